"""The CUT loss, a pure function of per-token log-probabilities (arXiv 2312.14591, Section 4).

An example is either an Align-P row, or a pair of rows over the same response tokens: Align-N
(the prompt holds the judgment) and Misalign (it does not).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_LOG_P = -(2.0**-24)  # the fp32 number below 0 where log(1 - p) is about -16.6


@dataclass(frozen=True)
class CutLoss:
    """One value per example, [B], except the two masks-and-ratios over tokens, [B, N]."""

    loss: Tensor  # what is minimised, in nats per token
    mle: Tensor  # L2's part: mean negative log-likelihood of the aligned row
    contrast: Tensor  # L1's part: likelihood and unlikelihood on the Misalign row; 0 for Align-P
    inappropriate: Tensor  # bool [B, N]: the set U
    log_ratio: Tensor  # [B, N]: log p(y|x,j) - log p(y|x), 0 outside the responses of pairs


def cut_loss(
    aligned: Tensor, misaligned: Tensor, response_mask: Tensor, negative: Tensor, *,
    threshold: float, weight_unlike: float, gamma: float = 0.0, halve_pairs: bool = True,
    l1: bool = True, align_n: bool = True, mle_mask: Tensor | None = None,
) -> CutLoss:
    """The loss of each example.

    With p the probability of a response token given what stands before it, in the row with the
    judgment, p(y|x,j), or without, p(y|x), and N the number of response tokens:

        U   = { t : p(y_t|x,j) > threshold * p(y_t|x) }                            (Equation 4)
        L1  = -1/N [ sum_{t not in U} log p(y_t|x)
                     + sum_{t in U} alpha * p(y_t|x,j)^gamma * log(1 - p(y_t|x)) ]  (Equation 5)
        L2  = -1/N sum_t log p(y_t | the aligned row)                              (Equation 6)

    An Align-P example costs L2, a pair (L1 + L2) / 2, as in the released code; with
    `halve_pairs=False` a pair costs L1 + L2, as in the paper.

    Args:
        aligned: [B, N] log-probabilities (nats, <= 0) of the tokens in the Align-P or Align-N row.
        misaligned: [B, N] of the same tokens in the Misalign row; ignored where `negative` is not
            set, and outside the response.
        response_mask: bool [B, N], the response's tokens, EOS included.
        negative: bool [B], which examples are pairs.
        threshold: lambda of U; the comparison is strict, on probabilities. 0: every token is in U.
        weight_unlike: alpha.
        gamma: exponent of the dynamic weight; 0 is the released code (no weight).
        halve_pairs: see above.
        l1, align_n: whether a pair costs its L1, and its L2 (the rows of Table 4 without them).
        mle_mask: bool [B, N], the tokens that L2 averages over if not the response's (the whole
            row for `train_on_inputs`).

    Returns fp32 values whatever the dtype that came in. Detached: U, and the weight p^gamma, so
    the judged probabilities get no gradient from L1. The domain of log(1 - p) is p < 1, which
    holds inside U whenever threshold >= 1, as p(y|x) < 1/threshold there; for thresholds below 1,
    log p is held at -2^-24. An example without any token (all masked) costs 0. Other shapes are a
    ValueError; that values are log-probabilities is not checked, as it would have a GPU waited for.
    """
    mle_mask = response_mask if mle_mask is None else mle_mask
    shapes = {tuple(each.shape) for each in (aligned, misaligned, response_mask, mle_mask)}
    if len(shapes) > 1 or aligned.ndim != 2 or negative.shape != aligned.shape[:1]:
        raise ValueError(f"expected [B, N] log-probabilities and masks and a [B] `negative`; got "
                         f"{[*map(list, shapes)]} and {list(negative.shape)}")
    aligned, misaligned = aligned.float(), misaligned.float()
    response_mask, mle_mask, negative = (each.bool() for each in (response_mask, mle_mask,
                                                                  negative))
    contrasted = response_mask & negative[:, None]
    misaligned = torch.where(contrasted, misaligned, 0.0)

    log_ratio = torch.where(contrasted, aligned - misaligned, 0.0).detach()
    inappropriate = contrasted
    if threshold:  # without it p > 0 decides, and a small p is rounded to 0
        inappropriate = contrasted & (
            aligned.detach().exp() > threshold * misaligned.detach().exp())

    weight = weight_unlike * (gamma * aligned.detach()).exp()
    per_token = torch.where(inappropriate, weight * log1mexp(misaligned), misaligned)

    mle = -masked_mean(aligned, mle_mask)
    contrast = -masked_mean(per_token, contrasted)
    pair_loss = align_n * mle + l1 * contrast
    pair_loss = pair_loss / 2 if halve_pairs else pair_loss
    return CutLoss(torch.where(negative, pair_loss, mle), mle, contrast, inappropriate, log_ratio)


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p without cancellation, for p < 1 (Maechler 2012)."""
    log_p = log_p.clamp(max=LARGEST_LOG_P)
    near_one = log_p > -0.6931
    return torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p))),
    )


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension of the values under the mask, 0 where there are none."""
    total = torch.where(mask, values, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1)
