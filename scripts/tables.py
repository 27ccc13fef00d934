"""The small-scale study: every table and figure of both papers, on one machine, without an API key.

    bash scripts/tables.sh --size smoke                    # two CPU cores, 15 minutes
    bash scripts/tables.sh --size cpu                      # two CPU cores, a night
    bash scripts/tables.sh --size cpu --only "base|cut.*" --dry_run
    bash scripts/tables.sh --size cpu --go_on              # what results/cpu.json does not hold
    python scripts/tables.py --report_only                 # results/*.json -> results/README.md

configs/tables.yaml names the rows, their commands and the sizes. A cell is a row with a seed, or a
trial of one of its learning rates; each has a folder, OUTPUT_DIR/SIZE/ROW/PART, with log.txt and,
once it is done, cell.json: commands, sha256 of inputs, seed, revision, versions, seconds, figures.
What is done is not done again: after a stop, even a kill, the same command goes on. A cell whose
commands or inputs have changed is run anew, and the former one stays beside it. A cell that fails
stops no other; it is told at the end (exit code 1) and in the report.

All figures go to results/SIZE.json; the report is made from these files alone.
"""

import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import InputError, Record, write_json
from lm.results import read_result
from lm.runs import REPOSITORY
from lm.stages import read_manifest
from scripts import tables_report
from scripts.tables_cells import (
    Cell,
    CellFailed,
    Study,
    commands_of,
    do,
    gpu,
    is_done,
    key_of,
    needs,
    plan,
    result_of,
    share,
)

if TYPE_CHECKING:
    from tqdm import tqdm

CONFIG = "configs/tables.yaml"
JOBS_ON_GPU = 8  # most of a cell's time goes to starting programs, and its model is small


def main(size: str = "smoke", only: str = "", jobs: int = 0, threads: int = 0,
         go_on: bool = False, dry_run: bool = False, report_only: bool = False,
         config: str = CONFIG,
         output_dir: str = "runs/tables", results: str = "results") -> None:
    """Run the cells that are missing, then write the report.

    Args:
        size: smoke|cpu|gpu, or another one of the config.
        only: rows or tables, as a regular expression over the whole name, such as "base|cut";
            what they build on is run too. Empty is all.
        jobs: cells at a time; 0 is one a core, on a GPU eight at most.
        threads: of each cell; 0 shares the cores among the jobs.
        go_on: take the cells of RESULTS/SIZE.json for done, whose folders may be on another
            machine, where they were made of the same commands and inputs; one whose folder another
            cell reads is run again.
        dry_run: print the commands of what is missing, and stop.
        report_only: run nothing; make the report from the results that are there.
        config: rows, commands and sizes.
        output_dir: the cells' folders go here.
        results: folder of the figures and the report.
    """
    study = load_study(config, size, output_dir)
    path = Path(results) / f"{size}.json"
    if go_on:
        study = replace(study, results=published(path)["cells"])
    cells = plan(study, only)
    if dry_run:
        return show(study, cells)
    failed = {}
    if not report_only:
        jobs, threads = shared_out(jobs, threads)
        print(f"{len(cells)} cells, {jobs} at a time, {threads} threads each", flush=True)
        failed = run_all(study, cells, jobs, threads)
        collect(study, path)
    tables_report.write(study.settings, Path(results))
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} cells failed; once what is wrong is mended, the same command runs "
              "these alone", file=sys.stderr)
        sys.exit(1)


def load_study(config: str, size: str, output_dir: str) -> Study:
    """The config at one size; paths are as seen from the repository, where commands run."""
    settings = read_config(config)
    if size not in settings["sizes"]:
        raise InputError(f"--size {size!r}: expected one of {', '.join(settings['sizes'])}")
    folder = Path(output_dir).resolve() / size
    if folder.is_relative_to(REPOSITORY):
        folder = folder.relative_to(REPOSITORY)
    return Study(settings, size, folder)


def read_config(path: str) -> Record:
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: broken YAML ({' '.join(str(error).split())}); mend that line"
                         ) from error
    if not isinstance(settings, dict) or not {"sizes", "rows", "recipes", "tables"} <= {*settings}:
        raise InputError(f"{path}: expected `sizes`, `recipes`, `rows` and `tables`, as "
                         f"{CONFIG} has them")
    return settings


