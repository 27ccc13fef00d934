"""One optimizer step of CUT: ours against the original computation, in time and in memory.

    python benchmarks/cut_step.py --data_path ITERATION_FILE.json --repeats 3

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
(Linux: the process's resident set); tokens without the padding, and the positions that were run
in all; floating-point operations a second as a share of the fastest matrix product that the same
process measured. Operations are counted from the shapes that ran, padding included: 2 a weight
and position forward, 2 more for the derivative with respect to the input (none in the first
layer, whose input is not trained), 6 for a LoRA weight, the head where it scores, and the half of
attention that causality leaves.

The first thing printed is a check: on single records both sides have the same loss and gradient.
"""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would split a batch over several
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cut.data import Example, collate, examples_of, rows_of  # noqa: E402
from cut.trainer import CutSettings, CutTrainer, cut_losses  # noqa: E402
from lm.cli import run  # noqa: E402
from lm.models import DEFAULT_MODEL, add_lora, load_model, load_tokenizer  # noqa: E402
from lm.records import InputError, read_records  # noqa: E402
from lm.templates import Template, load_template  # noqa: E402

SAMPLE = ROOT / "data" / "sample" / "train.jsonl"
SIDES = ("original", "ours")
MICRO_BATCH = 4
CUTOFF_LEN = 512
LORA = {"r": 16, "alpha": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
SETTINGS = CutSettings()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
        base_model: folder, Hub id or embedded model; on a GPU only its tokenizer is used.
        repeats: runs of each side; medians are printed.
        records: records in the step; a multiple of 4, the micro-batch.
        lora_dropout: as in training; on a CPU its random numbers take time.
    """
    if records < MICRO_BATCH or records % MICRO_BATCH:
        raise InputError(f"--records {records}: expected a multiple of {MICRO_BATCH}")
    source = data_path or str(SAMPLE)
    every = read_records(source)
    case_1, _ = examples_of(every, source, as_released=True)
    case_2, _ = examples_of(every, source, as_released=True, downsample=0.25)
    cases = {f"first {records} records": case_1[:records],
             f"first {records} after down-sampling 0.25": case_2[:records]}
    model = f"Llama-2-7B's shape in bf16 on {torch.cuda.get_device_name()}" \
        if DEVICE == "cuda" else f"{base_model} in fp32 on {torch.get_num_threads()} CPU threads"
    print(f"{source}\n{model}, micro-batch {MICRO_BATCH}, cutoff {CUTOFF_LEN}\n", flush=True)
    in_own_process(check, base_model, case_2[:records])
    for title, examples in cases.items():
        report(title, examples, alternate(base_model, examples, repeats, lora_dropout))


# The original computation

def original_row(example: Example, judgment: str | None, template: Template,
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


def original_rows(example: Example, template: Template, tokenizer) -> list:
    """The aligned row, and the misaligned one or None."""
    aligned = original_row(example, example.judgment, template, tokenizer)
    if example.judgment is None:
        return [aligned, None]
    return [aligned, original_row(example, None, template, tokenizer)]


def original_collate(examples: Sequence[list]) -> dict[str, Tensor]:
    """2B rows, right-padded: the aligned half, then the misaligned half with its dummy rows."""
    rows = [example[half] or ([], []) for half in (0, 1) for example in examples]
    width = -(-max(len(ids) for ids, _ in rows) // 8) * 8
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids))
                                        for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        "negative": torch.tensor([example[1] is not None for example in examples]),
    }


def original_loss(model, batch: dict[str, Tensor]) -> Tensor:
    """MLE over the aligned tokens of the micro-batch, averaged with the contrast if it has one."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    probabilities = logits.float().softmax(-1)[:, :-1]
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
    inappropriate = judged > SETTINGS.threshold * unjudged.detach()
    contrast = -(unjudged[~inappropriate].log().sum() + SETTINGS.weight_unlike
                 * (1 - unjudged[inappropriate]).log().sum()) / len(unjudged)
    return (mle + contrast) / 2


class InFileOrder:
    """Both sides get the same micro-batches."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class OriginalTrainer(InFileOrder, Trainer):
    """The original's loss; a micro-batch weighs the same whatever it holds."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return original_loss(model, inputs)


class OursTrainer(InFileOrder, CutTrainer):
    """The trainer of `finetune_unlikelihood.py`."""


# One run

def measure(side: str, base_model: str, examples: Sequence[Example],
            lora_dropout: float) -> Measured:
    """Load the model and run a step; meant for a fresh process."""
    matmul_peak = measure_matmul_peak()
    model, tokenizer = load(base_model, lora_dropout)
    watch = Watch(model)
    with TemporaryDirectory() as folder:
        trainer, tokens, supervised = prepare(side, model, tokenizer, examples, folder)
        trainer.add_callback(watch)
        trainer.train()
    positions = sum(rows * width for rows, width in watch.shapes)
    scored = supervised if side == "ours" else positions
    return Measured(watch.seconds, watch.memory, tokens, positions,
                    operations(model, watch.shapes, scored), matmul_peak)


def prepare(side: str, model, tokenizer, examples: Sequence[Example],
            folder: str) -> tuple[Trainer, int, int]:
    """A side's trainer, and how many tokens it has and how many of them supervised."""
    template = load_template("alpaca")
    steps = 2 if DEVICE == "cuda" else 1  # GPU kernels are chosen and loaded in the first one
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=len(examples) // MICRO_BATCH, learning_rate=4e-4,
        bf16=DEVICE == "cuda", report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True)
    if side == "ours":
        rows = [rows_of(example, template, tokenizer, CUTOFF_LEN) for example in examples]
        trainer = OursTrainer(model, args, train_dataset=rows, settings=SETTINGS, pad_id=0)
        supervised = sum(row.aligned.supervised + (row.misaligned.supervised if row.misaligned
                                                   else 0) for row in rows)
        return trainer, sum(row.tokens for row in rows), supervised
    rows = [original_rows(example, template, tokenizer) for example in examples]
    trainer = OriginalTrainer(model, args, train_dataset=rows, data_collator=original_collate)
    trainer.model_accepts_loss_kwargs = False  # the mean over micro-batches
    halves = [half for row in rows for half in row if half]
    return (trainer, sum(len(ids) for ids, _ in halves),
            sum(label != -100 for _, labels in halves for label in labels))


