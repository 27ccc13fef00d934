"""JSFT on trl's SFTTrainer: what differs, and nothing else.

    trainer = JsftTrainer(model, args=SFTConfig("runs/jsft"), train_dataset=rows,
                          processing_class=tokenizer, held_out=pairs, judge_templates=texts)

Rows hold `input_ids`, `completion_mask` and `kind` ("sft" or "judgment"). The loss is trl's: the
mean over the supervised tokens of all rows of an optimizer step, on all processes. So a judgment,
which is one token, weighs as much as one token of an answer.

- Only supervised positions are scored against the vocabulary, on every device. (trl's fused head
  does that on a GPU; on a CPU it scores every position: 2.2 times slower for a batch of judgments.)
- Rows are run in parts of like length, end to end where the attention can. (trl's `packing` makes
  one row of many, so that a step has ten times as many examples as its batch sizes say.)
- The log has the mean loss of each kind of token beside their common one.
- Evaluation also asks the model to judge held-out pairs in both orders.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import SFTTrainer

from lm.generation import token_budget_batches
from lm.log_probs import supervised_log_probs
from lm.packing import enable_packing, row_bounds, tokens_per_forward
from lm.records import InputError
from lm.trainers import (
    FiniteGradients,
    FullPrecision,
    InParts,
    NonFiniteLoss,
    WholeCheckpoints,
    present_rows,
    present_rows_of_evaluation,
)
from self_judge.collators import IGNORED, JudgeAugmentedSFTCollator
from self_judge.judgment import judge_metrics, judge_preferences

KINDS = ("sft", "judgment")


class JsftTrainer(WholeCheckpoints, FullPrecision, InParts, SFTTrainer):
    """trl's `SFTTrainer` on rows of answers and of judgments.

    Args:
        held_out: pairs {context, chosen, rejected, principle?} that are judged at evaluation.
        judge_templates: what `self_judge.templates.judge_templates` returns.
        judge_options: of `judge_pairs`, such as max_length or token ids.
    """

    def __init__(self, *positional, args, held_out: Sequence[Mapping] = (),
                 judge_templates: Mapping[str, str] | None = None,
                 judge_options: Mapping | None = None, processing_class, **named):
        if args.packing or args.padding_free:
            raise InputError("packing and padding_free: leave them out; see JsftTrainer")
        args.dataset_kwargs = {"skip_prepare_dataset": True}  # the rows are what is collated
        named["data_collator"] = Collator(processing_class)
        own = getattr(positional[0] if positional else named["model"], "config", None)
        balance = getattr(own, "router_aux_loss_coef", None)
        super().__init__(*positional, args=args, processing_class=processing_class, **named)
        if balance is not None and not self.aux_loss_enabled:
            own.router_aux_loss_coef = balance  # trl notes its own 0 there, which would be saved
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the step
        self.add_callback(FiniteGradients())
        self.held_out, self.judge_templates = held_out, judge_templates
        self.judge_options = dict(judge_options or {})
        self.sums = {mode: Sums(self.args.device) for mode in ("train", "eval")}
        self.is_plain = (args.loss_type == "nll" and self.label_smoother is None
                         and not self.aux_loss_enabled and self.compute_loss_func is None
                         and self.accelerator.parallelism_config is None)
        self.unpadded = self.is_plain and enable_packing(self.model, self.args.device,
                                                         self.is_sharded())

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "completion_mask", "kind"]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Micro-batches, and the supervised tokens in the step; repeated rows have none."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.accelerator.gradient_state.end_of_dataloader and batches:
            labels = batches[-1]["labels"]
            labels[~torch.tensor(present_rows(self, len(labels)))] = IGNORED
            tokens = self._get_num_items_in_batch(batches, device)
        return batches, tokens

    def parts(self, inputs: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Rows of like length, few enough for the token budget of a forward pass."""
        found = [inputs]
        if not (self.is_sharded() or self.aux_loss_enabled):  # balance is a micro-batch's
            lengths = inputs["attention_mask"].sum(-1).tolist()
            budget = tokens_per_forward(self.args.device, self.unpadded)
            found = [{name: value[rows, :lengths[rows[0]]] for name, value in inputs.items()}
                     for rows in token_budget_batches(dict(enumerate(lengths)), 0, budget)]
        return [end_to_end(part) | row_bounds(self.model, part["attention_mask"].sum(-1))
                for part in found] if self.unpadded else found

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """trl's loss; its own code runs what is rarer (dft, label smoothing, mixtures of experts).

        The sum of the step's tokens is divided by their number over all processes, and DDP
        averages gradients over the processes, hence the factor.
        """
        if return_outputs or not self.is_plain:
            inputs = {name: value for name, value in inputs.items() if name != "judged"}
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._stop_unless_finite(found[0] if return_outputs else found)
            return found
        log_probs, judged = self._log_probs(model, inputs)
        tokens = len(log_probs) if num_items_in_batch is None else num_items_in_batch
        loss = -log_probs.sum() / torch.as_tensor(tokens).clamp(min=1)
        self._stop_unless_finite(loss)
        self.sums["train" if self.model.training else "eval"].add(
            log_probs.detach(), judged, inputs["input_ids"].numel())
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def _stop_unless_finite(self, loss: Tensor) -> None:
        if not loss.isfinite():
            raise NonFiniteLoss(f"the loss is not finite at step {self.state.global_step + 1}; "
                                "the last checkpoint is kept; try a lower "
                                "training_args.learning_rate")

    def _log_probs(self, model, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[S] of the supervised tokens, and which of them are a judgment's."""
        ids, supervised = inputs["input_ids"], inputs["labels"] != IGNORED
        known = {"input_ids", "labels", "judged"}
        if not self.unpadded:  # no token sees the padding on its right
            known.add("attention_mask")
        others = {name: value for name, value in inputs.items() if name not in known}
        return (supervised_log_probs(model, ids, supervised, **others),
                inputs["judged"][supervised])

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone; `evaluation_loop` takes the mean over tokens from `self.sums`."""
        if not self.is_plain:
            inputs.pop("judged", None)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        present = present_rows_of_evaluation(self, len(inputs["labels"]))
        inputs["labels"][~torch.tensor(present)] = IGNORED
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.compute_loss(model, part)
                      for part in self.parts(self._prepare_inputs(inputs))]
        return torch.stack(losses).mean(), None, None

    def evaluation_loop(self, *positional, metric_key_prefix: str = "eval", **named):
        """trl's, with means over tokens instead of over batches, and the judge's metrics."""
        self.sums["eval"].clear()
        output = super().evaluation_loop(*positional, metric_key_prefix=metric_key_prefix, **named)
        found = self.sums["eval"].take(self.accelerator) if self.is_plain else {}
        found.pop("tokens_per_second", None)  # Trainer tells the speed of evaluations
        output.metrics.update({f"{metric_key_prefix}_{name}": value
                               for name, value in (found | self.judge_held_out()).items()})
        return output

    def judge_held_out(self) -> dict[str, float]:
        """How well the model judges the held-out pairs; each process judges its share."""
        if not self.held_out:
            return {}
        share = self.held_out[self.accelerator.process_index::self.accelerator.num_processes]
        with self.compute_loss_context_manager():
            judged = judge_preferences(self.model, self.processing_class, share,
                                       self.judge_templates, **self.judge_options)
        found = list(zip(share, *judged, strict=True))
        return judge_summary(gather_object(found))

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean loss of each kind of token to the training logs."""
        if "loss" in logs and self.is_plain:
            logs.update(self.sums["train"].take(self.accelerator) | {"loss": logs["loss"]})
        super().log(logs)  # without the time since the start, which is no news


def end_to_end(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Padded rows [B, T] as one row [1, all their tokens].

    A row's first token is never learnt, as the token before it is another row's.

    >>> rows = {"input_ids": [[5, 6, 7], [8, 9, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]],
    ...         "labels": [[-100, 6, 7], [8, 9, -100]]}
    >>> {name: value.tolist() for name, value in end_to_end(
    ...     {name: torch.tensor(value) for name, value in rows.items()}).items()}
    {'input_ids': [[5, 6, 7, 8, 9]], 'labels': [[-100, 6, 7, -100, 9]]}
    """
    present = part["attention_mask"].bool()
    rows = {name: value for name, value in part.items() if name != "attention_mask"}
    rows["labels"] = rows["labels"].clone()
    rows["labels"][:, 0] = IGNORED
    return {name: value[present][None] for name, value in rows.items()}


class Collator:
    """Rows -> batch, with `judged` [B, T]: which rows are judgments."""

    def __init__(self, tokenizer):
        self.collate = JudgeAugmentedSFTCollator(tokenizer)

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        """Ids, attention mask, labels and `judged`, all (B, T)."""
        batch = self.collate(rows)
        batch["labels"][:, 0] = IGNORED  # nothing stands before a row's first token
        judged = torch.tensor([row.get("kind") == "judgment" for row in rows])
        judged = judged[:, None].repeat(1, batch["labels"].shape[1])  # a view cannot be pinned
        return batch | {"judged": judged}


class Sums:
    """Losses and tokens of both kinds since the last log, kept on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        # Losses of answers' and judgments' tokens, how many of each, and tokens run
        self.values = torch.zeros(5, device=self.device, dtype=torch.float64)
        self.since = time.perf_counter()

    def add(self, log_probs: Tensor, judged: Tensor, run: int) -> None:
        """Count the supervised tokens of a forward pass over `run` tokens, padding included."""
        kinds = torch.stack([1.0 - judged.double(), judged.double()])
        losses = -kinds @ log_probs.double()
        self.values += torch.cat([losses, kinds.sum(1), kinds.new_tensor([run])])

    def take(self, accelerator) -> dict[str, float]:
        """Means over all processes, by the names in which they are logged; then start anew."""
        *sums, run = accelerator.reduce(self.values).tolist()
        losses, tokens = sums[:2], sums[2:]
        found = {"loss": sum(losses) / max(sum(tokens), 1),
                 "tokens_per_second": run / (time.perf_counter() - self.since)}
        found |= {f"{kind}_loss": loss / count
                  for kind, loss, count in zip(KINDS, losses, tokens, strict=True) if count}
        self.clear()
        return found


def judge_summary(found: Sequence[tuple]) -> dict[str, float]:
    """Metrics of (held-out pair, judgment, its pair); the biases are 0 for an unbiased judge."""
    shares = {name: share.share for name, share in judge_metrics(
        [judgment for _, judgment, _ in found], [pair for _, _, pair in found]).items()}
    summary = {"judge_pairs": len(found)} | {
        f"judge_{name}": shares[name] for name in ("accuracy", "consistency", "ties", "cut")}
    if "chose_first" in shares:
        summary["judge_position_bias"] = shares["chose_first"] - 0.5
    if "chose_longer" in shares:
        summary["judge_length_bias"] = shares["chose_longer"] - shares["longer_is_better"]
    for principle in sorted({pair["principle"] for pair, _, _ in found if "principle" in pair}):
        of_it = [entry for entry in found if entry[0].get("principle") == principle]
        accuracy = judge_metrics([entry[1] for entry in of_it], [entry[2] for entry in of_it])
        summary[f"judge_accuracy_{principle}"] = accuracy["accuracy"].share
    return summary
