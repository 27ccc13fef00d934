"""Contrastive unlikelihood training (CUT): align a model with judgments; and its baselines.

    python finetune_unlikelihood.py --base_model smollm2-135m-instruct \\
        --data_path data/sample/train.jsonl --output_dir runs/cut
    torchrun --nproc_per_node=8 finetune_unlikelihood.py \\
        --base_model meta-llama/Llama-2-13b-chat-hf \\
        --data_path data/downloads/cut_iter/train-alpaca-sample-iter1.json --output_dir runs/13b

Unlike the released code: the loss does not depend on the micro-batch size or the number of
processes; failed judgments are dropped (--as_released keeps them); killed runs continue. Of ilf_dpo
and dpo, which trl trains, the last step of an epoch does depend on them if it is not full.
"""

from lm.cli import run

# These change where, how often or with what a run reports, not its result.
FREE_SETTINGS = ("resume_from_checkpoint", "output_dir", "report_to", "wandb_project",
                 "wandb_run_name", "wandb_watch", "wandb_log_model", "logging_steps",
                 "save_steps", "micro_batch_size", "accumulation", "world_size",
                 "gradient_checkpointing", "visualize", "dry_run")


def main(
    base_model: str = "",
    data_path: str = "",
    output_dir: str = "",
    batch_size: int = 128,
    micro_batch_size: int = 8,
    num_epochs: int | float = 1,
    learning_rate: float = 3e-4,
    cutoff_len: int = 4096,
    val_set_size: int | float = 0,
    lr_scheduler: str = "cosine",
    warmup_steps: int = 100,
    lora_r: int = 16,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_target_modules: str | list | tuple = ("gate_proj", "down_proj", "up_proj"),
    train_on_inputs: bool = False,
    add_eos_token: bool = False,
    group_by_length: bool = False,
    wandb_project: str = "",
    wandb_run_name: str = "",
    wandb_watch: str = "",
    wandb_log_model: str = "",
    resume_from_checkpoint: str | bool | None = None,
    prompt_template_name: str = "alpaca",
    weight_unlike: float = 0.1,
    threshold: float = 1.1,
    downsample: float = -1,
    debug: bool = False,
    gamma: float = 0.0,
    objective: str = "cut",
    without: str | list | tuple = "",
    beta: float = 0.1,
    as_in_paper: bool = False,
    as_released: bool = False,
    load_in: str = "auto",
    full_finetune: bool = False,
    attn_implementation: str = "auto",
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
    seed: int = 42,
    max_steps: int = -1,
    logging_steps: int = 10,
    save_steps: int = 1000,
    report_to: str = "none",
    dry_run: bool = False,
    visualize: int = 0,
) -> None:
    """Train a LoRA adapter (or every weight) with CUT, or with a method it is compared with.

    Args:
        base_model: A folder, a Hub id, or smollm2-135m-instruct. Required.
        data_path: Records in a .json, .jsonl or .gz file, or a Hub dataset. Required.
        output_dir: Where the adapter, tokenizer, run.json and checkpoints go. Required.
        batch_size: Examples in an optimizer step, over all processes.
        micro_batch_size: Examples that a process takes at a time; changes no result but the
            draw of the dropout.
        num_epochs: Passes over the data.
        learning_rate: Peak of the schedule (it is reached after warmup_steps).
        cutoff_len: Longest row in tokens; longer ones lose the start of their instruction.
        val_set_size: Records held out for validation, or instructions of DPO's pairs; a fraction if
            below 1.
        lr_scheduler: A transformers schedule, such as cosine, linear or constant_with_warmup.
        warmup_steps: Steps in which the learning rate climbs to its peak; constant has none.
        lora_r: Rank of the LoRA update.
        lora_alpha: Scale of the LoRA update is lora_alpha / lora_r.
        lora_dropout: Dropout before the LoRA layers; ilf_dpo and dpo have none, as in trl.
        lora_target_modules: Layer names to update, or all-linear.
        train_on_inputs: Also learn the prompts of the aligned rows.
        add_eos_token: Accepted for compatibility; responses always end with EOS.
        group_by_length: Put examples of similar length into the same batch.
        wandb_project: Report to this Weights & Biases project.
        wandb_run_name: Name of the run there.
        wandb_watch: false, gradients or all (as WANDB_WATCH).
        wandb_log_model: false, checkpoint or end (as WANDB_LOG_MODEL).
        resume_from_checkpoint: A folder; by default the same command continues a killed run;
            False starts over.
        prompt_template_name: A name in configs/templates, or the path of a .json.
        weight_unlike: Weight of the unlikelihood term (alpha in the paper).
        threshold: A token is inappropriate if p(y|x,j) > threshold * p(y|x) (lambda).
        downsample: Keep this many positives per negative (0.25 in the paper); -1 keeps all.
        debug: The first 16 examples, 2 steps, everything logged.
        gamma: Exponent of the dynamic weight p(y|x,j)^gamma; 0 as released.
        objective: cut, mle, forward, hindsight, ilf_mle, ilf_dpo, dpo or unlikelihood (on all
            tokens); cut/objectives.py says what each learns.
        without: Leave parts out of CUT (Table 4): some of l1, align_p, align_n, detection, weight,
            separated by commas.
        beta: Of ilf_dpo and dpo: how near to stay to the base; more than 0.
        as_in_paper: gamma 1 unless more than 0 is given (for none, --without weight), and L1 + L2
            without the halving.
        as_released: Keep failed and blank judgments as text.
        load_in: Base precision: 8bit, 4bit, bf16, fp16, fp32; auto is 8bit on CUDA, fp32 on CPU.
            A GPU computes in bf16 if it has it, but for fp16 weights and fp32 ones.
        full_finetune: Train every weight instead of LoRA.
        attn_implementation: sdpa, eager, flash_attention_2, ...; auto takes the fastest there is.
        gradient_checkpointing: Recompute activations: less memory, a third more time.
        torch_compile: Compile the transformer's blocks (minutes at the start; for long GPU runs).
        seed: Of the shuffle, the LoRA weights and dropout.
        max_steps: Stop after so many steps; -1 follows num_epochs.
        logging_steps: Steps between two lines of the log.
        save_steps: Steps between two checkpoints; the last two are kept.
        report_to: tensorboard, wandb, trackio, ... or none.
        dry_run: Show rows, steps and an estimate of memory, then stop.
        visualize: Show token by token what the judgments of so many records flag, then stop.
    """
    flags = dict(locals())  # first of all: the signature is the configuration
    from cut import finetune, preview

    settings = finetune.check(flags)
    data = finetune.load_data(settings)
    if dry_run:
        return preview.preview(settings, data)
    if visualize:
        return preview.visualize(settings, data)
    checkpoint = finetune.open_run(settings, FREE_SETTINGS)
    arguments = finetune.training_arguments(settings)  # before the model: ZeRO-3 wants to know
    model = finetune.load_model(settings)
    trainer = finetune.make_trainer(settings, arguments, model, data)
    finetune.train(settings, trainer, checkpoint)
    finetune.save(settings, trainer, data)


if __name__ == "__main__":
    run(main)
