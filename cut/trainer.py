"""CUT on transformers' Trainer: what differs from plain fine-tuning, and nothing else.

A dataset item is one example's `Rows`. A micro-batch is run in as few forward passes as a token
budget allows, over the rows that exist, end to end where the attention can. The loss of an
optimizer step is the mean over its examples, so it depends neither on the micro-batch size, nor
on accumulation, nor on the number of processes.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from cut.data import Batch, Rows, check_positions, collate, within_budget
from cut.loss import CutLoss, cut_loss
from lm.log_probs import supervised_log_probs, supervised_log_probs_unpadded
from lm.models import positions_of
from lm.packing import enable_packing, tokens_per_forward
from lm.records import InputError
from lm.trainers import (
    FiniteGradients,
    FullPrecision,
    InParts,
    NonFiniteLoss,
    WholeCheckpoints,
)

PADDING = -1  # the index of an example without weight


@dataclass(frozen=True)
class CutSettings:
    """Arguments of `cut_loss`; papers.md 1.2 has the values that were searched."""

    threshold: float = 1.1
    weight_unlike: float = 0.1
    gamma: float = 0.0
    halve_pairs: bool = True
    l1: bool = True
    align_n: bool = True


class CutTrainer(WholeCheckpoints, FullPrecision, InParts, Trainer):
    """`Trainer` with the CUT loss; `train_dataset` and `eval_dataset` are lists of `Rows`.

    What would need logits, another loss or another collator is refused. `pad_id` is never looked
    at by the model, so that any will do.
    """

    def __init__(self, model=None, args=None, data_collator=None,
                 train_dataset: Sequence[Rows] | None = None, eval_dataset=None, *,
                 settings: CutSettings = CutSettings(), pad_id: int | None = 0,
                 group_by_length: bool = False, **kwargs):
        for name, given in {"data_collator": data_collator, **{name: kwargs.get(name) for name in (
                "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")}}.items():
            if given is not None:
                raise InputError(f"{name}: CutTrainer has its own rows and loss, and no logits; "
                                 "leave it out")
        if args is not None and args.label_smoothing_factor:
            raise InputError("label_smoothing_factor: the CUT loss has none; leave it out")
        super().__init__(model, args, list,  # a micro-batch is padded part by part
                         PaddedExamples(train_dataset) if train_dataset is not None else None,
                         eval_dataset, **kwargs)
        for examples in (train_dataset, eval_dataset):
            if isinstance(examples, Sequence):
                check_positions(examples, positions_of(self.model))
        self.settings = settings
        self.pad_id = pad_id or 0
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        self.order = "group_by_length" if group_by_length else strategy
        self.model_accepts_loss_kwargs = True  # the loss is divided by the examples of the step
        self.unpadded = enable_packing(self.model, self.args.device, self.is_sharded())
        self.statistics = Statistics(self.args.device)
        self.add_callback(FiniteGradients())

    def compute_loss(self, model, inputs: list[Rows], return_outputs=False,
                     num_items_in_batch=None) -> Tensor:
        """Sum of the examples' losses over the number of examples in the optimizer step.

        DDP averages gradients over the processes, hence the factor.
        """
        batch = collate(inputs, self.pad_id).to(self.args.device)
        losses = cut_losses(model, batch, self.settings, self.unpadded)
        if not torch.isfinite(losses.loss).all():
            bad = batch.records[int((~torch.isfinite(losses.loss)).nonzero()[0, 0])]
            raise NonFiniteLoss(f"{bad}: the loss is not finite at step "
                                f"{self.state.global_step + 1}; the last checkpoint is kept")
        if num_items_in_batch is None:  # not a part of an optimizer step
            loss = (losses.loss * batch.weight).sum() / batch.weight.sum().clamp(min=1)
            return (loss, losses) if return_outputs else loss
        self.statistics.add(losses, batch)
        total = (losses.loss * batch.weight).sum()
        return total / num_items_in_batch * self.accelerator.num_processes

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss is made of to the training logs."""
        if "loss" in logs:
            logs.update(self.statistics.take(self.accelerator))
        super().log(logs, start_time)

    def parts(self, examples: list[Rows]) -> list[list[Rows]]:
        """Few enough examples for the token budget of a forward pass."""
        if self.is_sharded():
            return [examples]
        budget = tokens_per_forward(self.args.device, self.unpadded)
        return within_budget(examples, budget, padded=not self.unpadded)

    def _get_num_items_in_batch(self, batch_samples: list[list[Rows]], device) -> Tensor:
        """Examples in the optimizer step, over all processes; padding examples do not count."""
        count = sum(example.weight for batch in batch_samples for example in batch)
        return self.accelerator.reduce(torch.tensor(count, device=device))

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        examples = train_dataset or self.train_dataset
        even = self.args.per_device_train_batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(examples, seed, even, self.args.gradient_accumulation_steps, self.order)


