"""train_jsft.py as a user runs it, on tiny models.

    python -m pytest tests/test_train_jsft.py

Most runs are made in this process, which saves the seconds of importing torch; those with several
processes, or that are killed, are real command lines.
"""

import json
import shutil
from pathlib import Path
from statistics import fmean as mean
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_judge import LLAMA, save_tiny_judge, tiny_tokenizer
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
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lm import packing
from lm.generation import generate
from lm.models import load_model, load_tokenizer
from preprocess import jsft_rows, judge_pairs_of
from self_judge import jsft, jsft_trainer
from self_judge.base import find_base, load_base
from self_judge.config import load_config
from self_judge.judgment import judge_preferences
from self_judge.templates import judge_templates, load_templates
from train_jsft import main

CONFIG = "--config=configs/sample_jsft.yaml"
# Batches of 2 x 2 of 24 rows, with a big learning rate, so that a difference would show
COMMON = {"training_args.per_device_train_batch_size": 2, "training_args.warmup_steps": 0,
          "training_args.gradient_accumulation_steps": 2, "training_args.logging_steps": 1,
          "training_args.learning_rate": 1e-2, "training_args.max_steps": 4,
          "training_args.save_steps": 2}


def overrides(settings: dict) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SimpleNamespace:
    return preference_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def common(tmp_path_factory, data) -> dict:
    model = save_tiny_judge(tmp_path_factory.mktemp("tiny_judge"))
    return COMMON | {"model.pretrained_model_name_or_path": model, "dataset": data.uf}


@pytest.fixture
def train(common, tmp_path):
    """Train in this process into `tmp_path / "run"`; settings replace the common ones."""
    def train(settings: dict | None = None, config: str = CONFIG) -> SimpleNamespace:
        settings = {**common, "training_args.output_dir": tmp_path / "run", **(settings or {})}
        result = in_this_process(main, config, *overrides(settings))
        result.folder = Path(settings["training_args.output_dir"])
        return result
    train.data, train.folder = common["dataset"], tmp_path
    return train


@pytest.fixture(scope="module")
def adapter_settings(common) -> dict:
    return {**common, "peft_config.r": 4, "peft_config.lora_dropout": 0.3,
            "peft_config.target_modules": "all-linear"}


