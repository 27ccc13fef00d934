"""The YAML of a run: what loads, what is translated, what stops with one line.

    python -m pytest tests/test_self_judge_config.py
"""

from pathlib import Path

import pytest
import yaml

from lm.records import InputError
from self_judge.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = [f"configs/{name}.yaml" for name in (
    "hh_jsft", "uf_jsft", "uf_jsft_pr", "hh_self_judge", "uf_self_judge", "uf_self_judge_pr")]
GIVEN = {
    "training_args": {"output_dir": "out"},
    "jsft_args": {"max_length": 512},
    "model": {"pretrained_model_name_or_path": "org/model"},
    "templates": {"judge": {"default": {"user": "{context} ${x} {response_a}{response_b}"}}},
    "dataset": "records.jsonl",
}


@pytest.fixture
def load(tmp_path):
    """Load sections over those that every run needs."""
    def load(*overrides: str, kind: str | None = "jsft", **sections):
        given = {name: value for name, value in (GIVEN | sections).items() if value is not ...}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(given))
        return load_config(str(path), overrides, kind)
    return load


def arguments(**settings):
    return {"training_args": GIVEN["training_args"] | settings}


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_configs_load(path):
    config = load_config(str(ROOT / path))
    assert config.kind == ("jsft" if "jsft" in path else "self_judge")
    assert config.notes == []  # names of today
    assert Path(ROOT, config.templates).is_file()
    assert isinstance(config.training_args["learning_rate"], float)


def test_published_settings_are_the_papers():
    hh, uf = (load_config(str(ROOT / path)) for path in PUBLISHED[:2])
    assert (hh.peft_config["r"], hh.peft_config["lora_alpha"]) == (8, 16)
    assert uf.peft_config is None
    for config in (hh, uf):
        args = config.training_args
        assert (args["learning_rate"], args["lr_scheduler_type"]) == (2e-5, "cosine")
        assert (args["warmup_steps"], args["num_train_epochs"]) == (0.03, 1)
        assert args["per_device_train_batch_size"] == 16
    config = load_config(str(ROOT / PUBLISHED[3]))
    assert config.training_args["learning_rate"] == 5e-6
    assert config.self_judge_args["max_new_tokens"] == 768 and config.peft_config["r"] == 8


def test_jsft_and_self_training_share_a_template():
    for jsft, self_judge in zip(PUBLISHED[:3], PUBLISHED[3:], strict=True):
        one, other = (load_config(str(ROOT / path)) for path in (jsft, self_judge))
        assert one.templates == other.templates
        assert (other.model["pretrained_model_name_or_path"]
                == one.training_args["output_dir"])


