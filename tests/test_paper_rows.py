"""Each row of the papers' tables: its recipe shows its commands, and its trainings run dry.

    python -m pytest tests/test_paper_rows.py -n0

Dry means that all is done up to the weights: flags and configurations are read, data become rows,
steps are counted. The models are tiny ones of the rows' architectures, the processes are eight.
"""

import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_tokenizers import (
    SENTENCES,
    byte_level_with_bos,
    sentencepiece,
    sentencepiece_without_space,
)
from test_configs import parameters
from training_runs import in_this_process, preference_data, write_records
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

import finetune_unlikelihood
from lm.tables import PAPER_TABLES

ROOT = Path(__file__).resolve().parents[1]
ROWS = [row for table in yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))["tables"]
        for row in table["rows"] if "recipe" in row]
RECIPES = list(dict.fromkeys(row["recipe"] for row in ROWS))
TRAININGS = ("finetune_unlikelihood.py", "train_jsft.py", "train_self_judge.py")
PROCESSES = 8
SHARDED = ("jsft_accelerate.yaml", "accelerate_fsdp2.yaml")  # their settings reach the processes
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.1}
# Grouped heads, ties and windows as the real ones have them; Llama-2 must know " A" and " B".
ARCHITECTURES = {
    "llama2": (LlamaConfig, {}, lambda: sentencepiece([*SENTENCES, "A B " * 9])),
    "llama3": (LlamaConfig, {"num_key_value_heads": 2, "rope_theta": 5e5}, byte_level_with_bos),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 32}, sentencepiece),
    "gemma": (GemmaConfig, {"num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": True},
              sentencepiece_without_space)}
FAMILIES = {"meta-llama/Llama-2-": "llama2", "meta-llama/Meta-Llama-3-": "llama3",
            "mistralai/Mistral-7B-": "mistral", "google/gemma-7b": "gemma"}


@functools.cache
def commands_of(recipe: str) -> list[list[str]]:
    """What a recipe would run."""
    shown = subprocess.run(["bash", "-c", recipe], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "DRY_RUN": "1"})
    assert shown.returncode == 0, shown.stderr
    return [words for line in shown.stdout.splitlines()
            if (words := shlex.split(line))[0] in ("python", "torchrun", "accelerate")]


def trainings_of(recipe: str) -> list[list[str]]:
    """The command lines that train, of an online round too."""
    found = []
    for words in commands_of(recipe):
        if script_of(words) in TRAININGS:
            found.append(words)
        elif script_of(words) == "scripts/online.py":
            flags = flags_of(words)
            found.append(["torchrun", f"--nproc_per_node={flags['gpus']}",
                          "finetune_unlikelihood.py", "--base_model", flags["model"],
                          "--data_path", "judged.json", "--output_dir", "adapter",
                          *(f"--{setting}" for setting in flags["train_settings"].split())])
    return found


def script_of(words: list[str]) -> str:
    return next(word for word in words if word.endswith(".py"))


def flags_of(words: list[str]) -> dict[str, str]:
    """--name value and --name=value, those of the script."""
    after = words[words.index(script_of(words)) + 1:]
    return {word[2:].split("=")[0]: word.partition("=")[2] or value
            for word, value in itertools.pairwise([*after, ""]) if word.startswith("--")}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A folder with a tiny random model of each architecture and a tokenizer of its kind."""
    folders = {}
    for name, (kind, more, tokenizer_of) in ARCHITECTURES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer = tokenizer_of()
        save(kind(**SIZES, **more, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
                  bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id),
             folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def save(config: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Records of each schema that the recipes train on."""
    folder = tmp_path_factory.mktemp("data")
    preferences = preference_data(folder)
    judged = [{"instruction": f"Name {number} cats.", "input": "", "output": output,
               "judgment": judgment, "score": score, "i_ans": "Tom and Kitty."}
              for number in range(2, 10) for output, judgment, score in (
                  ("The cat sat.", "It names none.", 1), ("Tom, Kitty.", None, 4))]
    perfect = [record | {"judgment": None} for record in judged]
    return {"judged": write_records(folder / "judged.jsonl", judged),
            "perfect": write_records(folder / "perfect.jsonl", perfect),
            "hh": preferences.hh, "uf": preferences.uf,
            "pairs": preferences.hh / "helpful-base/train.jsonl"}


def small(words: list[str], models: dict[str, Path], data: dict[str, Path],
          out: Path) -> list[str]:
    """A training's command line with a tiny model and small data in the place of the recipe's."""
    judged = "perfect" if "plain" in words else "judged"  # the AI judge's data are all positive

    def replaced(word: str) -> str:
        name, _, value = word.rpartition("=")
        if name == "model.pretrained_model_name_or_path":
            return f"{name}={folder_of(value, models)}"
        if name == "training_args.output_dir":
            return f"{name}={out / value}"
        if name == "dataset.path":
            kind = {"Anthropic/hh-rlhf": "hh", "openbmb/UltraFeedback": "uf"}.get(value, "pairs")
            return f"{name}={data[kind]}"
        return "dataset.eval_size=2" if word == "dataset.eval_size=1000" else word

    if script_of(words) == "finetune_unlikelihood.py":
        values = {"--base_model": folder_of(flags_of(words)["base_model"], models),
                  "--data_path": data[judged], "--output_dir": out}
        return [*(str(values.get(before, word)) for before, word in
                  zip(["", *words], words, strict=False)), "--dry_run", "True"]
    return [*map(replaced, words), "--dry_run", "True"]


