"""The CUT loss against plain arithmetic and a float64 transcription of its equations.

    python -m pytest tests/test_loss.py
"""

import math

import pytest
import torch

from cut.loss import LARGEST_LOG_P, cut_loss, log1mexp

SETTINGS = {"threshold": 1.1, "weight_unlike": 0.5, "gamma": 0.0}


def transcribed(aligned, misaligned, response, negative, *, threshold, weight_unlike, gamma=0.0,
                halve_pairs=True, mle_mask=None):
    """Equations 4 to 6 token by token: the loss of each example, and U as a list of lists."""
    losses, inappropriate = [], []
    for b in range(len(negative)):
        tokens = [t for t in range(aligned.shape[1]) if response[b, t]]
        learned = tokens if mle_mask is None else mle_mask[b].nonzero().flatten().tolist()
        l2 = -sum(aligned[b, t] for t in learned) / max(len(learned), 1)
        in_u = [t for t in tokens if negative[b]
                and aligned[b, t].exp().item() > threshold * misaligned[b, t].exp().item()]
        l1 = 0.0
        for t in tokens:
            if t in in_u:
                weight = weight_unlike * aligned[b, t].exp().item() ** gamma  # a number: detached
                l1 = l1 - weight * torch.log(1 - misaligned[b, t].exp()) / len(tokens)
            else:
                l1 = l1 - misaligned[b, t] / len(tokens)
        pair = (l1 + l2) / (2 if halve_pairs else 1)
        losses.append(torch.as_tensor(pair if negative[b] else l2, dtype=torch.float64))
        inappropriate.append([t in in_u for t in range(aligned.shape[1])])
    return torch.stack(losses), inappropriate


def assert_as_transcribed(aligned, misaligned, response, negative, mle_mask=None, **settings):
    """Loss, U and the gradients of a weighted sum of the losses agree with the transcription."""
    ours = [aligned.clone().requires_grad_(), misaligned.clone().requires_grad_()]
    exact = [aligned.double().requires_grad_(), misaligned.double().requires_grad_()]
    got = cut_loss(*ours, response, negative, mle_mask=mle_mask, **settings)
    expected, inappropriate = transcribed(*exact, response, negative, mle_mask=mle_mask, **settings)
    assert got.loss.dtype == torch.float32
    assert got.inappropriate.tolist() == inappropriate
    torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=1e-7)

    weights = torch.linspace(1, 2, len(expected))
    (got.loss * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    coarse = aligned.dtype != torch.float32  # gradients come back in the dtype that went in
    for mine, theirs in zip(ours, exact, strict=True):
        wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(mine.grad.double(), wanted, rtol=1e-2 if coarse else 2e-5,
                                   atol=1e-6)


def random_batch(seed, examples=6, tokens=9, dtype=torch.float32):
    """Log-probabilities whose ratios lie on both sides of the threshold, and random masks."""
    generator = torch.Generator().manual_seed(seed)
    aligned = -3 * torch.rand(examples, tokens, generator=generator) - 0.01
    misaligned = (aligned + 0.5 * torch.randn(examples, tokens, generator=generator)).clamp(max=-.2)
    lengths = torch.randint(1, tokens + 1, (examples, 1), generator=generator)
    response = torch.arange(tokens) >= tokens - lengths
    negative = torch.rand(examples, generator=generator) < 0.6
    return aligned.to(dtype), misaligned.to(dtype), response, negative


def test_loss_by_hand():
    """One pair and one Align-P, lambda 1.1, alpha 1/2, gamma 1.

    The pair has two response tokens (a third column is padding):
        p(y|x,j) = 1/2, 1/4        p(y|x) = 1/4, 1/2
    Token 1: 1/2 > 1.1 * 1/4, so it is in U and costs -alpha * (1/2)^gamma * log(1 - 1/4).
    Token 2: 1/4 <= 1.1 * 1/2, so it is not and costs -log 1/2.
        L1 = (-1/2 * 1/2 * log 3/4 + log 2) / 2
        L2 = (log 2 + log 4) / 2
    The pair costs (L1 + L2) / 2. The Align-P row has one token of p = 1/8 and costs log 8.
    """
    aligned = torch.tensor([[0.5, 0.25, 0.9], [0.9, 0.9, 0.125]]).log()
    misaligned = torch.tensor([[0.25, 0.5, 0.9], [0.9, 0.9, 0.9]]).log()
    response = torch.tensor([[True, True, False], [False, False, True]])
    got = cut_loss(aligned, misaligned, response, torch.tensor([True, False]),
                   threshold=1.1, weight_unlike=0.5, gamma=1.0)

    l1 = (-0.25 * math.log(3 / 4) + math.log(2)) / 2
    l2 = (math.log(2) + math.log(4)) / 2
    torch.testing.assert_close(got.contrast, torch.tensor([l1, 0.0]))
    torch.testing.assert_close(got.mle, torch.tensor([l2, math.log(8)]))
    torch.testing.assert_close(got.loss, torch.tensor([(l1 + l2) / 2, math.log(8)]))
    assert got.inappropriate.tolist() == [[True, False, False], [False, False, False]]
    torch.testing.assert_close(got.log_ratio, torch.tensor([[math.log(2), -math.log(2), 0.0],
                                                            [0.0, 0.0, 0.0]]))


def test_integer_masks_are_masks_and_other_shapes_are_refused():
    aligned = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]])
    masks = torch.tensor([[1, 1], [1, 0]]), torch.tensor([1, 0])
    as_ints = cut_loss(aligned, aligned - 1, *masks, threshold=1.1, weight_unlike=0.5)
    as_bools = cut_loss(aligned, aligned - 1, masks[0].bool(), masks[1].bool(), threshold=1.1,
                        weight_unlike=0.5)
    assert torch.equal(as_ints.loss, as_bools.loss)
    for others in ((aligned[:1], *masks), (aligned, masks[0], masks[1][:, None])):
        with pytest.raises(ValueError, match=r"expected \[B, N\] log-probabilities"):
            cut_loss(aligned, *others, threshold=1.1, weight_unlike=0.5)


