"""Self-training by on-policy judgment, on trl's DPOTrainer: what differs, and nothing else.

    trainer = SelfJudgeTrainer(
        model, tokenizer, args=DPOConfig("runs/self_judge"), train_dataset=rows,
        judge_templates=text, peft_config=LoraConfig(...))
    trainer.train()

On a CPU the `DPOConfig` needs `use_cpu=True, bf16=False` as well. With `pairs="given"` it is
offline DPO on the rows' own pairs: nothing is sampled or judged, and reference, loss, lengths and
metrics are the same.

Rows are texts: `query` (what the policy continues), `context` (what the judge reads), and for
evaluation `chosen` and `rejected`. For each optimizer step the policy answers every query twice
(`self_judge/sampling.py`), the frozen reference judges each pair in both orders
(`self_judge/judgment.py`), and winner and loser, the ids as they were sampled, become the batch
that trl's own loss takes. Evaluation scores the given pairs and samples nothing.

The loss of a step is the mean over its *queries*: a pair that is left out (identical responses;
ties and cut ones as told) counts as a pair of margin 0, whose loss is a constant and whose gradient
is zero. So it depends neither on the micro-batch size, nor on accumulation, nor on the number of
processes. A step without any pair changes no weight. (DeepSpeed, and fp16 with its gradient scaler,
cannot leave out a step: there it is one with a zero gradient, and Adam's momentum still moves the
weights.)

What differs from the released code: no response is decoded and tokenized again, and EOS is trained
only where it was sampled; the judge sees raw probabilities; draws follow from seed, step and row.
"""

import contextlib
import html
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from trl import DPOTrainer
from trl.trainer.utils import global_then_local_main_first

from lm.fused_head import NOT_MEASURED, score_responses_only
from lm.models import context_of
from lm.records import InputError
from lm.trainers import (
    FiniteGradients,
    FullPrecision,
    InParts,
    NonFiniteLoss,
    WholeCheckpoints,
    present_rows_of_evaluation,
)
from self_judge.collators import SelfJudgeCollator
from self_judge.config import CHOICES
from self_judge.inputs import (
    Collator,
    add_index,
    as_dataset,
    check_columns,
    columns_of,
    copy_of,
    tokenized,
    training_arguments,
)
from self_judge.metrics import (
    PER_PAIR,
    PER_STEP,
    Means,
    Work,
    shown,
)
from self_judge.on_policy import OnPolicy
from self_judge.pairs import Comparison
from self_judge.sampling import HuggingFaceEngine, VllmEngine, sampling_of


