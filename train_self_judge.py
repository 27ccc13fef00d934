"""Self-training by on-policy judgment (SELF-JUDGE): a model learns from judging its own answers.

    python train_self_judge.py --config=configs/hh_self_judge.yaml \\
        model.pretrained_model_name_or_path=runs/hh_jsft dataset=records.jsonl
    accelerate launch --config_file=configs/self_judge_accelerate.yaml train_self_judge.py \\
        --config=configs/hh_self_judge.yaml training_args.max_steps=10

The model, which `train_jsft.py` taught to judge, answers each query twice, judges its two answers
and learns to prefer the better one (DPO), while what it started as stays the reference. With
`self_judge_args.pairs=given` it learns from the dataset's own pairs instead (offline DPO).

Unlike the released code: an adapter that training starts from is merged, not replaced; what is
trained on are the sampled ids, EOS only where it was sampled; ties and identical answers train
nothing; the loss depends neither on how many processes there are nor on how a batch is split;
killed runs continue, with the same samples; further rounds take one flag.
"""

from contextlib import suppress
from typing import TYPE_CHECKING

from lm.cli import run

if TYPE_CHECKING:
    from self_judge.config import Config


def main(*overrides: str, config: str = "", rounds: int = 1, dry_run: bool = False) -> None:
    """Train an adapter (or every weight) on answers that the model samples and judges itself.

    Args:
        overrides: section.key=value, such as training_args.max_steps=10.
        config: The YAML of the run, such as configs/hh_self_judge.yaml. Required.
        rounds: Train so often in turn: each policy is the start, reference and judge of the next
            round. Round 1 is in output_dir, round 2 in output_dir/round2, and so on; a finished
            round is not repeated, a killed one continues. Round r trains with seed + r - 1.
        dry_run: Show rows and steps of round 1, then stop before the weights are loaded.
    """
    from self_judge.config import load_config
    from self_judge.self_training import rounds_of

    for settings in rounds_of(load_config(config, overrides, kind="self_judge"), rounds):
        train_round(settings, dry_run)
        if dry_run:
            break  # the next round would start from this one's policy


def train_round(settings: "Config", dry_run: bool) -> None:
    """One run from its start to its end, unless it is finished."""
    from lm.runs import Finished
    from self_judge import launch, self_training

    with suppress(Finished):
        arguments = self_training.training_arguments(settings)  # before the model, for ZeRO-3
        data = self_training.load_data(settings, arguments)
        if dry_run:
            return launch.preview(settings, arguments, data)
        record, checkpoint = launch.open_run(settings, data)
        model = self_training.load_model(settings, arguments)
        trainer = self_training.make_trainer(settings, arguments, model, data)
        launch.train(settings, trainer, checkpoint)
        self_training.save(settings, record, trainer)


if __name__ == "__main__":
    run(main)
