"""train_self_judge.py as a user runs it, on tiny models.

    python -m pytest tests/test_train_self_judge.py

Most runs are made in this process, which saves the seconds of importing torch; those with several
processes, or that are killed, are real command lines. What a step does is tested in
tests/test_self_judge_trainer.py.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_judge import save_tiny_judge
from training_runs import (
    ADAPTER,
    adapter,
    assert_one_line,
    history,
    in_this_process,
    in_two_processes,
    killed,
    losses,
    preference_data,
    watched,
)

from self_judge import self_training
from self_judge.base import find_base, load_base
from self_judge.config import load_config
from self_judge.launch import Data
from train_self_judge import main

CONFIG = "--config=configs/sample_self_judge.yaml"
# A big learning rate, so that a difference would show; dropout, so that random states count
COMMON = {"training_args.per_device_train_batch_size": 4, "training_args.warmup_steps": 0,
          "training_args.learning_rate": 1e-2, "training_args.max_steps": 4,
          "training_args.save_steps": 2, "self_judge_args.max_new_tokens": 6,
          "self_judge_args.show_every": 0, "self_judge_args.disable_dropout": "false",
          "peft_config.lora_dropout": 0.3}


def overrides(settings: dict) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SimpleNamespace:
    return preference_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_judge(tmp_path_factory.mktemp("tiny_judge"))


@pytest.fixture(scope="module")
def common(tiny, data) -> dict:
    return COMMON | {"model.pretrained_model_name_or_path": tiny, "dataset": data.uf}


@pytest.fixture
def train(common, tmp_path):
    """Train in this process into `tmp_path / "run"`; settings replace the common ones."""
    def train(settings: dict | None = None, *flags: str) -> SimpleNamespace:
        settings = {**common, "training_args.output_dir": tmp_path / "run", **(settings or {})}
        result = in_this_process(main, CONFIG, *flags, *overrides(settings))
        result.folder = Path(settings["training_args.output_dir"])
        return result
    return train


@pytest.fixture(scope="module")
def two_rounds(common, tmp_path_factory) -> SimpleNamespace:
    """Two finished rounds of an adapter: nobody may change them."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        runs = watched(patch, self_training)
        result = in_this_process(main, CONFIG, "--rounds=2", *overrides(
            common | {"training_args.output_dir": folder}))
    assert result.code == 0, result.err
    return SimpleNamespace(folder=folder, out=result.out, runs=runs)


# --- configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hh_self_judge", "uf_self_judge", "uf_self_judge_pr"])
def test_published_config_trains(name, data, tiny, tmp_path):
    settings = {"model.pretrained_model_name_or_path": tiny,
                "dataset.path": data.hh if name == "hh_self_judge" else data.uf,
                "self_judge_args.max_length": 400, "self_judge_args.max_new_tokens": 6,
                "training_args.output_dir": tmp_path, "training_args.max_steps": 2,
                "training_args.per_device_train_batch_size": 4}
    if name != "hh_self_judge":
        settings["dataset.eval_size"] = 3
    result = in_this_process(main, f"--config=configs/{name}.yaml", *overrides(settings))
    assert result.code == 0, result.err
    assert "note: no GPU: fp32 instead of bf16\n" in result.out
    assert f"policy and reference: {tiny} in fp32\njudge: the reference\n" in result.out
    assert "training an adapter: " in result.out
    assert "left out: identical responses, ties\n" in result.out
    assert result.out.count("is chosen") >= 1  # show_every
    assert len(losses(tmp_path)) == len(history(tmp_path, "eval_loss")) == 2
    assert all(value.abs().max() > 0 for value in adapter(tmp_path).values())  # lora_B began as 0
    for text in ("trained 2 steps on", "loss 0.69", "judge/margin", "judge/tie_rate",
                 "response_length/chosen", "seconds a step: sample", f"saved to {tmp_path}"):
        assert text in result.out
    assert (load_config(str(tmp_path / "config.yaml")).resolved()
            == load_config(f"configs/{name}.yaml", overrides(settings)).resolved())


def test_every_setting_reaches_the_trainer(monkeypatch):
    """Those of a published config, which has them all; the judge's tokens by its template."""
    given, decision_ids = {}, {"token_id_a": 7, "token_id_b": 8}

    class Noted(Exception):
        pass

    def note(model, **settings):
        given.update(settings)
        raise Noted

    monkeypatch.setattr(self_training, "SelfJudgeTrainer", note)
    monkeypatch.setattr(self_training.launch, "judge_options",
                        lambda config, tokenizer: {"judge_templates": "t", **decision_ids})
    config = load_config("configs/hh_self_judge.yaml", ["self_judge_args.beta=0.3"])
    with pytest.raises(Noted):
        self_training.make_trainer(config, None, None, Data("tokenizer", ["rows"], ["held out"]))
    own = dict(config.self_judge_args) | decision_ids
    assert {name: given[name] for name in own} == own and own["beta"] == 0.3
    assert (given["train_dataset"], given["eval_dataset"]) == (["rows"], ["held out"])
    assert given["peft_config"].lora_alpha == config.peft_config["lora_alpha"]


