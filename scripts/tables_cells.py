"""The cells of scripts/tables.py: which there are, what each runs, needs and measures.

A cell is a row of configs/tables.yaml with a seed, or a trial of one of its learning rates, or
what is made once. It has a folder of its own; cell.json is written last and tells what the cell
was made of and what it measured.
"""

import datetime
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lm.models import resolve_model
from lm.records import InputError, Record, write_json
from lm.runs import REPOSITORY, describe_run
from lm.stages import content_hash, locked, made_of, read_manifest
from lm.templates import TEMPLATES

# Keys of a row that are no values for its commands.
NO_VALUES = ("recipe", "once", "rates", "tuned_as", "measure")

DATA_FILES = (".json", ".jsonl", ".yaml")


class CellFailed(Exception):
    """A command of a cell failed; the message is one line."""


@dataclass(frozen=True)
class Cell:
    """A row, with a seed, with a trial's learning rate, or once."""

    row: str
    part: str  # the name of its folder
    seed: int
    rate: str = ""  # of a trial; others take the row's choice

    @property
    def name(self) -> str:
        return f"{self.row}/{self.part}"


@dataclass(frozen=True)
class Study:
    """configs/tables.yaml at one size, and the folder of its cells."""

    settings: Mapping
    size: str
    folder: Path
    running: set = field(default_factory=set)  # processes, to be ended with this one
    results: Mapping[str, Record] = field(default_factory=dict)  # of cells whose folders are gone

    @property
    def values(self) -> Mapping:
        return self.settings["sizes"][self.size]

    @property
    def rows(self) -> Mapping[str, Mapping]:
        return self.settings["rows"]

    def recipe(self, row: str) -> Mapping:
        return self.settings["recipes"][self.rows[row]["recipe"]]

    def measure(self, row: str) -> str:
        """The name of the figure that a row is judged by."""
        return self.rows[row].get("measure", self.recipe(row).get("measure", ""))

    def rates(self, row: str) -> list[str]:
        """The learning rates that are tried for a row, the first being what is taken untried."""
        return [str(rate) for rate in self.rows[row].get("rates", [])[:self.values["trials"]]]

    def folder_of(self, cell: Cell) -> Path:
        return self.folder / cell.name


def cells_of(study: Study, row: str) -> list[Cell]:
    """A row's cells: its trials, then one for each seed."""
    seeds = study.values["seeds"]
    if study.rows[row].get("once"):
        return [Cell(row, "once", seeds[0])]
    rates = study.rates(row)
    trials = [Cell(row, f"trial-{rate}", seeds[0], rate) for rate in rates] if rates[1:] else []
    return trials + [Cell(row, f"seed{seed}", seed) for seed in seeds]


def plan(study: Study, only: str = "") -> list[Cell]:
    """The cells of the chosen rows and all that they need: once, trials, first seed, second ...

    Those with a result are left out, unless another one reads their folder.
    """
    try:
        chosen = [row for row in study.rows if not only or any(
            re.fullmatch(only, name) for name in (row, *tables_of(study, row)))]
    except re.error as error:
        raise InputError(f"--only {only!r} is no regular expression ({error}); give names of rows "
                         "or tables, such as \"base|cut\"") from error
    if not chosen:
        tables = [table["key"] for table in study.settings["tables"]]
        raise InputError(f"--only {only!r} is the name of no row and no table; they are "
                         f"{', '.join([*study.rows, *tables])}")
    wanted: dict[Cell, None] = {}

    def want(cell: Cell, folder: bool = False) -> None:
        if cell in wanted or (result_of(study, cell) and not folder):
            return
        for other in trials_of(study, cell):
            want(other)
        for other in sources_of(study, cell):
            want(other, folder=True)
        wanted[cell] = None

    for row in chosen:
        for cell in cells_of(study, row):
            want(cell)
    order = {"once": -2, **{f"seed{seed}": place for place, seed in
                            enumerate(study.values["seeds"])}}
    return sorted(wanted, key=lambda cell: order.get(cell.part, -1))


