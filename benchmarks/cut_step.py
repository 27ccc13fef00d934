"""One optimizer step of CUT: ours against the original computation, in time and in memory.

    python benchmarks/cut_step.py                      # the sample data
    python benchmarks/cut_step.py --data_path train-alpaca-sample-iter1.json --repeats 3

Ours is what training runs: `CutTrainer` over `Rows`. The original is written anew here from its
description: every record is two rows (a positive one's second is a dummy of padding), a batch is
padded to its longest row and up to a multiple of 8, all positions are scored, in a full fp32
softmax, and the loss is a mean over the tokens of the micro-batch. Both train the same LoRA on
the same weights and records with transformers' Trainer; each run has a process of its own, and
the sides alternate.

Two cases: the first 16 records of the file, and its first 16 after down-sampling the positives to
0.25 of the negatives, which is what really trains. On a CPU the model is `--base_model` in fp32;
on a GPU it has Llama-2-7B's shape, random weights, bf16, and a first step warms up.

What is printed, medians over the repeats: seconds of the step; peak memory above the loaded model
(on a CPU the resident set, which Linux tells); tokens without the padding, and the positions that
were run in all; operations a second, and what share that is of the fastest matrix product that
the same process measured. Operations are counted from the shapes that ran, padding included: 2 a
weight and position forward, 2 more for the derivative of the input (none in the first layer,
whose input is not trained), 6 for a LoRA weight, the head where it scores, and the half of
attention that causality leaves.

First comes a check: on single records both sides have the same loss and gradient.
"""

import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would split a batch over several
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lm.cli import run  # noqa: E402
from lm.models import DEFAULT_MODEL, add_lora, load_model, load_tokenizer  # noqa: E402
from lm.records import InputError, read_records  # noqa: E402
from lm.templates import Template, load_template  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Trainer

    from cut.data import Example

