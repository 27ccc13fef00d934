"""Products with few rows are nn.Linear's, in another order of multiplication."""

import pytest
import torch
from tiny_judge import tiny_model
from torch import nn

from lm import skinny
from lm.models import add_lora
from lm.skinny import SKINNY, skinny_products

IDS = torch.arange(24).reshape(12, 2)  # 24 rows of hidden states


@pytest.fixture
def orders(monkeypatch):
    """Whether the usual order was taken, product by product; with MKL here or not."""
    taken = []
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    linear = torch.nn.functional.linear

    def noted(x, weight, bias=None):
        taken.append("usual")
        return linear(x, weight, bias)

    monkeypatch.setattr(skinny.functional, "linear", noted)
    return taken


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (1, 6), (48, 1, 6), (49, 1, 6), (2, 3, 5, 6), (6,)])
def test_product_is_the_layers(shape, bias, orders):
    layer, x = nn.Linear(6, 10, bias=bias), torch.randn(shape)
    expected = layer(x)
    orders.clear()
    with skinny_products(layer):
        found = layer(x)
    assert (orders == []) is (x.numel() // 6 in SKINNY)
    assert found.shape == expected.shape and found.is_contiguous()
    assert torch.allclose(found, expected, atol=1e-6)


def test_models_are_left_as_they_were(orders):
    model = add_lora(tiny_model(), 4, 4, 0.0, "all-linear", False)
    before = model(IDS).logits
    orders.clear()
    with skinny_products(model):
        found = model(IDS).logits
        with skinny_products(model):  # of another call; it ends first
            pass
        model(IDS)
        assert orders == []
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.allclose(found, before, atol=1e-4)
    assert found.grad_fn is not None
    with pytest.raises(KeyError), skinny_products(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_half_precision_and_layers_of_other_kinds_keep_their_own(orders):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (nn.Linear(4, 4, dtype=torch.bfloat16), Scaled(4, 4)):
        with skinny_products(layer):
            assert "forward" not in vars(layer)
