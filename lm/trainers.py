"""What our trainers need of `transformers.Trainer` that it does not do by itself.

`InParts`, `WholeCheckpoints` and `FullPrecision` stand before it, or before a trainer of trl, among
a trainer's parents; `FiniteGradients` and `LastStepLogged` are callbacks.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from lm.models import is_quantized
from lm.records import InputError


class InParts:
    """A micro-batch run in several forward passes, as the trainer's `parts(inputs)` splits it.

    One long row no longer makes all others as long, and memory holds one part's activations at a
    time. The loss must be a sum over the rows, divided by what is known of the whole step.
    """

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward over a micro-batch, part by part; gradients sync on the last."""
        *first, last = self.parts(inputs)
        syncing = self.accelerator.sync_gradients
        loss = torch.zeros((), device=self.args.device)
        for part in first:
            self.accelerator.gradient_state._set_sync_gradients(False)
            with self.accelerator.no_sync(model):
                loss += super().training_step(model, part, num_items_in_batch)
        self.accelerator.gradient_state._set_sync_gradients(syncing)
        return loss + super().training_step(model, last, num_items_in_batch)

    def is_sharded(self) -> bool:
        """Sharded weights are gathered in each forward: there, every process must run as many."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled


class WholeCheckpoints:
    """trainer_state.json is what ends a checkpoint.

    The random state is the last file that each process writes; then the first one alone writes
    trainer_state.json, and would not wait for the others. No pickle of the arguments is left
    beside the weights: run.json tells them.
    """

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)


class FullPrecision:
    """What accelerate and trl would round to bf16, and must not; before a trainer of trl.

    Under FSDP2 in bf16 accelerate has the model's outputs cast to bf16: log-probs that are
    computed inside the model would lose whole nats before the loss compares them. It has gradients
    summed over the processes in bf16 too. And trl casts adapters on quantized weights to bf16, in
    which small updates vanish.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if is_peft_model(self.model) and is_quantized(self.model):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy:
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32)


class NonFiniteLoss(InputError):
    """Training met a loss or gradient that is not a number."""


class FiniteGradients(TrainerCallback):
    """Stop before a gradient that is not finite reaches the weights (DeepSpeed hides them)."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:  # the gradient scaler skips such steps: that is how it finds its scale
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not torch.stack([g.isfinite().all() for g in gradients]).all():
            raise NonFiniteLoss(f"the gradient is not finite at step {state.global_step + 1}; "
                                "the last checkpoint is kept")


class LastStepLogged(TrainerCallback):
    """Log after the last step too: it may be no multiple of `logging_steps`.

    Such a line holds the mean over the steps since the line before it. Where the last step is
    logged anyway, the Trainer logs it once.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if args.logging_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_log = True


# Rows that accelerate repeats at an epoch's end, so that all processes have equal batches, are no
# rows of the data: a loss that does not depend on the number of processes leaves them out.

def present_rows(trainer: Trainer, rows: int) -> list[bool]:
    """Which of the `rows` of this process's last micro-batch of the step are no repetitions."""
    left_over = rows_left_over(trainer)
    if left_over <= 0 or not trainer.accelerator.gradient_state.end_of_dataloader:
        return [True] * rows
    before = trainer.accelerator.process_index * trainer.args.per_device_train_batch_size
    return [before + place < left_over for place in range(rows)]


def present_rows_of_evaluation(trainer: Trainer, rows: int) -> list[bool]:
    """The same of this process's micro-batch of an evaluation that is under way."""
    state = trainer.accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return [True] * rows
    before = trainer.accelerator.process_index * trainer.args.eval_batch_size
    return [before + place < state.remainder for place in range(rows)]


def rows_left_over(trainer: Trainer) -> int:
    """Rows in an epoch's last batches, over all processes, if they do not fill them.

    accelerate tells them too, but not in the epoch in whose midst a killed run goes on.
    """
    if trainer.args.dataloader_drop_last or not has_length(trainer.train_dataset):
        return trainer.accelerator.gradient_state.remainder
    return len(trainer.train_dataset) % (trainer.args.per_device_train_batch_size
                                         * trainer.accelerator.num_processes)
