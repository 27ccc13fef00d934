"""Journals: finished work, a JSON line each, so that a stop, even a kill, costs what was under way.

The first line holds the settings, so that no result is ever a mixture of two settings.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from lm.records import InputError, Record


def open_journal(path: Path, settings: Mapping) -> tuple[IO[str], list[Record]]:
    """The file to append to, and the lines that earlier runs with the same settings finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    lines = read_journal(path, settings)
    # Without a line nothing was finished, so nothing binds
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1 if lines else 0)
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    if not lines:
        append(file, settings)
    return file, lines


def read_journal(path: Path, settings: Mapping) -> list[Record]:
    """The finished lines of a journal, which another process may be writing.

    A last line without its newline is not finished: it is being written, or was when a kill came.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: broken JSON ({error}); delete that line"
                             ) from error
    if len(lines) > 1:
        check_settings(path, lines[0], settings)
    return lines[1:]


def append(file: IO[str], line: Mapping) -> None:
    """A line that is on the disk when this returns."""
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


def check_settings(path: Path, found: Mapping, wanted: Mapping) -> None:
    """Stop unless the settings are those that a file was made with."""
    changed = [f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}"
               for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if changed:
        raise InputError(f"{path}: was made with other settings ({'; '.join(changed)}); "
                         "choose another --output_path, or --overwrite")


def digest(value: object) -> str:
    """A short text that differs for different values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