def test_offline_run_trains_on_the_given_pairs_and_asks_no_judge(train, monkeypatch):
    """So the template's decisions need not be single tokens."""
    monkeypatch.setattr(self_training.launch, "judge_options", None)
    result = train({"self_judge_args.pairs": "given", "training_args.max_steps": 2,
                    "self_judge_args.token_id_a": 7})
    assert result.code == 0, result.err
    assert "pairs: the dataset's own; nothing is sampled or judged\n" in result.out
    assert "left out" not in result.out and "judge/" not in result.out
    entry, other = history(result.folder, "loss", "response_length/chosen", "seconds/sample")
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(other["loss"] - entry["loss"]) > 1e-3  # the policy has moved
    assert "response_length/chosen" in entry and "seconds/sample" not in entry


# --- where a run starts ------------------------------------------------------------------------


def test_a_round_starts_from_the_last_ones_policy(two_rounds, tiny):
    """Its adapter is merged: policy, reference and judge of round 2 are round 1's policy."""
    folder = two_rounds.folder
    first, second = two_rounds.runs
    assert "round 1: 4 queries a step, seed 42\n" in two_rounds.out
    assert f"policy and reference: {tiny} in fp32\n" in two_rounds.out
    assert "round 2: 4 queries a step, seed 43\n" in two_rounds.out
    assert f"policy and reference: {tiny} + {folder} in fp32\n" in two_rounds.out
    assert (first.trainer.args.seed, second.trainer.args.seed) == (42, 43)

    merged = load_base(find_base({"pretrained_model_name_or_path": str(folder)}), "fp32")
    base = {name: value for name, value in second.start.items() if "lora_" not in name}
    assert len(base) == len(list(merged.parameters()))
    for name, value in merged.named_parameters():
        own = next(key for key in (f"base_model.model.{name}", _wrapped(name)) if key in base)
        assert torch.equal(value, base[own]), name
        assert torch.equal(value, first.start[own]) != (own == _wrapped(name)), name
    for name, value in second.trainer.model.named_parameters():
        assert torch.equal(value, second.start[name]) == ("lora_" not in name), name


def _wrapped(name: str) -> str:
    """What peft calls the weight of a layer that has an adapter."""
    layer, _, weight = name.rpartition(".")
    return f"base_model.model.{layer}.base_layer.{weight}"


def test_further_rounds_are_ordinary_runs(two_rounds):
    """Their saved settings say where they start; the data and its draws are those of round 1."""
    folder = two_rounds.folder
    records = [json.loads((each / "run.json").read_text()) for each in (folder, folder / "round2")]
    assert [record["status"] for record in records] == ["finished"] * 2
    assert records[0]["data"] == records[1]["data"]
    config = load_config(str(folder / "round2/config.yaml"))
    assert (config.seed, config.self_judge_args["round"]) == (42, 2)
    assert config.model["pretrained_model_name_or_path"] == str(folder)
    assert in_this_process(main, f"--config={folder / 'round2/config.yaml'}").out.endswith(
        f"{folder / 'round2'}: this run is finished; training_args.resume_from_checkpoint=False "
        "repeats it\n")


def test_full_fine_tuning_moves_every_weight_of_the_policy_alone(train, tiny, monkeypatch):
    seen = watched(monkeypatch, self_training)
    result = train({"peft_config": "null", "training_args.max_steps": 1}, "--rounds=2")
    assert result.code == 0, result.err
    assert f"policy and reference (a frozen copy): {tiny} in fp32\n" in result.out
    assert f"policy and reference (a frozen copy): {result.folder} in fp32\n" in result.out
    assert result.out.count("training every weight: ") == 2
    for run in seen:
        for name, value in run.trainer.model.named_parameters():
            assert not torch.equal(value, run.start[name]), name
        for name, value in run.trainer.ref_model.named_parameters():
            assert torch.equal(value, run.start[name]), name
    first = load_file(result.folder / "model.safetensors")
    assert all(torch.equal(value, seen[1].start[name]) for name, value in first.items())


# --- runs: killed, finished, of several processes ----------------------------------------------


def test_killed_rounds_continue_to_the_same_bits(train, common, two_rounds, tmp_path):
    """Killed once in each round, between the weights and the optimizer of its last checkpoint."""
    folder, whole = tmp_path / "run", two_rounds.folder
    arguments = [CONFIG, "--rounds=2",
                 *overrides({**common, "training_args.output_dir": folder})]
    for die_at in ("run/checkpoint-4", "round2/checkpoint-4"):
        assert killed(main, arguments, f"{die_at}/tokenizer_config.json", tmp_path / "shim") == -9
    result = train({}, "--rounds=2")
    assert result.code == 0, result.err
    assert f"{folder}: this run is finished" in result.out
    assert f"continuing from {folder / 'round2/checkpoint-2'}\n" in result.out
    for ours, theirs in ((folder, whole), (folder / "round2", whole / "round2")):
        assert (ours / ADAPTER).read_bytes() == (theirs / ADAPTER).read_bytes()
        names = ("loss", "judge/margin", "logps/chosen", "response_length/chosen")
        assert history(ours, *names) == history(theirs, *names)
        assert len(losses(ours)) == 4


