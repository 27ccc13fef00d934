"""What the rounds of scripts/online.py rest on: fresh instructions, stages done once, an audit."""

import contextlib
import fcntl
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from lm.records import InputError, Record, join_input, sha256, write_json


def in_order(pool: Iterable[Record], evaluated: Iterable[Record], seed: int) -> list[Record]:
    """The instructions in the order in which rounds take them: none twice, none of `evaluated`."""
    distinct = {join_input(record): record for record in pool}
    for record in evaluated:
        distinct.pop(join_input(record), None)
    return random.Random(f"instructions {seed}").sample(list(distinct.values()), len(distinct))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO]:
    """The folder, for this process alone.

    Stages get the open file too and so hold the lock: one that outlived a killed loop is waited
    for, and no two write to the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another run is at work here, or a stage that one left behind; "
                  "waiting for its end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def done_once(manifest: Path, inputs: Mapping[str, str | Path], settings: Mapping,
              outputs: Mapping[str, Path], work: Callable[[], dict]) -> Record:
    """A stage's manifest. Where there is none, `work` is done first, which returns its counts.

    An input that was deleted after its use, such as a model of many GB, is taken to be as it was.
    """
    found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None
    made_of = {"settings": dict(settings), "inputs": {
        name: digest(source) if Path(source).exists() or not found else found["inputs"].get(name)
        for name, source in inputs.items()}}
    title = f"{manifest.parent.parent.name}: {manifest.stem}"
    if found:
        refuse_changes(manifest, found["settings"] | found["inputs"],
                       made_of["settings"] | made_of["inputs"])
        print(f"{title} is done")
        return found
    print(f"\n== {title}", flush=True)
    begin = time.monotonic()
    counts = work()
    record = {**made_of, "outputs": {name: digest(path) for name, path in outputs.items()},
              "cost": counts.pop("cost", 0.0), "counts": counts,
              "seconds": round(time.monotonic() - begin, 1)}
    write_json(manifest, record)
    return record


def refuse_changes(path: Path, found: Mapping, wanted: Mapping) -> None:
    """Stop, naming what has changed, unless a file was made of the same."""
    changed = [f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}"
               for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if changed:
        raise InputError(f"{path}: was made with other settings or inputs ({'; '.join(changed)}); "
                         "put them back, or choose another --output_dir")


def digest(source: str | Path) -> str:
    """The sha256 of a file, or of the weights in a folder; the name itself of what is no path."""
    path = Path(source)
    if path.is_file():
        return sha256(path)
    weights = sorted([*path.glob("*model*.safetensors"), *path.glob("*model*.bin")])
    if not weights:
        return str(source)
    return hashlib.sha256("".join(map(sha256, weights)).encode()).hexdigest()


def audit(counts: Mapping[str, int], max_failed: float, min_positive: float, max_positive: float,
          min_agreement: float) -> list[str]:
    """What speaks against training on judgments with these counts, with its numbers.

    >>> audit({"responses": 8, "failed": 2, "positive": 3, "negative": 3}, 0.1, 0.05, 0.95, 0.8)
    ['2 of 8 failed (25 %; expected 0 to 10 %, --max_failed)']
    """
    judged = counts["positive"] + counts["negative"]
    shares = [
        ("failed", counts["failed"], counts["responses"], 0, max_failed, "--max_failed"),
        ("positive", counts["positive"], judged, min_positive, max_positive,
         "--min_positive and --max_positive"),
        ("alike when asked for again", counts.get("alike", 0), counts.get("repeats", 0),
         min_agreement, 1, "--min_agreement")]
    return [f"{hits} of {total} {what} ({100 * hits / total:.0f} %; expected {100 * low:g} to "
            f"{100 * high:g} %, {flags})" for what, hits, total, low, high, flags in shares
            if total and not low <= hits / total <= high]