SAMPLE = ROOT / "data" / "sample" / "train.jsonl"
SIDES = ("original", "ours")
MICRO_BATCH = 4
CUTOFF_LEN = 512
THRESHOLD, WEIGHT_UNLIKE = 1.1, 0.5
LORA = {"r": 16, "alpha": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


@dataclass(frozen=True)
class Measured:
    """One run of one side."""

    seconds: float
    memory: float  # bytes at the peak, above the loaded model
    tokens: float  # of the records, padding and dummy rows left out
    positions: float  # run by the model, padding included
    operations: float
    matmul_peak: float  # operations a second

    @property
    def share(self) -> float:
        """Operations a second as a share of the matrix products' peak."""
        return self.operations / self.seconds / self.matmul_peak


def main(data_path: str = "", base_model: str = DEFAULT_MODEL, repeats: int = 3,
         records: int = 16, lora_dropout: float = 0.05):
    """Time and weigh one CUT step against the original computation.

    Args:
        data_path: CUT iteration file (JSON or JSON Lines); the sample data if not given.
        base_model: Folder, Hub id or embedded model; on a GPU only its tokenizer is used.
        repeats: Runs of each side; medians are printed.
        records: Records in the step; a multiple of 4, the micro-batch.
        lora_dropout: As in training; on a CPU its random numbers take time.
    """
    from cut.data import examples_of

    if records < MICRO_BATCH or records % MICRO_BATCH:
        raise InputError(f"--records is {records}; expected a multiple of {MICRO_BATCH}")
    if repeats < 1:
        raise InputError(f"--repeats is {repeats}; expected 1 or more")
    source = data_path or str(SAMPLE)
    every = read_records(source)
    all_of, _ = examples_of(every, source, as_released=True)
    thinned, _ = examples_of(every, source, as_released=True, downsample=0.25)
    if len(thinned) < records:
        raise InputError(f"{source}: {len(thinned)} records are left after down-sampling; "
                         f"--records {records} needs more")
    print(f"{source}\nmicro-batch {MICRO_BATCH}, cutoff {CUTOFF_LEN}", flush=True)
    in_own_process(check, base_model, thinned[:records])
    for title, examples in ((f"first {records} records", all_of[:records]),
                            (f"first {records} after down-sampling", thinned[:records])):
        report(title, examples, alternate(base_model, examples, repeats, lora_dropout))


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

def measure(side: str, base_model: str, examples: Sequence["Example"],
            lora_dropout: float) -> Measured:
    """Load the model and run a step; meant for a fresh process."""
    from transformers import PrinterCallback

    matmul_peak = measure_matmul_peak()
    model, tokenizer = load(base_model, lora_dropout)
    with TemporaryDirectory() as folder:
        trainer, tokens, supervised = trainer_of(side, model, tokenizer, examples,
                                                 training_arguments(folder, len(examples)))
        watch = watch_of(model)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    positions = sum(rows * width for rows, width in watch.shapes)
    scored = supervised if side == "ours" else positions
    return Measured(watch.seconds, watch.memory, tokens, positions,
                    operations(model, watch.shapes, scored), matmul_peak)


def load(base_model: str, lora_dropout: float):
    """The model with LoRA, the same on both sides, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = load_tokenizer(base_model)
    torch.manual_seed(0)
    if on_gpu():
        shape = LlamaConfig(vocab_size=max(32000, len(tokenizer)))  # the rest are Llama-2-7B's
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    else:
        model = load_model(base_model, load_in="fp32")
    model = add_lora(model, dropout=lora_dropout, **LORA)
    for parameter in model.parameters():
        parameter.detach().sum()  # brings weights that are still on disk into memory
    return model, tokenizer


def training_arguments(folder: str, records: int):
    """What the Trainers of both sides are told: a single optimizer step over all the records."""
    from transformers import TrainingArguments

    steps = 2 if on_gpu() else 1  # GPU kernels are chosen and loaded in the first
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=MICRO_BATCH,
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
        loaded = used_memory()

        def on_step_begin(self, *args, **kwargs):
            self.shapes = []
            reset_peak_memory()
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            wait_for_gpu()
            self.seconds = time.perf_counter() - self.start
            self.memory = peak_memory() - self.loaded

    watch = Watch()
    model.register_forward_pre_hook(
        lambda _, args, inputs: watch.shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    return watch


def operations(model, shapes: Sequence["torch.Size"], scored: int) -> float:
    """Floating-point operations of a step, forward and backward; the docstring above says which."""
    from torch.nn import Linear

    config, head = model.config, model.get_output_embeddings()
    weights = {name: module.weight.numel() for name, module in model.named_modules()
               if isinstance(module, Linear) and module is not head}
    lora = sum(size for name, size in weights.items() if "lora_" in name)
    frozen = sum(weights.values()) - lora
    width = config.num_attention_heads * config.head_dim
    attention = 2 * config.num_hidden_layers * width * sum(
        rows * length ** 2 for rows, length in shapes)
    positions = sum(rows * length for rows, length in shapes)
    behind = 1 - 1 / config.num_hidden_layers  # the part of the layers that passes derivatives on
    return (2 * frozen * positions * (1 + behind) + 6 * lora * positions
            + attention * (1 + 2 * behind) + 4 * head.weight.numel() * scored)


def measure_matmul_peak() -> float:
    """Operations a second of the fastest of 20 square products."""
    import torch

    size, dtype, device = (8192, torch.bfloat16, "cuda") if on_gpu() else (
        2048, torch.float32, "cpu")
    one, other = torch.randn(2, size, size, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(20):
        wait_for_gpu()
        start = time.perf_counter()
        one @ other
        wait_for_gpu()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size ** 3 / fastest


# The machine

def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def wait_for_gpu() -> None:
    """Its work is queued: a clock is right only when the queue is empty."""
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def used_memory() -> int:
    """Bytes in use now."""
    import torch

    return torch.cuda.memory_allocated() if on_gpu() else resident("VmRSS")


def peak_memory() -> int:
    """Most bytes in use since `reset_peak_memory`."""
    import torch

    return torch.cuda.max_memory_allocated() if on_gpu() else resident("VmHWM")


def reset_peak_memory() -> None:
    import torch

    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM := VmRSS


def resident(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def in_own_process(function, *arguments):
    """What a function returns in a fresh process, which has no memory of earlier runs."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=be_quiet) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise InputError("a run was killed, likely for want of memory (the original takes "
                             "14 GB with 16 records); use fewer --records") from error


def be_quiet() -> None:
    """Only our own lines; the warnings are the same in every run."""
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


# Check and report

def settings():
    """The loss's numbers, as the original has them above."""
    from cut.trainer import CutSettings

    return CutSettings(threshold=THRESHOLD, weight_unlike=WEIGHT_UNLIKE)


def check(base_model: str, examples: Sequence["Example"]) -> None:
    """Print both sides' loss on the shortest positive record and pairs, alone, dropout off."""
    import torch

    from cut.data import collate, rows_of
    from cut.trainer import cut_losses

    model, tokenizer = load(base_model, lora_dropout=0.0)
    print(f"Llama-2-7B's shape in bf16 on {torch.cuda.get_device_name()}" if on_gpu() else
          f"{base_model} in fp32 on {torch.get_num_threads()} CPU threads")
    template = load_template("alpaca")
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
        loss, gradient = with_gradient(model, original_loss(model, batch))
        losses = cut_losses(model, collate([ours], pad_id=0).to(model.device), settings())
        our_loss, our_gradient = with_gradient(model, losses.loss.mean())
        print(f"  {'pair' if ours.misaligned else 'positive'} of {ours.tokens} tokens: loss "
              f"{loss:.6f} and {our_loss:.6f}, {abs(our_loss - loss):.0e} apart; gradients "
              f"{(our_gradient - gradient).norm() / gradient.norm():.0e} apart; "
              f"{int(losses.inappropriate.sum())} tokens in U")
        # In bf16 rounding alone may take a token over U's threshold: there, numbers are only shown
        if not on_gpu() and abs(our_loss - loss) > 1e-4:
            raise InputError(f"{ours.record}: the two sides' losses differ")
    print(flush=True)


def with_gradient(model, loss: "Tensor") -> tuple[float, "Tensor"]:
    """The number, and the trained weights' gradient as one vector."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.autograd.grad(loss, trained)
    return loss.item(), torch.cat([part.flatten().float() for part in gradient])


def alternate(base_model: str, examples: Sequence["Example"], repeats: int,
              lora_dropout: float) -> dict[str, Measured]:
    """Run the sides in turn; the median of each figure."""
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for number in range(repeats):
        for side in SIDES:
            found = in_own_process(measure, side, base_model, examples, lora_dropout)
            runs[side].append(found)
            print(f"  {side}, run {number + 1} of {repeats}: {found.seconds:.2f} s", flush=True)
    return {side: Measured(*map(statistics.median, zip(*map(astuple, found), strict=True)))
            for side, found in runs.items()}


def report(title: str, examples: Sequence["Example"], sides: dict[str, Measured]) -> None:
    """Print a case's table."""
    original, ours = (sides[side] for side in SIDES)
    judged = sum(example.judgment is not None for example in examples)
    print(f"{f'{title} ({judged} judged)':<50}{'original':>10}{'ours':>10}")
    for name, form, value in (
            ("seconds", "10.2f", lambda side: side.seconds),
            ("peak memory above the model, GB", "10.2f", lambda side: side.memory / 1e9),
            ("tokens", "10.0f", lambda side: side.tokens),
            ("positions run", "10.0f", lambda side: side.positions),
            ("tokens a second", "10.1f", lambda side: side.tokens / side.seconds),
            ("GFLOP/s", "10.0f", lambda side: side.operations / side.seconds / 1e9),
            ("fastest matrix product, GFLOP/s", "10.0f", lambda side: side.matmul_peak / 1e9),
            ("share of it", "10.0%", lambda side: side.share)):
        print(f"{'  ' + name:<50}{value(original):{form}}{value(ours):{form}}")
    print(f"  ours is {original.seconds / ours.seconds:.2f} times as fast and takes "
          f"{ours.memory / original.memory:.2f} of the memory\n", flush=True)


if __name__ == "__main__":
    run(main)
