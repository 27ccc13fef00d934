"""What the evaluations by a judge behind a server share: its budget, its replies, its failures."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm.budget import LOCAL
from lm.records import InputError, Record
from lm.results import read_result
from lm.server import connect, paid
from lm.stages import refuse_changes

if TYPE_CHECKING:
    from lm.replies import Reply, Request
    from lm.server import Server

NAMES = ("benchmark", "model", "baseline", "judge_model")  # inputs that are no paths


@contextlib.contextmanager
def asking(folder: Path, model: str, base_url: str,
           flags: Mapping) -> Iterator[tuple["Server", float]]:
    """The judge's server, and the dollars that earlier runs for this folder spent.

    Its budget goes on from what the replies in the folder's cache have cost; those that gave no
    judgment are not kept there. At the end, whatever it is, what this run took is told.
    """
    requests, cost = paid(folder / "cache")
    server = connect(model, base_url, flags, cache=str(folder / "cache"))
    server.budget.go_on_from([{"requests": requests, "cost": cost}])
    try:
        yield server, cost
    finally:
        if (asked := server.budget.requests - requests) and server.price.known:
            print(f"this run: {asked} requests, ${server.budget.cost - cost:.4f}")


def refuse_other_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Stop before results of other inputs would be replaced."""
    path = folder / "results.json"
    if path.is_file():
        found = read_result(path)
        same = {name: value for name, value in inputs.items()
                if comparable(name, str(found.get(name))) == comparable(name, value)}
        refuse_changes(path, {name: found.get(name) for name in inputs} | same, inputs)


def comparable(name: str, value: str) -> str:
    """An input so that equal ones are written alike.

    A path may be written in many ways; a server on this machine has another port each time.

    >>> comparable("base_url", "http://localhost:8000/v1") == comparable("base_url", "http://[::1]")
    True
    """
    if name == "base_url":
        return "this machine" if LOCAL.match(value) else value
    return value if name in NAMES else os.path.realpath(value)


def ask(server: "Server", requests: Sequence["Request"],
        read: Callable[[str], object]) -> list[dict]:
    """For each request {value, reply, error}: the value that is read from the reply, or None.

    What gave none does not stay in the cache, so the next run asks it again.
    """
    numbered = dict(enumerate(requests))
    said: dict[int, dict] = {}
    for index, reply in replies(server, numbered):
        error = reply.error or ("cut off before its end" if reply.finish_reason == "length" else "")
        value = None if error else read(reply.text)
        if value is None:
            server.forget(requests[index])
            error = error or "cannot be read"
        said[index] = {"value": value, "reply": reply.text, "error": error}
    return [said[index] for index in numbered]


def replies(server: "Server", requests: Mapping[int, "Request"]) -> Iterator[tuple[int, "Reply"]]:
    """(index, reply) as they come, under a progress bar with the dollars of the budget.

    Those of earlier runs are among them. Before it, what the replies may cost is told.
    """
    from tqdm import tqdm

    print(server.estimate(requests))
    progress = tqdm(server.ask(requests), total=len(requests), unit="judgment")
    for index, reply in progress:
        if server.price.known:
            progress.set_postfix_str(f"${server.budget.cost:.2f}")
        yield index, reply


def report_failed(judged: list[Record], value: str, folder: Path) -> int:
    """Say how many judgments failed, and stop if all did."""
    failed = [entry for entry in judged if entry[value] is None]
    if failed:
        print(f"{len(failed)} of {len(judged)} judgments failed (the last: {failed[-1]['error']}); "
              f"they are in {folder}/judgments.json, and the same command asks for them again")
    if len(failed) == len(judged):
        raise InputError("no judgment could be read; choose another judge")
    return len(failed)
