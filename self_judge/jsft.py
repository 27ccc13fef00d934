"""The steps of `train_jsft.py` that self-training does not share: arguments, data, trainer, save.

Imported by that script only; in a notebook use `self_judge.jsft_trainer` and `preprocess` directly.
"""

from dataclasses import replace

from trl import SFTConfig

from lm import runs
from lm.models import context_of
from lm.records import InputError, first_line
from lm.trainers import LastStepLogged
from self_judge import launch
from self_judge.config import Config
from self_judge.data import jsft_rows, judge_pairs_of
from self_judge.jsft_trainer import JsftTrainer
from self_judge.launch import Data

SUMMARY = ("loss", "sft_loss", "judgment_loss", "eval_loss", "eval_judge_accuracy",
           "eval_judge_consistency", "eval_judge_position_bias")


def training_arguments(config: Config) -> SFTConfig:
    """trl's arguments."""
    for name in ("packing", "padding_free"):
        if config.training_args.get(name):
            raise InputError(f"{config.path}: training_args.{name}: leave it out; a step has the "
                             "rows that its batch sizes say, and they are run end to end "
                             "anyway, where attention can keep them apart")
    arguments = launch.training_arguments(
        config, SFTConfig, launch.NO_BALANCE, max_length=launch.max_length(config),
        completion_only_loss=True, prediction_loss_only=True)
    if runs.is_main():
        print(f"batch: {launch.batch_size(arguments)} rows a step")
    return arguments


def load_data(config: Config, arguments: SFTConfig) -> Data:
    """Records -> rows to train on; rows and pairs to measure by, if the dataset has such."""
    data = launch.load_data(config, arguments, jsft_rows)
    if data.held_out is None:
        return data
    pairs = judge_pairs_of(config, "eval")[:config.jsft_args.get("eval_judge_pairs")]
    return replace(data, pairs=pairs)


def make_trainer(config: Config, arguments: SFTConfig, model, data: Data) -> JsftTrainer:
    """The trainer; checks that model and rows fit, and that its logits are understood."""
    options = launch.judge_options(config, data.tokenizer)
    context = context_of(model)
    if context and launch.max_length(config) > context:
        raise InputError(f"{config.path}: jsft_args.max_length {launch.max_length(config)} is more "
                         f"than the model's context of {context}; lower it")
    try:
        trainer = JsftTrainer(
            model=model, args=arguments, train_dataset=data.train, eval_dataset=data.held_out,
            processing_class=data.tokenizer, peft_config=launch.lora(config), held_out=data.pairs,
            judge_templates=options.pop("judge_templates"),
            judge_options=options | {"max_length": launch.max_length(config)},
            callbacks=[LastStepLogged()])
    except ValueError as error:  # peft knows no layers of this architecture, for example
        raise InputError(f"{config.path}: {first_line(error)}") from error
    launch.check_logits(trainer, data.train[0]["input_ids"])
    launch.tell_trained(config, trainer)
    if runs.is_main():
        print("rows are run " + ("end to end" if trainer.unpadded else "padded"))
    return trainer


def save(config: Config, run: dict, trainer: JsftTrainer) -> None:
    """What was learnt, and how the losses and the judge went."""
    launch.save(config, run, trainer, SUMMARY)