@pytest.fixture(scope="module")
def reference(adapter_settings, tmp_path_factory) -> Path:
    """A finished run of an adapter: nobody may change it."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    result = in_this_process(main, CONFIG, *overrides(
        adapter_settings | {"training_args.output_dir": folder}))
    assert result.code == 0, result.err
    return folder


@pytest.mark.parametrize("name", ["hh_jsft", "uf_jsft", "uf_jsft_pr"])
def test_published_config_trains_and_measures_the_judge(name, data, common, tmp_path):
    """Two steps; the last evaluation says of the judge what the saved model shows."""
    settings = {"model.pretrained_model_name_or_path":
                common["model.pretrained_model_name_or_path"],
                "dataset.path": data.hh if name == "hh_jsft" else data.uf,
                "jsft_args.max_length": 400, "training_args.output_dir": tmp_path,
                "training_args.max_steps": 2, "training_args.per_device_train_batch_size": 4,
                "training_args.learning_rate": 0.01, "training_args.logging_steps": 1}
    if name != "hh_jsft":
        settings["dataset.eval_size"] = 3
    result = in_this_process(main, f"--config=configs/{name}.yaml", *overrides(settings))
    assert result.code == 0, result.err
    assert "note: no GPU: fp32 instead of bf16\n" in result.out
    assert len(losses(tmp_path)) == 2
    assert (tmp_path / ADAPTER).is_file() == (name == "hh_jsft")

    config = load_config(str(tmp_path / "config.yaml"))
    assert config.resolved() == load_config(f"configs/{name}.yaml", overrides(settings)).resolved()
    base = find_base({"pretrained_model_name_or_path": str(tmp_path)})
    tokenizer, templates = load_tokenizer(base.model), load_templates(config.templates)
    held_out = judge_pairs_of(config)
    judged, _ = judge_preferences(load_base(base, "fp32"), tokenizer, held_out,
                                  judge_templates(templates, tokenizer), max_length=400)
    found = history(tmp_path, "eval_judge_accuracy", "eval_judge_consistency",
                    "eval_judge_position_bias", "eval_judge_pairs")
    orders = [order for judgment in judged for p in judgment.probabilities.values()
              for order in (p.A_ab > p.B_ab, p.A_ba > p.B_ba)]
    right = [{"A": 1, "B": 0, None: 0.5}[judgment.winner] for judgment in judged]
    assert [entry["step"] for entry in found] == [1, 2]
    assert found[-1] == pytest.approx({
        "step": 2, "eval_judge_pairs": len(held_out), "eval_judge_accuracy": mean(right),
        "eval_judge_consistency": mean(judgment.consistent for judgment in judged),
        "eval_judge_position_bias": mean(orders) - 0.5})


def test_loss_is_the_mean_over_the_supervised_tokens(train, common):
    """Of the whole step, four micro-batches of rows of unlike lengths, and of each kind."""
    result = train({"training_args.max_steps": 1, "training_args.per_device_train_batch_size": 9,
                    "training_args.gradient_accumulation_steps": 4})
    folder = common["model.pretrained_model_name_or_path"]
    rows = jsft_rows(load_config(str(result.folder / "config.yaml")), load_tokenizer(str(folder)))
    assert len(rows) == 36  # one step
    model = AutoModelForCausalLM.from_pretrained(folder)
    learnt = {"sft": [], "judgment": []}
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        taken = -log_probs.gather(1, ids[0, 1:, None])[:, 0]
        learnt[row["kind"]] += taken[torch.tensor(row["completion_mask"][1:]).bool()].tolist()
    (logged,) = history(result.folder, "loss", "sft_loss", "judgment_loss")
    assert len(learnt["judgment"]) == 24 and len(learnt["sft"]) > 48
    assert logged == pytest.approx({
        "step": 1, "loss": mean(learnt["sft"] + learnt["judgment"]),
        "sft_loss": mean(learnt["sft"]), "judgment_loss": mean(learnt["judgment"])}, rel=1e-5)


@pytest.mark.parametrize("attention", [packing.BY_ROW, packing.FLASH])
def test_rows_without_padding_cost_the_same(
        attention, train, adapter_settings, monkeypatch, tmp_path):
    """For flash attention's way sdpa stands in: it finds the rows' bounds by position too."""
    settings = adapter_settings | {
        "peft_config.lora_dropout": 0, "training_args.max_steps": 2, "training_args.eval_steps": 2,
        "training_args.eval_strategy": "steps",
        "dataset": f"{{path: {train.data}, eval: {train.data}}}"}
    with monkeypatch.context() as patch:
        patch.setattr(jsft_trainer, "enable_packing", lambda *_: False)
        padded = train(settings | {"training_args.output_dir": tmp_path / "padded"})
    seen, score = [], jsft_trainer.supervised_log_probs

    def noted(model, ids, *positional, **named):
        seen.append((len(ids), set(named)))
        return score(model, ids, *positional, **named)

    if attention == packing.FLASH:
        monkeypatch.setattr(packing, "FLASH", "sdpa")
    monkeypatch.setattr(jsft_trainer, "supervised_log_probs", noted)
    result = train(settings)
    assert result.code == padded.code == 0, result.err
    told = {"position_ids", "attention_mask"} if attention == packing.BY_ROW else {"position_ids"}
    assert seen and all(seen_now == (1, told) for seen_now in seen)
    assert losses(result.folder) == pytest.approx(losses(padded.folder), rel=1e-5)
    measured = ("eval_loss", "eval_sft_loss", "eval_judgment_loss")
    assert history(result.folder, *measured)[0] == pytest.approx(
        history(padded.folder, *measured)[0], rel=1e-5)


@pytest.mark.parametrize("wanted", ["sft", "judge"])
def test_one_kind_of_examples_is_trained_alone(wanted, train):
    """Answers or judgments; the judge is measured all the same."""
    result = train({"jsft_args.examples": wanted, "training_args.max_steps": 1,
                    "training_args.eval_strategy": "steps", "training_args.eval_steps": 1,
                    "dataset": f"{{path: {train.data}, eval: {train.data}}}"})
    assert result.code == 0, result.err
    (entry,) = history(result.folder, "sft_loss", "judgment_loss")
    assert set(entry) == {"step", "sft_loss" if wanted == "sft" else "judgment_loss"}
    (measured,) = history(result.folder, "eval_judge_pairs", "eval_sft_loss", "eval_judgment_loss")
    assert measured["eval_judge_pairs"] == 12
    assert ("eval_sft_loss" in measured, "eval_judgment_loss" in measured) == (
        wanted == "sft", wanted == "judge")


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "every weight"])
def test_every_trained_parameter_moves_and_no_other(full, train, adapter_settings, monkeypatch):
    seen = watched(monkeypatch, jsft)
    result = train({} if full else adapter_settings)
    assert result.code == 0, result.err
    (run,) = seen
    trained = {name for name in run.start if full or "lora_" in name}
    assert f"training {'every weight' if full else 'an adapter'}: " in result.out
    for name, value in run.trainer.model.named_parameters():
        assert torch.equal(value, run.start[name]) != (name in trained), name
    if full:
        saved = load_file(result.folder / "model.safetensors")
        assert all(torch.equal(value, run.trainer.model.state_dict()[name])
                   for name, value in saved.items())
    else:
        assert len(adapter(result.folder)) == len(trained)


# --- runs: killed, finished, of several processes ---------------------------------------------


def test_killed_run_continues_to_the_same_bits(train, adapter_settings, reference, tmp_path):
    arguments = overrides({**adapter_settings, "training_args.output_dir": tmp_path / "run"})
    assert killed(main, [CONFIG, *arguments], "checkpoint-4/tokenizer_config.json",
                  tmp_path / "shim") == -9
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "running"
    result = train(adapter_settings)
    assert f"continuing from {tmp_path / 'run/checkpoint-2'}\n" in result.out
    assert (result.folder / ADAPTER).read_bytes() == (reference / ADAPTER).read_bytes()
    assert losses(result.folder) == losses(reference) and len(losses(reference)) == 4


def test_finished_run_is_not_repeated(train, adapter_settings, reference):
    settings = adapter_settings | {"training_args.output_dir": reference}
    before = (reference / ADAPTER).stat().st_mtime_ns
    result = train(settings | {"training_args.logging_steps": 3})  # reports otherwise, is the same
    assert result.code == 0 and (reference / ADAPTER).stat().st_mtime_ns == before
    assert "is finished; training_args.resume_from_checkpoint=False repeats it" in result.out
    assert_one_line(train(settings | {"training_args.learning_rate": 1}),
                    "other settings .training_args.learning_rate 0.01 -> 1.; choose another")


def test_run_record_and_settings_are_saved(reference, data, common):
    record = json.loads((reference / "run.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 4
    config = load_config(str(reference / "config.yaml"), kind="jsft")
    rows = jsft_rows(config, load_tokenizer(str(common["model.pretrained_model_name_or_path"])))
    lengths = sorted(map(len, rows["input_ids"]))
    assert sum(lengths[:16]) <= record["tokens"] <= sum(lengths[-16:])  # four steps of four
    assert record["settings"]["peft_config.r"] == 4
    assert list(record["data"]["files"]) == [str(data.uf)]
    assert record["loss"] == [losses(reference)[0], losses(reference)[-1]]
    assert {"torch", "trl"} <= record["versions"].keys() and record["git_revision"]
    assert load_config(str(reference / "config.yaml"), kind="jsft").peft_config["r"] == 4


def test_two_processes_train_as_one_does(train, adapter_settings, tmp_path):
    """One row each and four micro-batches, against two rows and two: the same batches of four.

    The last step has one row of 33, which accelerate gives to both processes.
    """
    settings = {**adapter_settings, "peft_config.lora_dropout": 0, "training_args.max_steps": -1,
                "training_args.learning_rate": 1e-3,
                "dataset": f"{{path: {tmp_path}/data/uf.jsonl, eval: {tmp_path}/data/uf.jsonl}}",
                "training_args.eval_strategy": "epoch",
                "training_args.per_device_eval_batch_size": 8}
    preference_data(tmp_path / "data", 11)
    one = train(settings)
    folder = tmp_path / "two"
    done = in_two_processes("train_jsft.py", CONFIG, *overrides(
        settings | {"training_args.per_device_train_batch_size": 1,
                    "training_args.output_dir": folder}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2 (MULTI_CPU) on cpu\n" in done.stdout
    assert losses(folder) == pytest.approx(losses(one.folder), rel=1e-5)
    assert len(losses(folder)) == 9
    measured = ("eval_loss", "eval_sft_loss", "eval_judgment_loss", "eval_judge_accuracy")
    assert (history(folder, *measured)[0]
            == pytest.approx(history(one.folder, *measured)[0], rel=1e-5))
    for name, value in adapter(folder).items():
        torch.testing.assert_close(value, adapter(one.folder)[name], rtol=0, atol=1e-5)


def test_the_last_step_is_logged_too(train):
    result = train({"training_args.max_steps": 3, "training_args.logging_steps": 2})
    assert result.code == 0, result.err
    assert [entry["step"] for entry in history(result.folder, "loss")] == [2, 3]


# --- mixtures of experts -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixture")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16,
        router_aux_loss_coef=0.5)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_mixture_learns_no_balance_and_keeps_its_config(train, mixture, monkeypatch):
    """trl would add a term a forward pass, and leave a config with which nothing can generate."""
    settings = {"model.pretrained_model_name_or_path": mixture, "training_args.max_steps": 1,
                "peft_config": "null", "training_args.per_device_train_batch_size": 16,
                "dataset": f"{{path: {train.data}, eval: null, eval_size: 4}}",
                "training_args.eval_strategy": "steps", "training_args.eval_steps": 1}
    found = {}
    for budget in (1, 100_000):  # a row a forward pass, and all of them
        monkeypatch.setitem(packing.TOKENS_PER_FORWARD, "cpu", budget)
        result = train({**settings, "training_args.output_dir": train.folder / str(budget)})
        assert result.code == 0, result.err
        (entry,) = history(result.folder, "loss", "sft_loss")
        assert "sft_loss" in entry  # our loss, not trl's
        found[budget] = entry["loss"]
    assert found[1] == pytest.approx(found[100_000], abs=1e-4)
    config = json.loads((result.folder / "config.json").read_text())
    assert config["router_aux_loss_coef"] == 0.5 and not config["output_router_logits"]


def test_a_mixture_that_trl_has_saved_generates(mixture, tmp_path):
    """Asked for its balance, it cannot go on from a cache."""
    shutil.copytree(mixture, tmp_path, dirs_exist_ok=True)
    config = json.loads((mixture / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    model, tokenizer = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    answers = list(generate(model, tokenizer, ["the cat", "a dog sat"], max_new_tokens=4))
    assert len(answers) == 2


def test_rarer_losses_stop_at_what_is_no_number(train):
    settings = {"training_args.learning_rate": 1e30, "training_args.loss_type": "dft"}
    assert_one_line(train(settings | {"training_args.disable_tqdm": "true"}),
                    "is not finite at step 2; the last checkpoint is kept")


def test_gradient_that_is_no_number_never_reaches_the_weights(train, monkeypatch):
    """A model saved with such weights would be where the next run goes on."""
    seen = {}
    step = jsft_trainer.JsftTrainer.training_step

    def poisoned(self, model, *inputs):
        loss = step(self, model, *inputs)
        weight = next(p for p in model.parameters() if p.grad is not None)
        seen["model"] = model
        weight.grad[0] = float("nan")
        return loss

    monkeypatch.setattr(jsft_trainer.JsftTrainer, "training_step", poisoned)
    assert_one_line(train({"training_args.disable_tqdm": "true"}),
                    "the gradient is not finite at step 1; the last checkpoint is kept")
    assert all(parameter.isfinite().all() for parameter in seen["model"].parameters())


# --- what cannot be meant ----------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"training_args.packing": "true"}, "training_args.packing: leave it out; a step has the rows"),
    ({"jsft_args.examples": "judges"}, "examples is 'judges'; expected all, sft, judge; did you "
                                       "mean 'judge'"),
    ({"training_args.max_length": 9}, "set jsft_args.max_length, not training_args.max_length"),
    ({"training_args.max_step": 9}, "unknown key 'max_step'; did you mean 'max_steps'"),
    ({"training_args.report_to": "wand"}, "report_to 'wand': unknown"),
    ({"training_args.lr_scheduler_type": "cosin"}, "training_args: cosin is not a valid"),
    ({"training_args.eval_strategy": "steps", "training_args.eval_steps": 2,
      "training_args.load_best_model_at_end": "true"}, "needs records for evaluation"),
    ({"model.load_in": "4bit"}, "4bit weights cannot be trained"),
    ({"jsft_args.max_length": 5000}, "max_length 5000 is more than the model's context of 1024"),
    ({"jsft_args.token_id_a": 7, "jsft_args.token_id_b": 8}, r"are 7 and 8, but the decisions'"),
    ({"training_args.gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expec"),
    ({"peft_config.target_modules": "[nothing]"}, "Target modules .*nothing.* not found")])
def test_mistakes_are_one_line(settings, message, train):
    assert_one_line(train(settings), message)


def test_without_records_for_evaluation_it_trains_and_says_so(train):
    result = train({"training_args.eval_strategy": "steps", "training_args.eval_steps": 1,
                    "training_args.max_steps": 1})
    assert result.code == 0
    assert "note: the dataset has no records for evaluation" in result.out


def test_batches_can_be_pinned(tiny_llama):
    """As the loader does on a GPU, with tensors that own their memory."""
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "kind": "judgment"},
            {"input_ids": [5, 6], "completion_mask": [0, 1], "kind": "answer"}]
    batch = jsft_trainer.Collator(load_tokenizer(str(tiny_llama)))(rows)
    assert all(tensor.is_contiguous() for tensor in batch.values())
    assert batch["judged"].tolist() == [[True] * 3, [False] * 3]
