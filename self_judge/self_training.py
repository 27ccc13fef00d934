"""The steps of `train_self_judge.py` that JSFT does not share: rounds, arguments, data, trainer.

Imported by that script only; in a notebook use `self_judge.SelfJudgeTrainer` directly.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from trl import DPOConfig

from lm import runs
from lm.records import InputError, first_line
from lm.templates import prompt_ids
from lm.trainers import LastStepLogged
from self_judge import inputs, launch
from self_judge.config import Config
from self_judge.data import self_judge_rows
from self_judge.launch import Data
from self_judge.sampling import sampling_of
from self_judge.trainer import SelfJudgeTrainer

SUMMARY = ("loss", "rewards/margins", "judge/margin", "judge/tie_rate", "response_length/chosen",
           "response_length/rejected", "eval_loss", "eval_rewards/accuracies")
PHASES = ("sample", "judge", "train")


def rounds_of(config: Config, rounds: int) -> Iterator[Config]:
    """The settings of each round: the first as they are, each further one from the last's policy.

    All rounds draw the same from the data; the seed of the training is the round's own.
    """
    training = config.training_args
    if rounds < 1:
        raise InputError(f"--rounds is {rounds}; expected 1 or more")
    if rounds > 1 and isinstance(training.get("resume_from_checkpoint"), str):
        raise InputError("training_args.resume_from_checkpoint names a checkpoint of one round; "
                         "leave out --rounds, or let each round find its own")
    if rounds > 1 and config.peft_config is not None and _cannot_merge(config):
        raise InputError("--rounds: an adapter cannot be merged into weights that are sharded by "
                         "ZeRO-3 or held in 8 or 4 bits, as a second round would have to; use "
                         "model.load_in=bf16 and data parallel training")
    first = config.self_judge_args.get("round", 1)
    folders = [Path(training["output_dir"], *([f"round{number}"] if number > 1 else []))
               for number in range(1, rounds + 1)]
    for number, folder in enumerate(folders, 1):
        clear_device_cache(garbage_collection=True)  # of the last round's model
        yield config if number == 1 else replace(
            config, notes=[], training_args=training | {"output_dir": str(folder)},
            self_judge_args=config.self_judge_args | {"round": first + number - 1},
            model=config.model | {"pretrained_model_name_or_path": str(folders[number - 2]),
                                  "peft_model_name_or_path": None})


def _cannot_merge(config: Config) -> bool:
    return (config.model.get("load_in") in ("8bit", "4bit")
            or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")


def training_arguments(config: Config) -> DPOConfig:
    """trl's arguments, with the seed of the round."""
    arguments = launch.training_arguments(config, DPOConfig, launch.NO_BALANCE)
    _check_own(config, arguments)
    number = config.self_judge_args.get("round", 1)
    arguments.seed += number - 1
    if runs.is_main():
        print(f"round {number}: {launch.batch_size(arguments)} queries a step, "
              f"seed {arguments.seed}")
    return arguments


def _check_own(config: Config, arguments: DPOConfig) -> None:
    """What the trainer checks of `self_judge_args`, before data and model are loaded."""
    own = config.self_judge_args
    inputs.training_arguments(
        arguments, **{name: own[name] for name in inputs.PUBLISHED if name in own})
    if not _offline(config):  # what is not given cannot be wrong
        harmless = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        sampling_of(own.get("generation"),
                    **{name: own.get(name, value) for name, value in harmless.items()})


def load_data(config: Config, arguments: DPOConfig) -> Data:
    """Records -> queries to train on; pairs to measure by, if the dataset has such."""
    return launch.load_data(config, arguments, self_judge_rows)


def load_model(config: Config, arguments: DPOConfig):
    """What policy and reference start as, and who judges."""
    copied = " (a frozen copy)" if config.peft_config is None else ""
    model = launch.load_model(config, arguments.seed, role=f"policy and reference{copied}")
    if runs.is_main():
        print("pairs: the dataset's own; nothing is sampled or judged" if _offline(config) else
              f"judge: the {config.self_judge_args.get('judge', 'reference')}")
    return model


def _offline(config: Config) -> bool:
    return config.self_judge_args.get("pairs") == "given"


def make_trainer(config: Config, arguments: DPOConfig, model, data: Data) -> SelfJudgeTrainer:
    """The trainer; checks that the architecture's logits are understood."""
    own = {name: value for name, value in config.self_judge_args.items()
           if name not in ("round", "token_id_a", "token_id_b")}
    try:
        trainer = SelfJudgeTrainer(
            model, args=arguments, train_dataset=data.train, eval_dataset=data.held_out,
            processing_class=data.tokenizer, peft_config=launch.lora(config),
            callbacks=[LastStepLogged()],
            **({} if _offline(config) else launch.judge_options(config, data.tokenizer)), **own)
    except ValueError as error:  # peft knows no layers of this architecture, for example
        raise InputError(f"{config.path}: {first_line(error)}") from error
    launch.check_logits(trainer, prompt_ids(data.tokenizer, data.train[0]["query"]))
    launch.tell_trained(config, trainer)
    if runs.is_main() and not _offline(config):
        left_out = ["identical responses", *(["ties"] if trainer.ties == "drop" else []),
                    *(["pairs that the judge cannot read whole"] if trainer.cut == "drop" else [])]
        print(f"left out: {', '.join(left_out)}")
    return trainer


def save(config: Config, run: dict, trainer: SelfJudgeTrainer) -> None:
    """What was learnt, how rewards and judge went, what took the time, and what went wrong."""
    times = {phase: [entry[f"seconds/{phase}"] for entry in trainer.state.log_history
                     if f"seconds/{phase}" in entry] for phase in PHASES}
    text = ", ".join(f"{phase} {sum(seconds) / len(seconds):.2f}"
                     for phase, seconds in times.items() if seconds)
    launch.save(config, run, trainer, SUMMARY, (text and f"\nseconds a step: {text}")
                + collapse(trainer.state.log_history))


def collapse(log_history: list[dict]) -> str:
    """A line for the user whose policy has learnt to say nothing; empty for others."""
    rates = [entry["response_empty_rate"] for entry in log_history
             if "response_empty_rate" in entry]
    if not rates or rates[-1] <= 0.5:
        return ""
    return (f"\n{rates[-1]:.0%} of the last sampled responses are empty: the policy has learnt to "
            "say nothing; take fewer steps or a lower training_args.learning_rate")