def tables_of(study: Study, row: str) -> list[str]:
    """The keys of the tables that show a row."""
    return [table["key"] for table in study.settings["tables"]
            if row in (shown["row"] for shown in table["rows"])]


class Others:
    """What `{of[ROW]}` stands for in a command: the folder of that row's cell of the same seed."""

    def __init__(self, study: Study, cell: Cell):
        self.study, self.cell, self.named = study, cell, []

    def __getitem__(self, row: str) -> Path:
        if row not in self.study.rows:
            raise InputError(f"configs/tables.yaml: {self.cell.row}: {{of[{row}]}} is no row")
        cell = next(cell for cell in cells_of(self.study, row)
                    if cell.part in ("once", f"seed{self.cell.seed}"))
        self.named.append(cell)
        return self.study.folder_of(cell)


def needs(study: Study, cell: Cell) -> list[Cell]:
    """The cells that must be done before this one."""
    return trials_of(study, cell) + sources_of(study, cell)


def trials_of(study: Study, cell: Cell) -> list[Cell]:
    """The trials that choose a cell's learning rate."""
    tuned = study.rows[cell.row].get("tuned_as", cell.row)
    return [] if cell.rate or cell.part == "once" else [
        other for other in cells_of(study, tuned) if other.rate]


def sources_of(study: Study, cell: Cell) -> list[Cell]:
    """The cells whose folders a cell's commands read."""
    return list(dict.fromkeys(render(study, cell, "-")[1]))


def commands_of(study: Study, cell: Cell) -> list[str]:
    """The command lines of a cell whose trials are done."""
    return render(study, cell, cell.rate or chosen_rate(study, cell.row))[0]


def render(study: Study, cell: Cell, rate: str) -> tuple[list[str], list[Cell]]:
    """The command lines of a cell, and the other cells whose folders they name."""
    others = Others(study, cell)
    values = {"of": others, "cell": study.folder_of(cell), "row": cell.row, "seed": cell.seed,
              "rate": rate, "model": study.settings["model"],
              "split": "validation" if cell.rate else "heldout", **study.values}
    recipe = study.recipe(cell.row)
    row = {**recipe.get("defaults", {}), **study.rows[cell.row],
           **(recipe.get("trial", {}) if cell.rate else {})}
    try:
        values |= {name: str(value).format_map(values) for name, value in row.items()
                   if name not in NO_VALUES}
        commands = [" ".join(command.format_map(values).split())
                    for command in recipe["commands"]]
    except KeyError as error:
        raise InputError(f"configs/tables.yaml: {cell.row}: nothing gives a value for "
                         f"{{{error.args[0]}}}") from error
    return commands, others.named


def chosen_rate(study: Study, row: str) -> str:
    """The learning rate whose trial was best; of equal ones the first listed."""
    row = study.rows[row].get("tuned_as", row)
    trials = {cell.rate: record_of(study, cell) for cell in cells_of(study, row) if cell.rate}
    if None in trials.values() or not trials:  # not known yet, or nothing to choose from
        return next(iter(study.rates(row)), "")
    measure = study.measure(row)
    return max(trials, key=lambda rate: share(trials[rate]["figures"][measure]))


def share(figure: Mapping) -> float:
    return figure["hits"] / figure["total"]


def record_of(study: Study, cell: Cell) -> Record | None:
    """What a finished cell measured; None where it is not done."""
    if is_done(study, cell):
        return read_manifest(study.folder_of(cell) / "cell.json")
    return result_of(study, cell)


def result_of(study: Study, cell: Cell) -> Record | None:
    """A cell's result, if it was made as the cell would be made now, its trials' too."""
    found = study.results.get(cell.name, {})
    if "figures" in found and found.get("made_of") == key_of(study, cell) and all(
            record_of(study, trial) for trial in trials_of(study, cell)):
        return found
    return None


