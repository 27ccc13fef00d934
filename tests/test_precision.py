"""Scores and adapters that stay in fp32 where accelerate and trl would round them to bf16.

    python -m pytest tests/test_precision.py

FSDP2 is real, on two processes over gloo; only the look for a GPU is replaced, without which
accelerate refuses to shard.
"""

import pytest
import torch
from tiny_judge import save_tiny_judge
from training_runs import (
    adapter,
    history,
    in_this_process,
    in_two_processes,
    losses,
    preference_data,
    write_records,
)

import finetune_unlikelihood
import train_jsft

RECORDS = [{"instruction": f"Say {word}.", "output": f"the {word} " * (3 + place % 4),
            "judgment": None, "score": place % 5}
           for place, word in enumerate(["cat", "dog", "mat"] * 6)]
JUDGED = [{**record, "score": None, "judgment": "It is no answer." if place % 2 else None}
          for place, record in enumerate(RECORDS)]
SHARDED = """
import atexit, runpy, sys
import torch
from accelerate import state
from accelerate.utils import DistributedType

torch.set_num_threads(1)
State, AllState = state.PartialState, state.AcceleratorState
start, start_all = State.__init__, AllState.__init__
State.__init__ = lambda self, cpu=False, **options: start(self, cpu=False, **options)
State._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
State.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
AllState.__init__ = lambda self, *_, **options: start_all(
    self, **options | {"cpu": False, "mixed_precision": "bf16"})
atexit.register(lambda: print("gradients are summed in", AllState._shared_state[
    "fsdp_plugin"].mixed_precision_policy.reduce_dtype))
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flags(tiny_llama, data, folder, **more) -> list[str]:
    return [f"--{name}={value}" for name, value in {
        "base_model": tiny_llama, "data_path": data, "output_dir": folder, "batch_size": 4,
        "micro_batch_size": 2, "max_steps": 3, "warmup_steps": 0, "learning_rate": 1e-3,
        "logging_steps": 1, "lora_dropout": 0, "load_in": "bf16", **more}.items()]


def sharded(script, *words: str) -> None:
    """The command on two processes under FSDP2 in bf16."""
    script.write_text(SHARDED)
    done = in_two_processes(
        script, *words, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2",
        FSDP_RESHARD_AFTER_FORWARD="true", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "gradients are summed in torch.float32" in done.stdout


@pytest.mark.parametrize(("objective", "records"), [("cut", JUDGED), ("dpo", RECORDS)])
def test_fsdp2_in_bf16_has_the_losses_of_one_process(objective, records, tiny_llama, tmp_path):
    """DPO's first is log 2: policy and reference are the same, which rounding would hide."""
    data = write_records(tmp_path / "data.jsonl", records)
    sharded(tmp_path / "script.py", "finetune_unlikelihood.py", *flags(
        tiny_llama, data, tmp_path / "two", objective=objective))
    alone = in_this_process(finetune_unlikelihood.main, *flags(
        tiny_llama, data, tmp_path / "one", objective=objective, load_in="fp32"))
    assert alone.code == 0, alone.err
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 3 and two == pytest.approx(one, abs=2e-2)
    if objective == "dpo":
        assert two[0] == pytest.approx(0.693147, abs=1e-6)
        margins = history(tmp_path / "two", "rewards/margins")
        assert margins[0]["rewards/margins"] == 0 != margins[2]["rewards/margins"]


def test_self_judges_trainings_under_fsdp2(tmp_path):
    """JSFT with the losses of one process; self-training samples, judges, and starts at log 2."""
    data, model = preference_data(tmp_path / "data").hh, tmp_path / "judge"
    save_tiny_judge(model)
    settings = {"model.pretrained_model_name_or_path": model, "dataset.path": data,
                "training_args.gradient_accumulation_steps": 1, "training_args.max_steps": 2,
                "training_args.warmup_steps": 0, "training_args.logging_steps": 1,
                "training_args.eval_strategy": "no"}

    def words(kind: str, rows: int, folder: str, **more) -> list[str]:
        own = {"training_args.per_device_train_batch_size": rows,
               "training_args.output_dir": tmp_path / folder, **more}
        return [f"--config=configs/hh_{kind}.yaml",
                *(f"{name}={value}" for name, value in (settings | own).items())]

    jsft = {"jsft_args.max_length": 512, "peft_config.lora_dropout": 0}
    sharded(tmp_path / "script.py", "train_jsft.py", *words("jsft", 2, "two", **jsft))
    alone = in_this_process(train_jsft.main, *words("jsft", 4, "one", **jsft))
    assert alone.code == 0, alone.err
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-2)
    sharded(tmp_path / "script.py", "train_self_judge.py", *words(
        "self_judge", 2, "policy", **{"self_judge_args.max_length": 256,
                                      "self_judge_args.max_new_tokens": 8}))
    first, _ = losses(tmp_path / "policy")
    assert first == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("objective", ["cut", "dpo"])
def test_adapters_on_8bit_weights_are_fp32(objective, tiny_llama, tmp_path):
    """trl casts its own to bf16, in which an update of 5e-5 vanishes."""
    data = write_records(tmp_path / "data.jsonl", RECORDS if objective == "dpo" else JUDGED)
    result = in_this_process(finetune_unlikelihood.main, *flags(
        tiny_llama, data, tmp_path / "run", objective=objective, load_in="8bit", max_steps=1))
    assert result.code == 0, result.err
    assert {weight.dtype for weight in adapter(tmp_path / "run").values()} == {torch.float32}
