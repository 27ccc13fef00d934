"""Read records, check their fields, write files whole or not at all.

A *record* is what a dataset file holds: one JSON object. Everything here stops at the first bad
record with an `InputError`, one line that names the file, the record, the field and the remedy.
"""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

Record = dict
TYPE_NAMES = {str: "text", NoneType: "null", int: "a number", float: "a number",
              list: "a list", dict: "an object", bool: "true or false"}

SURROGATE = re.compile("[\ud800-\udfff]")
SCRATCH = re.compile(r"[a-z0-9_]{8}(\.old)?")  # what tempfile.mkdtemp appends, and `whole_folder`


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line and says what to do."""


def read_records(source: str | Path, split: str = "train", data_dir: str | None = None,
                 bad: list[str] | None = None) -> list[Record | None]:
    """All records of a JSON list or JSON Lines file (`.gz` too), or of a Hub dataset `org/name`.

    Given a list `bad`, what is no record is told there, and None stands in its place.
    """
    path = Path(source)
    if path.is_file():
        records = _parse(_read_text(path), str(source), bad)
    elif str(source) and path.is_dir():  # where `datasets` would mix all files that it finds
        raise InputError(f"{source}: is a folder; give one of its .json, .jsonl or .gz files (or "
                         "rename it, if you mean the Hub's dataset)")
    elif looks_like_hub_id(str(source)):
        records = _read_hub(str(source), split, data_dir)
    else:
        raise InputError(f"{source}: no such file; give a .json, .jsonl or .jsonl.gz file, "
                         "or a Hub dataset as org/name")
    if not records:
        raise InputError(f"{source}: holds no records; expected a JSON list or JSON Lines")
    for index, record in enumerate(records):
        if not isinstance(record, dict | _Unreadable):
            records[index] = _Unreadable(f"{source}: record {index}: is {_type_name(record)}; "
                                         "expected a JSON object")
        elif isinstance(record, dict) and (field := _no_text(record)):
            records[index] = _Unreadable(f"{source}: record {index}: field '{field}' has half of a "
                                         "surrogate pair (such as \\ud83d), which is no text; "
                                         "mend or delete that record")
    broken = [record.reason for record in records if isinstance(record, _Unreadable)]
    if broken and bad is None:
        raise InputError(broken[0])
    if broken:
        bad += broken
        return [record if isinstance(record, dict) else None for record in records]
    return records


def check_fields(records: Iterable[Record], source: str | Path,
                 required: Mapping[str, tuple[type, ...]],
                 optional: Mapping[str, tuple[type, ...]] | None = None) -> None:
    """Every record has the required fields, and each given field has one of the listed types."""
    for index, record in enumerate(records):
        if wrong := wrong_field(record, required, optional):
            raise InputError(f"{source}: record {index}: {wrong}")


def wrong_field(record: Record, required: Mapping[str, tuple[type, ...]],
                optional: Mapping[str, tuple[type, ...]] | None = None,
                within: str = "") -> str | None:
    """What is wrong with the first field that is missing or has another type, if any is.

    `within` is where the record lies in a larger one, such as `completions[2].`.
    """
    for field, types in {**required, **(optional or {})}.items():
        expected = " or ".join(dict.fromkeys(TYPE_NAMES[kind] for kind in types))
        if field not in record:
            if field in required:
                return f"field '{within}{field}' is missing; expected {expected}"
        elif not fits(record[field], types):
            return (f"field '{within}{field}' is {_type_name(record[field])}; "
                    f"expected {expected}")
    return None


def fits(value: object, types: tuple[type, ...]) -> bool:
    """Whether a value is of one of the types; True is no number, and 1 will do for 1.0."""
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) or (isinstance(value, int) and float in types)


def join_input(record: Record) -> str:
    """The instruction, with a non-empty `input` after one newline."""
    return record["instruction"] + ("\n" + record["input"] if record.get("input") else "")


def listed(value: str | Iterable, needed: str = "") -> list[str]:
    """What a flag lists, separated by commas; Fire makes a tuple of some such texts.

    `needed` is the flag's name where it must list something.

    >>> listed("a, b,"), listed(("a", 1))
    (['a', 'b'], ['a', '1'])
    """
    words = value.split(",") if isinstance(value, str) else map(str, value)
    words = [word.strip() for word in words if word.strip()]
    if needed and not words:
        raise InputError(f"{needed} is empty; name at least one, separated by commas")
    return words


def write_json(path: str | Path, value: object) -> None:
    """Write JSON so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: str | Path, records: Iterable[Mapping]) -> None:
    """Write JSON Lines so that a reader never sees half a file; the folder is there."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a reader never sees half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well, and vanishes when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):  # one run at a time begins, or ends
        _discard_unfinished(path)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        under_way = contextlib.ExitStack()
        under_way.enter_context(_locked(scratch))
    try:
        yield scratch
        os.chmod(scratch, 0o755)  # mkdtemp and safetensors keep others out
        for file in scratch.rglob("*"):
            os.chmod(file, 0o755 if file.is_dir() else 0o644)
        with _locked(path.parent):
            _replace(path, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    finally:
        under_way.close()


def _replace(path: Path, scratch: Path) -> None:
    """Never a moment in which neither the old folder nor the new one is there whole."""
    old = scratch.with_name(f"{scratch.name}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(scratch, path)
    shutil.rmtree(old, ignore_errors=True)


def _discard_unfinished(path: Path) -> None:
    """Delete the scratch folders of runs that were killed; those of others under way are locked."""
    for scratch in path.parent.iterdir():
        name = scratch.name.removeprefix(f".{path.name}.")
        if name == scratch.name or not SCRATCH.fullmatch(name) or not scratch.is_dir():
            continue
        if name.endswith(".old") and not path.exists():  # the kill came between the two renamings
            continue
        # Under way, or somebody else's
        with contextlib.suppress(OSError), _locked(scratch, wait=False):
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keep others out until the block ends, if only by a kill; an error if one may not wait.

    Network file systems that cannot lock folders keep nobody out.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(lock)


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_text(path: Path) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error


@dataclass(frozen=True)
class _Unreadable:
    """Stands where a record should be."""

    reason: str


def _parse(text: str, source: str, bad: list[str] | None = None) -> list:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{source}: line {error.lineno}: broken JSON ({error.msg}); "
                             "mend that line") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if not records and is_object(text):
                    raise InputError(f"{source}: is one JSON object; expected a list of objects, "
                                     "or JSON Lines, with one object on each line") from error
                records.append(_Unreadable(f"{source}: line {number}: broken JSON ({error.msg}); "
                                           "mend or delete that line"))
                if bad is None:
                    break
    return records


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _read_hub(name: str, split: str, data_dir: str | None = None) -> list[Record]:
    from datasets import load_dataset

    folder = {"data_dir": data_dir} if data_dir else {}
    try:
        return load_dataset(name, split=split, **folder).to_list()
    except Exception as error:  # the Hub client raises many kinds; each means "not readable"
        raise InputError(f"{name}: not a file here, and the Hub dataset cannot be read "
                         f"({first_line(error)})") from error


def _no_text(record: Record) -> str | None:
    """The first field that cannot be written as UTF-8: JSON can spell half of a character."""
    for field, value in record.items():
        text = value if isinstance(value, str) else json.dumps(
            value, ensure_ascii=False, default=str)
        if not text.isascii() and SURROGATE.search(text):
            return field
    return None


def changes(found: Mapping, wanted: Mapping) -> list[str]:
    """What is another than it was, in words.

    >>> changes({"seed": 1, "limit": 0}, {"seed": 2, "limit": 0})
    ['seed was 1, is 2']
    """
    return [f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}"
            for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]


def first_line(error: Exception) -> str:
    """What an exception says, without the page of advice that libraries add."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def looks_like_hub_id(source: str) -> bool:
    parts = source.split("/")
    is_file_name = Path(source).suffix in (".json", ".jsonl", ".gz")  # ids may end in "-v1.5"
    return len(parts) == 2 and all(parts) and "." not in parts[0] and not is_file_name


def _type_name(value: object) -> str:
    return TYPE_NAMES.get(type(value), type(value).__name__)
