"""MT-Bench: a judge scores each reply of a model's dialogues from 1 to 10.

    python scripts/evaluate_mt_bench.py --answers runs/cut/mt_bench.json --judge_model gpt-4
    python scripts/evaluate_mt_bench.py --answers runs/cut/mt_bench.json --judge_model NAME \\
        --base_url http://127.0.0.1:8000/v1

Answers are those of scripts/generate_dialogues.py. Where the questions have a `reference`, as those
of math, coding and reasoning do, the judge sees it. Its prompt (configs/templates/mt_bench.yaml) is
our own, so a score is comparable with others made here, and with published ones only roughly.

Requests go through lm/server.py: a stopped run goes on and asks nothing twice. A reply without one
score from 1 to 10 is a failure: left out of the means, counted, and asked again by the next run.
Results of other inputs, another server or another model are never replaced: they want another
--output_dir. Those of another --limit or temperature are, and those of the same model's answers
where the file has changed. Any port of this machine counts as the same server. The key comes from
OPENAI_API_KEY, the server from --base_url or OPENAI_BASE_URL. Only servers are asked: for a local
judge start `vllm serve` or `transformers serve` and give its address as --base_url.

Cost (estimates): 160 replies judged by gpt-4 $8, by gpt-4o $0.60; 5 minutes at 8 requests a time.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.budget import LOCAL
from lm.cli import run
from lm.prompts import fill, load_prompt
from lm.records import (
    InputError,
    Record,
    check_fields,
    read_records,
    write_json,
    wrong_field,
)
from lm.server import check_judge, connect, paid
from lm.stages import locked, refuse_changes
from lm.tables import paper_rows, table
from scripts.report_results import read

if TYPE_CHECKING:
    from lm.replies import Reply, Request
    from lm.server import Server

SCORE = re.compile(r"^\W*score[\s:*_=]+(\d+(?:\.\d+)?)(?:\s*/\s*10)?[.*_\s]*$",
                   re.IGNORECASE | re.MULTILINE)
FIELDS = {"system": set(), "user": {"dialogue"}, "reference": {"turn", "reference"}}
NAMES = ("benchmark", "model", "baseline", "judge_model")  # inputs that are no paths
DRAWS = 1000  # of the bootstrap


def main(answers: str, judge_model: str, base_url: str = "", output_dir: str = "",
         references: str = "", template: str = "mt_bench", max_new_tokens: int = 1024,
         temperature: float = 0.0, concurrency: int = 8, requests_per_minute: float = 0.0,
         timeout: float = 120.0, attempts: int = 8, max_requests: int = 0, max_cost: float = 0.0,
         price_in: float = -1.0, price_out: float = -1.0,
         dry_run: bool = False) -> None:
    """Print the mean score of each category and turn with 95 % intervals.

    Args:
        answers: dialogues as scripts/generate_dialogues.py writes them.
        judge_model: what the server calls the judge.
        base_url: server that speaks OpenAI's protocol; default OPENAI_BASE_URL, else OpenAI's.
        output_dir: default: ANSWERS without its suffix / judge model.
        references: file of references in the place of those that the answers bring, such as
            data/downloads/mt_bench/reference_answer/gpt-4.jsonl; by question_id, one text a turn.
        template: judge prompt, by name in configs/templates or path.
        max_new_tokens: longest reply of the judge; one that is cut has failed.
        temperature: of the judge; 0 is greedy, below 0 it is left to the server.
        concurrency: requests under way at a time.
        requests_per_minute: send no more than that; 0 is no limit.
        timeout: seconds to wait for a reply before asking again.
        attempts: of each request, before it has failed.
        max_requests: stop before more requests than this, earlier runs for this output included; 0
            is no limit.
        max_cost: stop before more dollars than this, counted alike; 0 is no limit.
        price_in: dollars per million tokens of prompts, where configs/prices.yaml lacks the model.
        price_out: the same for the judge's tokens.
        dry_run: check the judge's settings, key and price before there are answers; ask nothing.
    """
    flags = locals()  # before there are other names
    from lm.replies import Request

    if max_new_tokens < 1:
        raise InputError(f"--max_new_tokens is {max_new_tokens}; expected 1 or more")
    prompt = load_prompt(template, FIELDS)
    if dry_run:
        check_judge(judge_model, base_url, flags)
        return
    records = read_dialogues(answers)
    if references:
        records = with_references(records, references)
    known = sum(any(record.get("reference") or []) for record in records)
    print(f"{known} of {len(records)} questions have a reference")
    folder = Path(output_dir or Path(answers).with_suffix("") / judge_model.replace("/", "_"))
    inputs = {"benchmark": "mt_bench", "model": records[0]["generator"], "answers": answers,
              "references": references, "judge_model": judge_model, "template": template}
    turns = [(record, turn) for record in records for turn in range(len(record["turns"]))]
    # A second run waits, and finds all that the first has paid for in the cache
    with locked(folder), asking(folder, judge_model, base_url, flags) as (server, before):
        inputs["base_url"] = server.base_url
        refuse_other_inputs(folder, inputs)
        said = ask(server, [Request(question(prompt, *each), max_new_tokens, temperature)
                            for each in turns], read_score)
        judged = [{"question_id": record["question_id"], "category": record["category"],
                   "turn": turn + 1, "score": entry.pop("value"), **entry}
                  for (record, turn), entry in zip(turns, said, strict=True)]
        write_json(folder / "judgments.json", judged)
        failed = report_failed(judged, "score", folder)
        scores = means(judged)
        print(summary(scores, inputs["model"]))
        write_json(folder / "results.json", {
            **inputs, "cost_of_this_run": server.budget.cost - before, "failed": failed,
            "scores": scores})
        print(f"written: {folder}/results.json")


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
        found = read(path)
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


def read_dialogues(path: str) -> list[Record]:
    """Answered questions, no number twice, with as many outputs as turns, at least one."""
    records = read_records(path)
    check_fields(records, path, {"question_id": (int, str), "category": (str,), "turns": (list,),
                                 "outputs": (list,), "generator": (str,)}, {"reference": (list,)})
    for index, record in enumerate(records):
        if not record["turns"] or len(record["turns"]) != len(record["outputs"]):
            raise InputError(f"{path}: record {index}: has {len(record['turns'])} turns and "
                             f"{len(record['outputs'])} outputs; make the answers with "
                             "scripts/generate_dialogues.py")
        for field in ("turns", "outputs"):
            check_entries(f"{path}: record {index}", field, record[field], str)
        check_entries(f"{path}: record {index}", "reference", record.get("reference", []),
                      str, NoneType)
    by_question(records, path)
    return records


def check_entries(where: str, field: str, entries: object, *kinds: type) -> None:
    """Stop unless a field is a list of entries of these kinds."""
    wrong = wrong_field({field: entries}, {field: (list,)})
    if not wrong:
        numbered = {f"{field}[{place}]": entry for place, entry in enumerate(entries)}
        wrong = wrong_field(numbered, dict.fromkeys(numbered, kinds))
    if wrong:
        raise InputError(f"{where}: {wrong}")


def by_question(records: list[Record], path: str) -> dict[str, Record]:
    """The records by their question's number or name as text, so that 1 is "1"; none twice."""
    found: dict[str, Record] = {}
    for index, record in enumerate(records):
        name = str(record["question_id"])
        if name in found:
            raise InputError(f"{path}: record {index}: field 'question_id' repeats that of an "
                             "earlier record; keep one of them")
        found[name] = record
    return found


