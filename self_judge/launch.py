"""What the runs of `train_jsft.py` and `train_self_judge.py` share: from a config to a saved model.

Imported by `self_judge/jsft.py` and `self_judge/self_training.py`, which have the steps of each.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import is_flash_attn_2_available

from lm import models, runs
from lm.log_probs import check_head
from lm.quantized import keep_gradients
from lm.records import InputError, first_line, listed
from self_judge.base import find_base, load_base
from self_judge.config import OURS, Config
from self_judge.data import MAX_LENGTH
from self_judge.sources import has_split, local_files, settings_of
from self_judge.templates import DECISION, asked_of, judge_templates, load_templates

if TYPE_CHECKING:
    from datasets import Dataset

# These change where, how often or with what a run reports, not its result.
FREE_SETTINGS = ("jsft_args.eval_judge_pairs", "self_judge_args.judge_batch_size",
                 "self_judge_args.show_every", *(f"training_args.{name}" for name in (
                     "output_dir", "resume_from_checkpoint", "report_to", "run_name", "project",
                     "disable_tqdm", "logging_steps", "logging_strategy", "logging_first_step",
                     "save_steps", "save_strategy", "save_total_limit", "eval_steps",
                     "eval_strategy", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
                     "dataloader_num_workers", "gradient_checkpointing",
                     "activation_checkpointing")))
# A mixture of experts' own loss, which trl would add: of a micro-batch, not of the step.
NO_BALANCE = {"router_aux_loss_coef": 0.0}
HALF = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")


@dataclass(frozen=True)
class Data:
    """What is trained on, and what the training is measured by."""

    tokenizer: object
    train: "Dataset"
    held_out: "Dataset | None"  # rows of the same kinds
    pairs: Sequence[dict] = ()  # that the model judges at evaluation


def own_args(config: Config) -> dict:
    """The section `jsft_args` or `self_judge_args`; a config has one of them."""
    return config.jsft_args | config.self_judge_args


def max_length(config: Config) -> int:
    """The longest row in tokens."""
    return own_args(config).get("max_length", MAX_LENGTH)


def training_arguments(config: Config, kind: type[TrainingArguments], defaults: dict,
                       **fixed: object) -> TrainingArguments:
    """trl's arguments of `kind` from `training_args`, with what follows from the machine.

    Tells the processes that train together, and what was read otherwise than it was written.
    `defaults` can be set in `training_args`, what is `fixed` cannot.
    """
    seconds = config.training_args.get("ddp_timeout")
    runs.world_size(**({"timeout": timedelta(seconds=seconds)} if isinstance(seconds, int) else {}))
    options = {name: value for name, value in config.training_args.items()
               if name != "resume_from_checkpoint"}
    own = f"{config.kind}_args"
    for name in options:
        if name in OURS[own]:
            raise InputError(f"{config.path}: set {own}.{name}, not training_args.{name}")
    if not torch.cuda.is_available():
        if halves := [name for name in HALF if options.get(name)]:
            config.notes.append(f"no GPU: fp32 instead of {', '.join(halves)}")
        options |= dict.fromkeys(HALF, False) | {"use_cpu": True, "dataloader_pin_memory": False}
    options = {"gradient_checkpointing": False, "report_to": "none", "save_total_limit": 2,
               "ddp_find_unused_parameters": False,
               "include_num_input_tokens_seen": "non_padding", **defaults, **options}
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size",
                 "gradient_accumulation_steps"):
        if options.get(name, 1) < 1:
            raise InputError(f"{config.path}: training_args.{name} is {options[name]}; expected 1 "
                             "or more")
    options["report_to"] = listed(options["report_to"] or "none")
    runs.check_trackers(options["report_to"])
    try:
        arguments = kind(**options, **fixed, logging_nan_inf_filter=False)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"{config.path}: training_args: {first_line(error)}") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never DataParallel: a process drives one GPU
    for note in config.notes if runs.is_main() else ():
        print(f"note: {note}")
    return arguments


def batch_size(arguments: TrainingArguments) -> int:
    """Rows of a step, over all processes."""
    return (arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
            * arguments.world_size)


def load_data(config: Config, arguments: TrainingArguments, rows_of: Callable) -> Data:
    """Records -> rows to train on; rows to measure by, if they are wanted and there are such."""
    tokenizer = models.load_tokenizer(find_base(config.model).model)
    train = rows_of(config, tokenizer, "train")
    if arguments.eval_strategy == "no" and not arguments.eval_on_start:
        return Data(tokenizer, train, None)
    if not has_split(config.dataset, "eval"):
        _never_evaluate(config, arguments)
        return Data(tokenizer, train, None)
    return Data(tokenizer, train, rows_of(config, tokenizer, "eval"))


def _never_evaluate(config: Config, arguments: TrainingArguments) -> None:
    if arguments.load_best_model_at_end:
        raise InputError(f"{config.path}: training_args.load_best_model_at_end needs records for "
                         "evaluation; set dataset.eval or dataset.eval_size")
    arguments.eval_strategy, arguments.eval_on_start = "no", False
    if runs.is_main():
        print("note: the dataset has no records for evaluation, so nothing is measured on such; "
              "dataset.eval_size=N holds out N")


def preview(config: Config, arguments: TrainingArguments, data: Data) -> None:
    """`--dry_run`: what would be trained on, and how long; the judge prompts are checked too."""
    if config.self_judge_args.get("pairs") != "given":
        judge_options(config, data.tokenizer)
    if runs.is_main():
        rows, size = len(data.train), batch_size(arguments)
        steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(
            math.ceil(rows / size) * arguments.num_train_epochs)
        print(f"rows: {rows}; to evaluate on: {len(data.held_out or ())}\n"
              f"steps: {steps}, {size} rows each")


def open_run(config: Config, data: Data) -> tuple[dict, str | None]:
    """Claim the output folder; the run's record, and the checkpoint to continue from if any."""
    settings = flat(config) | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}
    if start := start_sha256(config):
        settings["start_sha256"] = start
    run = runs.describe_run(settings, settings_of(config.dataset)["path"],
                            runs.rows_sha256(data.train))
    run["data"]["files"] = {str(file): runs.sha256(file) for file in local_files(config.dataset)}
    resume = config.training_args.get("resume_from_checkpoint")
    checkpoint = runs.open_run(config.training_args["output_dir"], run,
                               None if resume is True else resume, FREE_SETTINGS,
                               again=f"training_args.{runs.AGAIN}")
    if runs.is_main():
        config.save(config.training_args["output_dir"])
    return run, checkpoint


