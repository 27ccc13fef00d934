"""Command lines: what a user types wrong is one line and exit code 2, before anything runs.

    python -m pytest tests/test_cli.py
"""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm.cli import typed
from lm.records import InputError

HEADER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from lm.cli import run
from lm.records import InputError
"""
COMMAND = HEADER + '''
def main(data_path: str = "", batch_size: int = 8, learning_rate: float = 1e-4,
         debug: bool = False, layers: str | list | tuple = ("up",), size: int | float = 0) -> None:
    """Show the flags.

    Args:
        data_path: Records to read.
    """
    print("RAN", ascii([data_path, batch_size, learning_rate, debug, layers, size]))

run(main)
'''
OVERRIDDEN = HEADER + """
def main(*overrides: str, config: str = "", show: int = 0, dry_run: bool = False) -> None:
    print("RAN", ascii([overrides, config, show, dry_run]))

run(main)
"""


@pytest.fixture(scope="module")
def type_in(run_cli, tmp_path_factory):
    """Run a small script with arguments, as a user does."""
    folder = tmp_path_factory.mktemp("commands")

    def type_in(*arguments, code=COMMAND, **options):
        script = folder / "command.py"
        script.write_text(code)
        return run_cli(str(script), *arguments, **options)

    return type_in


def assert_stopped(result, message, code=2):
    """One line on stderr, nothing done."""
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert message in result.stderr


@pytest.mark.parametrize(("arguments", "flags"), [
    ((), ["", 8, 1e-4, False, ("up",), 0]),
    (("--data_path", "7"), ["7", 8, 1e-4, False, ("up",), 0]),
    (("--data-path=7", "--batch-size", "2"), ["7", 2, 1e-4, False, ("up",), 0]),
    (("--data_path", "None", "--debug"), ["None", 8, 1e-4, True, ("up",), 0]),
    (("--data_path", "[a, 'b']", "--debug", "False"), ["[a, 'b']", 8, 1e-4, False, ("up",), 0]),
    (("--data_path", "-1", "--learning_rate", "1"), ["-1", 8, 1, False, ("up",), 0]),
    (("--data_path=", "--size", "0.5"), ["", 8, 1e-4, False, ("up",), 0.5]),
    (("--data_path", "é 😀 \"q\" 'r' \\n {x}\n=", "--debug=True"),
     ["é 😀 \"q\" 'r' \\n {x}\n=", 8, 1e-4, True, ("up",), 0]),
    (("-b", "2", "-s=0.5"), ["", 2, 1e-4, False, ("up",), 0.5]),
    (("--layers", "[a,b_c]"), ["", 8, 1e-4, False, ["a", "b_c"], 0]),
    (("--layers", "all-linear"), ["", 8, 1e-4, False, "all-linear", 0]),
])
def test_flags_arrive_as_typed(type_in, arguments, flags):
    result = type_in(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"RAN {flags!a}\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (("--data_pth", "x"), "unknown flag --data_pth; did you mean --data_path?"),
    (("--data_path", "x", "--batchsize=4"), "unknown flag --batchsize; did you mean --batch_size?"),
    (("--debgu",), "did you mean --debug? (--help lists every flag)"),
    (("--batch_size", "two"), "--batch_size is 'two'; expected int"),
    (("--batch_size", "8.5"), "--batch_size is 8.5; expected int"),
    (("--batch_size",), "--batch_size is True; expected int"),
    (("--learning_rate", "fast"), "--learning_rate is 'fast'; expected float"),
    (("--debug", "yes"), "--debug is 'yes'; expected bool"),
    (("--data_path", "--debug"), "--data_path is True; expected str"),
    (("--size", "True"), "--size is True; expected int or float"),
])
def test_wrong_flags_are_one_line(type_in, arguments, message):
    assert_stopped(type_in(*arguments), message)


@pytest.mark.parametrize("arguments", [("-unknown", "3"),
                                       ("a", "1", "1", "True", "b", "2", "one more")])
def test_leftover_arguments_stop_before_the_command_runs(type_in, arguments):
    result = type_in(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Could not consume arg" in result.stderr


@pytest.mark.parametrize(("arguments", "arrived"), [
    (("--config=a.yaml", "t.max_steps=10"), [("t.max_steps=10",), "a.yaml", 0, False]),
    (("t.x=1", "--config", "a.yaml", "t.y=[1, 'b']"), [("t.x=1", "t.y=[1, 'b']"), "a.yaml", 0,
                                                       False]),
    (("--show", "3", "t.x==\"é\" {z}\n", "--dry_run", "t.y=", "--config", "k=v"),
     [("t.x==\"é\" {z}\n", "t.y="), "k=v", 3, True]),
    (("--dry_run", "False", "t.x=--y"), [("t.x=--y",), "", 0, False]),
    (("-c", "a.yaml", "t.x=1", "-d", "-s=3"), [("t.x=1",), "a.yaml", 3, True]),
    (("--config", "-d", "-s", "2"), [(), "-d", 2, False]),
    ((), [(), "", 0, False]),
])
def test_overrides_arrive_as_typed(type_in, arguments, arrived):
    result = type_in(*arguments, code=OVERRIDDEN)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"RAN {arrived!a}\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (("a.yaml",), "'a.yaml': not a flag; settings are overridden as section.key=value"),
    (("t.x=1", "=1"), "'=1': not a flag"),
    (("--dry_run", "yes"), "'yes': not a flag"),
    (("t.x=1", "--confg=x"), "unknown flag --confg; did you mean --config?"),
    (("--overrides=t.x=1",), "unknown flag --overrides"),
    (("--show", "t.x=1"), "--show is 't.x=1'; expected int"),
])
def test_what_is_no_override_is_one_line(type_in, arguments, message):
    assert_stopped(type_in(*arguments, code=OVERRIDDEN), message)


def test_single_dashes_are_no_overrides(type_in):
    result = type_in("t.x=1", "-unknown", "3", code=OVERRIDDEN)
    assert (result.returncode, result.stdout) == (2, "")


def test_texts_are_read_as_typed_flags_are():
    """What a script that runs another one checks before it does."""
    def command(path: str = "", steps: int = 0, rate: float = 0.0, sure: bool = False,
                layers: str | list | tuple = (), size: int | float = 0):
        pass

    assert typed(command, {"path": "7", "steps": "-1", "rate": "2e-3", "sure": "True",
                           "layers": "[a,b_c]", "size": "0.5"}) == {
        "path": "7", "steps": -1, "rate": 2e-3, "sure": True, "layers": ["a", "b_c"], "size": 0.5}
    for name, text, expected in (("rate", "2e-3x", "'2e-3x'; expected float"),
                                 ("steps", "2.5", "2.5; expected int"),
                                 ("sure", "yes", "'yes'; expected bool"),
                                 ("size", "", "''; expected int or float")):
        with pytest.raises(InputError, match=f"--{name} is {expected}"):
            typed(command, {name: text})


def test_help_lists_flags_with_their_meaning(type_in):
    result = type_in("--help")
    assert (result.returncode, result.stderr) == (0, "") and "RAN" not in result.stdout
    assert "--batch_size" in result.stdout and "Records to read." in result.stdout


@pytest.mark.parametrize("arguments", [("-h",), ("--show", "3", "--help"), ("--", "--help")])
def test_help_may_be_asked_for_in_other_ways(type_in, arguments):
    result = type_in(*arguments, code=OVERRIDDEN)
    assert (result.returncode, result.stderr) == (0, "") and "--dry_run" in result.stdout


@pytest.mark.parametrize(("failure", "message", "code"), [
    ("raise InputError('f: record 1:\\nfield x')", "error: f: record 1: field x\n", 2),
    ("open('/none/such')", "error: /none/such: No such file or directory\n", 2),
    ("raise OSError(28, 'No space left on device')", "error: No space left on device\n", 2),
    ("raise OSError('the Hub is away')", "error: the Hub is away\n", 2),
    ("import torch; raise torch.OutOfMemoryError('CUDA out of memory.\\nadvice')",
     "error: the GPU's memory is full (CUDA out of memory.); lower the flag for tokens or rows at "
     "a time (--batch_tokens, --micro_batch_size); the same command goes on\n",
     2),
    ("raise KeyboardInterrupt", "error: interrupted; run the same command again to continue\n",
     130),
])
def test_failures_of_the_command_are_one_line(type_in, failure, message, code):
    result = type_in(code=f"{HEADER}def main():\n    {failure}\nrun(main)\n")
    assert (result.returncode, result.stderr) == (code, message)


def test_mistakes_of_ours_keep_their_traceback(type_in):
    result = type_in(code=f"{HEADER}def main():\n    [][1]\nrun(main)\n")
    assert result.returncode == 1 and "IndexError" in result.stderr


@pytest.mark.parametrize(("ranks", "patience", "said"), [
    ("01", 60, ["error: bad record"]),
    ("1", 0, ["error: process 1: bad record"]),
], ids=["all", "one"])
def test_processes_of_a_launch_say_a_thing_once(ranks, patience, said, tmp_path):
    """If all meet bad input, the first names it, and the launcher ends the others as they wait."""
    script = tmp_path / "stops.py"
    script.write_text(f"{HEADER}import os, time\nimport lm.cli\nlm.cli.PATIENCE = {patience}\n"
                      f"def main():\n    if os.environ['LOCAL_RANK'] in {ranks!r}:\n"
                      "        raise InputError('bad record')\n    time.sleep(60)\nrun(main)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", str(script)]
    result = subprocess.run(command, text=True, capture_output=True)
    assert result.returncode
    assert [line for line in result.stderr.splitlines() if "bad record" in line] == said


def test_interrupted_processes_do_not_repeat_it(type_in):
    result = type_in(code=f"{HEADER}def main():\n    raise KeyboardInterrupt\nrun(main)\n",
                     env=os.environ | {"LOCAL_RANK": "1"})
    assert (result.returncode, result.stderr) == (130, "")


def test_ctrl_c_is_one_line(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(f"{HEADER}import time\ndef main():\n    print('ready', flush=True)\n"
                      "    time.sleep(60)\nrun(main)\n")
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, str(script)], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE,
                          preexec_fn=heeds) as process:  # a shell's background jobs ignore it
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "error: interrupted; run the same command again to continue\n"
