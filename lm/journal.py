"""Journals: finished work, a JSON line each, so that a stop, even a kill, costs what was under way.

The first line holds the settings, so that no result is ever a mixture of two settings. Who has one
open to write holds its lock, so that no two runs do the same work.
"""

import fcntl
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from lm.records import InputError, Record, changes


def open_journal(path: Path, settings: Mapping) -> tuple[IO[str], list[Record]]:
    """The file to append to, and the lines that earlier runs with the same settings finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    try:
        _lock(file)
        lines = read_journal(path, settings)
        # Without a line nothing was finished, so nothing binds
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1 if lines else 0)
        if not lines:
            append(file, settings)
    except BaseException:
        file.close()
        raise
    return file, lines


def discard(path: Path) -> None:
    """Delete a journal, if there is one and no other run is writing it."""
    if path.exists():
        with open(path, "a", encoding="utf-8") as file:
            _lock(file)
            path.unlink()


def _lock(file: IO[str]) -> None:
    """Keep other runs out until the file is closed, if only by a kill."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{file.name}: another run is writing it; the same command goes on when "
                         "that one has ended") from error
    except OSError:  # network file systems that have no locks keep nobody out
        pass


def read_journal(path: Path, settings: Mapping) -> list[Record]:
    """The finished lines of a journal with these settings, which another process may be writing."""
    lines = finished_lines(path)
    if len(lines) > 1:
        check_settings(path, lines[0], settings)
    return lines[1:]


def finished_lines(path: Path) -> list[Record]:
    """The settings of a journal and its lines, as far as they are whole.

    A last line without its newline is not finished: it is being written, or was when a kill came.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: broken JSON ({error}); delete that line"
                             ) from error
    return lines


def by_content(lines: Iterable[Record], contents: Sequence[str]) -> dict[int, Record]:
    """By place, those of a journal's lines that are about what stands there now.

    A line has the `content` that it is about, and the `index` where that stood, from which samples
    follow. So where contents are repeated, each line stays in its place if it can, and a place that
    none is left for never had the sample that is drawn for it.

    >>> lines = [{"content": "a", "index": 1}, {"content": "b", "index": 0}]
    >>> by_content(lines, ["a", "a", "c"])
    {1: {'content': 'a', 'index': 1}}
    >>> by_content(lines, ["a", "b"])
    {0: {'content': 'a', 'index': 1}, 1: {'content': 'b', 'index': 0}}
    """
    kept: dict[str, dict[int, Record]] = defaultdict(dict)
    for line in lines:
        kept[line["content"]][line["index"]] = line
    found = {index: kept[content].pop(index) for index, content in enumerate(contents)
             if index in kept[content]}
    for index, content in enumerate(contents):
        if index not in found and kept[content]:
            found[index] = kept[content].pop(min(kept[content]))
    return dict(sorted(found.items()))


def append(file: IO[str], *lines: Mapping) -> None:
    """Lines that are on the disk when this returns."""
    file.write("".join(json.dumps(line) + "\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


def merge(file: IO[str], others: Sequence[Path], settings: Mapping) -> None:
    """Move other journals' lines into an open one, but for those that a killed merge moved."""
    there = set(map(json.dumps, read_journal(Path(file.name), settings) if others else ()))
    for other in others:
        lines = read_journal(other, settings)
        append(file, *(line for line in lines if json.dumps(line) not in there))
        other.unlink()


def check_settings(path: Path, found: Mapping, wanted: Mapping) -> None:
    """Stop unless the settings are those that a file was made with."""
    if changed := changes(found, wanted):
        raise InputError(f"{path}: was made with other settings ({'; '.join(changed)}); "
                         "go on with those, write elsewhere, or --overwrite")


def digest(value: object) -> str:
    """A short text that differs for different values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
