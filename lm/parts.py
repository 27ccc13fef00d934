"""A micro-batch run in several forward passes, for `transformers.Trainer` and its kin.

One long row no longer makes all others as long, and memory holds one part's activations at a time.
"""

import torch
from torch import Tensor


class InParts:
    """Before `Trainer` among a trainer's parents; its `parts(inputs)` splits a micro-batch.

    The trainer's loss must be a sum over the rows, divided by what is known of the whole step.
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
