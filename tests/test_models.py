"""Model names, precisions and LoRA targets; every wrong one is a clear line."""

import shutil
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
)

from lm import models
from lm.dropout import CheapDropout
from lm.records import InputError
from self_judge.base import Base, find_base


def test_embedded_name_is_its_folder_under_saved_models(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setattr(models, "SAVED_MODELS", tmp_path)
    with pytest.raises(InputError, match=r"get_model\.py smollm2-135m-instruct"):
        models.resolve_model(models.DEFAULT_MODEL)
    (tmp_path / models.DEFAULT_MODEL).symlink_to(tiny_llama)
    assert models.resolve_model(models.DEFAULT_MODEL) == str(tmp_path / models.DEFAULT_MODEL)


def test_other_folders_of_a_models_name_do_not_hide_it(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "SAVED_MODELS", tmp_path / "saved")
    for folder in (models.DEFAULT_MODEL, "org/name"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "alpaca_eval.json").write_text("[]")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / models.DEFAULT_MODEL).symlink_to(tiny_llama)
    assert models.resolve_model(models.DEFAULT_MODEL) == str(
        tmp_path / "saved" / models.DEFAULT_MODEL)
    # transformers takes any folder for a model, so it has to go
    with pytest.raises(InputError, match=r"no config\.json\); rename it if you mean the Hub's"):
        models.resolve_model("org/name")
    with pytest.raises(InputError, match=r"no config\.json\)$"):
        models.resolve_model(str(tmp_path / "org"))
    (tmp_path / models.DEFAULT_MODEL / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter"):
        models.resolve_model(models.DEFAULT_MODEL)


def test_hub_ids_pass_and_folders_stay(tiny_llama):
    assert models.resolve_model("gpt2") == "gpt2"
    assert models.resolve_model("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert models.resolve_model(str(tiny_llama)) == str(tiny_llama)


@pytest.mark.parametrize("name", ["", "./none", "../none", "/none", "~/none", "a/b/none", "none/",
                                  "tests/none"])
def test_missing_local_folder_is_not_taken_for_a_hub_id(name, monkeypatch):
    monkeypatch.chdir(models.SAVED_MODELS.parent)  # where tests/ is a folder
    with pytest.raises(InputError, match="no such model folder"):
        models.resolve_model(name)


def test_adapter_folder_is_not_a_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is an adapter.*merge\.py"):
        models.load_model(str(tmp_path))


def test_unreachable_model_is_one_line():
    for load in (models.load_tokenizer, models.load_model):
        with pytest.raises(InputError, match="org/none: cannot load the") as error:
            load("org/none")
        assert "\n" not in str(error.value)


def test_tokenizer_without_eos_is_refused(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(InputError, match="no EOS token"):
        models.load_tokenizer(str(tmp_path))


def test_auto_is_fp32_on_cpu_and_other_dtypes_are_kept(tiny_llama):
    for load_in, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        model = models.load_model(str(tiny_llama), load_in)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not models.is_quantized(model)
    with pytest.raises(InputError, match="one of auto, 8bit"):
        models.load_model(str(tiny_llama), "int8")


@pytest.mark.parametrize(("load_in", "stored"), [("8bit", torch.int8), ("4bit", torch.uint8)])
def test_quantized_base_trains_its_adapter_only(tiny_llama, load_in, stored):
    base = models.load_model(str(tiny_llama), load_in)
    assert base.model.layers[0].mlp.up_proj.weight.dtype == stored
    model = models.add_lora(base, 4, 8, 0.0, ["up_proj"], gradient_checkpointing=True)
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    gradients = [p.grad.abs().sum() for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2 and all(gradient > 0 for gradient in gradients)


def test_missing_bitsandbytes_is_one_line(tiny_llama, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match="needs bitsandbytes"):
        models.load_model(str(tiny_llama), "8bit")


def test_broken_quantization_is_one_line(tiny_llama, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel for this machine\nand a page of advice")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(InputError, match=r"4bit does not work on this machine \(no kernel"):
        models.load_model(str(tiny_llama), "4bit")
    with pytest.raises(RuntimeError):  # without quantization it is no input error
        models.load_model(str(tiny_llama), "fp32")


@pytest.mark.parametrize("targets", ["up_proj", ["gate_proj", "up_proj"], ("mlp.up_proj",)])
def test_lora_on_named_layers(tiny_llama, targets):
    model = models.add_lora(models.load_model(str(tiny_llama)), 4, 8, 0.1, targets)
    names = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert names and all("up_proj" in name or "gate_proj" in name for name in names)
    assert len(names) == (4 if isinstance(targets, list) else 2)


def test_an_adapter_on_the_hub_is_found_with_its_base(tiny_llama, tmp_path, monkeypatch):
    """Here in the Hub's cache, as a download leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--jsft"
    model = models.add_lora(models.load_model(str(tiny_llama)), 4, 8, 0.0, "all-linear")
    model.save_pretrained(folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    base = find_base({"pretrained_model_name_or_path": "org/jsft"})
    assert base.model == str(tiny_llama) and base.adapters[0].name == "0" * 40
    assert find_base({"pretrained_model_name_or_path": "org/none"}) == Base("org/none")
    with pytest.raises(InputError, match="org/jsft: holds an adapter, which a new one would repl"):
        models.refuse_adapter(models.load_model("org/jsft"), "org/jsft")


def test_an_adapter_beside_a_config_is_one(tiny_llama, tmp_path):
    model = models.add_lora(models.load_model(str(tiny_llama)), 4, 8, 0.0, "all-linear")
    model.save_pretrained(tmp_path)
    shutil.copy(tiny_llama / "config.json", tmp_path)  # as other trainers leave it there
    assert models.adapter_config(str(tmp_path)) == tmp_path / "adapter_config.json"
    assert models.adapter_config(str(tiny_llama)) is None


def test_layers_that_cannot_have_lora_are_one_line():
    """A mixture's experts are one parameter, on which peft allows no dropout."""
    config = MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(InputError, match=r"MixtralForCausalLM cannot have LoRA there .*dropout"):
        models.add_lora(MixtralForCausalLM(config), 4, 8, 0.1, "all-linear")


@pytest.mark.parametrize(("emulated", "dtype"), [(False, torch.bfloat16), (True, torch.float16)])
def test_4bit_computes_in_what_the_gpu_can(emulated, dtype, monkeypatch):
    """As the training around it: in fp16 on a T4 or V100."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported",
                        lambda including_emulation=True: including_emulation or not emulated)
    found, quantization = models._quantization("4bit", on_gpu=True)
    assert found == quantization.bnb_4bit_compute_dtype == dtype


def test_loras_dropout_is_the_cheap_one(tiny_llama):
    model = models.add_lora(models.load_model(str(tiny_llama)), 4, 8, 0.1, "all-linear")
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(dropouts) == 14 and {type(module) for module in dropouts} == {CheapDropout}
    assert all(module.p == 0.1 and module.training == model.training for module in dropouts)


def test_all_linear_works_on_gpt2_and_names_of_llama_do_not(tiny_gpt2):
    base = models.load_model(str(tiny_gpt2))
    with pytest.raises(InputError, match=r"gate_proj, down_proj; it has c_attn, c_fc, c_proj \(`"):
        models.add_lora(base, 4, 8, 0.0, ["gate_proj", "down_proj", "c_fc"])
    model = models.add_lora(base, 4, 8, 0.0, "all-linear")
    assert any("c_attn.lora_A" in name for name, _ in model.named_modules())


def test_module_stays_light(run_cli):
    """Commands import it before --help; torch would make that take seconds."""
    code = "import sys, lm.models; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert run_cli("-c", code).returncode == 0, sys.version


def test_checkpoint_precision_and_device_by_name(tiny_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert models.load_model(str(tmp_path), "checkpoint").dtype == torch.bfloat16
    assert models.load_model(str(tiny_llama), "checkpoint", device="cpu").dtype == torch.float32
    for device in ("cuda", "gpu"):  # there is no GPU in the tests
        with pytest.raises(InputError, match=f"--device is '{device}'"):
            models.load_model(str(tiny_llama), device=device)


def test_what_is_no_adapter_is_one_line(tiny_llama, tmp_path):
    with pytest.raises(InputError, match="no such adapter folder"):
        models.find_adapter(str(tmp_path / "none"))
    with pytest.raises(InputError, match="is not an adapter"):
        models.find_adapter(str(tiny_llama))
    with pytest.raises(InputError, match="org/none: no adapter folder here, and not reachable"):
        models.find_adapter("org/none")


def test_every_module_gets_its_own_mode_back(tiny_llama):
    model = models.load_model(str(tiny_llama)).train()
    frozen = model.model.layers[0].eval()
    with models.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and not any(module.training for module in frozen.modules())
