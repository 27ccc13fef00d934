"""Rows that accelerate repeats at an epoch's end, so that all processes have equal batches.

They are no rows of the data, so a loss that does not depend on the number of processes leaves them
out.
"""

from transformers import Trainer
from transformers.trainer_utils import has_length


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
