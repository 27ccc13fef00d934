"""LoRA's dropout with cheap random numbers on a CPU.

There torch draws a float for each element, and keeps another as the mask: a tenth of the time of
a training step. Here an element takes 16 random bits, and its mask a byte.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
LEVELS = 2 ** 16  # of 16 random bits: p is rounded to a multiple of 1 / LEVELS


class CheapDropout(nn.Dropout):
    """`nn.Dropout`, drawn from 16 bits an element where `x` is on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * LEVELS)
        if not self.training or x.device.type != "cpu" or not 0 < dropped < LEVELS:
            return super().forward(x)
        return _Dropout.apply(x, dropped)


class _Dropout(torch.autograd.Function):
    """Zero `dropped` elements in `LEVELS`, scale the others so that the mean stays."""

    @staticmethod
    def forward(ctx, x: Tensor, dropped: int) -> Tensor:
        four_each = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
        bits = four_each.view(torch.int16)[:x.numel()].view(x.shape)
        keep = bits >= dropped - LEVELS // 2
        ctx.save_for_backward(keep)
        ctx.scale = LEVELS / (LEVELS - dropped)
        return torch.mul(x, keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return torch.mul(upstream, keep).mul_(ctx.scale), None


def with_cheap_dropout(model: Model) -> Model:
    """The model, with the dropout of its LoRA layers replaced."""
    for name, module in list(model.named_modules()):
        if ".lora_dropout." in name and type(module) is nn.Dropout:
            cheap = CheapDropout(module.p).train(module.training)
            model.set_submodule(name, cheap)
    return model
