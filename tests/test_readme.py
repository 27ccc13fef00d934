"""Every command of the README names a real script with real flags, and the short ones run."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from training_runs import in_this_process

import finetune_unlikelihood
from lm.cli import _reject_unknown_flags

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of each command in the README's bash blocks and in its recipe table."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"\| `(bash [^`]+)`", README)
    return [shlex.split(line) for line in lines if line.strip()]


def python_commands() -> list[tuple[str, list[str]]]:
    """(script, arguments) of the commands that run one of our Python scripts."""
    found = []
    for words in commands():
        script = next((word for word in words if word.endswith(".py")), None)
        if script:
            found.append((script, words[words.index(script) + 1:]))
    return found


def test_there_are_commands():
    assert len(commands()) >= 8
    assert len(python_commands()) >= 5


@pytest.mark.parametrize(("script", "arguments"), python_commands())
def test_flags_exist(script, arguments):
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _reject_unknown_flags(module.main, arguments)


def test_recipes_exist_and_parse():
    recipes = [word for words in commands() for word in words if word.endswith(".sh")]
    assert recipes
    for recipe in recipes:
        subprocess.run(["bash", "-n", str(ROOT / recipe)], check=True)


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    folders = "configs|data|scripts|cut|lm|self_judge|benchmarks"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*\w/?)`", README)
    assert links and paths
    for path in links + paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("flag", ["--dry_run", "--visualize"])
def test_look_before_you_train(flag, tiny_llama, tmp_path):
    """The two commands that people type first, with the tiny model in the embedded one's place."""
    arguments = next(words for script, words in python_commands()
                     if script == "finetune_unlikelihood.py" and flag in words)
    arguments = [str(tiny_llama) if word == "smollm2-135m-instruct" else
                 str(tmp_path) if word == "runs/mine" else word for word in arguments]
    result = in_this_process(finetune_unlikelihood.main, *arguments)
    assert result.code == 0, result.err
    assert {"--dry_run": "learning rate", "--visualize": "judgments.html"}[flag] in result.out
