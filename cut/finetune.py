"""The steps of `finetune_unlikelihood.py`: check -> data -> run folder -> model -> trainer -> save.

`scripts/online.py` checks its settings here too; in a notebook use `cut.data`, `cut.trainer` and
`lm` directly.
"""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments, get_scheduler, set_seed

from cut.data import Counts, Example, Rows, examples_of, rows_of
from cut.objectives import OBJECTIVES, learnt, left_out, preference_rows
from cut.trainer import CutSettings, CutTrainer
from lm import models, runs
from lm.log_probs import check_head
from lm.quantized import keep_gradients
from lm.records import InputError, first_line, listed, read_records
from lm.templates import load_template
from lm.trainers import LastStepLogged

AT_LEAST = {"batch_size": 1, "micro_batch_size": 1, "cutoff_len": 1, "logging_steps": 1,
            "save_steps": 1, "lora_r": 1, "lora_alpha": 1, "warmup_steps": 0, "learning_rate": 0,
            "val_set_size": 0, "weight_unlike": 0, "gamma": 0, "threshold": 0, "seed": 0,
            "lora_dropout": 0, "beta": 0, "max_steps": -1, "visualize": 0}
LARGEST = 2**32 - 1  # numpy's largest seed; other numbers above it are slips, too
AT_MOST = {"learning_rate": 1e30}  # fp32 ends at 3e38
# Schedules of transformers
BY_VALIDATION = ("reduce_lr_on_plateau", "greedy")
WITHOUT_WARMUP = ("constant", *BY_VALIDATION)
DEBUG_EXAMPLES, DEBUG_STEPS = 16, 2


@dataclass(frozen=True)
class Data:
    """What is trained on, and what it was made of."""

    tokenizer: object
    counts: Counts
    examples: list[Example]  # of `train`, in the same order; none of pairs for DPO
    train: list[Rows]
    validation: list[Rows]


def check(flags: dict, processes: int | None = None) -> SimpleNamespace:
    """The settings, with their defaults that depend on other flags; stops at what cannot work.

    `processes` is how many a training to come will have; of this one, the launcher tells.
    """
    settings = SimpleNamespace(**flags)
    for name in ("base_model", "data_path", "output_dir"):
        if not getattr(settings, name):
            raise InputError(f"--{name} is required (--help lists every flag)")
    _check_numbers(settings)
    _check_schedule(settings)
    if not all(isinstance(layer, str) for layer in settings.lora_target_modules):
        raise InputError(f"--lora_target_modules is {settings.lora_target_modules}; expected names "
                         "of layers, separated by commas, or all-linear")
    if settings.load_in not in models.PRECISIONS:
        raise InputError(f"--load_in is {settings.load_in!r}; expected one of "
                         f"{', '.join(models.PRECISIONS)}")
    if settings.full_finetune and settings.load_in not in ("auto", "bf16", "fp32"):
        raise InputError(f"--full_finetune cannot train --load_in {settings.load_in} weights; "
                         "use bf16 or fp32")
    load_in = models.training_precision(settings.load_in, settings.full_finetune)
    if load_in in ("8bit", "4bit") and models.shards_weights():
        raise InputError("FSDP and ZeRO-3 cannot shard 8-bit and 4-bit weights; add --load_in bf16")
    if settings.as_in_paper and not settings.gamma:
        settings.gamma = 1.0
    _check_objective(settings)
    if settings.wandb_project and settings.report_to == "none":
        settings.report_to = "wandb"
    runs.check_trackers(settings.report_to)
    settings.world_size = processes or runs.world_size()
    settings.accumulation = _accumulation(settings)
    return settings


def _check_objective(settings: SimpleNamespace) -> None:
    """Stop at what an objective does not do; `without` becomes what it leaves out of CUT."""
    settings.without = left_out(settings.objective, settings.without, settings.gamma)
    if settings.visualize and settings.objective != "cut":
        raise InputError("--visualize shows what CUT flags; leave out --objective")
    if OBJECTIVES[settings.objective].compare:
        for name in ("group_by_length", "train_on_inputs"):
            if getattr(settings, name):
                raise InputError(f"--{name} is not for --objective {settings.objective}, which "
                                 "trl's DPO trains; leave it out")
        if not settings.beta:
            raise InputError("--beta is 0, at which nothing is learnt; expected more than 0")
    if settings.objective == "dpo" and settings.downsample != -1:
        raise InputError("--downsample leaves out responses by their judgments, and --objective "
                         "dpo compares all by their scores; leave it out")
    if settings.as_released and settings.objective.startswith("ilf_"):
        raise InputError("--as_released keeps failed judgments, by which nothing is refined; leave "
                         f"it out with --objective {settings.objective}")


