"""Products of a layer's weights with a few rows, as decoding on a CPU has them.

For x W^T with 8 to 48 rows in x, Intel's MKL rearranges all of W before it multiplies. The same
product written (W x^T)^T leaves W as it is: 1.2 to 2.2 times as fast there, on two cores. With
fewer or more rows the usual order is the faster one.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

SKINNY = range(8, 49)  # rows


@contextlib.contextmanager
def skinny_products(model: nn.Module) -> Iterator[None]:
    """The model's linear layers in fp32 on a CPU multiply a few rows in the faster order."""
    layers = [module for module in model.modules() if has_other_order(module)]
    try:
        for layer in layers:
            layer.forward = functools.partial(skinny_linear, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def has_other_order(module: nn.Module) -> bool:
    """Whether MKL multiplies the module's weights, and nothing else has a say in it."""
    return (type(module) is nn.Linear and type(module.weight) is nn.Parameter
            and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
            and "forward" not in vars(module) and torch.backends.mkl.is_available())


def skinny_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`nn.Linear`'s forward, [..., in] -> [..., out]."""
    if x.numel() // x.shape[-1] not in SKINNY:
        return functional.linear(x, layer.weight, layer.bias)
    rows = x.reshape(-1, x.shape[-1])
    product = (layer.weight @ rows.T).T.contiguous()  # attention has no fast kernel for other ones
    if layer.bias is not None:
        product += layer.bias
    return product.reshape(*x.shape[:-1], -1)
