"""One optimizer step of CUT: ours against the original computation, in time and in memory.

    python benchmarks/cut_step.py                      # the sample data
    python benchmarks/cut_step.py --data_path train-alpaca-sample-iter1.json --repeats 3

Ours is what training runs: `CutTrainer` over `Rows`. The original is written anew here from its
description: every record is two rows (a positive one's second is a dummy of padding), a batch is
padded to its longest row and up to a multiple of 8, all positions are scored, in a full fp32
softmax, and the loss is a mean over the tokens of the micro-batch. Both train the same LoRA (with
peft's own dropout there) on the same weights and records with transformers' Trainer; each run has a
process of its own, and the sides alternate (`benchmarks/measure.py` says what is counted, and how).

Two cases: the first 16 records of the file, and its first 16 after down-sampling the positives to
0.25 of the negatives, which is what really trains. A first step warms up: it loads kernels, and
memory that later steps have at hand. What is printed are medians over the repeats.

First comes a check: on single records both sides have the same loss and gradient.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from benchmarks.measure import Measured, on_gpu
from lm.cli import run
from lm.memory import keep_freed_memory
from lm.models import DEFAULT_MODEL, add_lora
from lm.records import InputError, read_records
from lm.templates import Template, load_template

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from cut.data import Example

SAMPLE = measure.ROOT / "data" / "sample" / "train.jsonl"
MICRO_BATCH = 4
CUTOFF_LEN = 512
THRESHOLD, WEIGHT_UNLIKE = 1.1, 0.5
LORA = {"r": 16, "alpha": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


def main(data_path: str = "", base_model: str = DEFAULT_MODEL, repeats: int = 3,
         records: int = 16, lora_dropout: float = 0.05):
    """Time and weigh one CUT step against the original computation.

    Args:
        data_path: CUT iteration file (JSON or JSON Lines); the sample data if not given.
        base_model: Folder, Hub id or embedded model; on a GPU only its tokenizer is used.
        repeats: Runs of each side; medians are printed.
        records: Records in the step; a multiple of 4, the micro-batch. The original takes 14 GB
            with 16.
        lora_dropout: As in training; on a CPU its random numbers take time.
    """
    from cut.data import examples_of

    if records < MICRO_BATCH or records % MICRO_BATCH:
        raise InputError(f"--records is {records}; expected a multiple of {MICRO_BATCH}")
    measure.check_positive(repeats=repeats)
    source = data_path or str(SAMPLE)
    every = read_records(source)
    all_of, _ = examples_of(every, source, as_released=True)
    thinned, _ = examples_of(every, source, as_released=True, downsample=0.25)
    if len(thinned) < records:
        raise InputError(f"{source}: {len(thinned)} records are left after down-sampling; "
                         f"--records {records} needs more")
    print(f"{source}\nmicro-batch {MICRO_BATCH}, cutoff {CUTOFF_LEN}", flush=True)
    measure.in_own_process(check, base_model, thinned[:records])
    for title, examples in ((f"first {records} records", all_of[:records]),
                            (f"first {records} after down-sampling", thinned[:records])):
        runs = measure.alternate(measure.SIDES, repeats, run_side, base_model, examples,
                                 lora_dropout)
        sides = {side: measure.median(Measured, found) for side, found in runs.items()}
        judged = sum(example.judgment is not None for example in examples)
        measure.report(f"{title} ({judged} judged)", sides, measure.ROWS)
        print(f"  ours is {measure.compare(*sides.values())}\n", flush=True)


# The original computation

def original_row(example: "Example", judgment: str | None, template: Template,
                 tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels (-100 on the prompt), tokenized as one text, cut on the left."""
    prompt = template.render(example.instruction, judgment)
    ids = tokenizer(prompt + example.response)["input_ids"]
    prompt_length = min(len(tokenizer(prompt)["input_ids"]), len(ids))
    labels = [-100] * prompt_length + ids[prompt_length:]
    ids, labels = ids[-CUTOFF_LEN:], labels[-CUTOFF_LEN:]
    if ids[-1] != tokenizer.eos_token_id:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return ids, labels


