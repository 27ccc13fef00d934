"""The cache that grows in place, against transformers'."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_judge import tiny_model
from transformers import DynamicCache

from lm.cache import ROOM, GrowingCache, GrowingLayer, can_share

IDS = torch.arange(5, 5 + 2 * (ROOM + 20)).reshape(2, -1) % 300


def logits_in_pieces(model, cache, lengths) -> torch.Tensor:
    found = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits
             for piece in IDS.split(lengths, dim=1)]
    return torch.cat(found, dim=1)


@torch.no_grad()
def test_growing_layers_hold_what_transformers_hold():
    model, lengths = tiny_model(), [10, 1, 1, ROOM, 1, 7]
    growing, usual = GrowingCache(IDS.shape[1]), DynamicCache(config=model.config)
    assert torch.equal(logits_in_pieces(model, growing, lengths),
                       logits_in_pieces(model, usual, lengths))
    assert growing.get_seq_length() == usual.get_seq_length() == IDS.shape[1]
    for mine, theirs in zip(growing.layers, usual.layers, strict=True):
        assert type(mine) is GrowingLayer
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def test_a_token_is_written_without_copying_those_before():
    layer, states = GrowingLayer(200), torch.randn(2, 3, 4, 5)
    keys, _ = layer.update(states, states)
    for _ in range(ROOM):
        more, values = layer.update(states[:, :, :1], 2 * states[:, :, :1])
        assert more.data_ptr() == keys.data_ptr()
    assert torch.equal(values[:, :, -1], 2 * states[:, :, 0])
    more, _ = layer.update(states, states)  # no room is left
    assert more.data_ptr() != keys.data_ptr() and torch.equal(more[:, :, :4], states)


def test_layers_take_no_more_memory_than_their_tokens_will():
    layer, states = GrowingLayer(7), torch.randn(2, 3, 4, 5)
    layer.update(states, states)
    assert [memory.shape[2] for memory in layer.memory] == [7, 7]


@torch.no_grad()
def test_selected_rows_go_on():
    model, cache, which = tiny_model(), GrowingCache(12), torch.tensor([1, 0, 1])
    model(input_ids=IDS[:, :8], past_key_values=cache, use_cache=True)
    cache.batch_select_indices(which)
    found = model(input_ids=IDS[which, 8:12], past_key_values=cache, use_cache=True).logits
    expected = model(input_ids=IDS[which, :12]).logits[:, 8:]
    assert torch.allclose(found, expected, atol=1e-5) and cache.get_seq_length() == 12


@pytest.mark.parametrize(("name", "shares"), [
    ("llama", True), ("gpt2", True), ("gemma2", False), ("mistral", False), ("mamba", False)])
def test_only_ordinary_caches_are_shared(name, shares):
    model = tiny_model(name)
    assert can_share(model) is shares
    if name in ("llama", "mistral"):
        assert can_share(get_peft_model(model, LoraConfig(
            r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))) is shares