def load(base_model: str, lora_dropout: float):
    """The model with LoRA, the same on both sides, and its tokenizer."""
    tokenizer = load_tokenizer(base_model)
    torch.manual_seed(0)
    if DEVICE == "cuda":
        shape = LlamaConfig(vocab_size=max(32000, len(tokenizer)))  # the rest are Llama-2-7B's
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    else:
        model = load_model(base_model, load_in="fp32")
    model = add_lora(model, dropout=lora_dropout, **LORA)
    for parameter in model.parameters():
        parameter.detach().sum()  # brings weights that are still on disk into memory
    return model, tokenizer


class Watch(TrainerCallback):
    """The time, memory and shapes of the last step."""

    def __init__(self, model):
        self.loaded = used_memory()
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.shapes.append(kwargs["input_ids"].shape),
            with_kwargs=True)

    def on_step_begin(self, *args, **kwargs):
        self.shapes: list[torch.Size] = []
        reset_peak_memory()
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.memory = peak_memory() - self.loaded


def operations(model, shapes: Sequence[torch.Size], scored: int) -> float:
    """Floating-point operations of a step, forward and backward; see above."""
    config = model.config
    head = model.get_output_embeddings()
    linear = {name: module.weight.numel() for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and module is not head}
    lora = sum(size for name, size in linear.items() if "lora_" in name)
    frozen = sum(linear.values()) - lora
    layers = config.num_hidden_layers
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = 2 * layers * width * sum(rows * length ** 2 for rows, length in shapes)
    positions = sum(rows * length for rows, length in shapes)
    behind = (layers - 1) / layers  # layers that pass a derivative on
    return (2 * frozen * positions * (1 + behind) + 6 * lora * positions
            + attention * (1 + 2 * behind) + 4 * head.weight.numel() * scored)


