"""Training command lines, dry, each in the processes that it asks for.

    python tests/dry_runs.py COMMANDS.json RESULTS.json

Their own launcher, torchrun or accelerate, reads each up to where it would start the processes.
These are started once for all, by torchrun's agent; as it forks, torch is imported once. There each
script runs with the arguments and the environment that the launcher would have given it.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

import cut.preview  # noqa: F401  what the scripts import when they are called
import finetune_unlikelihood
import self_judge.jsft
import self_judge.self_training  # noqa: F401
import train_jsft
import train_self_judge
from lm.cli import run

MAINS = {"finetune_unlikelihood.py": finetune_unlikelihood.main,
         "train_jsft.py": train_jsft.main, "train_self_judge.py": train_self_judge.main}


def main(commands_file: str, results_file: str) -> None:
    """Write what each command came to: its processes, their exit codes, what the first printed."""
    torch.set_num_threads(1)
    commands = json.loads(Path(commands_file).read_text())
    launched = [read_by_launcher(words) for words in commands]
    (processes,) = {each["processes"] for each in launched}
    config, *_ = torchrun.config_from_args(torchrun.parse_args(
        ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--start_method=fork",
         f"--nproc_per_node={processes}", "-"]))
    told = elastic_launch(config, run_all)(launched)
    results = [{"codes": [told[rank][place]["code"] for rank in told], **told[0][place],
                "environment": each["environment"]} for place, each in enumerate(launched)]
    Path(results_file).write_text(json.dumps(results))


def read_by_launcher(words: list[str]) -> dict:
    """How a launcher understands a command line."""
    before, seen = dict(os.environ), []

    def start(given) -> None:
        seen.append({"processes": int(given.nproc_per_node), "script": given.training_script,
                     "arguments": given.training_script_args,
                     "environment": {name: value for name, value in os.environ.items()
                                     if before.get(name) != value}})

    with patch.object(torchrun, "run", start):
        if words[0] == "torchrun":
            torchrun.main(words[1:])
        else:
            launch_command(launch_command_parser().parse_args(words[2:]))
    return seen[0]


def run_all(launched: list[dict]) -> list[dict]:
    """In each process: every command in turn."""
    return [run_one(**{**each, "main": MAINS[each["script"]]}) for each in launched]


def run_one(main: Callable, script: str, arguments: list[str], environment: dict,
            processes: int) -> dict:
    """A script as if it had been started; its exit code and output."""
    code = 0
    with patch.dict(os.environ, environment), patch.object(sys, "argv", [script, *arguments]), \
            captured() as (out, err):
        try:
            run(main)
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What is printed; `lm.cli` sets how its stream writes odd characters."""
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = lambda **options: None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


if __name__ == "__main__":
    main(*sys.argv[1:])
