"""One step of self-training by phase: ours against the original flow, in time and in memory.

    python benchmarks/self_judge_step.py               # queries of the sample data
    python benchmarks/self_judge_step.py --data_path harmless-base-test.jsonl.gz --shortest 50

Ours is `SelfJudgeTrainer`. The original flow is written anew here from its description, for each
micro-batch in turn: `generate` samples two responses to each query and they are decoded; the judge
is asked as in `benchmarks/judge.py`; query, response and an EOS are tokenized again, and DPO's loss
takes four passes, policy and reference on the chosen and on the rejected rows, each with the fp32
log-softmax of every position over the whole vocabulary. Both train the same LoRA (the published r
and alpha, peft's choice of layers) on the same weights, queries and micro-batches; each run has a
process of its own, and the sides alternate (`benchmarks/measure.py` says what is counted, and how).

Sampled texts differ from run to run, and the sides draw in different ways, so that their responses
cannot be the same. What they cost follows from their length, and that is made the same: the model
cannot end a response while it samples, so each has exactly `--max_new_tokens`. (That spares the
original the padding of ragged responses, so real steps differ more.)

Phases: sample, judge, train (forward and backward), and the step as a whole, with the optimizer's
part. Memory is a phase's peak above the loaded model; on a CPU it has what the phases before it
have given back to the allocator only. On a GPU a first step warms up.

First comes a check: on given pairs both sides have the same loss and gradient.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from benchmarks.judge import (
    MAX_LENGTH,
    PRINCIPLE,
    SAMPLE,
    TEMPLATES,
    original_judge,
    read_pairs,
    read_templates,
)
from benchmarks.measure import on_gpu
from lm.cli import run
from lm.memory import keep_freed_memory
from lm.models import DEFAULT_MODEL, load_model, load_tokenizer, output_head
from lm.records import InputError
from lm.templates import prompt_ids, response_ids
from self_judge.data import self_judge_example
from self_judge.judgment import Pair
from self_judge.templates import judge_text

if TYPE_CHECKING:
    from torch import Tensor

    from self_judge.trainer import SelfJudgeTrainer

PHASES = ("sample", "judge", "train")
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
BETA, TOP_P, LEARNING_RATE = 0.1, 0.9, 5e-6


@dataclass(frozen=True)
class Settings:
    """What both sides are told."""

    base_model: str
    rows: list[dict]  # query, context, chosen, rejected
    judge: str  # the judge prompt, with its fields
    micro_batch: int
    max_new_tokens: int
    judge_batch_size: int
    engine: str  # that ours samples with


@dataclass(frozen=True)
class Phase:
    """A phase of one step."""

    seconds: float
    memory: float  # bytes at the peak, above the loaded model
    positions: float  # run by the model, padding included


@dataclass(frozen=True)
class Step:
    """One run of one side."""

    phases: dict[str, Phase]  # and the whole, as "step"

    @property
    def seconds(self) -> float:
        return self.phases["step"].seconds


def main(data_path: str = "", base_model: str = DEFAULT_MODEL, templates: str = TEMPLATES,
         queries: int = 8, micro_batch: int = 4, max_new_tokens: int = 64,
         judge_batch_size: int = 8, shortest: int = 0, longest: int = 300, engine: str = "hf",
         repeats: int = 3):
    """Time and weigh a self-training step by phase against the original flow.

    Args:
        data_path: Preference records of HH's or UltraFeedback's schema, JSON or JSON Lines (.gz
            too), whose prompts are the queries; the sample data if not given.
        base_model: Folder, Hub id or embedded model; on a GPU only its tokenizer is used, unless
            vLLM samples.
        templates: YAML file of a `templates` section with one judge prompt.
        queries: Queries in the step; a multiple of the micro-batch.
        micro_batch: Queries that the original samples, judges and trains on at a time.
        max_new_tokens: Length of every response.
        judge_batch_size: Prompts that the original judges at a time, and of ours the limit.
        shortest: Leave out records with a text of fewer tokens.
        longest: Leave out records with a text of more tokens.
        engine: Ours samples with hf, vllm_server or vllm_colocate; with vLLM the weights are those
            of base_model on both sides.
        repeats: Runs of each side; medians are printed.
    """
    measure.check_positive(queries=queries, micro_batch=micro_batch, max_new_tokens=max_new_tokens,
                           judge_batch_size=judge_batch_size, repeats=repeats)
    if queries % micro_batch:
        raise InputError(f"--queries is {queries}; expected a multiple of --micro_batch "
                         f"{micro_batch}")
    section, tokenizer = read_templates(templates), load_tokenizer(base_model)
    source = data_path or str(SAMPLE)
    rows = [self_judge_example(pair, section, tokenizer)
            for pair in read_pairs(source, tokenizer, queries, shortest, longest)]
    settings = Settings(base_model, rows, judge_text(section, tokenizer, PRINCIPLE), micro_batch,
                        max_new_tokens, judge_batch_size, engine)
    print(f"{source}\n{queries} queries, micro-batch {micro_batch}, {2 * queries} responses of "
          f"{max_new_tokens} tokens, sampled with {engine}", flush=True)
    measure.in_own_process(check, settings)
    report(measure.alternate(measure.SIDES, repeats, run_side, settings))


# The original flow

def original_step(model, tokenizer, settings: Settings, optimizer, watch: "Watch") -> None:
    """Sample, judge and train on one micro-batch after the other."""
    import torch

    size = settings.micro_batch
    for start in range(0, len(settings.rows), size):
        rows = settings.rows[start:start + size]
        with watch.phase("sample"):
            texts = original_samples(model, tokenizer, [row["query"] for row in rows],
                                     settings.max_new_tokens)
        pairs = [Pair(row["context"], one.strip(), other.strip())
                 for row, one, other in zip(rows, texts[::2], texts[1::2], strict=True)]
        with watch.phase("judge"), model.disable_adapter():
            judgments = original_judge(model, tokenizer, settings.judge, pairs,
                                       settings.judge_batch_size, TOP_P)
        with watch.phase("train"), torch.autocast("cuda", torch.bfloat16, enabled=on_gpu()):
            wins = [judgment.winner == "A" for judgment in judgments]
            chosen, rejected = ([pair.response_a if first else pair.response_b
                                 for pair, first in zip(pairs, order, strict=True)]
                                for order in (wins, [not won for won in wins]))
            loss = original_loss(model, tokenizer, [row["query"] for row in rows], chosen, rejected)
            (loss * size / len(settings.rows)).backward()
    optimizer.step()
    optimizer.zero_grad()


def original_samples(model, tokenizer, queries: Sequence[str], max_new_tokens: int) -> list[str]:
    """Two responses to each query, as texts."""
    batch = tokenizer(list(queries), padding=True, padding_side="left",
                      return_tensors="pt").to(model.device)
    output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=True, top_p=TOP_P,
                            top_k=0, temperature=1.0, num_return_sequences=2)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1]:],
                                  skip_special_tokens=True)


def original_loss(model, tokenizer, queries: Sequence[str], chosen: Sequence[str],
                  rejected: Sequence[str]) -> "Tensor":
    """DPO's loss of rows that are tokenized as whole texts, an EOS at the end of each."""
    import torch
    from torch.nn.functional import logsigmoid

    batches = [original_batch(model, tokenizer, queries, texts) for texts in (chosen, rejected)]
    policy_chosen, policy_rejected = (original_log_probs(model, *batch) for batch in batches)
    with torch.no_grad(), model.disable_adapter():
        chosen_before, rejected_before = (original_log_probs(model, *batch) for batch in batches)
    margin = (policy_chosen - policy_rejected) - (chosen_before - rejected_before)
    return -logsigmoid(BETA * margin).mean()


