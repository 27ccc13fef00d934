"""Runs of the training scripts: their processes, their record (`run.json`), their continuation.

The same command on the same data continues a run that was killed; other settings in the same
folder are an error, so that no result is ever a mixture of two runs.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lm.records import InputError, first_line, listed, sha256, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
RUN_FILE = "run.json"
AGAIN = "resume_from_checkpoint=False"  # a flag; the runs of a YAML file have a dotted name for it
REPOSITORY = Path(__file__).resolve().parents[1]
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What safetensors and torch say then; torch notices by the position in the file
DISK_TEXTS = re.compile(r"os error|No space left|unexpected pos|PytorchStreamWriter")


class Finished(SystemExit):
    """There is nothing left to do for this run."""


def world_size(**options) -> int:
    """Processes that work together; stops when a launcher started some that do not.

    The options are those of torch's `init_process_group`. The time that one waits for another is
    half an hour, as transformers' `ddp_timeout`, which comes too late to be heeded.
    """
    import torch
    from accelerate import PartialState

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if name not in os.environ]
    if launched > 1 and missing:
        raise InputError(f"WORLD_SIZE is {launched}, but {', '.join(missing)} not set, so each "
                         "process would work alone; use torchrun --nproc_per_node=N")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise InputError(f"{here} processes on this node, which has {gpus} GPUs; use torchrun "
                         f"--nproc_per_node={gpus} (GPUS={gpus} for a recipe)")
    options = {"timeout": timedelta(seconds=1800)} | options
    state = PartialState(cpu=not torch.cuda.is_available(), **options)
    if state.num_processes != launched:
        raise InputError(f"launched as {launched} processes, but each would work alone; on CPUs "
                         "use torchrun --nproc_per_node=N")
    if state.is_main_process:
        print(f"processes: {launched} ({state.distributed_type.value}) on {state.device.type}")
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if not torch.cuda.is_available() and not hidden and shutil.which("nvidia-smi"):
            print(f"warning: this machine has nvidia-smi, but torch {torch.__version__} finds no "
                  "GPU (`nvidia-smi` and torch.version.cuda tell which CUDA each knows); this run "
                  "is on the CPU", file=sys.stderr)
        idle = torch.cuda.device_count() - 1
        if launched == 1 and idle > 0:
            print(f"note: {idle} more GPUs are idle; torchrun --nproc_per_node={idle + 1} "
                  "uses them all")
    return launched


def allow_tf32() -> None:
    """TF32 for the products that a GPU has left in fp32, from here on.

    Layers in 8 bits pass gradients on in it, and an output head makes its logits. For trainings,
    once what compares exactly is over.
    """
    import torch

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def is_main() -> bool:
    """Whether this process speaks for all."""
    from accelerate import PartialState

    return PartialState().is_main_process


def describe_run(settings: Mapping[str, object], data_path: str,
                 data_sha256: str | None = None) -> dict:
    """Settings, data hash, versions, git revision and machine of this run.

    `data_sha256` is for data that is not a single file; `rows_sha256` gives one.
    """
    data_file = Path(data_path)
    if data_sha256 is None and data_file.is_file():
        data_sha256 = sha256(data_file)
    return {
        "status": "running",
        "settings": json.loads(json.dumps(dict(settings))),  # as it will be read back
        "data": {"path": str(data_path), "sha256": data_sha256},
        "versions": {"python": platform.python_version(), **_versions()},
        "git_revision": _git_revision(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def rows_sha256(rows: "Dataset") -> str:
    """Digest of a dataset's contents, wherever they came from."""
    digest = hashlib.sha256(json.dumps(rows.column_names).encode())
    for start in range(0, len(rows), 1000):
        for column in rows[start:start + 1000].values():
            digest.update(json.dumps(column, ensure_ascii=False).encode(errors="surrogatepass"))
    return digest.hexdigest()


def open_run(output_dir: str, run: dict, resume: str | bool | None = None,
             free: tuple[str, ...] = (), again: str = AGAIN) -> str | None:
    """Claim the output folder; the checkpoint to continue from, if this run was killed before.

    `Finished`, which ends the process, where nothing is left to do. `resume` is a checkpoint to
    start from, or False to start over, which people write as `again`; settings named in `free` may
    change.
    """
    from accelerate import PartialState

    if isinstance(resume, str) and not is_whole(Path(resume)):
        raise InputError(f"resume_from_checkpoint {resume}: not a whole checkpoint (a folder "
                         "with trainer_state.json)")
    state = PartialState()
    status = None if resume is False else previous_run(output_dir, run, free, again)
    state.wait_for_everyone()
    if status == "finished" and not isinstance(resume, str):
        if state.is_main_process:
            print(f"{output_dir}: this run is finished; {again} repeats it")
        raise Finished(0)
    if state.is_main_process:
        if resume is False:
            _remove_results(Path(output_dir))
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_run(output_dir, run)
    state.wait_for_everyone()
    checkpoint = resume if isinstance(resume, str) else last_checkpoint(output_dir)
    if checkpoint and state.is_main_process:
        print(f"continuing from {checkpoint}")
    return checkpoint