def _check_numbers(settings: SimpleNamespace) -> None:
    for name, value in vars(settings).items():
        most = AT_MOST.get(name, LARGEST)
        if isinstance(value, int | float) and not value <= most:  # NaN is not
            raise InputError(f"--{name} is {value}; expected {most} or less")
    for name, least in AT_LEAST.items():
        if getattr(settings, name) < least:
            raise InputError(f"--{name} is {getattr(settings, name)}; expected {least} or more")
    if settings.lora_dropout >= 1:
        raise InputError(f"--lora_dropout is {settings.lora_dropout}; expected less than 1")
    if settings.num_epochs <= 0 or settings.max_steps == 0:
        raise InputError(f"--num_epochs {settings.num_epochs} and --max_steps "
                         f"{settings.max_steps} leave no step to train")


def _check_schedule(settings: SimpleNamespace) -> None:
    """Have transformers make the schedule: some want arguments for which there is no flag."""
    if settings.lr_scheduler in BY_VALIDATION and not settings.val_set_size:
        raise InputError(f"--lr_scheduler {settings.lr_scheduler} follows the loss on validation "
                         "records; add --val_set_size")
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], settings.learning_rate)
    try:
        get_scheduler(settings.lr_scheduler, optimizer, settings.warmup_steps, 1)
    except (TypeError, ValueError) as error:
        raise InputError(f"--lr_scheduler {settings.lr_scheduler} cannot be used here "
                         f"({first_line(error)}); use another, such as cosine") from error


def load_data(settings: SimpleNamespace) -> Data:
    """Records -> examples -> rows, split into training and validation."""
    tokenizer = models.load_tokenizer(settings.base_model)
    objective = OBJECTIVES[settings.objective]
    keep_failed = settings.as_released or settings.objective == "dpo"  # which asks for no judgment
    examples, counts = examples_of(read_records(settings.data_path), settings.data_path,
                                   downsample=settings.downsample, as_released=keep_failed,
                                   contrast=settings.weight_unlike > 0 and objective.contrasts)
    examples, rows, sources = _learnt(settings, examples, tokenizer)
    if settings.debug:
        examples, rows, sources = (made[:DEBUG_EXAMPLES] for made in (examples, rows, sources))
    held_out = _held_out(sources, settings.val_set_size)
    trained = [index for index in range(len(rows)) if index not in held_out]
    if runs.is_main():
        print(f"data: {counts}\nobjective: {settings.objective}, {len(rows)} "
              f"{'pairs' if objective.compare else 'examples'} of them")
        if objective.contrasts and not counts.positives_kept:
            print("note: no Align-P examples, so nothing shows what a good response is")
        if cut := sum(row.cut > 0 for row in rows):
            print(f"note: {cut} of {len(rows)} examples were cut to --cutoff_len "
                  f"{settings.cutoff_len}")
    return Data(tokenizer, counts, [examples[index] for index in trained if examples],
                [rows[index] for index in trained], [rows[index] for index in sorted(held_out)])


def _learnt(settings: SimpleNamespace, examples: list[Example],
            tokenizer) -> tuple[list[Example], list[Rows], list[str]]:
    """What the objective makes of the records' examples; pairs for DPO are rows alone.

    The last list says what each is made of, a record or, of pairs, an instruction: all of one
    source is validated on, or none.
    """
    objective, template = OBJECTIVES[settings.objective], load_template(
        settings.prompt_template_name)
    if settings.objective == "forward" and (said := template.fixed_judgment):
        raise InputError(f"--prompt_template_name {template.name} says {said!r} of every response, "
                         "and --objective forward learns bad ones too; use alpaca")
    if objective.compare:
        examples, preferences = [], objective.compare(examples)
        rows = [preference_rows(preference, template, tokenizer, settings.cutoff_len)
                for preference in preferences]
        sources = [preference.instruction for preference in preferences]
    else:
        examples = learnt(objective, examples, settings.without)
        rows = [rows_of(example, template, tokenizer, settings.cutoff_len,
                        settings.train_on_inputs) for example in examples]
        sources = [example.record for example in examples]
    if not rows:
        raise InputError(f"{settings.data_path}: --objective {settings.objective} finds nothing to "
                         "learn in these records; cut/objectives.py says what it learns from")
    return examples, rows, sources


