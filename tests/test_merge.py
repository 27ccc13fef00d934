"""A merged model is plain, whole and exact, or is not there at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import merge
from lm.models import add_lora, load_model
from lm.records import InputError

IDS = torch.arange(1, 30)[None]


def make_adapter(base: Path, folder: Path, load_in: str = "fp32", seed: int = 0) -> Path:
    """An adapter after one large step of training on the base in some precision."""
    torch.manual_seed(seed)
    model = add_lora(load_model(str(base), load_in), 8, 16, 0.0, "all-linear")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("load_in", ["fp32", "8bit", "4bit"])
def test_merged_model_has_the_logits_of_base_and_adapter(model, load_in, request, tmp_path):
    base = request.getfixturevalue(model)
    adapter = make_adapter(base, tmp_path / "adapter", load_in)
    output = tmp_path / "merged"
    merge.main(str(base), str(adapter), str(output), "cpu")
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}  # also of a quantized run
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    adapted = logits(PeftModel.from_pretrained(plain, adapter))
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)
    assert (adapted - before).abs().max() > 0.1  # or the test could not fail
    assert AutoTokenizer.from_pretrained(output).eos_token == "</s>"
    assert sorted(file.name for file in output.glob("*.safetensors")) == ["model.safetensors"]
    assert not list(output.glob("adapter*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_stays_so(tiny_llama, tmp_path, dtype):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge.main(str(base), str(adapter), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["dtype"] in str(dtype)


def test_second_merge_is_a_no_op_and_another_adapter_an_error(tiny_llama, tmp_path, capsys):
    first = make_adapter(tiny_llama, tmp_path / "first")
    second = make_adapter(tiny_llama, tmp_path / "second", seed=1)
    output = tmp_path / "merged"
    merge.main(str(tiny_llama), str(first), str(output))
    written = (output / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    merge.main(str(tiny_llama), str(first), str(output))
    assert "already merged" in capsys.readouterr().out
    with pytest.raises(InputError, match="another origin"):
        merge.main(str(tiny_llama), str(second), str(output))
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    merge.main(str(tiny_llama), str(second), str(output), overwrite=True)
    assert (output / "model.safetensors").stat().st_mtime_ns != written


def test_a_base_that_was_written_again_is_another_origin(tiny_llama, tmp_path):
    """The next round's base lies where the last one's did."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    adapter, output = make_adapter(base, tmp_path / "adapter"), tmp_path / "merged"
    merge.main(str(base), str(adapter), str(output))
    weights = load_file(base / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()},
              base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="another origin"):
        merge.main(str(base), str(adapter), str(output))


def test_another_base_than_the_adapters_is_told(tiny_llama, tmp_path, capsys):
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    merge.main(str(tiny_llama), str(adapter), str(tmp_path / "merged"))
    assert "note:" not in capsys.readouterr().out
    merge.main(str(tmp_path / "merged"), str(adapter), str(tmp_path / "twice"))
    assert capsys.readouterr().out.startswith(
        f"note: {adapter} was trained on {tiny_llama}, not on {tmp_path}/merged\n")


@pytest.mark.parametrize(("noted", "base", "other"), [
    ("org/llama", "moved/llama", False), ("org/llama", "org/cat", True), (None, "org/cat", False),
    ("first/model", "second/model", True), ("first/model", "first/../first/model", False)])
def test_folders_move_with_their_names(noted, base, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("first/model", "second/model", "moved/llama"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": noted}))
    assert merge.other_base(base, tmp_path) == (noted if other else None)


def test_a_broken_adapter_is_one_line(tiny_llama, tmp_path):
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="the adapter does not fit"):
        merge.main(str(tiny_llama), str(adapter), str(tmp_path / "merged"))


def test_wrong_merge_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    # A merge that forgets the adapter: the base's own weights are saved.
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(InputError, match="logits differ by"):
        merge.main(str(tiny_llama), str(adapter), str(tmp_path / "out" / "merged"))
    assert list((tmp_path / "out").iterdir()) == []


def test_check_knows_a_forgotten_adapter_below_the_tolerance_of_bf16():
    base = torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(0))
    adapted = base * 1.01
    merge.check(adapted * 1.001, adapted, base, 0.08)
    merge.check(base, base, base, 0.08)  # an adapter without effect is no error
    with pytest.raises(InputError, match="base without the adapter"):
        merge.check(base, adapted, base, 0.08)
    with pytest.raises(InputError, match="differ by nan"):
        merge.check(adapted * torch.nan, adapted, base, 0.08)


def test_nothing_but_a_model_is_ever_replaced(tiny_llama, tmp_path):
    adapter = make_adapter(tiny_llama, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.json").write_text("{}")
    for output in (tmp_path / "run", adapter):
        with pytest.raises(InputError, match="holds the model or adapter"):
            merge.main(str(tiny_llama), str(adapter), str(output), overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("keep")
    with pytest.raises(InputError, match="no model"):
        merge.main(str(tiny_llama), str(adapter), str(tmp_path / "notes"), overwrite=True)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "keep"
    assert (adapter / "adapter_config.json").is_file()


def test_sampling_values_without_sampling_do_not_stop_the_merge(tiny_llama, tmp_path):
    """As in the first LLaMA-2 checkpoints; transformers refuses to save them."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": 0, "do_sample": False, "temperature": 0.9, "top_p": 0.6}))
    adapter = make_adapter(base, tmp_path / "adapter")
    merge.main(str(base), str(adapter), str(tmp_path / "merged"))
    saved = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert saved.eos_token_id == 0 and not saved.do_sample


@pytest.mark.parametrize(("flags", "message"), [
    (["--peft_model_path", "./none"], "no such adapter folder"),
    (["--peft_model_path", "tests"], "is not an adapter"),
    (["--peft_model_path", "x", "--overwite"], "did you mean --overwrite?"),
])
def test_bad_command_line_is_one_line(flags, message, tiny_llama, tmp_path, run_cli):
    done = run_cli("merge.py", "--base_model_name_or_path", tiny_llama, "--output_dir",
                   tmp_path / "out", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_architecture_and_missing_gpu(tiny_llama, tiny_gpt2, tmp_path):
    adapter = make_adapter(tiny_gpt2, tmp_path / "adapter")
    with pytest.raises(InputError, match="the adapter does not fit"):
        merge.main(str(tiny_llama), str(adapter), str(tmp_path / "out" / "merged"))
    with pytest.raises(InputError, match="--device is 'cuda'"):
        merge.main(str(tiny_gpt2), str(adapter), str(tmp_path / "out" / "merged"), "cuda")
    assert list((tmp_path / "out").iterdir()) == []