def previous_run(output_dir: str, run: dict, free: tuple[str, ...] = (),
                 again: str = AGAIN) -> str | None:
    """Status of the same run in this folder: None, "running" (killed) or "finished".

    Settings named in `free` may differ: they do not change the result. A run that stopped before
    its first checkpoint left nothing to continue, and counts as none.
    """
    path = Path(output_dir) / RUN_FILE
    begun = last_checkpoint(output_dir)
    if not path.is_file():
        if begun:
            raise InputError(f"{begun}: belongs to a run without {RUN_FILE}; choose another "
                             f"output_dir, or start over with {again}")
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["status"] == "running" and not begun:
        return None
    old, new = before["settings"], run["settings"]
    changed = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in {**new, **old}
               if key not in free and old.get(key) != new.get(key)]
    if before["data"]["sha256"] != run["data"]["sha256"]:
        changed.append(f"contents of {run['data']['path']}")
    if changed:
        raise InputError(f"{output_dir}: holds a run with other settings ({'; '.join(changed)}); "
                         f"choose another output_dir, or start over with {again}")
    return before["status"]


def save_weights(trainer: "Trainer", output_dir: str) -> None:
    """Adapter (or model) and tokenizer, each file in one piece, and the trainer's log history."""
    folder = Path(output_dir)
    with full_disk_in_one_line(output_dir):
        trainer.save_model(str(folder / ".saving"))
        trainer.accelerator.wait_for_everyone()
        if is_main():
            for file in (folder / ".saving").iterdir():
                file.chmod(0o644)  # safetensors keeps others out
                os.replace(file, folder / file.name)
            (folder / ".saving").rmdir()
        trainer.save_state()


def write_run(output_dir: str, run: dict, **more: object) -> None:
    """Write the run record, with what is known at this time."""
    write_json(Path(output_dir) / RUN_FILE, {**run, **more})


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was written whole; a kill can leave a later one half-written."""
    steps = {path: path.name.removeprefix("checkpoint-")
             for path in Path(output_dir).glob("checkpoint-*")}
    checkpoints = sorted((path for path, step in steps.items() if step.isdecimal()),
                         key=lambda path: int(steps[path]), reverse=True)
    return next((str(path) for path in checkpoints if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """`WholeCheckpoints` has trainer_state.json written last, after the states of all processes."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return "global_step" in state


def check_trackers(report_to: str | Sequence[str]) -> None:
    """Stop at a tracker that transformers does not know, or that is not installed."""
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    trackers = listed(report_to, "report_to")
    if len(trackers) > 1 and {"none", "all"} & {*trackers}:
        raise InputError(f"report_to {report_to!r}: none and all stand alone")
    for tracker in trackers:
        if tracker not in ("none", "all", *known):
            raise InputError(f"report_to {tracker!r}: unknown; use none, all, or some of "
                             f"{', '.join(known)}")
        if tracker in known and tracker not in (
                integration_utils.get_available_reporting_integrations()):
            raise InputError(f"report_to {tracker}: not installed; pip install {tracker}")


@contextlib.contextmanager
def full_disk_in_one_line(output_dir: str) -> Iterator[None]:
    """safetensors and torch report a full disk as errors of their own, some of them misleading."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = (error.errno in DISK_ERRNOS if isinstance(error, OSError)
                else DISK_TEXTS.search(str(error)))
        if not full:
            raise
        raise InputError(f"{output_dir}: cannot write ({first_line(error)}); free some "
                         "space there, and the same command continues") from error


def _remove_results(folder: Path) -> None:
    """Weights of a run that is started over; an old adapter beside a new model would be loaded."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for pattern in ("adapter_*", "model*.safetensors*"):
        for file in folder.glob(pattern):
            file.unlink()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_revision() -> str | None:
    """The commit, with `+` if the tree has uncommitted changes; None outside a checkout."""
    try:
        def git(*arguments: str) -> str:
            return subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, text=True,
                                  capture_output=True).stdout.strip()
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
