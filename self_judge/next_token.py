"""Next-token probabilities of many prompts, in as few operations as they need.

Prompts are sorted by length and run in batches of a token budget, padded on the right: no token
sees what follows it, so they need no attention mask and their positions are the usual ones. A hook
on the output head hands it each row's last hidden state alone; what the model does to its logits
(a scale, a cap) it does itself. So nothing depends on the batch, or on how the tokenizer pads.

Prompts that begin alike, as the two orders of a pair, the matches over one context, or the
principles of one question do, share their beginning where that saves enough: it is run once, and
its key-value cache is continued by each end. That takes a model whose every layer has an ordinary
attention cache; others run whole prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lm.cache import can_share
from lm.generation import left_pad, token_budget_batches
from lm.log_probs import is_linear, logits_of
from lm.models import evaluating, output_head, unwrapped
from lm.records import InputError
from lm.templates import common_start

# Tokens of a forward pass, padding included: enough to keep the device busy. More of them are no
# faster, and need more padding: 64 prompts of 200 to 990 tokens came to 20,000 positions in passes
# of 512 tokens, 26,000 in passes of 4096, and 35,000 in passes of 16384.
TOKEN_BUDGET = {"cpu": 512, "cuda": 4096}
PADDING = 0  # any id: nothing that is looked at sees it
LEAST_SAVING = 1 / 8  # of the tokens to run; below it the cache costs what it saves

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Group:
    """Rows, by their places, that share their first `length` ids."""

    rows: Sequence[int]
    length: int


@dataclass(frozen=True)
class Part:
    """Rows to run after one forward pass over the beginnings that they share, if they do."""

    groups: Sequence[Group]  # none where rows are run whole
    batches: Sequence[Sequence[int]]  # rows of one forward pass each


@torch.no_grad()
def next_token_probabilities(model: nn.Module, rows: Rows, tokens: Sequence[Sequence[int]], *,
                             token_budget: int | None = None,
                             progress: bool = False) -> list[list[float]]:
    """p(token | row) over the whole vocabulary, raw logits, for the tokens asked of each row.

    Args:
        model: a Hugging Face causal LM, bare or wrapped (peft, DDP, FSDP2, DeepSpeed). Where its
            weights are sharded, every process must call this, each with its own rows.
        rows: ids of the prompts.
        tokens: [R, K] ids whose probabilities are asked.
        token_budget: tokens of one forward pass, padding included; at least one row. By default
            those of `usual_budget`.
    """
    from tqdm import tqdm

    model = unwrapped(model)
    device = next(model.parameters()).device
    parts = plan(rows, token_budget or usual_budget(model), share=can_share(model))
    missing = missing_forwards(model, sum(bool(part.groups) + len(part.batches) for part in parts))
    order, found = [], []
    with evaluating(model), tqdm(total=len(rows), disable=not progress, unit="prompt") as bar:
        for part in parts:
            for batch, logits in run(model, part, rows):
                if not logits.isfinite().all():
                    raise InputError("the judge's logits are not numbers: training diverged, or "
                                     "the weights do not suit this precision (try bf16 or fp32)")
                asked = torch.tensor([list(tokens[row]) for row in batch], device=device)
                found.append(logits.softmax(-1).gather(-1, asked))
                order += batch
                bar.update(len(batch))
        for _ in range(missing):
            last_logits(model, torch.tensor([[PADDING]]), torch.tensor([1]), use_cache=False)
    values = torch.cat(found).tolist() if found else []
    by_row = dict(zip(order, values, strict=True))
    return [by_row[row] for row in range(len(rows))]


def usual_budget(model: nn.Module) -> int:
    """Tokens of a forward pass on the model's device."""
    device = next(model.parameters()).device
    return TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"])


def plan(rows: Rows, budget: int, share: bool) -> list[Part]:
    """Which rows run together, and which beginnings they share; the longest come first.

    >>> plan([[7, 7, 1], [7, 7, 2], [8]], budget=9, share=True)
    [Part(groups=(), batches=[[2]]), Part(groups=[Group(rows=[0, 1], length=2)], batches=[[0, 1]])]
    """
    every = sorted(range(len(rows)), key=lambda row: tuple(rows[row]))
    groups = dict(enumerate(best_groups(rows, every)[1] if share and rows else []))
    grouped = {row for group in groups.values() for row in group.rows}
    alone = {row: len(rows[row]) for row in every if row not in grouped}
    parts = [Part((), list(token_budget_batches(alone, 0, budget)))] if alone else []
    for batch in token_budget_batches({key: group.length for key, group in groups.items()}, 0,
                                      budget):
        some = [groups[key] for key in batch]
        ends = {row: len(rows[row]) - group.length for group in some for row in group.rows}
        longest = max(group.length for group in some)
        parts.append(Part(some, list(token_budget_batches(ends, longest, budget))))
    return parts


