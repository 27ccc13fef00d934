"""Training scripts as the tests run them: in this process, or killed; and what their runs leave."""

import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT
from datasets import disable_progress_bars
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar
from warm_python import warm_environment

from lm.cli import run

disable_progress_bars()  # of datasets
disable_progress_bar()  # of loaded weights: what is left on stderr is ours

ADAPTER = "adapter_model.safetensors"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "another", "dog", "ran", "red"]
PRINCIPLES = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def write_records(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def in_this_process(main: Callable, *arguments: str) -> SimpleNamespace:
    """What the command line prints, and its exit code; saves the seconds of importing torch."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *arguments])
        code = 0
        try:
            run(main)
        except SystemExit as stop:
            code = stop.code or 0
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return SimpleNamespace(code=code, out=texts[0], err=texts[1])


def assert_one_line(result: SimpleNamespace, message: str) -> None:
    """Stopped with one line on stderr that holds the message."""
    assert result.code == 2
    assert re.search(message, result.err), result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err


# Process $DIE_RANK dies where it would open the file, or make the folder, $DIE_AT, by a signal that
# nothing can catch. Where there are others, they first get a moment to go on without it.
DIE_AT = """
import os, signal, sys, time

def die(event, arguments):
    if (event in ("open", "os.mkdir") and str(arguments[0]).endswith(os.environ["DIE_AT"])
            and os.environ.get("LOCAL_RANK", "0") == os.environ["DIE_RANK"]):
        time.sleep(3 * int(os.environ.get("WORLD_SIZE", "1")) - 3)
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
"""


def killed(main: Callable, arguments: list[str], die_at: str, shim: Path,
           launcher: Sequence[str] = (), die_rank: int = 0) -> int:
    """Run until the command opens a file or makes a folder."""
    shim.mkdir(exist_ok=True)
    (shim / "sitecustomize.py").write_text(DIE_AT)
    environment = {**os.environ, "PYTHONPATH": str(shim), "DIE_AT": die_at,
                   "DIE_RANK": str(die_rank)}
    python = warm_environment() / "bin/python"
    return subprocess.run([python, *launcher, f"{main.__module__}.py", *arguments],
                          cwd=ROOT, capture_output=True, env=environment).returncode


def in_two_processes(*words: object, **variables: str) -> subprocess.CompletedProcess:
    """A script and its arguments under torchrun."""
    return subprocess.run(
        [warm_environment() / "bin/python", "-m", *TORCHRUN, *map(str, words)], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **variables})


def history(folder: Path, *names: str) -> list[dict]:
    """The logged values of some names, step by step."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in ("step", *names) if name in entry}
            for entry in log if any(name in entry for name in names)]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in history(folder, "loss")]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER)


def preference_data(folder: Path, count: int = 12) -> SimpleNamespace:
    """Random words in HH's folders and files, and in UltraFeedback's schema."""
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))

    def dialogue() -> dict:
        start = f"\n\nHuman: {words(8)}\n\nAssistant: "
        return {"chosen": start + words(12), "rejected": start + words(6)}

    def completion(rating: int) -> dict:
        return {"response": words(12), "custom_system_prompt": "", "annotations": {
            name: {"Rating": str(rating), "Rationale For Rating": words(6)}
            for name in PRINCIPLES}}

    for name in ("helpful-base/train", "helpful-base/test", "helpful-online/train"):
        write_records(folder / "hh" / f"{name}.jsonl", [dialogue() for _ in range(count)])
    uf = write_records(folder / "uf.jsonl", [
        {"instruction": words(8), "completions": [completion(rating) for rating in (2, 5, 3)]}
        for _ in range(count)])
    return SimpleNamespace(hh=folder / "hh", uf=uf)


def watched(monkeypatch: pytest.MonkeyPatch, steps: ModuleType) -> list[SimpleNamespace]:
    """The trainers that `steps.make_trainer` will make, each with its parameters at the start."""
    seen, make = [], steps.make_trainer

    def make_trainer(*arguments: object) -> object:
        trainer = make(*arguments)
        start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        seen.append(SimpleNamespace(trainer=trainer, start=start))
        return trainer

    monkeypatch.setattr(steps, "make_trainer", make_trainer)
    return seen
