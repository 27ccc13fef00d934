"""Log-probabilities of the supervised tokens of a batch, without the full logits.

The model runs as it is. While it does, a hook on its output head takes the hidden states
of the supervised positions only, scores them in chunks of rows, and leaves the head none to score
for itself. So no [rows, T, vocab] tensor ever exists, and since the work is done inside the model's
own forward it is the same under DDP, FSDP2 and ZeRO-3, whose weights are gathered there.

`benchmarks/cut_step.py` measures this against the full logits.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from lm.models import evaluating, output_head, unwrapped
from lm.packing import row_bounds
from lm.records import InputError

CHUNK = {"cpu": 256, "cuda": 2048}  # rows scored at a time; larger chunks were slower on 2 cores


def supervised_log_probs(model: nn.Module, input_ids: Tensor, loss_mask: Tensor,
                         **inputs) -> Tensor:
    """log p(token | tokens before it), fp32, of every position under `loss_mask`.

    Args:
        model: a Hugging Face causal LM, bare or wrapped (peft, DDP, FSDP, DeepSpeed).
        input_ids, loss_mask: [R, T], right-padded; position 0 of a row is never supervised, as
            nothing stands before it. No attention mask is needed: no token sees what follows it,
            and without a mask attention takes its fastest way.
        inputs: what else the model is to get, such as the `position_ids` of packed rows.

    Returns [S], S = loss_mask.sum(), in row-major order.
    """
    loss_mask = loss_mask.bool()
    check_first(loss_mask)
    targets = input_ids[loss_mask]
    before = loss_mask.roll(-1, dims=1)  # the position whose hidden state predicts a target
    found: list[Tensor] = []

    def score(head: nn.Module, arguments: tuple) -> tuple:
        hidden = arguments[0]
        found.append(score_tokens(hidden[before], targets, head, logit_transform(model)))
        return (hidden[:, :0], *arguments[1:])

    head = output_head(model)
    hook = head.register_forward_pre_hook(score)
    try:
        logits = model(input_ids=input_ids, use_cache=False, **inputs).logits
    finally:
        hook.remove()
    by_zero3 = any(hasattr(parameter, "ds_id") for parameter in head.parameters())
    if not logits.requires_grad or (is_frozen(head) and not by_zero3):
        return found[0]
    # ZeRO-3 and FSDP gather a head's weights again for the backward pass only if the head's own
    # output takes part in it; ZeRO-3 asks that of a frozen head too. An empty part: nothing is
    # added, not even a NaN of another row.
    return found[0] + logits[:0].sum()


def supervised_log_probs_unpadded(model: nn.Module, input_ids: Tensor,
                                  loss_mask: Tensor) -> Tensor:
    """The same, with the rows run end to end; for models that `enable_packing` says can do so.

    A row ends with its last supervised token; one without any keeps its first.
    """
    check_first(loss_mask)
    columns = torch.arange(loss_mask.shape[1], device=loss_mask.device)
    lengths = (loss_mask * (columns + 1)).amax(-1).clamp(min=1)
    present = columns < lengths[:, None]
    return supervised_log_probs(model, input_ids[present][None], loss_mask[present][None],
                                **row_bounds(model, lengths))


def check_first(loss_mask: Tensor) -> None:
    """Stop at what cannot be predicted."""
    if loss_mask[:, 0].any():
        raise ValueError("the first position of a row has no token before it to be predicted from; "
                         "leave it out of loss_mask")


def score_tokens(hidden: Tensor, targets: Tensor, head: nn.Module,
                 transform: Callable[[Tensor], Tensor]) -> Tensor:
    """log-softmax of `head(hidden)` at the targets: [S, H], [S] -> [S], a chunk at a time.

    Equals `logits_of(head, hidden).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)`.
    """
    def chunk_log_probs(rows: Tensor, tokens: Tensor) -> Tensor:
        logits = transform(logits_of(head, rows))
        return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)

    size = CHUNK.get(hidden.device.type, 256)
    chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([chunk_log_probs(*chunk) for chunk in chunks])
    if is_frozen(head):
        plain = is_linear(head) and head.bias is None and transform is unchanged
        slopes = partial(slopes_of_linear, head.weight.float()) if plain else partial(
            slopes_by_autograd, chunk_log_probs)
        return FrozenHead.apply(hidden, chunks, slopes)
    return torch.cat([checkpoint(chunk_log_probs, *chunk, use_reentrant=False)
                      for chunk in chunks])


def logits_of(head: nn.Module, rows: Tensor) -> Tensor:
    """What a head makes of hidden states, [C, H] -> [C, V], in fp32.

    A head in bf16, or under autocast, would round its logits: near 20 to eighths, when log 1.1
    tells an inappropriate token from others. A linear layer is computed in fp32 instead, where
    products of bf16 and fp16 lose nothing, in TF32 neither. Any other head (quantized, in an
    adapter) runs as it is, and rounds.
    """
    if not is_linear(head):
        return head.forward(rows).float()  # forward: no hooks again
    with torch.autocast(rows.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(rows.float(), head.weight.float(), bias)


def is_linear(head: nn.Module) -> bool:
    """Whether a head is rows @ weight.T + bias: not quantized, no adapter, nobody's own forward."""
    return (type(head).forward is nn.Linear.forward and "forward" not in vars(head)
            and head.weight.is_floating_point())