def original_batch(model, tokenizer, queries: Sequence[str],
                   responses: Sequence[str]) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Ids, attention mask and labels (-100 on query and padding), padded on the right."""
    import torch

    batch = tokenizer([query + response + tokenizer.eos_token for query, response in
                       zip(queries, responses, strict=True)], padding=True, padding_side="right",
                      return_tensors="pt")
    before = torch.tensor([len(tokenizer(query)["input_ids"]) for query in queries])
    place = torch.arange(batch["input_ids"].shape[1])
    labels = batch["input_ids"].masked_fill(
        (place < before[:, None]) | (batch["attention_mask"] == 0), -100)
    return tuple(part.to(model.device)
                 for part in (batch["input_ids"], batch["attention_mask"], labels))


def original_log_probs(model, ids: "Tensor", mask: "Tensor", labels: "Tensor") -> "Tensor":
    """Summed log-probabilities of the rows' labels, from the logits of all positions."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    log_probs = logits.float().log_softmax(-1)[:, :-1]  # [B, T - 1, V]
    labels = labels[:, 1:]
    taken = log_probs.gather(-1, labels.clamp(min=0)[:, :, None]).squeeze(-1)
    return (taken * (labels != -100)).sum(-1)


# One run

class Watch:
    """Seconds, memory and positions of the phases of a step, which may come in several pieces."""

    def __init__(self, model, tokenizer):
        from lm.generation import stop_ids

        self.shapes = measure.watch_shapes(model)
        self.model, self.stops = model, stop_ids(model, tokenizer)
        self.loaded = measure.used_memory()
        self.begin()

    def begin(self) -> None:
        """Start a step."""
        self.start = time.perf_counter()
        self.phases = dict.fromkeys(PHASES, Phase(0, 0, 0))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase, or a piece of it."""
        measure.reset_peak_memory()
        self.shapes.clear()
        start = time.perf_counter()
        with endless(self.model, self.stops) if name == "sample" else contextlib.nullcontext():
            yield
        measure.wait_for_gpu()
        before = self.phases[name]
        self.phases[name] = Phase(
            before.seconds + time.perf_counter() - start,
            max(before.memory, measure.peak_memory() - self.loaded),
            before.positions + sum(shape.positions for shape in self.shapes))

    def end(self) -> Step:
        """The step, which ends here."""
        measure.wait_for_gpu()
        phases = self.phases.values()
        whole = Phase(time.perf_counter() - self.start, max(phase.memory for phase in phases),
                      sum(phase.positions for phase in phases))
        return Step({**self.phases, "step": whole})


@contextlib.contextmanager
def endless(model, stops: Sequence[int]) -> Iterator[None]:
    """No token that ends a response has any probability meanwhile."""
    import torch

    ends = torch.tensor(stops, device=model.device)
    hook = output_head(model).register_forward_hook(
        lambda head, args, logits: logits.index_fill(-1, ends, -torch.inf))
    try:
        yield
    finally:
        hook.remove()


def run_side(side: str, settings: Settings) -> Step:
    """Load the model and run a step; meant for a fresh process."""
    steps = 2 if on_gpu() else 1  # GPU kernels are chosen and loaded in the first
    return (run_ours if side == "ours" else run_original)(settings, steps)


def run_original(settings: Settings, steps: int) -> Step:
    """The last of some steps of the original flow."""
    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(settings)
    model = get_peft_model(model, LoraConfig(**LORA)).eval()  # without dropout, as published
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters()
                                   if parameter.requires_grad], lr=LEARNING_RATE)
    watch = Watch(model, tokenizer)
    for _ in range(steps):
        watch.begin()
        original_step(model, tokenizer, settings, optimizer, watch)
        step = watch.end()
    return step


def run_ours(settings: Settings, steps: int) -> Step:
    """The last of some steps of `SelfJudgeTrainer`."""
    from transformers import PrinterCallback, TrainerCallback

    keep_freed_memory()
    with TemporaryDirectory() as folder:
        trainer = trainer_of(settings, folder, steps)
        watch, timed = Watch(trainer.model, trainer.processing_class), trainer.timed
        found: list[Step] = []

        class Steps(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                watch.begin()

            def on_step_end(self, *args, **kwargs):
                found.append(watch.end())
                watch.begin()

        @contextlib.contextmanager
        def watched(phase: str, steps: float = 1) -> Iterator:
            with watch.phase(phase), timed(phase, steps) as work:
                yield work

        trainer.timed = watched
        trainer.add_callback(Steps)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if trainer.pairs_in_step < len(settings.rows):
        raise InputError("two responses were identical, so ours had less to train on; raise "
                         "--max_new_tokens")
    return found[-1]


def trainer_of(settings: Settings, folder: str, steps: int = 1) -> "SelfJudgeTrainer":
    """Ours, as it is told to do what the original does."""
    from peft import LoraConfig
    from trl import DPOConfig

    from self_judge.trainer import SelfJudgeTrainer

    model, tokenizer = load(settings)
    arguments = DPOConfig(
        folder, max_steps=steps, per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=len(settings.rows) // settings.micro_batch,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch",
        train_sampling_strategy="sequential", bf16=on_gpu(), use_cpu=not on_gpu(),
        gradient_checkpointing=False, dataloader_pin_memory=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True)
    forced = {"generation_kwargs": {"ignore_eos": True}} if settings.engine != "hf" else {}
    return SelfJudgeTrainer(
        model, tokenizer, arguments, train_dataset=settings.rows, judge_templates=settings.judge,
        peft_config=LoraConfig(**LORA), max_length=MAX_LENGTH,
        max_new_tokens=settings.max_new_tokens, judge_batch_size=settings.judge_batch_size,
        top_p=TOP_P, beta=BETA, ties="keep", generation={"engine": settings.engine, **forced})


def load(settings: Settings):
    """The model without an adapter, and its tokenizer."""
    if settings.engine == "hf":
        model, tokenizer = measure.load(settings.base_model)
    else:  # vLLM loads them by their name
        model = load_model(settings.base_model, load_in="bf16")
        tokenizer = load_tokenizer(settings.base_model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    measure.read_weights(model)
    return model, tokenizer


# Check and report

def check(settings: Settings) -> None:
    """Print both sides' loss and gradient on two given pairs, with an adapter that is not zero."""
    import torch

    with TemporaryDirectory() as folder:
        trainer = trainer_of(settings, folder)
    model, tokenizer = trainer.model, trainer.processing_class
    print(measure.machine(settings.base_model) if settings.engine == "hf" else
          f"{settings.base_model} in bf16")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    rows = [row for row in settings.rows if same_ids(tokenizer, row)][:2]
    columns = [[row[name] for row in rows] for name in ("query", "chosen", "rejected")]
    batch = trainer.data_collator.pairs([
        {"prompt_ids": prompt_ids(tokenizer, row["query"]),
         "chosen_ids": response_ids(tokenizer, row["chosen"]),
         "rejected_ids": response_ids(tokenizer, row["rejected"])} for row in rows])
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu()):
        loss, gradient = measure.with_gradient(model, original_loss(model, tokenizer, *columns))
        our_loss, our_gradient = measure.with_gradient(model, trainer.compute_loss(
            model, {name: value.to(model.device) for name, value in batch.items()}))
    print(f"\ncheck: {len(rows)} given pairs: loss {loss:.6f} and {our_loss:.6f}; gradients "
          f"{(our_gradient - gradient).norm() / gradient.norm():.0e} apart\n", flush=True)
    # In bf16 sums over a vocabulary round otherwise: there, numbers are only shown
    if not on_gpu() and abs(our_loss - loss) > 1e-4:
        raise InputError("the two sides' losses differ")


