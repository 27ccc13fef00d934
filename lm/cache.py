"""Key-value caches that several rows start from, and that grow in place."""

import functools
import inspect

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from lm.models import without_adapter

ROOM = 64  # tokens that a growing layer makes room for at a time


def can_share(model: nn.Module) -> bool:
    """Whether all the model remembers of a prompt is one key and one value a token and layer."""
    plain = without_adapter(model)
    known = inspect.signature(plain.forward).parameters
    return {"past_key_values", "position_ids", "attention_mask"} <= set(known) and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=plain.config).layers)


class GrowingLayer(DynamicLayer):
    """Writes new keys and values behind the old ones, which transformers' layer would copy.

    That copy was a fifth of the time of sampling after prompts of 300 tokens, on two cores.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit  # tokens that it will have at most

    def update(self, key_states: Tensor, value_states: Tensor,
               *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] of all tokens so far, given those of the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.memory = [key_states[:, :, :0], value_states[:, :, :0]]
        old = self.get_seq_length()
        total = old + key_states.shape[2]
        if total > self.memory[0].shape[2]:
            length = max(total, min(total + ROOM, self.limit))
            self.memory = [with_room(memory[:, :, :old], length) for memory in self.memory]
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, old:total] = new
        return self._hold(total)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, which may come several times; beam search's other ways are not for us."""
        self.memory = [memory[indices.to(memory.device)] for memory in self.memory]
        self._hold(self.get_seq_length())

    def _hold(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (memory[:, :, :length] for memory in self.memory)
        return self.keys, self.values


class GrowingCache(DynamicCache):
    """A cache of `GrowingLayer`s for at most so many tokens."""

    def __init__(self, limit: int):
        # DynamicCache's own would make layers of another kind
        Cache.__init__(self, layer_class_to_replicate=functools.partial(GrowingLayer, limit))


def with_room(states: Tensor, length: int) -> Tensor:
    """The states [B, H, T, D] at the start of [B, H, length, D]."""
    batch, heads, held, size = states.shape
    memory = states.new_empty(batch, heads, length, size)
    memory[:, :, :held] = states
    return memory
