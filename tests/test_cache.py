"""The cache that grows in place, against transformers'."""

import torch
from tiny_judge import tiny_model
from transformers import DynamicCache

from lm.cache import ROOM, GrowingCache, GrowingLayer, copy_rows

IDS = torch.arange(5, 5 + 2 * (ROOM + 20)).reshape(2, -1) % 300


def logits_in_pieces(model, cache, lengths) -> torch.Tensor:
    found = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits
             for piece in IDS.split(lengths, dim=1)]
    return torch.cat(found, dim=1)


@torch.no_grad()
def test_growing_layers_hold_what_transformers_hold():
    model, lengths = tiny_model(), [10, 1, 1, ROOM, 1, 7]
    growing, usual = GrowingCache(), DynamicCache(config=model.config)
    assert torch.equal(logits_in_pieces(model, growing, lengths),
                       logits_in_pieces(model, usual, lengths))
    assert growing.get_seq_length() == usual.get_seq_length() == IDS.shape[1]
    for mine, theirs in zip(growing.layers, usual.layers, strict=True):
        assert type(mine) is GrowingLayer
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def test_a_token_is_written_without_copying_those_before():
    layer, states = GrowingLayer(), torch.randn(2, 3, 4, 5)
    keys, _ = layer.update(states, states)
    for _ in range(ROOM):
        more, values = layer.update(states[:, :, :1], 2 * states[:, :, :1])
        assert more.data_ptr() == keys.data_ptr()
    assert torch.equal(values[:, :, -1], 2 * states[:, :, 0])
    more, _ = layer.update(states, states)  # no room is left
    assert more.data_ptr() != keys.data_ptr() and torch.equal(more[:, :, :4], states)


@torch.no_grad()
def test_copied_rows_go_on_alone():
    model, cache = tiny_model(), GrowingCache()
    model(input_ids=IDS[:, :8], past_key_values=cache, use_cache=True)
    which = torch.tensor([1, 0, 1])
    copy = copy_rows(cache, which)
    found = model(input_ids=IDS[which, 8:12], past_key_values=copy, use_cache=True).logits
    expected = model(input_ids=IDS[which, :12]).logits[:, 8:]
    assert torch.allclose(found, expected, atol=1e-5)
    assert type(copy) is GrowingCache and cache.get_seq_length() == 8
