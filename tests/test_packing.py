"""Which models run rows end to end, and that nothing else about them changes.

    python -m pytest tests/test_packing.py
"""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lm import packing
from lm.log_probs import supervised_log_probs_unpadded
from lm.packing import BY_ROW, enable_packing, row_bounds

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny(kind, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gpt_neox", "opt", "phi"])
def test_most_architectures_can(kind):
    more = {"opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "qwen3": {"head_dim": 8}}
    assert enable_packing(tiny(kind, **more.get(kind, {})), CPU, sharded=False)


@pytest.mark.parametrize(("kind", "more"), [
    ("mistral", {"sliding_window": 8}), ("gemma3_text", {"head_dim": 8}), ("mamba", {}),
    ("bloom", {}), ("llama", {"attn_implementation": "eager"}),
    ("mixtral", {"num_local_experts": 2, "output_router_logits": True})])
def test_where_tokens_meet_in_other_ways_the_model_stays_as_it_is(kind, more):
    model = tiny(kind, **more)
    attention = model.config._attn_implementation
    assert not enable_packing(model, CPU, sharded=False)
    assert model.config._attn_implementation == attention


def test_a_model_whose_rows_meet_is_found_out(monkeypatch):
    """As one whose attention ignored the bounds would be."""
    model = tiny("llama")
    monkeypatch.setattr(packing, "row_bounds", lambda model, lengths: {
        "position_ids": torch.tensor([[0, 1, 2, 3, 4] * 2]),
        "attention_mask": torch.tensor([[[[10]]]])})
    assert not enable_packing(model, CPU, sharded=False)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kind", "can"), [
    ("llama", True), ("mistral", True), ("gpt_bigcode", False), ("mamba", False)])
def test_on_a_gpu_flash_attention_alone_can_and_finds_the_bounds_by_position(
        kind, can, monkeypatch):
    """sdpa stands in for it: it finds them by position too, and there is no GPU here."""
    model = tiny(kind)
    attention = model.config._attn_implementation
    assert not enable_packing(model, GPU, sharded=False)
    monkeypatch.setattr(packing, "FLASH", attention)
    assert enable_packing(model, GPU, sharded=False) is can
    assert enable_packing(model, GPU, sharded=True) is can
    assert model.config._attn_implementation == attention
    assert {name: value.tolist() for name, value in
            row_bounds(model, torch.tensor([2, 3])).items()} == {"position_ids": [[0, 1, 0, 1, 2]]}


def test_a_second_trainer_of_the_model_asks_for_itself():
    model = tiny("llama")
    assert enable_packing(model, CPU, sharded=False)
    assert not enable_packing(model, CPU, sharded=True)
    assert not enable_packing(model, GPU, sharded=False)
    assert enable_packing(model, CPU, sharded=False)


def test_prompts_that_are_learnt_need_padded_rows():
    """peft puts its own mask before the given one."""
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert not enable_packing(model, CPU, sharded=False)


def test_a_model_that_does_not_know_such_input_stays_as_it_is(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(packing, "row_bounds", lambda model, lengths: {"unknown": 1,
                                                                       "attention_mask": lengths})
    assert not enable_packing(model, CPU, sharded=False)
    assert model.config._attn_implementation == "sdpa"


def test_a_rows_first_position_is_refused_wherever_it_stands():
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    with pytest.raises(ValueError, match="first position of a row"):
        supervised_log_probs_unpadded(tiny("llama"), ids, mask)


def test_padded_rows_generation_and_saved_files_are_those_of_sdpa(tmp_path):
    model = tiny("llama")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    added = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)

    def answers():
        return (model(input_ids=ids, attention_mask=mask).logits,
                model(input_ids=ids, attention_mask=added).logits,
                model(input_ids=ids, attention_mask=added == 0).logits,
                model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8))

    before = answers()
    assert enable_packing(model, CPU, sharded=False) and model.config._attn_implementation == BY_ROW
    for now, then in zip(answers(), before, strict=True):
        assert torch.equal(now, then)
    model.save_pretrained(tmp_path)
    assert "by_row" not in (tmp_path / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path)