def best_groups(rows: Rows, some: Sequence[int]) -> tuple[int, list[Group]]:
    """How to share beginnings so that most tokens are saved; how many that is, and the groups.

    `some` are places in `rows`, in the order of the rows' ids. Either all of them share what they
    have in common, or those that go on alike share among themselves, whichever saves more.

    >>> best_groups([[1, 2, 3, 4], [1, 2, 3, 5], [1, 8, 8]], [0, 1, 2])
    (3, [Group(rows=[0, 1], length=3)])
    >>> best_groups([[1, 2, 3, 4], [1, 9], [1, 5, 5, 6, 7, 8, 5, 6]], [0, 2, 1])
    (2, [Group(rows=[0, 2, 1], length=1)])
    """
    if len(some) == 1:
        return 0, []
    length = common_start(rows[some[0]], rows[some[-1]])
    branches: dict[int | None, list[int]] = {}
    for row in some:
        following = rows[row][length] if length < len(rows[row]) else None
        branches.setdefault(following, []).append(row)
    apart = [best_groups(rows, branch) for branch in branches.values()] if len(branches) > 1 else []
    saved_apart = sum(saved for saved, _ in apart)
    length = min(length, min(len(rows[row]) for row in some) - 1)  # each keeps an end of its own
    saved = (len(some) - 1) * length
    if saved <= saved_apart or saved < LEAST_SAVING * sum(len(rows[row]) for row in some):
        return saved_apart, [group for _, groups in apart for group in groups]
    return saved, [Group(list(some), length)]


def run(model: nn.Module, part: Part, rows: Rows) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Each batch of a part with its rows' last logits, [R, V] in fp32."""
    if not part.groups:
        for batch in part.batches:
            ids, lengths = right_pad([rows[row] for row in batch])
            yield batch, last_logits(model, ids, lengths, use_cache=False)[0]
        return
    starts = [rows[group.rows[0]][:group.length] for group in part.groups]
    start_ids, start_mask = left_pad(starts, PADDING)
    width = torch.full((len(starts),), start_ids.shape[1])
    _, cache = last_logits(model, start_ids, width, attention_mask=start_mask, use_cache=True,
                           position_ids=(start_mask.cumsum(-1) - 1).clamp(min=0))
    group_of = {row: place for place, group in enumerate(part.groups) for row in group.rows}
    for batch in part.batches:
        which = torch.tensor([group_of[row] for row in batch])
        before = start_mask.sum(-1)[which, None]
        ids, lengths = right_pad([rows[row][part.groups[group_of[row]].length:] for row in batch])
        place = torch.arange(ids.shape[1]).expand_as(ids)
        mask = torch.cat([start_mask[which], (place < lengths[:, None]).long()], dim=1)
        # Padding repeats the last position: one further might be beyond the model's table
        positions = before + place.minimum(lengths[:, None] - 1)
        yield batch, last_logits(model, ids, lengths, attention_mask=mask, position_ids=positions,
                                 past_key_values=copy_rows(cache, which), use_cache=True)[0]


def last_logits(model: nn.Module, ids: Tensor, lengths: Tensor,
                **inputs) -> tuple[Tensor, DynamicCache | None]:
    """Logits [R, V] in fp32 at the last of each row's `lengths` ids, and the cache if there is one.

    The head scores these positions only, inside the model's own forward: its weights are gathered
    there if they are sharded, and no [R, T, V] tensor is made.
    """
    device = next(model.parameters()).device
    rows, last = torch.arange(len(ids), device=device), (lengths - 1).to(device)

    def keep_last(head: nn.Module, arguments: tuple) -> tuple:
        hidden = arguments[0]
        return (hidden[rows.to(hidden.device), last.to(hidden.device), None], *arguments[1:])

    def in_fp32(head: nn.Module, arguments: tuple, logits: Tensor) -> Tensor:
        rounded = logits.dtype != torch.float32 and is_linear(head)
        return logits_of(head, arguments[0]) if rounded else logits

    head = output_head(model)
    hooks = [head.register_forward_pre_hook(keep_last),
             head.register_forward_hook(in_fp32, prepend=True)]  # while its weights are gathered
    try:
        output = model(input_ids=ids.to(device), **{
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    logits = output.logits  # [R, T, V] if the model computes them without calling its head
    return (logits[:, 0] if logits.shape[1] == 1 else logits[rows, last]).float(), \
        output.get("past_key_values")


def right_pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (R, T) and lengths (R).

    >>> right_pad([[5, 6], [7]])
    (tensor([[5, 6],
            [7, 0]]), tensor([2, 1]))
    """
    longest = max(map(len, rows))
    return (torch.tensor([list(row) + [PADDING] * (longest - len(row)) for row in rows]),
            torch.tensor([len(row) for row in rows]))


def copy_rows(cache: DynamicCache, which: Tensor) -> DynamicCache:
    """A new cache of some rows, which may come several times."""
    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        index = which.to(layer.keys.device)
        copy.update(layer.keys[index], layer.values[index], number)
    return copy


def missing_forwards(model: nn.Module, forwards: int) -> int:
    """How many more the busiest process runs, where each pass gathers weights from all of them."""
    if not is_sharded(model):
        return 0
    most = torch.tensor(forwards, device=next(model.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most) - forwards


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are spread over the processes (FSDP2, ZeRO-3)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
               for parameter in model.parameters())
