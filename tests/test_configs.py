"""Every configuration file loads, and every script explains its flags at once.

    python -m pytest tests/test_configs.py
"""

import ast
import re
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from lm.templates import load_template

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("configs/**/*.yml")])
RUNS = [path for path in CONFIGS if path.parent.name == "configs"]  # the others hold texts
ACCELERATE = [path for path in CONFIGS if "accelerate" in path.stem]
TEMPLATES = sorted(ROOT.glob("configs/templates/**/*.json"))
SCRIPTS = sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
                 if "__main__" in path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parameters(script: Path) -> list[str]:
    """Parameters of the function that a script hands to `lm.cli.run`: its flags.

    `*overrides` is none of them.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    (command,) = [call.args[0].id for call in ast.walk(tree)
                  if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                  and call.func.id == "run" and isinstance(call.args[0], ast.Name)]
    (function,) = [node for node in tree.body
                   if isinstance(node, ast.FunctionDef) and node.name == command]
    return [argument.arg for argument in function.args.args + function.args.kwonlyargs]


def test_everything_is_found():
    assert {"finetune_unlikelihood.py", "scripts/generate.py"} <= set(map(name, SCRIPTS))
    assert len(ACCELERATE) >= 8 and len(RUNS) >= 16 and TEMPLATES


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_yaml_is_a_mapping(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_configuration(path):
    """accelerate takes it; its header launches an existing script with flags that it has."""
    assert load_config_from_file(str(path)).num_processes > 0
    text = path.read_text(encoding="utf-8")
    header = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    command = re.search(rf"accelerate launch --config_file[ =]{name(path)} ((?:\\\n|.)*)", header)
    assert command, "no launch command in the header"
    assert "Hardware: " in header
    script, *flags = re.findall(r"\w+\.py|(?<=--)\w+", command[1])
    assert flags and set(flags) <= set(parameters(ROOT / script))


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_its_header_says_what_it_is(path):
    assert re.match(r"# \w", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_key_has_a_comment(path):
    keys = [line for line in path.read_text(encoding="utf-8").splitlines()
            if re.match(r"\s*\w+:", line)]
    assert keys and [line for line in keys if "  # " not in line] == []


def test_cpu_configuration_is_for_several_processes():
    """What makes accelerate start one process without a word: MULTI_CPU."""
    config = load_config_from_file(str(ROOT / "configs" / "accelerate_cpu.yaml"))
    assert (config.distributed_type.value, config.use_cpu) == ("MULTI_GPU", True)
    assert config.num_processes == 2


@pytest.mark.parametrize("path", TEMPLATES, ids=name)
def test_template(path):
    template = load_template(str(path))
    assert "{instruction}" not in template.render("an instruction", "a judgment")


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_help_is_quick_and_complete(script, run_cli):
    for _ in range(2):  # the better of two, as the machine may be busy
        start = time.perf_counter()
        result = run_cli(name(script), "--help")
        seconds = time.perf_counter() - start
        if seconds < 2:
            break
    assert result.returncode == 0
    missing = [flag for flag in parameters(script)
               if not re.search(rf"(--{flag}|^ +{flag.upper()})\b", result.stdout, re.M)]
    assert missing == []
    assert seconds < 2