class FrozenHead(torch.autograd.Function):
    """Log-probs under a head that is not trained.

    A token's log-probability depends on its own hidden state only, so the derivative found in
    the forward pass, [S, H], is all that the backward pass needs: no logits are kept, and none
    computed twice.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, chunks: list, slopes: Callable):
        log_probs, derivatives = zip(*(slopes(*chunk) for chunk in chunks), strict=True)
        ctx.save_for_backward(torch.cat(derivatives))
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (derivatives,) = ctx.saved_tensors
        return (upstream[:, None] * derivatives).to(derivatives.dtype), None, None


def slopes_by_autograd(chunk_log_probs: Callable, rows: Tensor,
                       tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [C] and their derivatives by the hidden states [C, H], whatever the head."""
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        log_probs = chunk_log_probs(rows, tokens)
        (derivatives,) = torch.autograd.grad(log_probs.sum(), rows)
    return log_probs.detach(), derivatives


def slopes_of_linear(weight: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same for logits = rows @ weight.T, in fp32: d log p / d rows = (one-hot - p) @ weight.

    1.3 times as fast as autograd on a CPU, which passes over the logits more often.
    """
    tokens = tokens[:, None]
    with torch.autocast(rows.device.type, enabled=False):
        log_p = F.linear(rows.float(), weight).log_softmax(-1)
        log_probs = log_p.gather(-1, tokens).squeeze(-1)
        by_logits = log_p.exp_().neg_()
        by_logits.scatter_add_(-1, tokens, torch.ones_like(by_logits[:, :1]))
        return log_probs, (by_logits @ weight).to(rows.dtype)


def is_frozen(head: nn.Module) -> bool:
    """Whether none of the head's weights is trained."""
    return not any(parameter.requires_grad for parameter in head.parameters())


def unchanged(logits: Tensor) -> Tensor:
    """The transform of most architectures."""
    return logits


def logit_transform(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the architecture does to its head's output: a scale, Gemma's cap."""
    config = unwrapped(model).config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = logit_scale(config)
    if scale == 1 and not cap:
        return unchanged

    def transform(logits: Tensor) -> Tensor:
        logits = logits * scale if scale != 1 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return transform


def logit_scale(config: PreTrainedConfig) -> float:
    """What the architecture multiplies its head's output by; one name means several things."""
    kind = config.model_type
    if kind.startswith("cohere"):
        return config.logit_scale or 1.0
    if kind.startswith("granite"):
        return 1 / config.logits_scaling
    if kind.startswith("hyperclovax"):
        return config.logits_scaling
    if kind.startswith("muse_"):
        return config.output_multiplier
    return config.lm_head_multiplier if kind == "falcon_h1" else 1.0


@torch.no_grad()
def check_head(model: nn.Module, token_ids: list[int]) -> None:
    """Stop if an architecture treats its logits in a way `logit_transform` does not know."""
    ids = torch.tensor([token_ids], device=next(model.parameters()).device)
    supervised = torch.ones_like(ids).bool()
    supervised[:, 0] = False
    with evaluating(model):
        ours = supervised_log_probs(model, ids, supervised)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    theirs = -F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")
    exact = logits.dtype == torch.float32  # in half precision the model's own are rounded
    if not torch.allclose(ours, theirs, atol=1e-3 if exact else 0.3, rtol=1e-3 if exact else 0.05):
        worst = (ours - theirs).abs().max().item()
        raise InputError(f"{type(unwrapped(model)).__name__} computes its logits in a way that "
                         f"lm/log_probs.py does not know (log-probs differ by {worst:.3g}); "
                         "add it to logit_transform")