def key_of(study: Study, cell: Cell) -> str:
    """A sha256 of all that a cell is made of, code apart; the same on any machine.

    It needs no other cell's folder: what such a cell is made of stands for what it made.
    """
    own = str(study.folder)
    inputs = {name: content_hash(path) for name, path in inputs_of(study, cell).items()
              if not Path(path).is_relative_to(REPOSITORY / own)}
    settings = settings_of(study, cell)
    settings["commands"] = [command.replace(own, "") for command in settings["commands"]]
    sources = {other.name: key_of(study, other) for other in sources_of(study, cell)}
    return hashlib.sha256(json.dumps([settings, inputs, sources], sort_keys=True).encode()
                          ).hexdigest()


def settings_of(study: Study, cell: Cell) -> dict:
    """What a cell's result follows from, beside its inputs."""
    return {"commands": commands_of(study, cell), "seed": cell.seed,
            "learning_rate": cell.rate or chosen_rate(study, cell.row),
            "model": content_hash(resolve_model(study.settings["model"]))}


def inputs_of(study: Study, cell: Cell) -> dict[str, str]:
    """The model, and the files and weights that a cell's commands name outside its own folder."""
    words = [word.split("=")[-1] for command in commands_of(study, cell)
             for word in shlex.split(command)]
    own = str(study.folder_of(cell))
    found = {}
    for word in filter(None, words):
        path = REPOSITORY / word
        if (template := TEMPLATES / f"{word}.json").is_file():  # by its name
            path = template
        if word.startswith(own) or word.endswith(".py") or not path.exists():
            continue
        files = [path] if path.is_file() or list(path.glob("*.safetensors")) else [
            file for file in sorted(path.rglob("*")) if file.suffix in DATA_FILES]
        found |= {os.path.relpath(file, REPOSITORY): str(file) for file in files}
    return found


def is_done(study: Study, cell: Cell) -> bool:
    """Whether a cell is there as it would be made now."""
    found = read_manifest(study.folder_of(cell) / "cell.json")
    return bool(found) and not what_changed(study, cell, found)


def what_changed(study: Study, cell: Cell, found: Record) -> list[str]:
    """The names of what differs between a finished cell and how it would be made now.

    An input that was deleted after its use is taken to be as it was.
    """
    made = made_of(inputs_of(study, cell), settings_of(study, cell), found)
    wanted = made["settings"] | found["inputs"] | made["inputs"]
    return [name for name, value in wanted.items()
            if (found["settings"] | found["inputs"]).get(name) != value]


def do(study: Study, cell: Cell, threads: int, say=print) -> tuple[Record, bool]:
    """A cell's record, and whether it was run now; one that was made otherwise is moved aside."""
    folder = study.folder_of(cell)
    with locked(study.folder / ".locks" / cell.name) as lock:
        finished = read_manifest(folder / "cell.json")
        found = finished or read_manifest(folder / "begun.json")
        if found and (changed := what_changed(study, cell, found)):
            aside = next(path for number in itertools.count(1)
                         if not (path := folder.with_name(f"{folder.name}.old{number}")).exists())
            say(f"{cell.name}: run anew, the former one is kept as {aside.name} "
                f"({', '.join(changed)} changed)")
            os.replace(folder, aside)
        elif finished:
            return finished, False
        record = made_of(inputs_of(study, cell), settings_of(study, cell), None)
        write_json(folder / "begun.json", record)
        try:
            record |= work(study, cell, threads, lock)
        except CellFailed as error:
            write_json(folder / "failed.json", {"error": str(error)})
            raise
        (folder / "failed.json").unlink(missing_ok=True)
        write_json(folder / "cell.json", record)
        return record, True


