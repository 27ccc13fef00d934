"""DPO on pairs of rows, for the objectives that prefer one response to another: trl's, as it is."""

from collections.abc import Sequence

from accelerate.utils import is_peft_model
from datasets import Dataset
from trl import DPOTrainer

from cut.data import Rows, check_positions
from lm.fused_head import NOT_MEASURED, score_responses_only
from lm.models import positions_of
from lm.trainers import FiniteGradients, FullPrecision, WholeCheckpoints


class PairTrainer(WholeCheckpoints, FullPrecision, DPOTrainer):
    """`train_dataset` and `eval_dataset` are `Rows`: the chosen response, and the rejected one.

    The reference is the model as it comes: without its adapter, which must be new, or else the
    folder that it was loaded from.
    """

    def __init__(self, model, args, train_dataset: Sequence[Rows],
                 eval_dataset: Sequence[Rows] | None = None, **kwargs):
        check_positions([*train_dataset, *(eval_dataset or ())], positions_of(model))
        super().__init__(model=model, args=args, train_dataset=as_ids(train_dataset),
                         eval_dataset=eval_dataset and as_ids(eval_dataset), **kwargs)
        if is_peft_model(self.model):
            self.model.delete_adapter("ref")  # trl's copy of the new adapter, which does nothing
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        for scored in filter(None, (self.model, self.ref_model)):
            score_responses_only(self.accelerator.unwrap_model(scored), self.args.device,
                                 sharded)
        self.add_callback(FiniteGradients())

    def _prepare_dataset(self, dataset, *args):
        """The rows are ids already."""
        return dataset

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """trl's metrics, but for those that are not measured."""
        for metrics in self._metrics.values():
            for name in NOT_MEASURED:
                metrics.pop(name, None)
        super().log(logs, start_time)


def as_ids(pairs: Sequence[Rows]) -> Dataset:
    """The columns that trl's collator takes."""
    return Dataset.from_list([
        {"prompt_ids": pair.aligned.ids[:-pair.aligned.supervised],
         "chosen_ids": pair.aligned.ids[-pair.aligned.supervised:],
         "rejected_ids": pair.misaligned.ids[-pair.misaligned.supervised:]} for pair in pairs])