def test_gradient_by_hand():
    """As above with gamma 0: d/dlog p of log(1 - p) is -p / (1 - p).

    Pair, halved: token 1 in U, -alpha * log(1 - p) / 2 tokens / 2: 1/2 * (1/4)/(3/4) / 4 = 1/24;
    token 2, -log p / 2 / 2: -1/4. The aligned row gets -1/4 for each token, from L2 alone.
    """
    aligned = torch.tensor([[0.5, 0.25]]).log().requires_grad_()
    misaligned = torch.tensor([[0.25, 0.5]]).log().requires_grad_()
    cut_loss(aligned, misaligned, torch.tensor([[True, True]]), torch.tensor([True]),
             **SETTINGS).loss.sum().backward()
    torch.testing.assert_close(misaligned.grad, torch.tensor([[1 / 24, -1 / 4]]))
    torch.testing.assert_close(aligned.grad, torch.tensor([[-1 / 4, -1 / 4]]))


@pytest.mark.parametrize("halve_pairs", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 2.0])
@pytest.mark.parametrize(("threshold", "weight_unlike"), [(1.1, 0.1), (1.2, 1.0), (1.0, 0.5),
                                                          (0.8, 0.5), (0.0, 0.25)])
def test_random_batches_as_transcribed(threshold, weight_unlike, gamma, halve_pairs):
    for seed in range(3):
        assert_as_transcribed(*random_batch(seed), threshold=threshold, gamma=gamma,
                              weight_unlike=weight_unlike, halve_pairs=halve_pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_fp32(dtype):
    assert_as_transcribed(*random_batch(5, dtype=dtype), **SETTINGS)


@pytest.mark.parametrize("fill", [True, False])
def test_all_negative_and_all_positive_batches(fill):
    aligned, misaligned, response, negative = random_batch(1)
    negative = torch.full_like(negative, fill)
    assert_as_transcribed(aligned, misaligned, response, negative, **SETTINGS)
    got = cut_loss(aligned, misaligned, response, negative, **SETTINGS)
    assert bool(got.inappropriate.any()) == fill
    assert bool(got.contrast.any()) == bool(got.log_ratio.any()) == fill


@pytest.mark.parametrize("negative", [True, False])
def test_an_example_without_tokens_costs_nothing(negative):
    aligned, misaligned, response, _ = random_batch(2, examples=2)
    response[0] = False
    kinds = torch.tensor([negative, True])
    assert_as_transcribed(aligned, misaligned, response, kinds, **SETTINGS)
    assert cut_loss(aligned, misaligned, response, kinds, **SETTINGS).loss[0] == 0


def test_mle_over_other_tokens_than_the_response():
    """`train_on_inputs`: L2 averages over the whole row, L1 over the response."""
    aligned, misaligned, response, negative = random_batch(3)
    whole = torch.arange(response.shape[1]) >= 2
    assert_as_transcribed(aligned, misaligned, response, negative,
                          mle_mask=whole.expand_as(response) | response, **SETTINGS)


def test_threshold_is_strict():
    """p(y|x,j) = lambda * p(y|x) is not in U; a little more is, a little less is not."""
    misaligned = torch.tensor([[-0.3, -2.0, -30.0]])

    def flagged(log_ratio, threshold):
        return cut_loss(misaligned + log_ratio, misaligned, torch.ones(1, 3).bool(),
                        torch.tensor([True]), threshold=threshold,
                        weight_unlike=1.0).inappropriate[0].tolist()

    assert flagged(0.0, 1.0) == [False] * 3
    for threshold in (1.0, 1.1):
        assert flagged(math.log(threshold) - 1e-5, threshold) == [False] * 3
        assert flagged(math.log(threshold) + 1e-5, threshold) == [True] * 3


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("threshold", [1.0, 1.1])
def test_probabilities_near_zero_and_one(threshold, gamma):
    aligned = torch.tensor([[0.0, -1e-6, -1e-7, -80.0, -0.09, -1e-3, -60.0, 0.0]])
    misaligned = torch.tensor([[-80.0, -1e-5, -80.0, -0.1, -0.2, -80.0, -70.0, 0.0]])
    assert_as_transcribed(aligned, misaligned, torch.ones(1, 8).bool(), torch.tensor([True]),
                          threshold=threshold, weight_unlike=1.0, gamma=gamma)


def test_certain_tokens_below_lambda_one_stay_finite():
    """p(y|x) = 1 in U happens for lambda < 1 only; log(1 - p) is held at log 2^-24."""
    misaligned = torch.zeros(1, 1, requires_grad=True)
    got = cut_loss(torch.zeros(1, 1), misaligned, torch.tensor([[True]]), torch.tensor([True]),
                   threshold=0.5, weight_unlike=1.0)
    assert got.inappropriate.all()
    assert got.contrast.item() == pytest.approx(24 * math.log(2), rel=1e-6)
    got.loss.sum().backward()
    assert misaligned.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("garbage", [0.0, float("-inf"), float("nan"), 1.0])
def test_masked_positions_reach_neither_loss_nor_gradient(garbage, gamma):
    aligned, misaligned, response, negative = random_batch(4)
    outside = ~(response & negative[:, None])
    inputs = [aligned.masked_fill(~response, garbage).requires_grad_(),
              misaligned.masked_fill(outside, garbage).requires_grad_()]
    settings = SETTINGS | {"gamma": gamma}
    got = cut_loss(*inputs, response, negative, **settings)
    clean = cut_loss(aligned, misaligned, response, negative, **settings)
    assert torch.equal(got.loss, clean.loss)
    got.loss.sum().backward()
    assert inputs[0].grad.isfinite().all() and inputs[1].grad.isfinite().all()
    assert not inputs[0].grad[~response].any() and not inputs[1].grad[outside].any()


def test_set_u_and_its_weight_are_detached():
    """L1 gives the judged row no gradient, whatever gamma; L2 gives the Misalign row none."""
    for gamma in (0.0, 1.0):
        inputs = [tensor.requires_grad_() for tensor in random_batch(0)[:2]]
        got = cut_loss(*inputs, *random_batch(0)[2:], **(SETTINGS | {"gamma": gamma}))
        assert got.inappropriate.any()
        assert not got.log_ratio.requires_grad
        judged, plain = torch.autograd.grad(got.contrast.sum(), inputs, retain_graph=True,
                                            allow_unused=True)
        assert judged is None or not judged.any()
        assert plain.any()
        judged, plain = torch.autograd.grad(got.mle.sum(), inputs, allow_unused=True)
        assert judged.any()
        assert plain is None or not plain.any()


def test_log1mexp_is_accurate_at_every_magnitude():
    """float64 has twice the digits: log(-expm1(x)) near 0 and log1p(-exp(x)) far from it."""
    exponents = torch.linspace(math.log10(-LARGEST_LOG_P), math.log10(80), 400).double()
    log_p = torch.cat([-(10**exponents), torch.tensor([-0.6931, -0.69314, -0.694])]).float()
    log_p = log_p.clamp(max=LARGEST_LOG_P).requires_grad_()
    x = log_p.detach().double()
    exact = torch.where(x > -1, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    got = log1mexp(log_p)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-37)
    got.sum().backward()
    torch.testing.assert_close(log_p.grad.double(), -1 / torch.expm1(-x), rtol=1e-5, atol=1e-37)


def test_log1mexp_outside_its_domain():
    log_p = torch.tensor([0.0, 1e-3, -1e-9, -1000.0, float("-inf")], requires_grad=True)
    got = log1mexp(log_p)
    torch.testing.assert_close(got, torch.tensor([-24 * math.log(2)] * 3 + [0.0, 0.0]))
    got.sum().backward()
    assert log_p.grad.isfinite().all()