def work(study: Study, cell: Cell, threads: int, lock) -> Record:
    """Run a cell's commands, one after the other, and measure."""
    folder = study.folder_of(cell)
    begin = datetime.datetime.now(datetime.UTC)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        for command in commands_of(study, cell):
            print(f"$ {command}", file=log, flush=True)
            call(study, command, threads, log, lock)
    recipe = study.recipe(cell.row)
    for pattern in [*recipe.get("discard", []),
                    *(recipe.get("discard_of_trials", []) if cell.rate else [])]:
        for path in sorted(folder.glob(pattern)):
            shutil.rmtree(path)
    end = datetime.datetime.now(datetime.UTC)
    about = describe_run({}, "")
    return {"figures": figures_in(folder, study.recipe(cell.row).get("results", "")),
            "tokens": trained(folder, "tokens"), "steps": trained(folder, "steps"),
            "seconds": round((end - begin).total_seconds(), 1),
            "threads": threads, "finished": end.date().isoformat(),
            "git_revision": about["git_revision"], "versions": about["versions"],
            "machine": machine()}


def call(study: Study, command: str, threads: int, log, lock) -> None:
    """Run one command line; its output goes to the log."""
    program, *words = shlex.split(command)
    program = sys.executable if program == "python" else program
    with subprocess.Popen([program, *words], stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads),
                               "TOKENIZERS_PARALLELISM": "false"},
                          pass_fds=(lock.fileno(),)) as process:
        study.running.add(process)
        code = process.wait()
        study.running.discard(process)
    if code:
        said = Path(log.name).read_text(encoding="utf-8", errors="replace")
        last = [line for line in re.split(r"[\r\n]+", said) if line.strip()][-1]
        raise CellFailed(f"exit code {code}: {last.strip()[:200]} (all of it: {log.name})")


def figures_in(folder: Path, results: str) -> dict[str, dict]:
    """What a cell measured: for each figure so many of so many, and the verdict on each item."""
    found = {}
    for path in sorted(folder.glob(results)) if results else []:
        told = json.loads(path.read_text(encoding="utf-8"))
        found |= dict(READERS[told["benchmark"]](told))
    if results and not found:
        raise CellFailed(f"nothing was measured: no {results} in {folder}")
    return found


def constraints(told: Record) -> Iterator[tuple[str, dict]]:
    """Of scripts/evaluate_constraints.py: a figure for each model, an item for each constraint."""
    for name in told["models"]:
        held = [holds for answer in told["answers"]
                for holds in answer["outputs"][name]["satisfied"]]
        yield name, {"hits": sum(held), "total": len(held),
                     "items": "".join("01"[holds] for holds in held)}


def judge(told: Record) -> Iterator[tuple[str, dict]]:
    """Of scripts/evaluate_judge.py: how often the judge is right; a tie is half a hit."""
    accuracy = told["metrics"]["all"]["accuracy"]
    yield "judge", {"hits": accuracy["hits"], "total": accuracy["total"],
                    "items": "".join({"A": "1", "B": "0", None: "="}[judgment["winner"]]
                                     for judgment in told["judgments"])}


def ai_judge(told: Record) -> Iterator[tuple[str, dict]]:
    """Of scripts/evaluate_ai_judge.py: all its shares."""
    for name, hits in told["verdicts"].items():
        yield name, {"hits": sum(hits), "total": len(hits),
                     "items": "".join("01"[hit] for hit in hits)}


READERS = {"constraints": constraints, "judge": judge, "ai_judge": ai_judge}


def trained(folder: Path, what: str) -> int | None:
    """Tokens or steps of all trainings in a folder, where their records tell."""
    found = [json.loads(path.read_text(encoding="utf-8")).get(what)
             for path in sorted(folder.rglob("run.json"))]
    return sum(found) if found and None not in found else None


@functools.cache
def machine() -> str:
    """The processor, how many cores of it are ours, and the GPU."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8")
                       ) if Path("/proc/cpuinfo").exists() else [platform.processor()]
    told = f"{(names or [platform.machine()])[0]}, {len(os.sched_getaffinity(0))} cores"
    return f"{told}, {gpu()}" if gpu() else told


def gpu() -> str:
    """The GPU's name, or nothing; torch takes seconds to say that there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
