"""What the benchmarks share: each run in a process of its own, its memory, the machine's peak.

A side is "original" or "ours". Both have the same weights: on a CPU those of `--base_model` in
fp32, on a GPU random ones of Llama-2-7B's shape in bf16. On a CPU memory is the resident set, which
Linux tells.

Operations are counted from the shapes that ran, padding included: 2 a weight and position forward;
in training 2 more for the derivative of the input (none in the first layer, whose input is not
trained) and 6 for a LoRA weight; the head where it scores; and the half of attention that causality
leaves. Their share is of the fastest matrix product that the same process measured.
"""

import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from lm.models import load_tokenizer, resolve_model, unwrapped
from lm.records import InputError
from lm.tables import table

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would split a batch over several
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("original", "ours")
Run = TypeVar("Run")
Row = tuple[str, str, Callable[[Run], float]]  # what is printed: name, format, number


@dataclass(frozen=True)
class Measured:
    """One run of one side."""

    seconds: float
    memory: float  # bytes at the peak, above the loaded model
    tokens: float  # padding left out
    positions: float  # run by the model, padding included
    operations: float
    matmul_peak: float  # operations a second

    @property
    def share(self) -> float:
        """Operations a second as a share of the matrix products' peak."""
        return self.operations / self.seconds / self.matmul_peak


ROWS: list[Row] = [
    ("seconds", ".2f", lambda run: run.seconds),
    ("peak memory above the model, GB", ".2f", lambda run: run.memory / 1e9),
    ("tokens", ".0f", lambda run: run.tokens),
    ("positions run", ".0f", lambda run: run.positions),
    ("tokens a second", ".1f", lambda run: run.tokens / run.seconds),
    ("GFLOP/s", ".0f", lambda run: run.operations / run.seconds / 1e9),
    ("fastest matrix product, GFLOP/s", ".0f", lambda run: run.matmul_peak / 1e9),
    ("share of it", ".0%", lambda run: run.share),
]


# Runs

def alternate(sides: Sequence[str], repeats: int, function: Callable[..., Run],
              *arguments: object) -> dict[str, list[Run]]:
    """Run `function(side, *arguments)` for each side in turn, each time in a fresh process."""
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    for number in range(repeats):
        for side in sides:
            found = in_own_process(function, side, *arguments)
            runs[side].append(found)
            print(f"  {side}, run {number + 1} of {repeats}: {found.seconds:.2f} s", flush=True)
    return runs


def check_positive(**flags: int) -> None:
    """Stop at a number of nothing."""
    for name, value in flags.items():
        if value < 1:
            raise InputError(f"--{name} is {value}; expected 1 or more")


def in_own_process(function: Callable[..., Run], *arguments: object) -> Run:
    """What a function returns in a fresh process, which has no memory of earlier runs."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=be_quiet) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise InputError("a run was killed, likely for want of memory; ask for less (--help "
                             "lists the flags)") from error


def be_quiet() -> None:
    """Only our own lines; the warnings are the same in every run."""
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def median(kind: type[Run], runs: Sequence[Run]) -> Run:
    """The median of each figure that a kind of run has."""
    return kind(*(statistics.median(getattr(run, field.name) for run in runs)
                  for field in fields(kind)))


def report(title: str, runs: Mapping[str, Run], rows: Sequence[Row]) -> None:
    """Print a table with a column for each run."""
    print(table([title, *runs], [[f"  {name}", *(format(value(run), form) for run in runs.values())]
                                 for name, form, value in rows]))


def compare(original: Run, ours: Run) -> str:
    """How much faster and smaller ours is."""
    return (f"{original.seconds / ours.seconds:.2f} times as fast and takes "
            f"{ours.memory / max(original.memory, 1):.2f} of the memory")


# The model

def load(base_model: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model without an adapter, the same on all sides, and its tokenizer.

    `lm.models.load_model` also has freed memory kept on a CPU, which the original did not.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = load_tokenizer(base_model)
    torch.manual_seed(0)
    if on_gpu():
        shape = LlamaConfig(vocab_size=max(32000, len(tokenizer)))  # the rest are Llama-2-7B's
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(base_model),
                                                     dtype=torch.float32)
    return model, tokenizer


def read_weights(model: "Module") -> None:
    """Bring weights that are still on disk into memory."""
    for parameter in model.parameters():
        parameter.detach().sum()


def machine(base_model: str) -> str:
    """What runs on what."""
    import torch

    return (f"Llama-2-7B's shape in bf16 on {torch.cuda.get_device_name()}" if on_gpu() else
            f"{base_model} in fp32 on {torch.get_num_threads()} CPU threads")


def with_gradient(model: "Module", loss: "Tensor") -> tuple[float, "Tensor"]:
    """The number, and the trained weights' gradient as one vector."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.autograd.grad(loss, trained)
    return loss.item(), torch.cat([part.flatten().float() for part in gradient])


class Shape(NamedTuple):
    """Of one forward pass."""

    rows: int
    length: int  # positions of a row that were run, padding included
    seen: int  # what the last of them attends to: these and what is cached

    @property
    def positions(self) -> int:
        return self.rows * self.length


def watch_shapes(model: "Module") -> list[Shape]:
    """A list that grows with each pass through the model's layers."""
    from peft import PeftModel

    shapes: list[Shape] = []

    def note(module, args, inputs):
        rows, length = inputs["input_ids"].shape
        mask = inputs.get("attention_mask")
        positions = inputs.get("position_ids")
        end_to_end = positions is not None and (mask is None or mask.ndim == 4)
        if end_to_end and positions[0, 0] == 0:  # no continuation of a cache
            starts = (positions[0] == 0).nonzero().flatten().tolist()
            shapes.extend(Shape(1, end - start, end - start)
                          for start, end in zip(starts, [*starts[1:], length], strict=True))
            return
        shapes.append(Shape(rows, length, length if mask is None else mask.shape[-1]))

    plain = model.get_base_model() if isinstance(model, PeftModel) else unwrapped(model)
    plain.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def watch_head(model: "Module") -> list[int]:
    """A list that grows with the positions that the output head is called for."""
    scored: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda head, args, logits: scored.append(logits.shape[:-1].numel()))
    return scored


def operations(model: "Module", shapes: Sequence[Shape], scored: int, training: bool) -> float:
    """Floating-point operations, `scored` positions by the head; the docstring above says which."""
    from torch.nn import Linear

    config, head = model.config, model.get_output_embeddings()
    weights = {name: module.weight.numel() for name, module in model.named_modules()
               if isinstance(module, Linear) and module is not head}
    lora = sum(size for name, size in weights.items() if "lora_" in name)
    frozen = sum(weights.values()) - lora
    width = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * width * sum(
        rows * length * (seen - length / 2) for rows, length, seen in shapes)
    positions = sum(shape.positions for shape in shapes)
    # The part of the layers that passes derivatives on
    behind = (1 - 1 / config.num_hidden_layers) * training
    return (2 * frozen * positions * (1 + behind) + (6 if training else 2) * lora * positions
            + attention * (1 + 2 * behind)
            + (4 if training else 2) * head.weight.numel() * scored)


# The machine

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
