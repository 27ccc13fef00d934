"""Run records: what a run was made of (`run.json`), and whether a folder holds it already.

The same command on the same data continues a run that was killed; other settings in the same
folder are an error, so that no result is ever a mixture of two runs.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lm.records import InputError, sha256, write_json

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
RUN_FILE = "run.json"
REPOSITORY = Path(__file__).resolve().parents[1]


def describe_run(settings: Mapping[str, object], data_path: str) -> dict:
    """Settings, data hash, versions, git revision and machine of this run."""
    data_file = Path(data_path)
    return {
        "status": "running",
        "settings": json.loads(json.dumps(dict(settings))),  # as it will be read back
        "data": {"path": str(data_path),
                 "sha256": sha256(data_file) if data_file.is_file() else None},
        "versions": {"python": platform.python_version(), **_versions()},
        "git_revision": _git_revision(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def previous_run(output_dir: str, run: dict, free: tuple[str, ...] = ()) -> str | None:
    """Status of the same run in this folder: None, "running" (killed) or "finished".

    Settings named in `free` may differ: they do not change the result. A run that stopped before
    its first checkpoint left nothing to continue, and counts as none.
    """
    path = Path(output_dir) / RUN_FILE
    begun = last_checkpoint(output_dir)
    if not path.is_file():
        if begun:
            raise InputError(f"{begun}: belongs to a run without {RUN_FILE}; choose another "
                             "--output_dir, or start over with --resume_from_checkpoint False")
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["status"] == "running" and not begun:
        return None
    changed = [f"{key} {before['settings'].get(key)!r} -> {value!r}"
               for key, value in run["settings"].items()
               if key not in free and before["settings"].get(key) != value]
    if before["data"]["sha256"] != run["data"]["sha256"]:
        changed.append(f"contents of {run['data']['path']}")
    if changed:
        raise InputError(f"{output_dir}: holds a run with other settings ({'; '.join(changed)}); "
                         "choose another --output_dir, or start over with "
                         "--resume_from_checkpoint False")
    return before["status"]


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
    """Trainer writes trainer_state.json last, after weights, optimizer and random states."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return "global_step" in state


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
