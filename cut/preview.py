"""What people look at before they train: `--dry_run` and `--visualize`."""

from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from cut.data import Rows
from cut.finetune import Data, cut_settings, schedule
from cut.heatmap import show
from cut.objectives import OBJECTIVES
from lm import models, runs
from lm.packing import TOKENS_PER_FORWARD


def preview(settings: SimpleNamespace, data: Data) -> None:
    """`--dry_run`: rendered examples with their masks, counts, schedule and memory."""
    if not runs.is_main():
        return
    objective = OBJECTIVES[settings.objective]
    names = ("chosen", "rejected") if objective.compare else ("Align-N", "Misalign")
    single = "Align-P" if objective.contrasts else settings.objective
    for pair in (True, False):
        first = next((rows for rows in data.train if bool(rows.misaligned) == pair), None)
        if first:
            print_rows(first, data.tokenizer, names if pair else (single, ""))
    tokens = [rows.tokens for rows in data.train]
    rows = sum(len(example.rows) for example in data.train)
    print(f"\nrows: {rows} of {len(data.train)} examples, {sum(tokens)} tokens, the longest "
          f"example {max(tokens)}; validation: {len(data.validation)} examples")
    print(schedule(settings, len(data.train)))
    print(memory_estimate(settings, data))


def print_rows(rows: Rows, tokenizer, names: tuple[str, str]) -> None:
    """An example's rows as the model sees them, with a mark where supervision begins."""
    for name, row in zip(names, (rows.aligned, rows.misaligned), strict=True):
        if row:
            print(f"\n--- {name}, {rows.record}: {len(row.ids)} tokens, the last "
                  f"{row.supervised} supervised (after the mark)")
            print(tokenizer.decode(row.ids[:-row.supervised]) + "▮"
                  + tokenizer.decode(row.ids[-row.supervised:]))


def visualize(settings: SimpleNamespace, data: Data) -> None:
    """`--visualize K`: what the judgments of the first K negative records flag."""
    if not runs.is_main():
        return
    model = models.load_model(settings.base_model, settings.load_in, settings.attn_implementation)
    pairs = [(example, rows) for example, rows in zip(data.examples, data.train, strict=True)
             if rows.misaligned][:settings.visualize]
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    show(model, data.tokenizer, [pair[0] for pair in pairs], [pair[1] for pair in pairs],
         cut_settings(settings), Path(settings.output_dir) / "judgments.html")


def memory_estimate(settings: SimpleNamespace, data: Data) -> str:
    """Weights, what is trained, and activations of the largest forward pass, as one line."""
    on_gpu = torch.cuda.is_available()
    load_in = models.training_precision(settings.load_in, settings.full_finetune)
    config = AutoConfig.from_pretrained(models.resolve_model(settings.base_model))
    stored = config.dtype.itemsize if config.dtype else 4
    weight_bytes = {"8bit": 1, "4bit": 0.55, "bf16": 2, "fp16": 2, "fp32": 4,
                    "checkpoint": stored}[load_in]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
        if not settings.full_finetune:
            model = models.add_lora(model, settings.lora_r, settings.lora_alpha,
                                    settings.lora_dropout, settings.lora_target_modules)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = config.get_text_config()
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    # Tensors that one layer keeps for its backward pass, per token: counted for a Llama with LoRA
    # on its three MLP projections, right to a fifth for SmolLM2-135M.
    kept = (1 if settings.gradient_checkpointing else 10) * text.hidden_size
    kept += 0 if settings.gradient_checkpointing else 8 * width
    budget = TOKENS_PER_FORWARD["cuda" if on_gpu else "cpu"]
    tokens = max(max(rows.tokens for rows in data.train),
                 min(budget, settings.micro_batch_size * max(r.tokens for r in data.train)))
    value_bytes, weights = (2 if on_gpu else 4), model.num_parameters() * weight_bytes
    if load_in in ("8bit", "4bit"):  # the rest is fp32, and with it what layers pass on
        value_bytes = 4
        weights += (4 - weight_bytes) * sum(
            {id(weight): weight.numel() for end in (model.get_input_embeddings(),
             model.get_output_embeddings()) for weight in end.parameters()}.values())
    elif load_in != "fp32":  # lm/log_probs.py scores with an fp32 copy of the head
        weights += 4 * sum(weight.numel()
                           for weight in model.get_output_embeddings().parameters())
    parts = {"weights": weights, "gradients and optimizer": trained * 12,
             "activations": tokens * text.num_hidden_layers * kept * value_bytes}
    listed = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return (f"memory, an estimate: {sum(parts.values()) / 2**30:.1f} GiB a process ({listed}; "
            f"largest forward pass {tokens} tokens)")