def with_references(records: list[Record], path: str) -> list[Record]:
    """The records with the references of a file, by question; none where it has none."""
    known = read_records(path)
    check_fields(known, path, {"question_id": (int, str)})
    texts = {name: reference_of(record, f"{path}: record {index}")
             for index, (name, record) in enumerate(by_question(known, path).items())}
    found = [texts.get(str(record["question_id"]), []) for record in records]
    if not any(map(any, found)):
        raise InputError(f"{path}: has no reference to any of these questions (there 'question_id' "
                         f"{next(iter(texts))!r} ..., here {str(records[0]['question_id'])!r} "
                         "...); give theirs, or leave --references out (REFERENCES= in the "
                         "recipe)")
    return [{**record, "reference": entries}
            for record, entries in zip(records, found, strict=True)]


def reference_of(record: Record, where: str) -> list[str | None]:
    """A reference a turn: `reference`, or the first of MT-Bench's `choices`."""
    if "reference" in record:
        field, entries = "reference", record["reference"]
    else:
        try:
            field, entries = "choices[0].turns", record["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{where}: expected 'reference', a list of texts, or 'choices', as "
                             "MT-Bench has them") from error
    check_entries(where, field, entries, str, NoneType)
    return entries


def question(prompt: Mapping[str, str], record: Record, turn: int) -> list[dict[str, str]]:
    """What the judge is asked about the reply to a turn: the dialogue so far, and references."""
    dialogue = "\n\n".join(
        f"### User, message {place + 1}:\n{record['turns'][place]}\n\n"
        f"### Assistant, reply {place + 1}:\n{record['outputs'][place]}"
        for place in range(turn + 1))
    known = (record.get("reference") or [])[:turn + 1]
    parts = [fill(prompt["user"], dialogue=dialogue),
             *(fill(prompt["reference"], turn=str(place), reference=text)
               for place, text in enumerate(known, start=1) if text)]
    return [{"role": "system", "content": prompt["system"]},
            {"role": "user", "content": "\n\n".join(parts)}]


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