def open_run(settings: SimpleNamespace, free: tuple[str, ...]) -> str | None:
    """Claim the output folder; the checkpoint to continue from, if this run was killed before."""
    settings.run = runs.describe_run(vars(settings), settings.data_path)
    return runs.open_run(settings.output_dir, settings.run, settings.resume_from_checkpoint, free)


def training_arguments(settings: SimpleNamespace) -> TrainingArguments:
    """The Trainer's part of the settings."""
    for name in ("project", "watch", "log_model"):
        if value := getattr(settings, f"wandb_{name}"):
            os.environ[f"WANDB_{name.upper()}"] = value
    on_gpu = torch.cuda.is_available()
    validate = bool(settings.val_set_size)
    half = on_gpu and (settings.load_in != "fp32" or settings.full_finetune)
    bf16 = (half and settings.load_in != "fp16"
            and torch.cuda.is_bf16_supported(including_emulation=False))
    options = dict(
        output_dir=settings.output_dir,
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.num_epochs,
        max_steps=DEBUG_STEPS if settings.debug else settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        bf16=bf16,
        fp16=half and not bf16,
        use_cpu=not on_gpu,
        optim="adamw_torch",
        logging_steps=1 if settings.debug else settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if validate else "no",
        eval_steps=0.1 if validate else None,  # of the steps
        prediction_loss_only=True,
        seed=settings.seed,
        report_to=listed(settings.report_to),
        run_name=settings.wandb_run_name or None,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False if settings.world_size > 1 else None,
    )
    kind = TrainingArguments
    if OBJECTIVES[settings.objective].compare:
        from trl import DPOConfig

        kind = DPOConfig
        options |= {"beta": settings.beta, "max_length": settings.cutoff_len,
                    "router_aux_loss_coef": 0.0,  # as for the other objectives
                    "gradient_checkpointing": False}  # load_model has switched it on or not
    try:
        arguments = kind(**options)
    except ValueError as error:  # what else transformers and trl refuse
        raise InputError(first_line(error)) from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never DataParallel: a process drives one GPU
    return arguments


def load_model(settings: SimpleNamespace):
    """The base model with LoRA layers, or with every weight trainable."""
    set_seed(settings.seed)  # LoRA's first weights
    load_in = models.training_precision(settings.load_in, settings.full_finetune)
    model = models.load_model(settings.base_model, load_in, settings.attn_implementation)
    models.refuse_adapter(model, settings.base_model)
    if load_in == "4bit":
        keep_gradients(model)
    if settings.full_finetune:
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model = models.add_lora(model, settings.lora_r, settings.lora_alpha,
                                settings.lora_dropout, settings.lora_target_modules,
                                settings.gradient_checkpointing)
    if settings.torch_compile and models.is_quantized(model):
        raise InputError("--torch_compile gains nothing with weights in 8 or 4 bits, whose layers "
                         "it cannot compile; use --load_in bf16 (or fp32)")
    if settings.torch_compile:
        compile_blocks(model)
    if runs.is_main():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"model: {settings.base_model}, {trained / 1e6:.2f} M parameters trained")
        if settings.full_finetune and (note := models.note_on_bf16(load_in)):
            print(note)
    return model


def compile_blocks(model: torch.nn.Module) -> None:
    """torch.compile of the transformer's blocks, one by one: the first compilation serves all."""
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for block in max(lists, key=len):
        block.compile(dynamic=True)