def shared_out(jobs: int, threads: int) -> tuple[int, int]:
    """Cells at a time, and the threads of each."""
    if jobs < 0 or threads < 0:
        raise InputError(f"--jobs {jobs} and --threads {threads} must be 0 (chosen here) or more")
    cores = len(os.sched_getaffinity(0))
    jobs = jobs or (min(cores, JOBS_ON_GPU) if gpu() else cores)
    return jobs, threads or max(1, cores // jobs)


def show(study: Study, cells: list[Cell]) -> None:
    """Print the commands of the cells that are missing."""
    for cell in cells:
        if not is_done(study, cell):
            print(f"# {cell.name}")
            print("\n".join(commands_of(study, cell)), end="\n\n")


def run_all(study: Study, cells: list[Cell], jobs: int, threads: int) -> dict[str, str]:
    """Run what is missing, each cell after those that it needs; why which have failed."""
    from tqdm import tqdm

    waiting, running, done, failed = list(cells), {}, set(), {}
    planned = {cell.name for cell in cells}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(cells), unit="cell") as bar:
        try:
            while waiting or running:
                for cell in list(waiting):
                    needed = {other.name for other in needs(study, cell)} & planned
                    if lost := sorted(needed & failed.keys()):
                        failed[cell.name] = f"needs {lost[0]}"
                        bar.update()
                    elif needed <= done and len(running) < jobs:
                        running[pool.submit(do, study, cell, threads, bar.write)] = cell
                    else:
                        continue
                    waiting.remove(cell)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finish(study, running.pop(future), future, bar, done, failed)
        except BaseException:  # the others end with this one
            for process in list(study.running):
                process.terminate()
            raise
    return failed


def finish(study: Study, cell: Cell, future: Future, bar: "tqdm", done: set[str],
           failed: dict[str, str]) -> None:
    """Note how a cell has ended, and say so unless it was done before."""
    try:
        record, fresh = future.result()
    except CellFailed as error:
        failed[cell.name] = str(error)
        bar.update()
        return bar.write(f"{cell.name}: failed: {error}")
    done.add(cell.name)
    if not fresh:  # the bar and its estimate are of those that are run now
        bar.total -= 1
        return bar.refresh()
    bar.update()
    left = bar.format_dict["elapsed"] / bar.n * (bar.total - bar.n)
    bar.write(f"{cell.name}: {told(study, cell, record)}, {record['seconds'] / 60:.1f} min; "
              f"about {left / 3600:.1f} h left")


def told(study: Study, cell: Cell, record: Record) -> str:
    """A cell's figure in a few words."""
    figure = record["figures"].get(study.measure(cell.row))
    return f"{100 * share(figure):.1f} %" if figure else "done"


def published(path: Path) -> Record:
    """The results that are there."""
    return read_result(path) if path.exists() else {"cells": {}, "versions": {}}


def collect(study: Study, path: Path) -> None:
    """Write the figures of all cells that are there; the report needs nothing else.

    Figures of a cell whose folder is gone, of another machine or an earlier night, are kept as
    long as it would be made of the same.
    """
    before = published(path)
    study = replace(study, results=before["cells"])
    found, versions = {}, before["versions"]
    for cell in plan(replace(study, results={})):
        folder = study.folder_of(cell)
        record, failure = (read_manifest(folder / name) for name in ("cell.json", "failed.json"))
        if record and is_done(study, cell):
            found[cell.name] = {"row": cell.row, "part": cell.part, **{
                key: record.get(key) for key in ("figures", "tokens", "steps", "seconds",
                                                 "finished", "git_revision", "machine")},
                "learning_rate": record["settings"]["learning_rate"],
                "made_of": key_of(study, cell)}
            versions = record["versions"]
        elif failure:
            found[cell.name] = {"row": cell.row, "part": cell.part, **failure}
        elif result := result_of(study, cell):
            found[cell.name] = result
    if dropped := [name for name in before["cells"] if name not in found]:
        print(f"{path}: dropped, as they would be made otherwise now: {', '.join(dropped)}")
    if found:
        write_json(path, {"size": study.size, "model": study.settings["model"],
                          "versions": versions, "values": dict(study.values), "cells": found})


if __name__ == "__main__":
    run(main)
