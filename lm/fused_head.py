"""Log-probs of the responses alone, in the place of trl's fused head.

Where trl has no Triton, as on a CPU, it scores every position, prompts and padding too, in tiles of
half a gigabyte. `lm.log_probs` scores the supervised ones in small chunks, on every device, and
finds a frozen head's derivative on the way. `benchmarks/self_judge_step.py` measures a step of it.
"""

import functools

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from lm.log_probs import supervised_log_probs, supervised_log_probs_unpadded
from lm.models import without_adapter
from lm.packing import enable_packing

# trl's metrics that would need the full logits, which are never made: zeros here
NOT_MEASURED = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


def score_responses_only(model: PreTrainedModel | PeftModel, device: torch.device,
                         sharded: bool) -> bool:
    """Make `model(..., labels=labels, fused_lm_head=True)` score the labelled positions only.

    Returns whether rows are run end to end, as `lm.packing.enable_packing` says.

    The output's `entropy`, `mean_logits` and `is_top1`, which feed nothing but trl's metrics
    `NOT_MEASURED`, are zero.
    """
    model = without_adapter(model)
    unpadded = enable_packing(model, device, sharded)
    forward = model.forward

    @functools.wraps(forward)
    def lean_forward(*args, fused_lm_head: bool = False, labels=None, **kwargs):
        if not fused_lm_head:
            return forward(*args, **kwargs | ({} if labels is None else {"labels": labels}))
        kwargs.pop("attention_mask", None)  # right padding: no token sees what follows it
        kwargs.pop("use_cache", None)
        supervised = labels != -100
        supervised[:, 0] = False
        ids = kwargs.pop("input_ids")
        found = (supervised_log_probs_unpadded(model, ids, supervised) if unpadded and not kwargs
                 else supervised_log_probs(model, ids, supervised, **kwargs))
        mask = supervised[:, 1:]
        log_probs = found.new_zeros(mask.shape).masked_scatter(mask, found)
        nothing = torch.zeros_like(log_probs)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=nothing, mean_logits=nothing,
                                   is_top1=mask & False, label_mask=mask)

    model.forward = lean_forward
    return unpadded