def make_trainer(settings: SimpleNamespace, arguments: TrainingArguments, model,
                 data: Data) -> Trainer:
    """The trainer; checks first that the architecture's logits are understood."""
    if not (arguments.deepspeed_plugin or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        check_head(model, data.train[0].aligned.ids[:32])
    if runs.is_main():
        print(schedule(settings, len(data.train)))
    if OBJECTIVES[settings.objective].compare:
        from cut.dpo import PairTrainer

        trainer = PairTrainer(model, arguments, data.train, data.validation or None,
                              processing_class=data.tokenizer)
    else:
        trainer = CutTrainer(
            model=model, args=arguments, train_dataset=data.train,
            eval_dataset=data.validation or None, processing_class=data.tokenizer,
            settings=cut_settings(settings), pad_id=pad_id(data.tokenizer),
            group_by_length=settings.group_by_length)
    trainer.add_callback(LastStepLogged())
    return trainer


def train(settings: SimpleNamespace, trainer: Trainer, checkpoint: str | None) -> None:
    """All steps, from the checkpoint if there is one."""
    runs.allow_tf32()
    with runs.full_disk_in_one_line(settings.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)


def save(settings: SimpleNamespace, trainer: Trainer, data: Data) -> None:
    """Adapter (or model), tokenizer, log history; the run record last, as the sign of the end."""
    runs.save_weights(trainer, settings.output_dir)
    if runs.is_main():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.write_run(settings.output_dir, settings.run, status="finished",
                       counts=vars(data.counts), steps=trainer.state.global_step,
                       tokens=trained_tokens(data.train, trainer.state.epoch),
                       first_loss=losses[0], last_loss=losses[-1])
        print(f"trained {trainer.state.global_step} steps on {len(data.train)} examples: loss "
              f"{losses[0]:.4f} -> {losses[-1]:.4f}\nsaved to {settings.output_dir}")
    PartialState().wait_for_everyone()


def trained_tokens(rows: Sequence[Rows], epochs: float) -> int:
    """Tokens that went forward and backward, without padding and reference passes."""
    return round(epochs * sum(example.tokens for example in rows))


def schedule(settings: SimpleNamespace, count: int) -> str:
    """Steps and the learning rate that they reach."""
    steps = settings.max_steps
    if settings.debug:
        steps = DEBUG_STEPS
    if steps < 0:
        steps = math.ceil(math.ceil(count / settings.batch_size) * settings.num_epochs)
    line = f"steps: {steps}, {settings.batch_size} examples each; "
    if settings.lr_scheduler in WITHOUT_WARMUP:
        return line + (f"learning rate starts at {settings.learning_rate:.3g}: "
                       f"{settings.lr_scheduler} has no warm-up")
    if steps <= settings.warmup_steps:
        reached = settings.learning_rate * (steps - 1) / settings.warmup_steps
        return line + (f"fewer than warmup_steps {settings.warmup_steps}, so the learning rate "
                       f"climbs to {reached:.3g} and never falls")
    return line + f"learning rate peaks at {settings.learning_rate:.3g}"


def cut_settings(settings: SimpleNamespace) -> CutSettings:
    """The loss's part of the settings."""
    without = settings.without
    return CutSettings(
        threshold=0.0 if "detection" in without else settings.threshold,
        weight_unlike=settings.weight_unlike,
        gamma=0.0 if "weight" in without else settings.gamma,
        halve_pairs=not settings.as_in_paper,
        l1="l1" not in without, align_n="align_n" not in without)


def pad_id(tokenizer) -> int:
    """Padding is masked by length, so any id will do; released code uses unk, or 0."""
    return tokenizer.unk_token_id or 0


def _accumulation(settings: SimpleNamespace) -> int:
    together = settings.micro_batch_size * settings.world_size
    if settings.batch_size % together:
        raise InputError(f"--batch_size {settings.batch_size} is not a multiple of "
                         f"--micro_batch_size {settings.micro_batch_size} x {settings.world_size} "
                         "processes; change one of the three")
    return settings.batch_size // together


def _held_out(sources: Sequence[str], size: float) -> set[int]:
    """Indices of the validation examples, the same whatever the training seed."""
    distinct = list(dict.fromkeys(sources))
    wanted = int(len(distinct) * size) if size < 1 else int(size)
    if size and not wanted:
        raise InputError(f"--val_set_size {size} holds out nothing of {len(distinct)} records")
    if wanted >= len(distinct):
        raise InputError(f"--val_set_size {size} leaves nothing of {len(distinct)} records to "
                         "train on")
    drawn = {distinct[index] for index in random.Random(42).sample(range(len(distinct)), wanted)}
    return {index for index, source in enumerate(sources) if source in drawn}