def flat(config: Config) -> dict[str, object]:
    """The settings by dotted names, as they are written on the command line."""
    named = {}
    for section, value in config.resolved().items():
        if isinstance(value, dict):
            named |= {f"{section}.{key}": entry for key, entry in value.items()}
        else:
            named[section] = value
    return named


def start_sha256(config: Config) -> list[str]:
    """Digests of the records of the runs that the model comes from: trained anew, it is another."""
    names = (config.model.get(f"{name}_model_name_or_path") for name in ("pretrained", "peft"))
    records = [Path(name).expanduser() / runs.RUN_FILE for name in names if name]
    return [runs.sha256(record) for record in records if record.is_file()]


def precision(config: Config) -> str:
    """What the weights are loaded in: fp32 if they are trained, else what `load_in` says."""
    load_in = config.model.get("load_in", "auto")
    if load_in == "auto":
        trained = config.peft_config is None
        load_in = "fp32" if trained or not torch.cuda.is_available() else "bf16"
    if config.peft_config is None and load_in not in ("fp32", "bf16"):
        raise InputError(f"{config.path}: model.load_in {load_in} weights cannot be trained; use "
                         "fp32 or bf16, or add a peft_config")
    return load_in


def load_model(config: Config, seed: int, role: str = "model"):
    """The base, told by its `role`; `seed` is of an adapter's first weights and of dropout."""
    base, load_in = find_base(config.model), precision(config)
    if runs.is_main():
        print(f"{role}: {base} in {load_in}")
        if config.peft_config is None and (note := models.note_on_bf16(load_in)):
            print(note)
    set_seed(seed)
    model = load_base(base, load_in, attention(config))
    if load_in == "4bit":
        keep_gradients(model)
    models.refuse_adapter(model, base.model)
    return model