def read_score(text: str) -> float | None:
    """The score, if the reply gives one and no other.

    >>> read_score("Right and short.\\nScore: 9"), read_score("Score: 9\\nScore: 2")
    (9.0, None)
    """
    found = {float(score) for score in SCORE.findall(text)}
    return found.pop() if len(found) == 1 and 1 <= min(found) <= 10 else None


def report_failed(judged: list[Record], value: str, folder: Path) -> int:
    """Say how many judgments failed, and stop if all did."""
    failed = [entry for entry in judged if entry[value] is None]
    if failed:
        print(f"{len(failed)} of {len(judged)} judgments failed (the last: {failed[-1]['error']}); "
              f"they are in {folder}/judgments.json, and the same command asks for them again")
    if len(failed) == len(judged):
        raise InputError("no judgment could be read; choose another judge")
    return len(failed)


def means(judged: list[Record]) -> dict[str, dict[str, dict]]:
    """Mean, interval and count by category (`all` last) and turn (`all` of them last)."""
    categories = [*dict.fromkeys(entry["category"] for entry in judged), "all"]
    turns = sorted({entry["turn"] for entry in judged})
    return {category: {str(turn): mean([
        entry for entry in judged if entry["score"] is not None
        and category in (entry["category"], "all") and turn in (entry["turn"], "all")])
        for turn in [*turns, "all"]} for category in categories}


def mean(scored: list[Record]) -> dict:
    """Mean of the scores with its bootstrap interval; questions are drawn, with all their turns."""
    import numpy

    if not scored:
        return {"mean": None, "low": None, "high": None, "count": 0}
    questions: dict[int | str, list[float]] = {}
    for entry in scored:
        questions.setdefault(entry["question_id"], []).append(entry["score"])
    sums = numpy.array([[sum(scores), len(scores)] for scores in questions.values()])  # (Q, 2)
    draws = numpy.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    drawn = sums[draws].sum(1)  # (DRAWS, 2)
    low, high = numpy.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return {"mean": float(sums[:, 0].sum() / sums[:, 1].sum()), "low": float(low),
            "high": float(high), "count": len(scored)}


def summary(scores: dict[str, dict[str, dict]], model: str) -> str:
    """A row a category, a column a turn, and the papers' means."""
    turns = list(scores["all"])
    rows = [[category, *(cell(by_turn[turn]) for turn in turns)]
            for category, by_turn in scores.items()]
    blank = " " * len(" [0.00, 00.00]")
    rows += [[name, *[""] * (len(turns) - 1), f"{figure:.2f}{blank}     "]
             for name, (figure,) in paper_rows("mt_bench").items()]
    heads = [f"turn {turn}" if turn != "all" else "all turns" for turn in turns]
    return "\n".join([table([model, *heads], rows), "mean [95 % bootstrap interval] of so many"])


def cell(found: dict) -> str:
    if not found["count"]:
        return "-"
    return (f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:5.2f}] {found['count']:4}")


if __name__ == "__main__":
    run(main)
