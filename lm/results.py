"""Files of results: read again, what they lack is an error that names the file."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lm.records import InputError, Record


class Result(Record):
    """An object of a results file; a field that it lacks is an error that names the file."""

    def __init__(self, path: Path, pairs: Sequence[tuple[str, object]]):
        super().__init__(pairs)
        self._path = path

    def __missing__(self, field: str) -> NoReturn:
        raise InputError(f"{self._path}: field '{field}' is missing; delete the file, or make it "
                         "anew")


def read_result(path: Path) -> Record:
    """What a JSON file holds; each object in it knows the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"),
                          object_pairs_hook=functools.partial(Result, path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); delete it, or make it "
                         "anew") from error