def original_rows(example: "Example", template: Template, tokenizer) -> list:
    """The aligned row, and the misaligned one or None."""
    aligned = original_row(example, example.judgment, template, tokenizer)
    if example.judgment is None:
        return [aligned, None]
    return [aligned, original_row(example, None, template, tokenizer)]


def original_collate(examples: Sequence[list]) -> dict[str, "Tensor"]:
    """2B rows, right-padded: the aligned half, then the misaligned half with its dummy rows."""
    import torch

    rows = [example[half] or ([], []) for half in (0, 1) for example in examples]
    width = -(-max(len(ids) for ids, _ in rows) // 8) * 8
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids))
                                        for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        "negative": torch.tensor([example[1] is not None for example in examples]),
    }


def original_loss(model, batch: dict[str, "Tensor"]) -> "Tensor":
    """MLE over the aligned tokens of the micro-batch, averaged with the contrast if it has one."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    probabilities = logits.float().softmax(-1)[:, :-1]  # [2B, T - 1, V]
    labels = batch["labels"][:, 1:]
    chosen = probabilities.gather(-1, labels.clamp(min=0)[:, :, None]).squeeze(-1)
    aligned, misaligned = chosen.chunk(2)
    aligned_mask, misaligned_mask = (labels != -100).chunk(2)
    mle = -aligned[aligned_mask].log().mean()
    negative = batch["negative"]
    if not negative.any():
        return mle
    judged = aligned[negative][aligned_mask[negative]].detach()
    unjudged = misaligned[negative][misaligned_mask[negative]]
    inappropriate = judged > THRESHOLD * unjudged.detach()
    contrast = -(unjudged[~inappropriate].log().sum()
                 + WEIGHT_UNLIKE * (1 - unjudged[inappropriate]).log().sum()) / len(unjudged)
    return (mle + contrast) / 2


# One run

def run_side(side: str, base_model: str, examples: Sequence["Example"],
             lora_dropout: float) -> Measured:
    """Load the model and run a step; meant for a fresh process."""
    from transformers import PrinterCallback

    matmul_peak = measure.measure_matmul_peak()
    model, tokenizer = load_with_lora(base_model, lora_dropout)
    if side == "original":
        restore_dropout(model)
    else:
        keep_freed_memory()
    with TemporaryDirectory() as folder:
        trainer, tokens, supervised = trainer_of(side, model, tokenizer, examples,
                                                 training_arguments(folder, len(examples)))
        watch = watch_of(model)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    positions = sum(shape.positions for shape in watch.shapes)
    scored = supervised if side == "ours" else positions
    return Measured(watch.seconds, watch.memory, tokens, positions,
                    measure.operations(model, watch.shapes, scored, training=True), matmul_peak)


def load_with_lora(base_model: str, lora_dropout: float):
    """The model with LoRA, the same on both sides, and its tokenizer."""
    model, tokenizer = measure.load(base_model)
    model = add_lora(model, dropout=lora_dropout, **LORA)
    measure.read_weights(model)
    return model, tokenizer


def restore_dropout(model) -> None:
    """peft's own dropout in the place of ours."""
    from torch import nn

    from lm.dropout import CheapDropout

    for name, module in list(model.named_modules()):
        if isinstance(module, CheapDropout):
            model.set_submodule(name, nn.Dropout(module.p))


