"""The `dataset:` section -> records: which files or Hub splits, what is held out, what is bad.

    dataset: records.jsonl.gz        # a file, a folder with train* and test* files, or a Hub id

    dataset:
      path: Anthropic/hh-rlhf
      subfolders: [helpful-base]       # of the path, each with its own splits
      sft_subfolders: [helpful-online] # the same, for SFT only
      train: train                     # split on the Hub, or what a folder's files begin with
      eval: test                       # the same; beside a single file, the path of another
      eval_size: 0                     # hold out so many records of `train` instead
      num_proc: 1                      # processes that tokenize
      skip_bad: 0                      # bad records that are left out, not an error
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType

from lm.records import InputError, Record, looks_like_hub_id, read_records, wrong_field
from self_judge.config import check_keys

FILES = (".json", ".jsonl", ".gz")
DEFAULTS = {"path": "", "subfolders": [], "sft_subfolders": [], "train": "train", "eval": "test",
            "eval_size": 0, "num_proc": 1, "skip_bad": 0}


def _count(label: str) -> int:
    return field(default=0, metadata={"label": label})


@dataclass
class Counts:
    """What became of the records; only what happened is told."""

    records: int = _count("records")
    bad: int = _count("bad ones skipped")
    sft: int = _count("SFT examples")
    pairs: int = _count("pairs")
    turnless: int = _count("dialogues without a question and an answer left out")
    joined: int = _count("dialogues with two turns of one speaker in a row, joined")
    empty: int = _count("empty answers left out")
    contexts: int = _count("pairs with different contexts left out")
    same: int = _count("pairs of one answer twice left out")
    unrated: int = _count("completions without a rating left out")
    answerless: int = _count("records without a rated completion left out")
    tied: int = _count("records without a lower completion, so without a pair")
    incomparable: int = _count("principles of a record without a comparison")
    rationales: int = _count("rationales missing or naming a \"Text\"")
    losers: int = _count("comparisons that the better-ranked completion lost")
    cut: int = _count("rows cut to max_length")
    unlearnt: int = _count("rows cut before what is learnt, left out")

    def add(self, notes: Counter) -> None:
        """Add to the counts that `notes` names."""
        for name, number in notes.items():
            setattr(self, name, getattr(self, name) + number)

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, entry.name)} {entry.metadata['label']}"
                         for entry in fields(self) if getattr(self, entry.name)) or "no records"


@dataclass(frozen=True)
class Source:
    """A file, or a split of a Hub dataset."""

    path: str
    split: str
    data_dir: str | None = None
    sft_only: bool = False

    def __str__(self) -> str:
        return f"{self.path} {self.data_dir}" if self.data_dir else self.path


def settings_of(dataset: Mapping | str) -> dict:
    """The section with its defaults; a text alone is the path."""
    given = {"path": dataset} if isinstance(dataset, str) else dict(dataset)
    check_keys(given, DEFAULTS, "dataset")
    kinds = {name: (type(value), NoneType) for name, value in DEFAULTS.items()}
    if wrong := wrong_field(given, {"path": (str,)}, kinds, "dataset."):
        raise InputError(wrong)
    settings = DEFAULTS | {name: value for name, value in given.items() if value is not None}
    if "eval" in given and given["eval"] is None:
        settings["eval"] = ""
    for name in ("eval_size", "num_proc", "skip_bad"):
        if settings[name] < 0:
            raise InputError(f"dataset.{name} is {settings[name]}; expected 0 or more")
    return settings


def sources_of(dataset: Mapping | str, split: str) -> list[Source]:
    """Where the records of `split`, "train" or "eval", are; none where there are none."""
    settings = settings_of(dataset)
    path, name = settings["path"], settings[split]
    if not name:
        return []
    if Path(path).is_file():
        if split == "eval":
            given = "eval" in dataset if isinstance(dataset, Mapping) else False
            return [_file(name)] if given else []
        return [Source(path, split)]
    sources = []
    for folders, sft_only in ((settings["subfolders"], False), (settings["sft_subfolders"], True)):
        for folder in folders:
            sources += _within(path, name, str(folder), sft_only)
    if not settings["subfolders"] and not settings["sft_subfolders"]:
        sources = _within(path, name, None, False)
    if split == "train" and not sources:
        raise InputError(f"dataset: {path} has no {', '.join(FILES)} file that begins with "
                         f"{name!r}; set dataset.train to what it begins with")
    return sources


def records_of(dataset: Mapping | str, split: str, seed: int,
               bad: "BadRecords") -> Iterator[tuple[Source, int, Record]]:
    """Source, index in it and contents of each record of a split, the held-out ones apart."""
    settings = settings_of(dataset)
    held_out = settings["eval_size"]
    sources = sources_of(dataset, "train" if held_out else split)
    if not sources:
        raise InputError(f"dataset: {settings['path']} has no records for evaluation; set "
                         "dataset.eval to them, or dataset.eval_size to hold out some of train")
    found = []
    for source in sources:
        unreadable: list[str] | None = [] if bad.allowed else None
        records = read_records(source.path, source.split, source.data_dir, unreadable)
        for message in unreadable or []:
            bad.skip(message)
        found += [(source, index, record) for index, record in enumerate(records)
                  if record is not None]
    if not held_out:
        yield from found
        return
    candidates = [place for place, (source, _, _) in enumerate(found) if not source.sft_only]
    if held_out >= len(candidates):
        raise InputError(f"dataset.eval_size {held_out} leaves nothing of {len(candidates)} "
                         "records to train on; lower it")
    chosen = set(random.Random(f"{seed} held out").sample(candidates, held_out))
    yield from (entry for place, entry in enumerate(found)
                if (place in chosen) == (split == "eval"))


class BadRecords:
    """Bad records: the first one too many is an error."""

    def __init__(self, allowed: int):
        self.allowed, self.messages = allowed, []

    def skip(self, message: str) -> None:
        """Note one; stop if that is more than are allowed."""
        self.messages.append(message)
        if len(self.messages) > self.allowed:
            more = f" (more than skip_bad {self.allowed})" if self.allowed else ""
            raise InputError(message + more)


def has_split(dataset: Mapping | str, split: str) -> bool:
    """Whether the section names records for `split`, "train" or "eval"."""
    return bool(settings_of(dataset)["eval_size"]) or bool(sources_of(dataset, split))


def local_files(dataset: Mapping | str) -> list[Path]:
    """The files that the section names, for a run's record of its data."""
    paths = {Path(source.path): None for split in ("train", "eval")
             for source in sources_of(dataset, split)}
    return [path for path in paths if path.is_file()]


def _within(path: str, name: str, folder: str | None, sft_only: bool) -> list[Source]:
    """The splits of a Hub dataset, or the files of a folder that begin with `name`."""
    if Path(path).is_dir():
        here = Path(path, folder) if folder else Path(path)
        if not here.is_dir():
            raise InputError(f"dataset: no such folder {here}")
        return [Source(str(file), name, sft_only=sft_only) for file in sorted(here.iterdir())
                if file.name.startswith(name) and file.suffix in FILES]
    if not looks_like_hub_id(path):
        raise InputError(f"dataset: {path}: no such file or folder; give a .json, .jsonl or .gz "
                         "file, a folder with train* and test* files, or a Hub id as org/name")
    return [Source(path, name, folder, sft_only)]


def _file(path: str) -> Source:
    if not Path(path).is_file():
        raise InputError(f"dataset.eval: no such file {path}")
    return Source(path, "eval")
