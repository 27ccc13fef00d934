"""Where bitsandbytes' layers, as they come, do not suit the training of what stands beside them."""

import functools

from torch import nn


def keep_gradients(model: nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights for CPU inference at the first evaluation.

    It does so where the CPU has AVX512-BF16, for good, and packed layers pass no gradient on.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def forget_inputs() -> None:
    """Let 8-bit layers on a GPU not hold their inputs until the backward pass.

    Only the gradient of the weights needs them, and these are frozen. They are held where gradient
    checkpointing does not see them, which so freed little.
    """
    from bitsandbytes.autograd._functions import MatMul8bitLt

    forward = MatMul8bitLt.forward
    if hasattr(forward, "__wrapped__"):
        return

    @functools.wraps(forward)
    def lean(ctx, *args):
        output = forward(ctx, *args)
        if not (ctx.is_empty or ctx.needs_input_grad[1]):
            ctx.tensors = (None, None, None)
        return output

    MatMul8bitLt.forward = staticmethod(lean)