def training_arguments(folder: str, records: int):
    """What the Trainers of both sides are told: two optimizer steps, each over all the records."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=records // MICRO_BATCH, learning_rate=4e-4,
        optim="adamw_torch", bf16=on_gpu(), use_cpu=not on_gpu(), remove_unused_columns=False,
        dataloader_pin_memory=False, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True)


def trainer_of(side: str, model, tokenizer, examples: Sequence["Example"],
               arguments) -> tuple["Trainer", int, int]:
    """A side's trainer, in the order of the file; its tokens, and how many are supervised."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    from cut.data import rows_of
    from cut.trainer import CutTrainer

    template = load_template("alpaca")
    if side == "ours":
        data = [rows_of(example, template, tokenizer, CUTOFF_LEN) for example in examples]
        lengths = [(len(row.ids), row.supervised) for both in data
                   for row in (both.aligned, both.misaligned) if row]
        trainer = CutTrainer(model, arguments, train_dataset=data, settings=settings(), pad_id=0)
    else:
        data = [original_rows(example, template, tokenizer) for example in examples]
        lengths = [(len(ids), sum(label != -100 for label in labels)) for both in data
                   for ids, labels in filter(None, both)]
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=original_collate)
        trainer.compute_loss = lambda model, batch, **_: original_loss(model, batch)
        trainer.model_accepts_loss_kwargs = False  # a step's loss: the mean of its micro-batches
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    tokens, supervised = map(sum, zip(*lengths, strict=True))
    return trainer, tokens, supervised


def watch_of(model):
    """A callback that holds the last step's seconds, memory and shapes of the model's input."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        loaded, shapes = measure.used_memory(), measure.watch_shapes(model)

        def on_step_begin(self, *args, **kwargs):
            self.shapes.clear()
            measure.reset_peak_memory()
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            measure.wait_for_gpu()
            self.seconds = time.perf_counter() - self.start
            self.memory = measure.peak_memory() - self.loaded

    return Watch()


# Check

def settings():
    """The loss's numbers, as the original has them above."""
    from cut.trainer import CutSettings

    return CutSettings(threshold=THRESHOLD, weight_unlike=WEIGHT_UNLIKE)


def check(base_model: str, examples: Sequence["Example"]) -> None:
    """Print both sides' loss on the shortest positive record and pairs, alone, dropout off."""
    from cut.data import collate, rows_of
    from cut.trainer import cut_losses
    from lm.packing import enable_packing

    model, tokenizer = load_with_lora(base_model, lora_dropout=0.0)
    print(measure.machine(base_model))
    template = load_template("alpaca")
    unpadded = enable_packing(model, model.device, sharded=False)
    same = []
    for example in examples:
        ours = rows_of(example, template, tokenizer, CUTOFF_LEN)
        theirs = original_rows(example, template, tokenizer)
        if [row.ids if row else None for row in (ours.aligned, ours.misaligned)] == \
                [row[0] if row else None for row in theirs]:
            same.append((ours, theirs))
    print(f"\ncheck: {len(same)} of {len(examples)} records have the same ids on both sides (the "
          "others are cut, or merge prompt and response)")
    same.sort(key=lambda both: both[0].tokens)
    positives = [both for both in same if not both[0].misaligned]
    pairs = [both for both in same if both[0].misaligned]
    for ours, theirs in positives[:1] + pairs[:2]:
        batch = {name: value.to(model.device) for name, value in
                 original_collate([theirs]).items()}
        loss, gradient = measure.with_gradient(model, original_loss(model, batch))
        twice = collate([ours, ours], pad_id=0).to(model.device)  # so that there are bounds
        losses = cut_losses(model, twice, settings(), unpadded)
        our_loss, our_gradient = measure.with_gradient(model, losses.loss.mean())
        print(f"  {'pair' if ours.misaligned else 'positive'} of {ours.tokens} tokens: loss "
              f"{loss:.6f} and {our_loss:.6f}, {abs(our_loss - loss):.0e} apart; gradients "
              f"{(our_gradient - gradient).norm() / gradient.norm():.0e} apart; "
              f"{int(losses.inappropriate[0].sum())} tokens in U")
        # In bf16 rounding alone may take a token over U's threshold: there, numbers are only shown
        if not on_gpu() and abs(our_loss - loss) > 1e-4:
            raise InputError(f"{ours.record}: the two sides' losses differ")
    print(flush=True)


if __name__ == "__main__":
    run(main)
