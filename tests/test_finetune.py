"""finetune_unlikelihood.py as a user runs it, on tiny models.

    python -m pytest tests/test_finetune.py

Most runs are made in this process, which saves the seconds of importing torch; those with several
processes, or that are killed, are real command lines.
"""

import fcntl
import inspect
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from training_runs import (
    ADAPTER,
    TORCHRUN,
    WORDS,
    adapter,
    assert_one_line,
    history,
    in_this_process,
    killed,
    losses,
    write_records,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.integrations import integration_utils

from cut import finetune
from finetune_unlikelihood import main
from lm import models, runs
from lm.records import InputError, sha256

SCRIPT = "finetune_unlikelihood.py"
HELD_OUT = 3
TRAINED = 21  # not a multiple of the batch size
STEPS = 6  # 2 epochs of 8 + 8 + 5 examples


def make_records(count: int, positive_every: int = 3) -> list[dict]:
    """Records of random words; every third response is good, the others are judged."""
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))

    return [{"id": index, "instruction": words(12), "input": "", "output": words(20),
             "judgment": None if positive_every and index % positive_every == 0 else words(8)}
            for index in range(count)]


def flags(**settings: object) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "train.jsonl",
                         make_records(TRAINED + HELD_OUT))


@pytest.fixture(scope="module")
def common(tiny_llama, data) -> dict:
    """Settings of every run here; a big learning rate, so that a difference would show."""
    return {"base_model": tiny_llama, "data_path": data, "batch_size": 8, "micro_batch_size": 4,
            "num_epochs": 2, "learning_rate": 1e-2, "warmup_steps": 2, "logging_steps": 1}


@pytest.fixture
def train(common, tmp_path):
    """Train in this process into `tmp_path / "run"`; keywords replace the common settings."""
    def train(*switches: str, **settings: object) -> SimpleNamespace:
        settings = {**common, "output_dir": tmp_path / "run", **settings}
        result = in_this_process(main, *flags(**settings), *switches)
        result.folder = Path(settings["output_dir"])
        return result
    return train


@pytest.fixture(scope="module")
def reference_settings(common) -> dict:
    """Adam turns noise in a gradient near 0 into a step of some 0.1 % of the learning rate."""
    return {**common, "learning_rate": 1e-3, "lora_dropout": 0, "val_set_size": HELD_OUT,
            "save_steps": 4}