def measure_matmul_peak() -> float:
    """Operations a second of the fastest of 20 square products."""
    size, dtype = (8192, torch.bfloat16) if DEVICE == "cuda" else (2048, torch.float32)
    one, other = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
    fastest = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        one @ other
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size ** 3 / fastest


def used_memory() -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else process_status("VmRSS")


def peak_memory() -> int:
    """Most bytes in use since `reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else process_status("VmHWM")


def reset_peak_memory() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): peak resident set := now


def process_status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


# Check and report

def check(base_model: str, examples: Sequence[Example]) -> None:
    """Print both sides' loss on three short records, one at a time, dropout off."""
    model, tokenizer = load(base_model, lora_dropout=0.0)
    template = load_template("alpaca")
    comparable = []
    for example in examples:
        ours = rows_of(example, template, tokenizer, CUTOFF_LEN)
        theirs = original_rows(example, template, tokenizer)
        ids = [row.ids if row else None for row in (ours.aligned, ours.misaligned)]
        if ids == [row[0] if row else None for row in theirs]:
            comparable.append((ours, theirs))
    print(f"check: {len(comparable)} of {len(examples)} records have the same ids on both sides "
          "(the others are cut, or merge prompt and response)")
    comparable.sort(key=lambda both: both[0].tokens)
    pairs = [both for both in comparable if both[0].misaligned][:2]
    for ours, theirs in [both for both in comparable if not both[0].misaligned][:1] + pairs:
        batch = {name: value.to(DEVICE) for name, value in original_collate([theirs]).items()}
        original = loss_and_gradient(model, original_loss(model, batch))
        mine = cut_losses(model, collate([ours], pad_id=0).to(model.device), SETTINGS)
        loss, gradient = loss_and_gradient(model, mine.loss.mean())
        apart = (gradient - original[1]).norm() / original[1].norm()
        print(f"  {'pair' if ours.misaligned else 'positive'} of {ours.tokens} tokens: loss "
              f"{original[0]:.6f} and {loss:.6f}, {abs(loss - original[0]):.1e} apart; "
              f"gradients {apart:.1e} apart, {int(mine.inappropriate.sum())} tokens in U")
        if DEVICE == "cpu" and abs(loss - original[0]) > 1e-4:
            raise InputError(f"{ours.record}: the two sides differ by more than 1e-4")
    print(flush=True)


def loss_and_gradient(model, loss: Tensor) -> tuple[float, Tensor]:
    """The number, and the trained weights' gradient as one vector."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.autograd.grad(loss, trained)
    return loss.item(), torch.cat([part.flatten().float() for part in gradient])


def alternate(base_model: str, examples: Sequence[Example], repeats: int,
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


def in_own_process(function, *arguments):
    """What a function returns in a fresh process, which starts with no memory in use."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise InputError("a run was killed, likely for want of memory (the original takes "
                             "14 GB with 16 records); use fewer --records") from error


def report(title: str, examples: Sequence[Example], sides: dict[str, Measured]) -> None:
    """Print a case's table."""
    original, ours = (sides[side] for side in SIDES)
    judged = sum(example.judgment is not None for example in examples)
    print(f"{f'{title} ({judged} judged)':<52}{'original':>10}{'ours':>10}")
    for name, form, value in (
            ("seconds", "10.2f", lambda side: side.seconds),
            ("peak memory above the model, GB", "10.2f", lambda side: side.memory / 1e9),
            ("tokens", "10.0f", lambda side: side.tokens),
            ("positions run", "10.0f", lambda side: side.positions),
            ("tokens a second", "10.1f", lambda side: side.tokens / side.seconds),
            ("TFLOP/s", "10.3f", lambda side: side.operations / side.seconds / 1e12),
            ("share of the matrix products' peak", "10.0%", lambda side: side.share)):
        print(f"{'  ' + name:<52}{value(original):{form}}{value(ours):{form}}")
    print(f"  => {original.seconds / ours.seconds:.2f} times as fast, "
          f"{ours.memory / original.memory:.2f} of the memory; matrix products' peak "
          f"{ours.matmul_peak / 1e12:.3f} TFLOP/s\n", flush=True)


if __name__ == "__main__":
    run(main)
