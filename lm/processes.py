"""Several processes share long work: each does its part, and notes it in a journal of its own.

    place, processes = launched()
    file, _ = open_journal(part_of(path, place), settings)       # of lm/journal.py
    done = read_parts(path, settings)                            # by any number of processes
    mine = share(lengths, place, processes)                      # less what is done
    ...
    wait(processes)
    if place == 0:
        merge_parts(file, settings)                              # one journal again
"""

import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

from lm.journal import discard, merge, read_journal
from lm.records import InputError, Record
from lm.runs import world_size

LONGEST_WAIT = timedelta(days=7)  # of processes for each other


def is_first() -> bool:
    """Whether this process speaks for all, as its launcher says; joins no group of processes."""
    return os.environ.get("RANK", "0") == "0"


def launched(alone: str = "") -> tuple[int, int]:
    """This process's place, and how many share the work.

    `alone` names a flag, if any, that works in one process; then a launcher is an error.
    """
    if not alone:
        from accelerate import PartialState

        processes = world_size(timeout=LONGEST_WAIT)
        return PartialState().process_index, processes
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{alone} works in one process; start it without a launcher")
    return 0, 1


def wait(processes: int) -> None:
    """Until all processes have come as far."""
    if processes > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def share(lengths: Sequence[int], place: int, processes: int) -> list[int]:
    """The indices that a process works on: its part of the long ones and of the short ones.

    They follow from its place alone, so that no two processes ever do the same.

    >>> share([5, 1, 9, 7], place=0, processes=2)
    [2, 0]
    """
    longest_first = sorted(range(len(lengths)), reverse=True, key=lengths.__getitem__)
    return longest_first[place::processes]


def part_of(journal: Path, place: int) -> Path:
    """The journal of one process.

    >>> part_of(Path("a.responses.jsonl"), 0).name, part_of(Path("a.responses.jsonl"), 2).name
    ('a.responses.jsonl', 'a.responses.process2.jsonl')
    """
    return journal.with_stem(f"{journal.stem}.process{place}") if place else journal


def parts(journal: Path) -> list[Path]:
    """The journals of all processes that there ever were, as far as they are there; in order."""
    own = re.compile(rf"{re.escape(journal.stem)}\.process(\d+){re.escape(journal.suffix)}")
    further = [path for path in journal.parent.glob("*") if own.fullmatch(path.name)]
    return [path for path in (journal, *sorted(further)) if path.exists()]


def read_parts(journal: Path, settings: Mapping) -> list[Record]:
    """The finished lines of all processes' journals."""
    return [line for path in parts(journal) for line in read_journal(path, settings)]


def merge_parts(file: IO[str], settings: Mapping) -> None:
    """Move all lines into the first process's journal, which is open."""
    journal = Path(file.name)
    merge(file, [path for path in parts(journal) if path != journal], settings)


def discard_parts(journal: Path, place: int, processes: int) -> None:
    """Delete all processes' journals; each process comes back when that is done."""
    if place == 0:
        for path in parts(journal):
            discard(path)
    wait(processes)


def told_share(processes: int) -> str | None:
    """What the first process's progress bar is called: the others have none."""
    return f"first of {processes} processes" if processes > 1 else None
