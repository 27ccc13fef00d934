"""Stages that are done once: what each was made of, and a lock for the folder that they are in."""

import contextlib
import fcntl
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from lm.journal import digest
from lm.records import InputError, Record, changes, sha256, write_json

# What a model's answers depend on
MODEL_FILES = ("*model*.safetensors", "*model*.bin", "tokenizer*", "*.jinja", "vocab.json",
               "merges.txt")
CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")


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
        except OSError:  # network file systems that have no locks keep nobody out
            pass
        yield lock


def done_once(manifest: Path, inputs: Mapping[str, str | Path], settings: Mapping,
              outputs: Mapping[str, Path], work: Callable[[], dict]) -> Record:
    """A stage's manifest. Where there is none, `work` is done first, which returns its counts.

    What was deleted after its use, such as a model of many GB, is taken to be as it was; but not
    before its use: an input that is a Path must be there then.
    """
    found = read_manifest(manifest)
    if not found:
        refuse_missing(manifest, inputs)
    made = made_of(inputs, settings, found)
    title = f"{manifest.parent.parent.name}: {manifest.stem}"
    if found:
        refuse_changes(manifest, found["settings"] | found["inputs"],
                       made["settings"] | made["inputs"])
        gone = refuse_other_outputs(manifest, found["outputs"], outputs)
        print(f"{title} is done" + (f"; gone since: {', '.join(gone)}" if gone else ""))
        return found
    print(f"\n== {title}", flush=True)
    begin = time.monotonic()
    counts = work()
    record = {**made, "outputs": {name: content_hash(path) for name, path in outputs.items()},
              "cost": counts.pop("cost", 0.0), "counts": counts,
              "seconds": round(time.monotonic() - begin, 1)}
    write_json(manifest, record)
    return record


def read_manifest(manifest: Path) -> Record | None:
    """What a stage left when it was done; None where it has not been."""
    return json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None


def made_of(inputs: Mapping[str, str | Path], settings: Mapping, found: Record | None) -> Record:
    """A stage's settings and its inputs' hashes; `found` knows those that are gone by now."""
    known = found["inputs"] if found else None
    return {"settings": dict(settings), "inputs": {
        name: content_hash(source) if Path(source).exists() or known is None else known.get(name)
        for name, source in inputs.items()}}


def refuse_missing(manifest: Path, inputs: Mapping[str, str | Path]) -> None:
    """Stop if what another stage made for this one is gone."""
    for name, source in inputs.items():
        if isinstance(source, Path) and not source.exists():
            raise InputError(f"{manifest}: {name} {source} is gone; delete the manifest of the "
                             "stage that made it, and the same command makes it again")


def refuse_other_outputs(manifest: Path, found: Mapping[str, str],
                         outputs: Mapping[str, Path]) -> list[str]:
    """Stop if a finished stage's outputs are not what it made; those that are gone."""
    there = {name: path for name, path in outputs.items() if path.exists()}
    for name, path in there.items():
        if content_hash(path) != found.get(name):
            raise InputError(f"{manifest}: {path} is not what this stage made; put that back, or "
                             "delete it and this manifest, and the same command makes it again")
    return [str(path) for name, path in outputs.items() if name not in there]


def refuse_changes(path: Path, found: Mapping, wanted: Mapping) -> None:
    """Stop, naming what has changed, unless a file was made of the same."""
    if changed := changes(found, wanted):
        raise InputError(f"{path}: was made with other settings or inputs ({'; '.join(changed)}); "
                         "put them back, or choose another --output_dir")


def content_hash(source: str | Path) -> str:
    """The sha256 of a file, or of a folder's weights and tokenizer; the name of what is no path."""
    path = Path(source)
    if path.is_file():
        return _sha256_once(path, path.stat().st_mtime_ns)
    files = sorted(file for kind in MODEL_FILES for file in path.glob(kind))
    if not files:
        return str(source)
    return hashlib.sha256("".join(map(content_hash, files)).encode()).hexdigest()


def fingerprint(folder: Path | None) -> str:
    """Changes when a model's files in a folder are written again; empty for one on the Hub."""
    if folder is None or not folder.is_dir():
        return ""
    files = {file for kind in (*MODEL_FILES, *CONFIGS) for file in folder.glob(kind)}
    return digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns)
                   for file in sorted(files)])


@functools.cache
def _sha256_once(path: Path, changed: int) -> str:
    """One stage's output is the input of several, and may have many GB."""
    return sha256(path)