class SelfJudgeTrainer(WholeCheckpoints, FullPrecision, OnPolicy, InParts, DPOTrainer):
    """trl's `DPOTrainer` on pairs that the policy samples and the reference judges.

    Args:
        model: a causal LM, or its name or folder.
        tokenizer, processing_class: two names of the same thing.
        args: a `DPOConfig` or any `TrainingArguments`. Where the arguments below are left at their
            defaults, a `DPOConfig`'s own loss_type, beta, max_length and disable_dropout count.
        data_collator: of the training rows; `SelfJudgeCollator` if not given.
        train_dataset, eval_dataset: a `Dataset` or a list of rows (`eval_dataset` also a dict).
        judge_templates: a text with {context}, {response_a} and {response_b}, a list of texts, or
            a text per principle by name.
        token_id_a, token_id_b: the verdict's tokens; from the tokenizer if not given.
        peft_config: train an adapter of this kind; the reference is then the model without it.
        ref_model: the reference; without it and without an adapter, a copy of the model.
        max_length: of query and response, and of a judge prompt; longer ones lose their start
            (counted: query_cut_rate, judge/cut_rate). Never more than the model's own context.
        judge_batch_size: pairs of max_length that are judged at once, at most; of shorter ones,
            more.
        loss_type: sigmoid, hinge or ipo, on log-probs that are summed over a response's tokens, or
            with `average_log_prob` averaged.
        ties, cut: drop or keep pairs that tie (kept, B is chosen, as in the released code) and
            pairs of which the judge could not see everything. Identical responses are no pair.
        judge: reference (frozen) or policy (the paper's live variant).
        generation: the engine and its options, see `self_judge/sampling.py`.
        show_every: print two responses and their verdict every so many steps; 0 never.
        pairs: sampled, or given: the rows' `chosen` and `rejected` (offline DPO). Nothing is
            sampled or judged then, but queries leave room for max_new_tokens all the same.
    """

    _tag_names = ["trl", "self-judge"]  # noqa: RUF012
    _name = "SELF-JUDGE"
    _paper = {"title": "Aligning Large Language Models by On-Policy Self-Judgment",  # noqa: RUF012
              "id": "2402.11253", "citation": ""}
    loss_is_scaled_for_ga = True  # by the number of queries in the step

    def __init__(self, model, tokenizer=None, args=None, data_collator=None, train_dataset=None,
                 eval_dataset=None, judge_templates=None, token_id_a: int | None = None,
                 token_id_b: int | None = None, peft_config=None, ref_model=None, *,
                 disable_dropout: bool = True, max_length: int = 2048, max_new_tokens: int = 768,
                 judge_batch_size: int = 1, top_p: float = 0.9, temperature: float = 1.0,
                 loss_type: str = "sigmoid", beta: float = 0.1, average_log_prob: bool = False,
                 processing_class=None, ties: str = "drop", cut: str = "keep",
                 judge: str = "reference", generation: Mapping | None = None, show_every: int = 0,
                 pairs: str = "sampled", **kwargs):
        for name, value in {"ties": ties, "cut": cut, "judge": judge, "pairs": pairs}.items():
            if value not in CHOICES[name]:
                raise InputError(f"{name} is {value!r}; expected {' or '.join(CHOICES[name])}")
        if pairs == "sampled" and not judge_templates:
            raise InputError("judge_templates is missing: give a text with {context}, {response_a} "
                             "and {response_b}")
        args = training_arguments(args, disable_dropout=disable_dropout, max_length=max_length,
                                  loss_type=loss_type, beta=beta)
        self.ties, self.cut, self.judge, self.show_every = ties, cut, judge, show_every
        self.pairs = pairs
        self.judge_options = {"judge_templates": judge_templates, "token_id_a": token_id_a,
                              "token_id_b": token_id_b}
        self.judge_batch_size = judge_batch_size
        sampling = sampling_of(generation, max_new_tokens=max_new_tokens, temperature=temperature,
                               top_p=top_p) if pairs == "sampled" else None
        self.row_length = min(args.max_length, context_of(model) or args.max_length)
        args.max_length = self.row_length  # to which trl cuts given pairs
        self.query_length = self.row_length - max_new_tokens
        if self.query_length < 1:
            raise InputError(f"max_new_tokens {max_new_tokens} leaves no room for a query in "
                             f"{self.row_length} tokens (the smaller of max_length and the model's "
                             "context); lower max_new_tokens")
        # trl's ipo divides log-probs by the response's length, its other losses do not
        self.length_power = (args.loss_type[0] == "ipo") - average_log_prob
        self.train_rows = as_dataset(train_dataset)
        if self.train_rows is not None:
            columns_of(self.train_rows, "train")  # before trl takes the first row
        super().__init__(
            model=model, ref_model=ref_model or copy_of(model, peft_config), args=args,
            train_dataset=self.train_rows, eval_dataset=as_dataset(eval_dataset),
            processing_class=processing_class or tokenizer, peft_config=peft_config, **kwargs)
        self.add_callback(FiniteGradients())
        self.data_collator = Collator(data_collator or SelfJudgeCollator(self.processing_class),
                                      self.data_collator)
        self.means = {mode: Means(PER_PAIR + PER_STEP * (mode == "train"), self.args.device)
                      for mode in ("train", "eval")}
        self.skipped = self.pairs_in_step = 0
        self.told_of_skips = False
        self.log_probs: list[Tensor] = []  # of rows, [2B]: the policy's, then the reference's
        self.unpadded = False
        for scored in filter(None, (self.model, self.ref_model)):
            if not self.aux_loss_enabled:  # a mixture of experts' own loss is left to trl's head
                self.unpadded = score_responses_only(self.accelerator.unwrap_model(scored),
                                                     self.args.device, self.is_sharded())
        if sampling:
            self.engine = (HuggingFaceEngine(self, sampling) if sampling.engine == "hf"
                           else VllmEngine(self, sampling, self.row_length))

    # Rows

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Rows to be sampled stay texts, pairs become ids, by our rule; training rows are numbered.
        """
        training = dataset is self.train_rows and dataset_name == "train"  # both may be one
        dataset = as_dataset(dataset)
        columns = columns_of(dataset, dataset_name)
        if "chosen_ids" in columns:  # prepared before
            return dataset
        to_sample = training and self.pairs == "sampled"
        needed = ["query", "context"] if to_sample else ["query", "chosen", "rejected"]
        check_columns(columns, dataset_name, needed)
        with global_then_local_main_first():
            if to_sample:
                dataset = dataset.select_columns(needed)
            else:
                dataset = dataset.map(tokenized, remove_columns=columns, fn_kwargs={
                    "tokenizer": processing_class, "query_length": self.query_length})
            return dataset.map(add_index, with_indices=True) if training else dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["query", "context", "index", "prompt_ids", "chosen_ids",
                                   "rejected_ids"]

    # Loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward over a micro-batch; neither, where the step has no pair anywhere."""
        with self.timed("train", 1 / self.current_gradient_accumulation_steps) as work:
            if self.pairs_in_step or not self._can_skip():
                work.tokens = int(inputs["attention_mask"].sum())
                return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        loss = self._empty_loss() * int(inputs["present"].sum()) / num_items_in_batch
        return torch.tensor(loss * self.accelerator.num_processes, device=self.args.device)

    def _can_skip(self) -> bool:
        """Without gradients torch's optimizers leave out a step; DeepSpeed and a scaler do not."""
        return not self.is_deepspeed_enabled and self.accelerator.scaler is None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """trl's loss; in training its sum over queries by the queries of the step.

        DDP averages gradients over the processes, hence the factor.
        """
        present = inputs.pop("present", None)
        loss = super().compute_loss(model, inputs, return_outputs)
        if present is None:  # evaluation, see prediction_step
            return loss
        if not loss.isfinite():
            raise NonFiniteLoss(f"the loss is not finite at step {self.state.global_step + 1}; "
                                "the last checkpoint is kept; try a lower "
                                "training_args.learning_rate")
        total = loss * len(present) - self._empty_loss() * (~present).sum()
        return total / num_items_in_batch * self.accelerator.num_processes

    def predict(self, test_dataset, *args, **kwargs):
        """On rows of pairs, as `evaluate` takes them."""
        prepared = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
        return super().predict(prepared, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """trl's: the mean over the given pairs; of repeated ones nothing counts."""
        present = torch.tensor(present_rows_of_evaluation(self, len(inputs["input_ids"]) // 2))
        inputs["completion_mask"][~present.repeat(2)] = 0
        loss, *others = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        total = loss * len(present) - self._empty_loss() * int((~present).sum())
        return total / max(int(present.sum()), 1), *others

    def _empty_loss(self) -> float:
        """The loss of a pair whose margin is 0."""
        return {"sigmoid": math.log(2), "hinge": 1.0,
                "ipo": 1 / (2 * self.beta) ** 2}[self.loss_types[0]]

    def _scale_log_probs(self, module, args, kwargs, output):
        """Note the rows' log-probs; make their sums averages (or trl's averages sums)."""
        if kwargs.get("fused_lm_head"):
            self.log_probs.append(output.log_probs.detach().sum(1))
            if self.length_power:
                lengths = (kwargs["labels"][:, 1:] != -100).sum(1, keepdim=True).clamp(min=1)
                output.log_probs = output.log_probs * lengths ** float(self.length_power)

    def _compute_loss(self, model, inputs, return_outputs):
        self.log_probs.clear()
        hooks = [scored.register_forward_hook(self._scale_log_probs, with_kwargs=True)
                 for scored in filter(None, (self.model, self.ref_model))]
        try:
            result = super()._compute_loss(model, inputs, return_outputs)
        finally:  # another trainer of these models has a hook of its own
            for hook in hooks:
                hook.remove()
        self._count_pairs(inputs["completion_mask"].any(1).chunk(2)[0], *self.log_probs)
        return result

    # Metrics

    def _count_pairs(self, real: Tensor, policy: Tensor, reference: Tensor) -> None:
        """Means over the real pairs, of summed log-probs, in place of trl's over all rows."""
        chosen, rejected = (self.beta * (policy - reference)).chunk(2)
        values = torch.stack([chosen, rejected, chosen - rejected, (chosen > rejected).float(),
                              *policy.chunk(2)])
        mode = "train" if self.model.training else "eval"
        *sums, count = torch.cat([(values * real).sum(1), real.sum()[None]]).tolist()
        for name, total in zip(PER_PAIR, sums, strict=True):
            self.means[mode].add(name, total, count)
        metrics = self._metrics[mode]
        without_tokens = metrics["entropy"][-1] == 0  # on any process: trl notes zeros then
        for name in PER_PAIR + NOT_MEASURED * without_tokens:
            metrics[name].pop()
            if not metrics[name]:
                del metrics[name]

    @contextlib.contextmanager
    def timed(self, phase: str, steps: float = 1) -> Iterator["Work"]:
        """Seconds a step, and the tokens a second that the body counts, over all processes."""
        work = Work()
        start = time.perf_counter()
        yield work
        if self.args.device.type == "cuda":  # its work is only queued
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        means = self.means["train"]
        means.add(f"seconds/{phase}", seconds, steps)
        means.add(f"tokens_per_second/{phase}", work.tokens * self.accelerator.num_processes,
                  seconds)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our means to trl's metrics."""
        mode = "train" if self.model.training else "eval"
        for name, mean in self.means[mode].take(self.accelerator).items():
            self._metrics[mode][name] = [mean]
        if "loss" in logs:
            logs["skipped_batches"] = self.skipped
            self.skipped = 0
        super().log(logs)  # without the time since the start, which is no news

    def note_skip(self) -> None:
        self.skipped += 1
        if self.told_of_skips or not self.accelerator.is_main_process:
            return
        self.told_of_skips = True
        print(f"step {self.state.global_step + 1}: no pair among its responses (identical, tied or "
              "cut), so no weight changes; the log counts such steps as skipped_batches",
              flush=True)

    def show(self, compared: Comparison, winner: str | None) -> None:
        """Print a query's responses and their verdict, and give it to TensorBoard and W&B."""
        if not self.show_every or self.state.global_step % self.show_every:
            return
        if not self.accelerator.is_main_process:
            return
        text = shown(compared, winner)
        print(f"step {self.state.global_step + 1}\n{text}", flush=True)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                callback.tb_writer.add_text("responses", text, self.state.global_step)
            elif isinstance(callback, WandbCallback) and callback._wandb:
                page = callback._wandb.Html(f"<pre>{html.escape(text)}</pre>")
                callback._wandb.log({"responses": page,
                                     "train/global_step": self.state.global_step})


class PeftSavingCallback(TrainerCallback):
    """Leaves the adapter alone in each checkpoint, without the base model's weights.

    Today's Trainer saves no more than that by itself; kept so that older scripts run.
    """

    def on_save(self, args, state, control, **kwargs):
        """Remove whole-model weights that stand beside an adapter."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and (folder / "adapter_model.safetensors").is_file():
            for pattern in ("pytorch_model*", "model*.safetensors*"):
                for file in folder.glob(pattern):
                    file.unlink()