class PaddedExamples(Dataset):
    """Examples, and under index `PADDING` the shortest one again, without weight."""

    def __init__(self, examples: Sequence[Rows]):
        if not len(examples) or not isinstance(examples[0], Rows):
            raise InputError("train_dataset: expected a list of at least one `Rows`, as "
                             "`cut.data.rows_of` makes them of an example")
        self.examples = examples
        self.padding = replace(min(examples, key=lambda example: example.tokens), weight=0.0)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Rows:
        return self.padding if index == PADDING else self.examples[index]


class EpochSampler(Sampler[int]):
    """A shuffle that depends on seed and epoch alone, padded to whole micro-batches.

    Without the padding, accelerate would repeat examples in the last batch of an epoch on
    several processes, and the last step would differ from that of one process.
    """

    def __init__(self, dataset: PaddedExamples, seed: int, even: int, accumulation: int,
                 order: str):
        self.dataset = dataset
        self.seed = seed
        self.even = even
        self.batch_size = even * accumulation
        self.order = order  # random, group_by_length or sequential
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.even) * self.even

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.order == "sequential":
            order = list(range(len(self.dataset)))
        elif self.order == "group_by_length":
            lengths = [example.tokens for example in self.dataset.examples]
            order = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
        else:
            order = torch.randperm(len(self.dataset), generator=generator).tolist()
        yield from order + [PADDING] * (len(self) - len(order))


class Statistics:
    """Sums over the micro-batches since the last log, kept on the device."""

    NAMES = ("examples", "pairs", "mle", "contrast", "tokens", "contrasted", "inappropriate",
             "log_ratio")

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(self.NAMES), device=device, dtype=torch.float64)
        self.since = time.perf_counter()

    def add(self, losses: CutLoss, batch: Batch) -> None:
        """Count a batch; examples without weight do not count."""
        weight = batch.weight.double()
        pairs = weight * batch.negative
        self.sums += torch.stack([
            weight.sum(), pairs.sum(), (losses.mle.detach() * weight).sum(),
            (losses.contrast.detach() * pairs).sum(), batch.lengths.sum().double(),
            (batch.response * pairs).sum(), (losses.inappropriate.sum(-1) * pairs).sum(),
            (losses.log_ratio.sum(-1) * pairs).sum()])

    def take(self, accelerator) -> dict[str, float]:
        """Means over all processes, by the names in which they are logged, and start anew."""
        total = dict(zip(self.NAMES, accelerator.reduce(self.sums).tolist(), strict=True))
        seconds = time.perf_counter() - self.since
        self.sums.zero_()
        self.since = time.perf_counter()
        tokens = max(total["contrasted"], 1)
        return {
            "mle": total["mle"] / max(total["examples"], 1),
            "unlikelihood": total["contrast"] / max(total["pairs"], 1),
            "inappropriate_share": total["inappropriate"] / tokens,
            "p_ratio": torch.tensor(total["log_ratio"] / tokens).exp().item(),  # geometric mean
            "tokens_per_second": total["tokens"] / seconds,
        }


def cut_losses(model, batch: Batch, settings: CutSettings, unpadded: bool = False) -> CutLoss:
    """Run the model over a batch's rows, in one forward pass, and compare them token by token."""
    log_probs = supervised_log_probs_unpadded if unpadded else supervised_log_probs
    flat = log_probs(model, batch.input_ids, batch.loss_mask)
    rows, supervised = align_right(flat, batch.loss_mask.sum(-1))
    examples, tokens = len(batch.negative), rows.shape[1]
    aligned = rows[:examples]
    misaligned = torch.zeros_like(aligned).index_put(
        (batch.negative.nonzero().squeeze(-1),), rows[examples:])
    response_mask = torch.arange(tokens, device=flat.device) >= tokens - batch.response[:, None]
    return cut_loss(aligned, misaligned, response_mask, batch.negative,
                    mle_mask=supervised[:examples], **asdict(settings))


def align_right(flat: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Lay [S] values out as rows that end in the last column: [R, max], and the mask of values.

    >>> align_right(torch.tensor([1., 2., 3.]), torch.tensor([1, 2]))[0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    width = int(lengths.max())
    mask = torch.arange(width, device=flat.device) >= width - lengths[:, None]
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat), mask
