"""Dropout with 16 random bits an element: as `torch.nn.Dropout` in all but the draws.

    python -m pytest tests/test_dropout.py
"""

import pytest
import torch

from lm.dropout import LEVELS, CheapDropout


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_dropped_and_scale(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 999)
    out = CheapDropout(p)(x)
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=3e-3)  # over 5 sigma
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1 / LEVELS / (1 - p),
                               atol=0)
    # Four elements share one draw of 64 bits, and rows follow each other: none tells of the next
    dropped = (out == 0).double().flatten()
    for apart in (1, 2, 3, 4, 999):
        pairs = torch.stack([dropped[:-apart], dropped[apart:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (0, 4)])
def test_gradient_is_that_of_the_kept_elements(shape, dtype):
    torch.manual_seed(0)
    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    out = CheapDropout(0.5)(x)
    assert out.shape == x.shape and out.dtype == dtype
    out.sum().backward()
    assert torch.equal(x.grad * 2, out.detach())


def test_draws_follow_the_seed_and_differ_from_call_to_call():
    x = torch.ones(50)
    dropout = CheapDropout(0.5)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize(("p", "training", "expected"), [
    (0.5, False, 1.0), (0.0, True, 1.0), (1e-9, True, 1.0), (1.0, True, 0.0)])
def test_nothing_and_everything(p, training, expected):
    x = torch.ones(20)
    out = CheapDropout(p).train(training)(x)
    torch.testing.assert_close(out, torch.full_like(x, expected))
