"""Judge-augmented supervised fine-tuning (JSFT): learn to answer and to judge answers, in one run.

    python train_jsft.py --config=configs/hh_jsft.yaml \\
        model.pretrained_model_name_or_path=smollm2-135m-instruct dataset=records.jsonl
    accelerate launch --config_file=configs/jsft_accelerate.yaml train_jsft.py \\
        --config=configs/hh_jsft.yaml training_args.max_steps=10

`jsft_args.examples=sft` learns the answers alone, `judge` the judgments alone.

Unlike the released code: what is learnt is marked when a row is built, not searched for afterwards;
the loss is the mean over the supervised tokens of the whole step, so it depends neither on how many
processes there are nor on how a batch is split; judging is measured while it is learnt; killed runs
continue.
"""

from lm.cli import run


def main(*overrides: str, config: str = "", dry_run: bool = False) -> None:
    """Train an adapter (or every weight) on answers and judgments.

    Args:
        overrides: section.key=value, such as training_args.max_steps=10.
        config: The YAML of the run, such as configs/hh_jsft.yaml. Required.
        dry_run: Show rows and steps, then stop before the weights are loaded.
    """
    from self_judge import jsft, launch
    from self_judge.config import load_config

    settings = load_config(config, overrides, kind="jsft")
    arguments = jsft.training_arguments(settings)  # before the model: ZeRO-3 wants to know
    data = jsft.load_data(settings, arguments)
    if dry_run:
        return launch.preview(settings, arguments, data)
    record, checkpoint = launch.open_run(settings, data)
    model = launch.load_model(settings, arguments.seed)
    trainer = jsft.make_trainer(settings, arguments, model, data)
    launch.train(settings, trainer, checkpoint)
    jsft.save(settings, record, trainer)


if __name__ == "__main__":
    run(main)
