"""Which models run rows end to end, and that nothing else about them changes.

    python -m pytest tests/test_packing.py
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lm import packing
from lm.packing import BY_ROW, enable_packing, row_bounds

SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny(kind, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gpt_neox", "opt", "phi"])
def test_most_architectures_can(kind):
    more = {"opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "qwen3": {"head_dim": 8}}
    assert enable_packing(tiny(kind, **more.get(kind, {})), on_cpu=True)


@pytest.mark.parametrize(("kind", "more"), [
    ("mistral", {"sliding_window": 8}), ("gemma3_text", {"head_dim": 8}), ("mamba", {}),
    ("bloom", {}), ("llama", {"attn_implementation": "eager"}),
    ("mixtral", {"num_local_experts": 2, "output_router_logits": True})])
def test_where_tokens_meet_in_other_ways_the_model_stays_as_it_is(kind, more):
    model = tiny(kind, **more)
    attention = model.config._attn_implementation
    assert not enable_packing(model, on_cpu=True)
    assert model.config._attn_implementation == attention


def test_a_model_whose_rows_meet_is_found_out(monkeypatch):
    """As one whose attention ignored the bounds would be."""
    model = tiny("llama")
    monkeypatch.setattr(packing, "row_bounds", lambda model, lengths: {
        "position_ids": torch.tensor([[0, 1, 2, 3, 4] * 2]),
        "attention_mask": torch.tensor([[[[10]]]])})
    assert not enable_packing(model, on_cpu=True)
    assert model.config._attn_implementation == "sdpa"


def test_on_a_gpu_flash_attention_alone_can_and_finds_the_bounds_by_position():
    model = tiny("llama")
    assert not enable_packing(model, on_cpu=False)
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = packing.FLASH  # nothing runs: there is no GPU here
    assert enable_packing(model, on_cpu=False)
    assert {name: value.tolist() for name, value in
            row_bounds(model, torch.tensor([2, 3])).items()} == {"position_ids": [[0, 1, 0, 1, 2]]}


def test_padded_rows_generation_and_saved_files_are_those_of_sdpa(tmp_path):
    model = tiny("llama")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def answers():
        return (model(input_ids=ids, attention_mask=mask).logits,
                model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8))

    before = answers()
    assert enable_packing(model, on_cpu=True) and model.config._attn_implementation == BY_ROW
    for now, then in zip(answers(), before, strict=True):
        assert torch.equal(now, then)
    model.save_pretrained(tmp_path)
    assert "by_row" not in (tmp_path / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path)