def folder_of(model: str, models: dict[str, Path]) -> Path:
    """The tiny one for a model of the papers, or for one that a recipe made of Llama-2."""
    family = "llama2" if model.startswith("runs/") else next(
        family for start, family in FAMILIES.items() if model.startswith(start))
    return models[family]


@pytest.fixture(scope="module")
def results(models, data, tmp_path_factory) -> dict[tuple, dict]:
    """What each training of all recipes came to, run once whichever recipes it is in."""
    folder = tmp_path_factory.mktemp("dry")
    lines = {tuple(words): small(words, models, data, folder)
             for recipe in RECIPES for words in trainings_of(recipe)}
    commands, told = folder / "commands.json", folder / "results.json"
    commands.write_text(json.dumps(list(lines.values())))
    run = subprocess.run([sys.executable, "tests/dry_runs.py", commands, told], cwd=ROOT,
                         capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {path.name for path in folder.iterdir()} == {"commands.json", "results.json"}
    return dict(zip(lines, json.loads(told.read_text()), strict=True))


def test_every_row_is_found():
    assert len(ROWS) > 60 and len(RECIPES) > 50
    assert {family for recipe in RECIPES for words in trainings_of(recipe)[:1]
            for start, family in FAMILIES.items() if start in " ".join(words)} == set(ARCHITECTURES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_shows_commands_that_exist(recipe):
    """Scripts that are there, with flags that they have; and all trainings are on eight GPUs."""
    for words in commands_of(recipe):
        script = ROOT / script_of(words)
        assert script.is_file()
        assert set(flags_of(words)) <= set(parameters(script)), script
    for words in trainings_of(recipe):
        assert re.search(rf"--(nproc_per_node|num_processes)[= ]{PROCESSES}\b", " ".join(words))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_variable_of_the_recipe_counts(recipe):
    """Without it the commands are others; one that no script reads would change nothing."""
    for variable in re.finditer(r"[A-Z_]+=('.*?'|\S*) ", recipe):
        rest = recipe[:variable.start()] + recipe[variable.end():]
        assert commands_of(rest) != commands_of(recipe), variable[0]


def test_a_dry_run_shows_what_replaces_the_shell_too():
    (words,) = commands_of("bash scripts/chat.sh runs/none --template chat")
    assert words == ["python", "scripts/chat.py", "--model", "runs/none", "--template", "chat"]


def test_without_principles_is_a_zero_too():
    recipe = "bash scripts/self_judge_uf.sh"
    assert commands_of(f"PRINCIPLES=0 {recipe}") == commands_of(recipe)


@pytest.mark.parametrize("data", ["hh", "uf"])
def test_flags_of_the_labels_reach_them(data):
    (words,) = (words for words in commands_of("METHOD=rest LABEL_FLAGS='--thresholds 0.5 --beta 1'"
                                               f" bash scripts/self_judge_{data}.sh")
                if script_of(words) == "scripts/label_samples.py")
    assert (flags_of(words)["thresholds"], flags_of(words)["beta"]) == ("0.5", "1")


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_step_reads_what_an_earlier_one_wrote(recipe):
    """Of what is below runs/; or what another row's recipe makes, as the round before does."""
    written = {f"runs/{row['run']}/model" for row in ROWS if row["recipe"] != recipe}
    for words in commands_of(recipe):
        after = words[words.index(script_of(words)) + 1:]
        given = flags_of(words) | dict(word.split("=", 1) for word in after
                                       if "=" in word and not word.startswith("--"))
        own = {name: Path(value) for name, value in given.items() if value.startswith("runs/")}
        outputs = {name for name in own if re.search(r"output|samples_path", name)}
        for name in own.keys() - outputs:
            assert {str(own[name]), *map(str, own[name].parents)} & written, (name, own[name])
        written |= {str(own[name]) for name in outputs}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["run"])
def test_the_recipe_makes_what_the_row_measures(row):
    model = Path(row.get("model", f"runs/{row['run']}/model"))
    made = {word.rpartition("=")[2] for words in commands_of(row["recipe"]) for word in words}
    assert made & {str(folder) for folder in (model, *model.parents) if folder.parts[1:]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_trainings_run_dry_in_eight_processes(recipe, results):
    trainings = trainings_of(recipe)
    assert trainings
    for words in trainings:
        result = results[tuple(words)]
        assert result["codes"] == [0] * PROCESSES, result["err"]
        assert f"processes: {PROCESSES} (" in result["out"]
        assert re.search(r"steps: \d+", result["out"])
        sharded = any(word.endswith(SHARDED) for word in words)
        assert result["environment"].get("ACCELERATE_USE_FSDP") == ("true" if sharded else None)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cut_trains_each_architecture(name, models, data, tmp_path):
    """A step of real training: LoRA finds the layers, and the logits are understood."""
    result = in_this_process(
        finetune_unlikelihood.main, "--base_model", str(models[name]), "--data_path",
        str(data["judged"]), "--output_dir", str(tmp_path), "--batch_size", "8",
        "--micro_batch_size", "8", "--max_steps", "1")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 1
