"""What `SelfJudgeTrainer` is given, as trl's `DPOTrainer` wants it: arguments, model, rows."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig

from lm.records import InputError
from lm.templates import prompt_ids, response_ids
from self_judge.pairs import keep_end

LOSS_TYPES = ("sigmoid", "hinge", "ipo")
PUBLISHED = {"disable_dropout": True, "max_length": 2048, "loss_type": "sigmoid", "beta": 0.1}
TRL_DEFAULTS = {"disable_dropout": True, "max_length": 1024, "loss_type": ["sigmoid"], "beta": 0.1}


def training_arguments(args: TrainingArguments | None, **given: object) -> DPOConfig:
    """A `DPOConfig` of our own with the given values, which yield to what `args` was told.

    That is, where a value is left as published and `args` says anything but trl's default.
    """
    args = as_dpo_config(args)
    for name, value in given.items():
        theirs = getattr(args, name)
        told = theirs is not None and theirs != TRL_DEFAULTS[name]
        if value != PUBLISHED[name] or not told:
            setattr(args, name, value)
    if isinstance(args.loss_type, str):
        args.loss_type = [args.loss_type]
    if len(args.loss_type) != 1 or args.loss_type[0] not in LOSS_TYPES:
        raise InputError(f"loss_type is {', '.join(args.loss_type)}; expected one of "
                         f"{', '.join(LOSS_TYPES)} (average_log_prob averages over tokens)")
    if not args.beta > 0:
        raise InputError(f"beta is {args.beta}; expected more than 0, 0.1 as published")
    if args.use_weighting:
        raise InputError("use_weighting cannot be: it needs the full logits; leave it False")
    if args.precompute_ref_log_probs:
        raise InputError("precompute_ref_log_probs cannot be: what the policy will answer is not "
                         "known before training; leave it False")
    return args


def as_dpo_config(args: TrainingArguments | None) -> DPOConfig:
    """A copy of `args`, as a `DPOConfig`; of None trl's defaults, without bf16 on a CPU."""
    if args is None:
        machine = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
        return DPOConfig("self_judge", **machine)
    if isinstance(args, DPOConfig):
        return copy.copy(args)
    known = {field.name for field in fields(DPOConfig)}
    return DPOConfig(**{field.name: getattr(args, field.name) for field in fields(args)
                        if field.init and field.name in known})


def copy_of(model: PreTrainedModel | str, peft_config: object) -> PreTrainedModel | None:
    """The reference for full fine-tuning: the weights as they are in memory.

    trl loads those of the folder again that the model came from, which are others after a merge.
    Adapters need none, and weights that ZeRO-3 has sharded already are left to trl.
    """
    from peft import PeftModel

    if peft_config is not None or isinstance(model, str | PeftModel):
        return None
    if is_deepspeed_zero3_enabled():
        return None
    twin = copy.deepcopy(model)
    for patched in ("forward", "_original_forward"):  # earlier trainers', with `model`'s weights
        vars(twin).pop(patched, None)
    return twin


def as_dataset(rows):
    """A list of rows as a `Dataset`; a dict of them too; anything else as it is."""
    if isinstance(rows, Mapping):
        return {name: as_dataset(some) for name, some in rows.items()}
    return Dataset.from_list(list(rows)) if isinstance(rows, list | tuple) else rows


def columns_of(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    """The names of a dataset's columns; stops where there is no row."""
    for row in dataset:
        return list(row)
    raise InputError(f"there are no {name} rows; give at least one")


def check_columns(columns: Sequence[str], name: str, needed: Sequence[str]) -> None:
    """Stop where one is missing."""
    if missing := [column for column in needed if column not in columns]:
        raise InputError(f"{name} rows lack {', '.join(missing)}; they have {', '.join(columns)}")


def add_index(row: dict, index: int) -> dict:
    """The number of a row in its dataset, from which its samples are drawn."""
    return {"index": index}


def tokenized(row: dict, tokenizer, query_length: int) -> dict:
    """A given pair as ids, by the same rule as in sampling: a long query loses its start."""
    ids = prompt_ids(tokenizer, row["query"])
    return {"prompt_ids": keep_end(ids, query_length, tokenizer.bos_token_id),
            "chosen_ids": response_ids(tokenizer, row["chosen"]),
            "rejected_ids": response_ids(tokenizer, row["rejected"])}


@dataclass(frozen=True)
class Collator:
    """One collator for all rows: texts to be sampled, and given pairs, of training as they are.

    `pairs` batches the latter in the step, where it is known which of them count.
    """

    queries: Callable
    pairs: Callable

    def __call__(self, rows: Sequence[dict]) -> dict:
        if "chosen_ids" not in rows[0]:
            return self.queries(rows)
        if "index" not in rows[0]:  # of evaluation
            return self.pairs(rows)
        return {"given": list(rows), "index": torch.tensor([row["index"] for row in rows])}