def attention(config: Config) -> str:
    """flash_attention_2 where it can run and nothing else is asked for."""
    wanted = config.model.get("attn_implementation") or "auto"
    half = any(config.training_args.get(name) for name in ("bf16", "fp16"))
    if wanted == "auto" and half and torch.cuda.is_available() and is_flash_attn_2_available():
        return "flash_attention_2"
    return wanted


def lora(config: Config) -> LoraConfig | None:
    """The adapter to train; None trains every weight."""
    if config.peft_config is None:
        return None
    return LoraConfig(**{"task_type": "CAUSAL_LM", **config.peft_config})


def judge_options(config: Config, tokenizer) -> dict:
    """Judge prompts by principle and the decisions' tokens, so that one asks as JSFT trains."""
    templates = load_templates(config.templates)
    ids = tuple(own_args(config).get(f"token_id_{letter}") for letter in "ab")
    if config.kind == "jsft" or (ids == (None, None) and templates.decision != DECISION):
        asked = asked_of(templates, tokenizer)
        learnt = (asked["token_id_a"], asked["token_id_b"])
        if ids not in ((None, None), learnt):
            raise InputError(f"{config.path}: jsft_args.token_id_a and token_id_b are {ids[0]} and "
                             f"{ids[1]}, but the decisions' tokens, which are learnt, are "
                             f"{learnt[0]} and {learnt[1]}; leave them out")
        return asked
    if None not in ids and runs.is_main():  # an old config's may be another tokenizer's
        print(f"decisions: the tokens {tokenizer.convert_ids_to_tokens(ids)}, as the config says")
    return {"judge_templates": judge_templates(templates, tokenizer),
            "token_id_a": ids[0], "token_id_b": ids[1]}


def check_logits(trainer: Trainer, ids: Sequence[int]) -> None:
    """Stop at an architecture whose logits are not understood; sharded weights cannot be asked."""
    if trainer.is_sharded():
        return
    flash = "flash" in (trainer.model.config._attn_implementation or "")  # it takes no fp32
    with trainer.accelerator.autocast() if flash else contextlib.nullcontext():
        check_head(trainer.model, ids[:32])


def tell_trained(config: Config, trainer: Trainer) -> None:
    """Print how many parameters are trained."""
    if runs.is_main():
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        print(f"training {'every weight' if config.peft_config is None else 'an adapter'}: "
              f"{trained:,} parameters")


def train(config: Config, trainer: Trainer, checkpoint: str | None) -> None:
    """All steps, from the checkpoint if there is one."""
    if trainer.args.tf32 is not False:
        runs.allow_tf32()
    with runs.full_disk_in_one_line(config.training_args["output_dir"]):
        trainer.train(resume_from_checkpoint=checkpoint)


def save(config: Config, run: dict, trainer: Trainer, names: Sequence[str],
         more: str = "") -> None:
    """Adapter (or model), tokenizer, log history; the run record last, as the sign of the end.

    It holds, and the last lines tell, first and last value of what was logged by `names`; also the
    tokens of all rows that were trained on, repeated ones as often as they were.
    """
    folder = config.training_args["output_dir"]
    runs.save_weights(trainer, folder)
    if runs.is_main():
        found = first_and_last(trainer.state.log_history, names)
        steps = trainer.state.global_step
        runs.write_run(folder, run, status="finished", steps=steps,
                       tokens=trainer.state.num_input_tokens_seen, **found)
        print(f"trained {steps} steps on {len(trainer.train_dataset)} rows: "
              + ", ".join(f"{name} {first:.4f} -> {last:.4f}"
                          for name, (first, last) in found.items())
              + f"{more}\nsaved to {folder}")
    trainer.accelerator.wait_for_everyone()


def first_and_last(history: list[dict], names: Sequence[str]) -> dict[str, list[float]]:
    """First and last value of what was logged, by name."""
    values = {name: [entry[name] for entry in history if name in entry] for name in names}
    return {name: [found[0], found[-1]] for name, found in values.items() if found}