def test_sections(load):
    config = load(peft_config={"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}, seed=7)
    assert (config.kind, config.seed, config.jsft_args) == ("jsft", 7, {"max_length": 512})
    assert config.templates == GIVEN["templates"]  # dollar signs and braces are text
    assert config.peft_config["lora_alpha"] == 16
    assert load().peft_config is None and load().seed == 42
    assert load("training_args.seed=3", seed=7).seed == 3


def test_kind_is_told_by_its_section(load):
    assert load(kind=None).kind == "jsft"
    assert load(kind=None, jsft_args=..., self_judge_args={"beta": 1}).kind == "self_judge"
    with pytest.raises(InputError, match="one of the sections jsft_args and self_judge_args"):
        load(kind=None, jsft_args=...)


def test_overrides(load):
    config = load("training_args.max_steps=10", "training_args.learning_rate=1e-3",
                  "training_args.report_to=[wandb, tensorboard]", "dataset=a/b.jsonl",
                  "templates=judge.yaml", "peft_config.r=4", "training_args.run_name=",
                  "model.attn_implementation=null", "training_args.bf16=true",
                  peft_config={"r": 8}, dataset={"path": "x", "eval_size": 3})
    args = config.training_args
    assert (args["max_steps"], args["learning_rate"], args["bf16"]) == (10, 1e-3, True)
    assert args["report_to"] == ["wandb", "tensorboard"]
    assert (config.dataset, config.templates, config.peft_config) == ("a/b.jsonl", "judge.yaml",
                                                                      {"r": 4})
    assert load("peft_config=null", peft_config={"r": 8}).peft_config is None
    assert load("dataset.path=y", dataset={"path": "x"}).dataset == {"path": "y"}
    assert load("dataset.path=y", dataset="x").dataset == {"path": "y"}
    for order in (["dataset=y", "dataset.eval_size=2"], ["dataset.eval_size=2", "dataset=y"]):
        assert load(*order, dataset={"path": "x", "num_proc": 3}).dataset == {
            "path": "y", "eval_size": 2}
    assert load("templates.decision_rationale=null", templates="judge.yaml").templates == {
        "file": "judge.yaml", "decision_rationale": None}
    assert load("training_args.save_strategy=no").training_args["save_strategy"] == "no"


def test_what_older_transformers_said(load):
    config = load(**arguments(
        evaluation_strategy="epoch", per_gpu_train_batch_size=2, per_gpu_eval_batch_size=3,
        no_cuda=True, warmup_ratio=0.03, group_by_length=True, adafactor=False,
        overwrite_output_dir=True, save_safetensors=True))
    assert config.training_args == {
        "output_dir": "out", "eval_strategy": "epoch", "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3, "use_cpu": True, "warmup_steps": 0.03,
        "train_sampling_strategy": "group_by_length"}
    assert len(config.notes) == 8 and all("training_args." in note for note in config.notes)
    both = arguments(warmup_ratio=0.03, warmup_steps=100)  # steps went before the ratio
    assert load(**both).training_args["warmup_steps"] == 100
    both = arguments(warmup_ratio=0.03, warmup_steps=0)
    assert load(**both).training_args["warmup_steps"] == 0.03


def test_translated_names_are_todays():
    """What a name is translated to exists."""
    from dataclasses import fields

    from trl import DPOConfig, SFTConfig

    from self_judge.config import GONE, RENAMED, SWITCHES

    for kind in (SFTConfig, DPOConfig):
        known = {field.name for field in fields(kind)}
        assert {*RENAMED.values(), *(name for name, _ in SWITCHES.values())} <= known
        assert not {*RENAMED, *SWITCHES, *GONE} & known


@pytest.mark.parametrize(("sections", "overrides", "message"), [
    (arguments(max_step=1), [], r"run.yaml: training_args: unknown key 'max_step'; did you mean "
                                "'max_steps'"),
    ({}, ["jsft_args.maxlength=1"], "jsft_args: unknown key 'maxlength'; .* 'max_length'"),
    ({}, ["jsft_arg.max_length=1"], "unknown key 'jsft_arg'; did you mean 'jsft_args'"),
    ({"self_judge_args": {}}, [], "unknown key 'self_judge_args'"),
    ({"peft_config": {"rank": 8}}, [], "peft_config: unknown key 'rank'"),
    ({}, ["model.name=x"], "model: unknown key 'name'"),
    (arguments(), ["training_args.max_steps=ten"], "max_steps is 'ten'; expected int"),
    (arguments(), ["training_args.bf16=1"], "bf16 is 1; expected bool"),
    (arguments(), ["training_args.learning_rate=null"], "learning_rate is None; expected float"),
    ({}, ["jsft_args.max_length=long"], "max_length is 'long'; expected int"),
    ({"jsft_args": 512}, [], "section jsft_args is 512; expected keys with values"),
    ({"dataset": ...}, [], "dataset is required"),
    ({"model": {}}, [], "model.pretrained_model_name_or_path is required"),
    ({"training_args": {}}, [], "training_args.output_dir is required"),
    ({"templates": None}, [], "templates is required"),
    (arguments(eval_strategy="no", evaluation_strategy="no"), [], "both evaluation_strategy and"),
    ({}, ["max_steps"], "'max_steps': not an override; write section.key=value"),
    ({}, ["--x=1"], "'--x=1': not an override"),
    ({}, ["training_args.max_steps=[1"], "cannot be read as YAML with these overrides"),
])
def test_mistakes_are_one_line(sections, overrides, message, load):
    with pytest.raises(InputError, match=message) as stopped:
        load(*overrides, **sections)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1\nb: 2", "cannot be read as YAML"), ("- a\n- b", "expected sections with keys"),
    ("", "one of the sections"), ("jsft_args: {}\nx: 1", "unknown key 'x'")])
def test_broken_files(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(str(path))


def test_missing_file():
    for path in ("nowhere.yaml", "", "configs"):
        with pytest.raises(InputError, match="no such file; give a YAML file such as"):
            load_config(path)


def test_saved_config_is_the_same_run(load, tmp_path):
    config = load("training_args.max_steps=3", **arguments(evaluation_strategy="no"))
    config.save(tmp_path)
    again = load_config(str(tmp_path / "config.yaml"))
    assert again.resolved() == config.resolved() and again.notes == []
    assert "self_judge_args" not in config.resolved()