def same_ids(tokenizer, row: dict) -> bool:
    """Whether query and responses are the same ids, tokenized apart and together."""
    query = prompt_ids(tokenizer, row["query"])
    return all(tokenizer(row["query"] + row[name] + tokenizer.eos_token)["input_ids"]
               == query + response_ids(tokenizer, row[name]) for name in ("chosen", "rejected"))


def report(runs: dict[str, list[Step]]) -> None:
    """Print what each phase took."""
    names = (*PHASES, "step")
    sides = {side: Step({name: measure.median(Phase, [step.phases[name] for step in found])
                         for name in names}) for side, found in runs.items()}

    def row(name: str, what: str, form: str, value: Callable[[Phase], float]) -> measure.Row:
        return f"{name}, {what}", form, lambda side: value(side.phases[name])

    measure.report("one step", sides, [line for name in names for line in (
        row(name, "seconds", ".2f", lambda phase: phase.seconds),
        row(name, "peak memory above the model, GB", ".2f", lambda phase: phase.memory / 1e9),
        row(name, "positions run", ".0f", lambda phase: phase.positions))])
    for name in names:
        original, ours = (side.phases[name] for side in sides.values())
        print(f"  {name}: ours is {measure.compare(original, ours)}")


if __name__ == "__main__":
    run(main)