def test_finished_rounds_are_not_repeated(train, two_rounds):
    settings = {"training_args.output_dir": two_rounds.folder}
    before = {path: path.stat().st_mtime_ns for path in two_rounds.folder.rglob("*.safetensors")}
    result = train(settings | {"self_judge_args.show_every": 1}, "--rounds=2")
    assert result.code == 0 and result.out.count("this run is finished") == 2
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) == 4
    assert_one_line(train(settings | {"self_judge_args.beta": 0.2}, "--rounds=2"),
                    "other settings .self_judge_args.beta 0.1 -> 0.2.; choose another output_dir")


def test_a_round_whose_start_was_trained_anew_is_not_taken_for_finished(train, two_rounds,
                                                                         tmp_path):
    folder = shutil.copytree(two_rounds.folder / "round2", tmp_path / "run/round2").parent
    result = train({"training_args.learning_rate": 1e-3, "training_args.disable_tqdm": "true"},
                   "--rounds=2")
    assert (folder / ADAPTER).is_file()  # round 1
    assert_one_line(result, "run/round2: holds a run with other settings .*start_sha256")


def test_two_processes_train_as_one_does(train, common, tmp_path):
    """Two queries each, against four; all tokens in the nucleus, lest a rounding change a sample"""
    settings = {**common, "self_judge_args.disable_dropout": "true", "self_judge_args.top_p": 1.0,
                "training_args.max_steps": 2, "training_args.learning_rate": 1e-3}
    one, folder = train(settings, "--rounds=2").folder, tmp_path / "two"
    done = in_two_processes("train_self_judge.py", CONFIG, "--rounds=2", *overrides(
        settings | {"training_args.per_device_train_batch_size": 2,
                    "training_args.output_dir": folder}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2 (MULTI_CPU) on cpu\n" in done.stdout
    for ours, theirs in ((folder, one), (folder / "round2", one / "round2")):
        names = ("loss", "judge/margin", "logps/chosen", "response_length/chosen")
        for mine, their in zip(history(ours, *names), history(theirs, *names), strict=True):
            assert mine == pytest.approx(their, rel=1e-4)
        for name, value in adapter(ours).items():
            torch.testing.assert_close(value, adapter(theirs)[name], rtol=0, atol=1e-5)


# --- what cannot be meant ----------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "flags", "message"), [
    ({"self_judge_args.max_new_token": 9}, [], "unknown key 'max_new_token'; did you mean "
                                               "'max_new_tokens'"),
    ({"self_judge_args.pairs": "giving"}, [],
     "pairs is 'giving'; expected sampled, given; did you mean 'given'"),
    ({"training_args.beta": 9}, [], "set self_judge_args.beta, not training_args.beta"),
    ({"self_judge_args.ties": "toss"}, [], "ties is 'toss'; expected drop, keep"),
    ({"self_judge_args.max_new_tokens": 999}, [], "leaves no room for a query"),
    ({"peft_config": "null", "model.load_in": "4bit"}, [], "4bit weights cannot be trained"),
    ({}, ["--rounds=0"], "--rounds is 0; expected 1 or more"),
    ({}, ["--round=2"], "unknown flag --round; did you mean --rounds"),
    ({"training_args.resume_from_checkpoint": "x"}, ["--rounds=2"], "a checkpoint of one round"),
    ({"model.load_in": "8bit"}, ["--rounds=2"], "cannot be merged into weights that are"),
    ({"training_args.learning_rate": 1e30, "training_args.disable_tqdm": "true"}, [],
     "not numbers: training diverged")])
def test_mistakes_are_one_line(settings, flags, message, train):
    assert_one_line(train(settings, *flags), message)


@pytest.mark.parametrize(("setting", "message"), [
    ("judge=gpt", "judge is 'gpt'; expected reference, policy; did you mean"),
    ("cut=none", "cut is 'none'; expected keep, drop"),
    ("beta=-1", "beta is -1; expected more than 0"), ("beta=0.0", "beta is 0.0"),
    ("loss_type=robust", "loss_type is robust; expected one of sigmoid"),
    ("top_p=0", "top_p is 0; expected more than 0"), ("temperature=0", "temperature is 0: both"),
    ("generation.engine=tgi", "engine is 'tgi'")])
def test_what_the_trainer_would_refuse_is_refused_before_anything_is_loaded(setting, message, train,
                                                                            monkeypatch):
    monkeypatch.setattr(self_training, "load_data", None)
    name, _, value = setting.partition("=")
    assert_one_line(train({f"self_judge_args.{name}": value}), message)


def test_offline_runs_may_leave_sampling_as_it_is(train):
    settings = {"self_judge_args.pairs": "given", "self_judge_args.temperature": 0}
    result = train(settings, "--dry_run")
    assert result.code == 0, result.err