@pytest.fixture(scope="module")
def reference(reference_settings, tmp_path_factory) -> Path:
    """A finished run, one example at a time: nobody may change it."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    result = in_this_process(main, *flags(**{**reference_settings, "micro_batch_size": 1},
                                    output_dir=folder))
    assert result.code == 0, result.err
    return folder


def epoch_losses(folder: Path) -> tuple[float, float]:
    """Sums over the three steps of each epoch."""
    steps = losses(folder)
    assert len(steps) == STEPS
    return sum(steps[:3]), sum(steps[3:])


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file."""
    return {str(path.relative_to(folder)): (sha256(path), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_run(folder: Path, other: Path, tolerance: float) -> None:
    ours, theirs = (history(each, "loss", "eval_loss", "learning_rate") for each in (folder, other))
    assert len(theirs) > STEPS and len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, abs=tolerance, rel=0)
    weights = adapter(other)
    assert adapter(folder).keys() == weights.keys()
    for name, tensor in adapter(folder).items():
        torch.testing.assert_close(tensor, weights[name], atol=tolerance, rtol=0)


# --- the result does not depend on how a batch is split

LAUNCHERS = {
    "torchrun": TORCHRUN,
    "accelerate": ["accelerate.commands.launch", "--config_file", "configs/accelerate_cpu.yaml"],
}


def test_reference_learns(reference):
    first, second = epoch_losses(reference)
    assert second < first - 0.1
    assert len(history(reference, "eval_loss")) == STEPS  # a tenth of the steps apart, at least one


@pytest.mark.parametrize("switches", [{"micro_batch_size": 8}, {"gradient_checkpointing": True}],
                         ids=["8 x 1", "gradient checkpointing"])
def test_same_result_in_one_process(switches, train, reference, reference_settings):
    result = train(**reference_settings | switches)
    assert result.code == 0
    assert_same_run(result.folder, reference, 1e-5)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_same_result_in_two_processes(launcher, reference, reference_settings, warm_venv,
                                      tmp_path):
    command = [warm_venv / "bin/python", "-m", *LAUNCHERS[launcher], SCRIPT,
               *flags(**reference_settings, output_dir=tmp_path)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("processes: 2 (MULTI_CPU) on cpu") == 1
    assert result.stdout.count("saved to") == 1
    assert json.loads((tmp_path / "run.json").read_text())["world_size"] == 2
    assert_same_run(tmp_path, reference, 1e-5)


# --- killed runs

def killed_after(arguments: list[str], lines: int) -> int:
    """Run until so many steps are logged; a small pipe keeps the run from getting far ahead."""
    with subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        for line in process.stdout:
            lines -= "'loss'" in line
            if not lines:
                process.kill()
                break
    return process.returncode


def test_killed_run_continues_to_the_same_bits(common, train, tmp_path):
    settings = {"batch_size": 4, "micro_batch_size": 2, "num_epochs": 7, "lora_dropout": 0.3,
                "save_steps": 3}
    whole = train(**settings, output_dir=tmp_path / "whole").folder
    folder = tmp_path / "run"
    arguments = flags(**common | settings, output_dir=folder)

    # While it writes a checkpoint: the weights are there, the optimizer is not.
    assert killed(main, arguments, "checkpoint-6/tokenizer_config.json", tmp_path / "shim") == -9
    assert (folder / "checkpoint-6" / ADAPTER).is_file()
    assert runs.last_checkpoint(folder) == str(folder / "checkpoint-3")
    assert json.loads((folder / "run.json").read_text())["status"] == "running"

    # At any moment, and with half a state file in the newest checkpoint.
    assert killed_after(arguments, lines=8) == -9
    newest = Path(runs.last_checkpoint(folder))
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    before = runs.last_checkpoint(folder)
    assert before != str(newest)

    result = train(**settings)
    assert f"continuing from {before}\n" in result.out
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert losses(folder) == losses(whole) and len(losses(whole)) == 42


def test_checkpoint_is_whole_only_with_the_states_of_all_processes(train, reference,
                                                                   reference_settings, tmp_path):
    """The second of two processes dies before it writes its random state; one alone continues."""
    folder = tmp_path / "run"
    settings = reference_settings | {"save_steps": 2}
    assert killed(main, flags(**settings, output_dir=folder), "checkpoint-4", tmp_path / "shim",
                  ["-m", *LAUNCHERS["torchrun"]], die_rank=1) != 0
    assert (folder / "checkpoint-4/rng_state_0.pth").is_file()
    assert not (folder / "checkpoint-4/rng_state_1.pth").exists()
    assert runs.last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert (folder / "checkpoint-2/rng_state_1.pth").is_file()

    result = train(**settings)
    assert f"continuing from {folder / 'checkpoint-2'}\n" in result.out
    assert_same_run(folder, reference, 1e-5)


def test_kill_before_the_first_checkpoint_leaves_nothing_to_continue(train, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "load_model", interrupt)
        result = train()
    assert result.code == 130 and "same command again" in result.err
    result = train(max_steps=1)  # other settings: there is nothing that they could spoil
    assert result.code == 0 and "continuing" not in result.out


@pytest.fixture
def unfinished(reference, tmp_path) -> Path:
    """The reference run as a kill after checkpoint-4 would have left it."""
    folder = shutil.copytree(reference, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    (folder / ADAPTER).unlink()
    shutil.rmtree(folder / "checkpoint-6")
    return folder


def test_kill_after_the_last_step_only_saves(train, unfinished, reference, reference_settings):
    shutil.copytree(reference / "checkpoint-6", unfinished / "checkpoint-6")
    result = train(**reference_settings)
    assert result.code == 0 and "continuing from" in result.out
    assert (unfinished / ADAPTER).read_bytes() == (reference / ADAPTER).read_bytes()
    assert losses(unfinished) == losses(reference)


@pytest.mark.parametrize("limit", [30_000, 100_000], ids=["adapter", "optimizer"])
def test_full_disk(limit, train, unfinished, reference, reference_settings):
    """Files cannot grow beyond a limit, like on a full disk; then they can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        result = train(**reference_settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    last = result.err.splitlines()[-1]  # after the progress bars
    assert result.code == 2 and last.startswith(f"error: {unfinished}: cannot write"), result.err
    assert runs.last_checkpoint(unfinished) == str(unfinished / "checkpoint-4")
    assert train(**reference_settings).code == 0
    assert_same_run(unfinished, reference, 1e-5)


def test_finished_run_says_so_and_changes_nothing(train, reference, reference_settings):
    before = snapshot(reference)
    result = train(**reference_settings | {"output_dir": reference, "micro_batch_size": 1})
    assert result.code == 0 and result.err == ""
    assert f"{reference}: this run is finished" in result.out
    assert snapshot(reference) == before


@pytest.mark.parametrize(("change", "message"), [
    ({"threshold": 1.2}, r"holds a run with other settings \(threshold 1.1 -> 1.2\)"),
    ({"resume_from_checkpoint": "nowhere"}, "nowhere: not a whole checkpoint"),
    ({"resume_from_checkpoint": ROOT / "configs"}, "configs: not a whole checkpoint"),
])
def test_finished_run_is_safe_from(change, message, train, reference, reference_settings):
    before = snapshot(reference)
    assert_one_line(train(**reference_settings | {"output_dir": reference} | change), message)
    assert snapshot(reference) == before


def test_other_data_in_the_same_folder(train, unfinished, reference_settings, tmp_path):
    other = write_records(tmp_path / "other.jsonl", make_records(30))
    result = train(**reference_settings | {"data_path": other})
    assert_one_line(result, f"other settings .*contents of {other}")


def test_start_over(train, unfinished, reference_settings):
    settings = reference_settings | {"threshold": 1.2, "max_steps": 1}
    result = train(**settings, resume_from_checkpoint=False)
    assert result.code == 0 and "continuing" not in result.out
    assert len(losses(unfinished)) == 1
    assert not (unfinished / "checkpoint-4").exists()


def test_checkpoints_of_an_unknown_run(train, unfinished, reference_settings):
    (unfinished / "run.json").unlink()
    assert_one_line(train(**reference_settings), "checkpoint-4: belongs to a run without run.json")


def test_last_checkpoint_is_the_newest_whole_one(tmp_path):
    states = {"9": '{"global_step": 9}', "10": '{"global_step": 10}', "11": '{"glob', "12": None,
              "99-copy": '{"global_step": 99}'}
    for name, state in states.items():
        folder = tmp_path / f"checkpoint-{name}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert runs.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert runs.last_checkpoint(tmp_path / "nothing") is None


# --- what is trained, and in what precision


def test_every_trained_parameter_moves_and_no_other(train, tiny_llama, monkeypatch):
    trained = []
    save = finetune.save
    monkeypatch.setattr(finetune, "save", lambda *run: (trained.append(run[1].model), save(*run)))
    result = train(lora_target_modules="all-linear")
    set_seed(42)  # the default of --seed
    start = models.add_lora(models.load_model(str(tiny_llama)), 16, 16, 0.05, "all-linear")
    after = trained[0].state_dict()
    lora = {name for name in after if "lora_" in name}
    assert len(lora) == 2 * 2 * 7  # A and B of seven projections in two layers
    assert {name for name, tensor in start.state_dict().items()
            if not torch.equal(tensor, after[name])} == lora
    assert {name.replace(".default", "") for name in lora} == adapter(result.folder).keys()


def test_full_finetuning_moves_every_weight(train, tiny_llama):
    result = train("--full_finetune", learning_rate=1e-3)
    assert result.code == 0
    before = load_file(tiny_llama / "model.safetensors")
    after = AutoModelForCausalLM.from_pretrained(result.folder).state_dict()
    assert all(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    first, second = epoch_losses(result.folder)
    assert second < first
    assert AutoTokenizer.from_pretrained(result.folder).eos_token == "</s>"


def test_weights_trained_in_bf16_are_told_but_for_deepspeed(train, monkeypatch):
    told = "the trained weights are bf16 themselves"
    assert told in train("--full_finetune", load_in="bf16", max_steps=1).out
    assert told not in train(load_in="bf16", max_steps=1).out  # the adapter is fp32
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not models.note_on_bf16("bf16")


def test_other_architecture(train, tiny_gpt2):
    result = train(base_model=tiny_gpt2)  # the default names are Llama's
    assert result.code == 2
    assert re.search("^error: .*no layer gate_proj.*has c_attn, c_fc, c_proj", result.err, re.M)
    result = train(base_model=tiny_gpt2, lora_target_modules="c_fc,c_proj")
    assert result.code == 0
    assert {name.split(".")[-3] for name in adapter(result.folder)} == {"c_fc", "c_proj"}
    first, second = epoch_losses(result.folder)
    assert second < first


def test_4bit_trains_as_its_dequantized_weights_do(train, tiny_llama, tmp_path):
    """bitsandbytes has kernels without gradients, which evaluation must not switch on."""
    pytest.importorskip("bitsandbytes")
    plain = models.load_model(str(tiny_llama), "4bit").dequantize()
    plain.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "plain")
    settings = {"lora_dropout": 0, "val_set_size": HELD_OUT}
    result = train(**settings, load_in="4bit")
    assert result.code == 0
    other = train(**settings, base_model=tmp_path / "plain", output_dir=tmp_path / "other")
    assert_same_run(result.folder, other.folder, 1e-3)


def test_8bit_trains_nearly_as_full_precision(train, tmp_path):
    pytest.importorskip("bitsandbytes")
    result = train(lora_dropout=0, load_in="8bit")
    assert result.code == 0
    full = losses(train(lora_dropout=0, output_dir=tmp_path / "full").folder)
    assert losses(result.folder) == pytest.approx(full, abs=0.1)


def test_8bit_where_it_cannot_work(common, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(  # Python's way to say: not installed
        "import sys; sys.modules['bitsandbytes'] = None")
    result = subprocess.run(
        [sys.executable, SCRIPT, *flags(**common, output_dir=tmp_path / "run", load_in="8bit")],
        cwd=ROOT, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    result.code, result.err = result.returncode, result.stderr
    assert_one_line(result, "--load_in 8bit needs bitsandbytes.*use --load_in bf16 or fp32")


# --- the other flags


def test_validation_tracker_grouping_and_inputs(train, tmp_path):
    settings = {"val_set_size": 0.125, "lora_dropout": 0}  # 3 of 24
    plain = train(**settings, output_dir=tmp_path / "plain").folder
    result = train("--group_by_length", "--train_on_inputs", **settings, report_to="tensorboard")
    assert result.code == 0 and f"on {TRAINED} examples" in result.out
    assert list(result.folder.rglob("events.out.tfevents.*"))
    assert len(history(result.folder, "eval_loss")) == STEPS
    assert losses(result.folder)[0] != losses(plain)[0]
    assert not list(plain.rglob("events.*"))


def test_what_one_record_teaches_is_held_out_together(train):
    """Forward prediction makes two examples of a judged record."""
    result = train("--dry_run", objective="forward", val_set_size=12)
    assert "24 records: 16 negative" in result.out and "forward, 40 examples" in result.out
    (held_out,) = re.findall(r"validation: (\d+) examples", result.out)
    sources = [str(number // 2) for number in range(40)]
    split = finetune._held_out(sources, 0.5)
    assert 12 < int(held_out) < 24 and len(split) == 20
    assert all((number in split) == (number ^ 1 in split) for number in range(40))


def test_debug_is_two_steps_of_sixteen_examples(train):
    result = train(debug=True, logging_steps=10)
    assert "trained 2 steps on 16 examples" in result.out
    assert len(losses(result.folder)) == 2


@pytest.mark.parametrize("as_in_paper", [False, True])
def test_as_in_paper_adds_where_the_released_code_averages(as_in_paper, train, tmp_path):
    judged = write_records(tmp_path / "judged.jsonl", make_records(8, positive_every=0))
    result = train(data_path=judged, as_in_paper=as_in_paper, num_epochs=1)
    assert "no Align-P examples" in result.out
    (step,) = history(result.folder, "loss", "mle", "unlikelihood")
    total = step["mle"] + step["unlikelihood"]
    assert step["loss"] == pytest.approx(total if as_in_paper else total / 2, rel=1e-5)
    gamma = json.loads((result.folder / "run.json").read_text())["settings"]["gamma"]
    assert gamma == (1 if as_in_paper else 0)


@pytest.mark.parametrize(("told", "seconds"), [({}, 1800), ({"timeout": timedelta(hours=2)}, 7200)])
def test_processes_wait_half_an_hour_for_each_other_or_as_told(told, seconds, monkeypatch):
    """torch's own default for GPUs, ten minutes, is less than writing a large model may take."""
    noted = {}
    monkeypatch.setattr("accelerate.PartialState", lambda **options: noted.update(options) or
                        SimpleNamespace(num_processes=1, is_main_process=False))
    assert runs.world_size(**told) == 1
    assert noted["timeout"].total_seconds() == seconds


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match=r"8 processes on this node, which has 2 GPUs; .*=2 "):
        runs.world_size()


def test_a_gpu_that_torch_does_not_find_is_told(monkeypatch, capsys):
    """Or a 13B model would be trained on the CPU, for weeks."""
    monkeypatch.setattr("shutil.which", {"nvidia-smi": "/usr/bin/nvidia-smi"}.get)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runs.world_size()
    assert "warning: this machine has nvidia-smi, but torch" in capsys.readouterr().err
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        runs.world_size()
        assert capsys.readouterr().err == ""


def test_quantized_layers_are_not_compiled(train):
    result = train("--torch_compile", load_in="8bit")
    assert result.code == 2 and "--torch_compile gains nothing" in result.err


def test_run_record(train, data):
    result = train("--weight-unlike", "0.5")
    record = json.loads((result.folder / "run.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 6
    assert record["settings"]["weight_unlike"] == 0.5
    assert record["settings"]["lora_target_modules"] == ["gate_proj", "down_proj", "up_proj"]
    assert record["data"] == {"path": str(data), "sha256": sha256(data)}
    assert record["versions"]["torch"] == version("torch")
    assert record["counts"]["negatives"] == 16
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True,
                              capture_output=True).stdout.strip()
    assert (record["git_revision"] or "").rstrip("+") == revision  # both empty outside a checkout


def test_dry_run_shows_and_writes_nothing(train, data):
    result = train("--dry_run", val_set_size=HELD_OUT)
    assert result.code == 0
    for text in ("24 records: 16 negative, 8 of 8 positive used", "--- Align-N, ", "--- Misalign, ",
                 "--- Align-P, ", "### Judgment:", "▮", "</s>", "of 21 examples",
                 "validation: 3 examples", "steps: 6, 8 examples each",
                 "learning rate peaks at 0.01", "memory, an estimate: "):
        assert text in result.out
    assert not result.folder.exists()


def test_dry_run_warns_of_a_schedule_that_never_warms_up(train):
    result = train("--dry_run", warmup_steps=100, learning_rate=1e-3)
    assert "fewer than warmup_steps 100, so the learning rate climbs to 5e-05" in result.out


@pytest.mark.parametrize("name", finetune.WITHOUT_WARMUP)
def test_schedules_without_warm_up_are_told_as_they_are(name, train):
    """What the dry run says, and what the Trainer does."""
    settings = {"lr_scheduler": name, "warmup_steps": 100, "max_steps": 1, "val_set_size": HELD_OUT}
    told = f"learning rate starts at 0.01: {name} has no warm-up"
    assert told in train("--dry_run", **settings).out
    assert history(train(**settings).folder, "learning_rate")[0]["learning_rate"] == 0.01


def test_settings_are_checked_for_processes_to_come(common):
    defaults = {name: each.default for name, each in inspect.signature(main).parameters.items()}
    given = {**defaults, **common, "output_dir": "run"}
    settings = finetune.check(given, processes=2)
    assert (settings.world_size, settings.accumulation) == (2, 1)
    assert finetune.check(given).accumulation == 2
    with pytest.raises(InputError, match=r"--batch_size 8 is not a multiple .* 4 x 3 proc"):
        finetune.check(given, processes=3)


@pytest.mark.parametrize(("logging_steps", "logged"), [(4, [1, 4, 6]), (3, [1, 3, 6]),
                                                       (10, [1, 6])])
def test_the_last_step_is_logged_once(logging_steps, logged, train):
    result = train(logging_steps=logging_steps, lr_scheduler="constant", lora_dropout=0)
    lines = history(result.folder, "loss", "mle")
    assert [line["step"] for line in lines] == logged and all("mle" in line for line in lines)
    record = json.loads((result.folder / "run.json").read_text())
    assert [record["first_loss"], record["last_loss"]] == [lines[0]["loss"], lines[-1]["loss"]]


def test_the_last_step_of_dpo_is_logged_once(train, tmp_path):
    data = write_records(tmp_path / "refined.jsonl", [
        {**record, "i_ans": "the cat ran"} for record in make_records(12, positive_every=0)])
    settings = {"objective": "ilf_dpo", "data_path": data, "batch_size": 4, "num_epochs": 1}
    for steps in (2, 3):
        folder = train(**settings, logging_steps=steps, output_dir=tmp_path / str(steps)).folder
        lines = [line for line in history(folder, "loss", "rewards/margins") if "loss" in line]
        assert [line["step"] for line in lines] == [1, *([2] if steps == 2 else []), 3]
        assert all("rewards/margins" in line for line in lines)


def test_a_logged_loss_is_the_mean_since_the_line_before(train, tmp_path):
    each = losses(train(output_dir=tmp_path / "each").folder)
    some = losses(train(logging_steps=4).folder)
    assert some == pytest.approx([each[0], sum(each[1:4]) / 3, sum(each[4:]) / 2], rel=1e-6)


def test_supervised_tokens_follow_train_on_inputs(train):
    def supervised(*switches):
        return [int(n) for n in re.findall(r"the last (\d+) supervised",
                                           train("--dry_run", *switches).out)]
    plain, inputs = supervised(), supervised("--train_on_inputs")
    assert [a > b for a, b in zip(inputs, plain, strict=True)] == [True, False, True]


@pytest.mark.parametrize(("setting", "counts"), [
    ({}, "1 negative, 6 of 6 positive used, 2 with a failed judgment dropped"),
    ({"as_released": True}, "3 negative, 6 of 6 positive used, 0 with a failed judgment dropped"),
    ({"downsample": 2}, "1 negative, 2 of 6 positive used, 2 with a failed judgment dropped"),
])
def test_which_records_count(setting, counts, train, tmp_path):
    records = make_records(9, positive_every=1)
    for record, judgment in zip(records, ("$ERROR$", " ", "Too long."), strict=False):
        record["judgment"] = judgment
    path = write_records(tmp_path / "records.jsonl", records)
    assert f"9 records: {counts}" in train("--dry_run", data_path=path, **setting).out


def test_visualize(train):
    pytest.importorskip("cut.heatmap")
    result = train(visualize=2)
    assert result.code == 0 and str(result.folder / "judgments.html") in result.out
    assert "record 1 " in result.out and "record 2 " in result.out and "record 4 " not in result.out
    assert [path.name for path in result.folder.iterdir()] == ["judgments.html"]
    assert train().code == 0  # the folder is still free for the run


def test_loss_that_is_not_finite_stops_with_the_record(train, data):
    result = train(learning_rate=1e30, save_steps=1)
    last = result.err.splitlines()[-1]
    assert result.code == 2
    assert re.match(rf"error: {data}: record \d+ .*not finite at step 3", last), result.err
    assert runs.last_checkpoint(result.folder) == str(result.folder / "checkpoint-2")


# --- bad input: one line, and nothing is written

GOOD = {"instruction": "a", "output": "b", "judgment": "c"}
FILES = {
    "empty": ("", "holds no records"),
    "broken": (json.dumps(GOOD) + "\n{'a'}\n", "line 2: broken JSON"),
    "list": (f"[{json.dumps(GOOD)},\n{{]", "line 2: broken JSON"),
    "number": (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "output": 7}),
               "record 1: field 'output' is a number; expected text"),
    "missing": ('{"instruction": "a", "output": "b"}',
                "record 0: field 'judgment' is missing; expected text or null"),
    "good": (json.dumps({**GOOD, "judgment": None}), "no record has a negative judgment"),
    "scored": (json.dumps({**GOOD, "score": 7}), "no record has a negative judgment"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_data(name, train, tmp_path):
    text, message = FILES[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_text(text)
    result = train(data_path=path)
    assert_one_line(result, f"^error: {path}: .*{re.escape(message)}")
    assert not result.folder.exists()


@pytest.mark.parametrize(("settings", "message"), [
    ({"data_path": "nowhere/at/all.json"}, "nowhere/at/all.json: no such file"),
    ({"data_path": ""}, "--data_path is required"),
    ({"data_path": ROOT / "data/sample"}, "data/sample: is a folder; give one of its .json, "),
    ({"base_model": "nobody/has-this"}, "nobody/has-this: cannot load the tokenizer"),
    ({"base_model": "./nowhere"}, "'./nowhere': no such model folder"),
    ({"batch_size": 10}, r"--batch_size 10 is not a multiple of --micro_batch_size 4 x 1 proc"),
    ({"cutoff_len": 10}, "--cutoff_len 10 leaves no room for a response"),
    ({"prompt_template_name": "alpacca"}, "alpacca: unknown template; use one of alpaca"),
    ({"prompt_template_name": "alpaca_positive", "objective": "forward"},
     "alpaca_positive says 'The response is satisfactory.' of every response, .* use alpaca"),
    ({"load_in": "3bit"}, "--load_in is '3bit'; expected one of auto"),
    ({"load_in": "8bit", "full_finetune": True}, "--full_finetune cannot train --load_in 8bit"),
    ({"report_to": "none,tensorboard"}, "none and all stand alone"),
    ({"report_to": "paper"}, "report_to 'paper': unknown; use none, all, or some of azure_ml"),
    ({"lr_scheduler": "cosin"}, "cosin is not a valid SchedulerType"),
    ({"lr_scheduler": "cosine_with_min_lr"}, "--lr_scheduler cosine_with_min_lr cannot be used"),
    ({"lr_scheduler": "warmup_stable_decay"}, "warmup_stable_decay cannot be used .*use another"),
    ({"lr_scheduler": "greedy"}, "--lr_scheduler greedy follows .* add --val_set_size"),
    ({"val_set_size": 24}, "--val_set_size 24 leaves nothing of 24 records to train on"),
    ({"val_set_size": 0.01}, "--val_set_size 0.01 holds out nothing of 24 records"),
    ({"lora_r": 0}, "--lora_r is 0; expected 1 or more"),
    ({"learning_rate": "fast"}, "--learning_rate is 'fast'; expected float"),
    ({"learning_rate": -1}, "--learning_rate is -1; expected 0 or more"),
    ({"learning_rate": "1e999"}, r"--learning_rate is inf; expected 1e\+30 or less"),
    ({"num_epochs": "1e308"}, r"--num_epochs is 1e\+308; expected 4294967295 or less"),
    ({"seed": 2**32}, "--seed is 4294967296; expected 4294967295 or less"),
    ({"seed": -1}, "--seed is -1; expected 0 or more"),
    ({"lora_alpha": 0}, "--lora_alpha is 0; expected 1 or more"),
    ({"lora_dropout": 1}, "--lora_dropout is 1; expected less than 1"),
    ({"lora_target_modules": "[1,2]"}, r"--lora_target_modules is \[1, 2\]; expected names"),
    ({"visualize": -1}, "--visualize is -1; expected 0 or more"),
    ({"max_steps": -5}, "--max_steps is -5; expected -1 or more"),
    ({"max_steps": 0}, "leave no step to train"),
    ({"batchsize": 8}, "unknown flag --batchsize; did you mean --batch_size?"),
], ids=lambda value: " ".join(flags(**value)) if isinstance(value, dict) else "")
def test_bad_settings(settings, message, train):
    result = train(**settings)
    assert_one_line(result, message)
    assert not (result.folder / ADAPTER).exists()


@pytest.mark.parametrize("setting", [{"report_to": "wandb"}, {"wandb_project": "mine"}])
def test_tracker_that_is_not_installed(setting, train, monkeypatch):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [])
    assert_one_line(train(**setting), "report_to wandb: not installed; pip install wandb")


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_unwritable_output(below, train, tmp_path):
    """A file stands where the folder should be (permissions do not stop the root user of CI)."""
    (tmp_path / "file").write_text("precious")
    result = train(output_dir=tmp_path / "file" / below)
    assert_one_line(result, f"^error: {tmp_path / 'file'}.*: (File exists|Not a directory)")
    assert (tmp_path / "file").read_text() == "precious"


def test_processes_that_would_train_alone(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = train()
    assert_one_line(result, "WORLD_SIZE is 2, but RANK, .*MASTER_ADDR.* not set.* use torchrun")
    assert not result.folder.exists()
