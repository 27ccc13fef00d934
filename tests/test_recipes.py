"""The shell recipes, from their first to their last line, on a tiny model and the sample data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.skipif(not list(Path(sys.prefix).glob(".installed-*")),
                       reason="the recipes would install their requirements here; run "
                              "bash scripts/test.sh, which did so")]


def run_recipe(*words: str, **variables: object) -> str:
    """Run a recipe with these environment variables; its output."""
    environment = {**os.environ, **{key: str(value) for key, value in variables.items()},
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", *words], cwd=ROOT, env=environment, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Three held-out prompts."""
    path = tmp_path / "prompts.jsonl"
    lines = (ROOT / "data/sample/heldout.jsonl").read_text().splitlines()[:3]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("recipe", "folder"), [
    (["scripts/cut_offline.sh"], "."),
    (["scripts/cut_online_iter.sh", "1", "scripts/cut_online_iter.sh", "2"], "round2")])
def test_paper_recipe(recipe, folder, tiny_llama, prompts, tmp_path):
    """The offline recipe; two rounds of the online one, the second on the first one's model."""
    out = tmp_path / folder
    for words in (recipe[:2], recipe[2:]):
        if words:
            run_recipe(*words, BASE_MODEL=tiny_llama, DATA="data/sample/train.jsonl", GPUS=1,
                       OUT=tmp_path, ROUNDS=tmp_path, PROMPTS=prompts, MAX_STEPS=2,
                       MAX_NEW_TOKENS=4, VENV=sys.prefix)
    settings = json.loads((out / "adapter/run.json").read_text())["settings"]
    if folder == "round2":
        assert settings["base_model"] == str(tmp_path / "round1/model")
    assert settings["learning_rate"] == 4e-4 and settings["batch_size"] == 8  # as in the paper
    answers = json.loads((out / "alpaca_eval.json").read_text())
    assert len(answers) == 3 and set(answers[0]) >= {"instruction", "output", "generator"}


def test_quickstart_and_again(tiny_llama, prompts, tmp_path):
    """The newcomer's command; typed again it trains and generates nothing anew."""
    out = tmp_path / "out"
    variables = {"MODEL": tiny_llama, "OUT": out, "PROMPTS": prompts, "VENV": sys.prefix}
    printed = run_recipe("scripts/quickstart.sh", **variables)
    assert "everything is in" in printed and (out / "loss.png").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text())
    assert results
    adapter = out / "adapter/adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    printed = run_recipe("scripts/quickstart.sh", **variables)
    assert "this run is finished" in printed and "already there" in printed
    assert adapter.stat().st_mtime_ns == before
