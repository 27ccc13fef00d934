"""Pairs judged a second: ours against the original computation, in time and in memory.

    python benchmarks/judge.py                         # the sample data, whose texts are short
    python benchmarks/judge.py --data_path harmless-base-test.jsonl.gz --shortest 50

Ours is what training, evaluation and tournament run: `judge_pairs`. The original is written anew
here from its description: both orders of all pairs, one order after the other, as the pairs come,
`--batch_sizes` prompts at a time, padded on the left; one token is sampled by `generate`, and the
probabilities are a softmax over the filtered scores of the whole vocabulary. (Today's `generate`
scores the last position alone. That of the authors' time scored all, and so took longer, and more
memory.) Each run has a process of its own, and the sides alternate (`benchmarks/measure.py` says
what is counted, and how); a first judgment of three words warms up.

Two cases: the first `--pairs` pairs of the file whose context and responses all have `--shortest`
to `--longest` tokens, and a tournament of 16 of their responses over one of their contexts (the one
of middle length). Both sides are run with several sizes of a forward pass: the original's in
prompts, ours in tokens. A CPU is as fast with one prompt as with many, so there the original is at
its best with one, which needs no padding; on a GPU the best size of either is not known before.
Ours at its fastest is compared with each size of the original.

First comes a check: without top-p both sides have the same probabilities. With it, as it is timed,
the original may choose another response now and then; how often is told.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from benchmarks.measure import Measured, on_gpu
from lm.cli import run
from lm.memory import keep_freed_memory
from lm.models import DEFAULT_MODEL, load_tokenizer
from lm.records import InputError, read_records
from self_judge.judgment import Judgment, Pair, Probabilities, judge_pairs, judgment_of
from self_judge.templates import Templates, decision_ids, fill, judge_text, load_templates

if TYPE_CHECKING:
    from self_judge import preferences

SAMPLE = measure.ROOT / "data" / "sample" / "preferences" / "hh_heldout.jsonl"
TEMPLATES = "configs/templates/judge_hh.yaml"
PRINCIPLE = "default"
RESPONSES = 16  # in the tournament
MAX_LENGTH = 2048
# Of a forward pass: prompts of the original, tokens of ours
SIZES = {"cpu": ("1,8", "512"), "gpu": ("1,2,4,8,16,32", "1024,2048,4096,8192,16384")}
WARM_UP = Pair("Hi", "Yes", "No")

Judge = Callable[[Sequence[Pair]], list[Judgment]]


@dataclass(frozen=True)
class Case:
    """What is judged: pairs, or else the matches of a tournament over one context."""

    title: str
    pairs: list[Pair] = field(default_factory=list)
    context: str = ""
    responses: list[str] = field(default_factory=list)

    def judged(self, judge: Judge) -> list[tuple[Pair, Judgment]]:
        """Every pair with its judgment."""
        from self_judge.tournament import knockout

        if self.pairs:
            return list(zip(self.pairs, judge(self.pairs), strict=True))
        found: list[tuple[Pair, Judgment]] = []

        def judge_round(matches: list) -> list[Judgment]:
            pairs = [Pair(self.context, a, b) for _, a, b in matches]
            judgments = judge(pairs)
            found.extend(zip(pairs, judgments, strict=True))
            return judgments

        knockout([self.responses], judge_round)
        return found


@dataclass(frozen=True)
class Judged(Measured):
    """A run, and what was chosen."""

    winners: dict[Pair, str | None]


def main(data_path: str = "", base_model: str = DEFAULT_MODEL, templates: str = TEMPLATES,
         pairs: int = 32, shortest: int = 0, longest: int = 300, batch_sizes: str = "",
         token_budgets: str = "", repeats: int = 3):
    """Time and weigh the judge against the original computation.

    Args:
        data_path: Preference records of HH's or UltraFeedback's schema, JSON or JSON Lines (.gz
            too); the sample data if not given.
        base_model: Folder, Hub id or embedded model; on a GPU only its tokenizer is used.
        templates: YAML file of a `templates` section with one judge prompt.
        pairs: Pairs to judge.
        shortest: Leave out pairs with a text of fewer tokens.
        longest: Leave out pairs with a text of more tokens.
        batch_sizes: Prompts that the original runs at a time, such as 1,8; on a GPU several if not
            given.
        token_budgets: Tokens that ours runs at a time, such as 512; the same.
        repeats: Runs of each side and size; medians are printed.
    """
    measure.check_positive(pairs=pairs, repeats=repeats)
    theirs, ours = SIZES["gpu" if on_gpu() else "cpu"]
    sides = [f"{side} {size}" for side, text, flag in (
        ("original", batch_sizes or theirs, "batch_sizes"),
        ("ours", token_budgets or ours, "token_budgets")) for size in sizes_of(text, flag)]
    section, tokenizer = read_templates(templates), load_tokenizer(base_model)
    source = data_path or str(SAMPLE)
    found = [Pair(pair.context, pair.chosen, pair.rejected) for pair in
             read_pairs(source, tokenizer, pairs, shortest, longest)]
    print(f"{source}\nprompts as in {templates}, texts of {shortest} to {longest} tokens",
          flush=True)
    measure.in_own_process(check, base_model, section, found[:4])
    for case in (Case(f"{pairs} pairs", found), tournament(found, tokenizer)):
        runs = measure.alternate(sides, repeats, run_side, base_model, section, case)
        report(case.title, runs)


def sizes_of(text: str, flag: str) -> list[int]:
    """The numbers of "1,8"."""
    sizes = [size.strip() for size in text.split(",")]
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise InputError(f"--{flag} is {text!r}; expected numbers such as 8 or 1,8")
    return list(map(int, sizes))


def read_templates(path: str) -> Templates:
    """A `templates` section that has a judge prompt without a principle."""
    section = load_templates(path)
    if PRINCIPLE not in section.judge:
        raise InputError(f"{path}: has no judge prompt {PRINCIPLE!r}, only "
                         f"{', '.join(section.judge)}")
    return section


def read_pairs(source: str, tokenizer, number: int, shortest: int,
               longest: int) -> list["preferences.Pair"]:
    """The first pairs of a file of preference records, all of whose texts have a fitting length."""
    from self_judge.preferences import found_in

    fitting = []
    for index, record in enumerate(read_records(source)):
        try:
            found = found_in(record)
        except InputError as error:
            raise InputError(f"{source}: record {index}: {error}") from error
        for pair in found.pairs:
            lengths = [len(tokenizer(text)["input_ids"])
                       for text in (pair.context, pair.chosen, pair.rejected)]
            if shortest <= min(lengths) and max(lengths) <= longest:
                fitting.append(pair)
        if len(fitting) >= number:
            return fitting[:number]
    raise InputError(f"{source}: has {len(fitting)} pairs with texts of {shortest} to {longest} "
                     f"tokens, not {number}; lower the number or widen --shortest and --longest")


def tournament(pairs: Sequence[Pair], tokenizer) -> Case:
    """16 responses of the pairs, over the one of their contexts that has the middle length."""
    contexts = sorted({pair.context for pair in pairs},
                      key=lambda text: len(tokenizer(text)["input_ids"]))
    responses = list(dict.fromkeys(
        text for pair in pairs for text in (pair.response_a, pair.response_b)))[:RESPONSES]
    return Case(f"tournament of {len(responses)}", context=contexts[len(contexts) // 2],
                responses=responses)


# The original computation

def original_judge(model, tokenizer, text: str, pairs: Sequence[Pair], batch_size: int,
                   top_p: float = 0.9) -> list[Judgment]:
    """Sample a token after each prompt; the scores it was drawn from tell p(A) and p(B)."""
    letters = list(decision_ids(tokenizer, text))
    found: list[list[float]] = []
    for order in (pairs, map(swapped, pairs)):
        prompts = [prompt_of(text, pair) for pair in order]
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(prompts[start:start + batch_size], padding=True, padding_side="left",
                              return_tensors="pt").to(model.device)
            output = model.generate(**batch, max_new_tokens=1, do_sample=True, top_p=top_p, top_k=0,
                                    temperature=1.0, output_scores=True,
                                    return_dict_in_generate=True)
            found += output.scores[0].float().softmax(-1)[:, letters].tolist()
    return [judgment_of(pair, {PRINCIPLE: Probabilities(*one, *other)})
            for pair, one, other in zip(pairs, found[:len(pairs)], found[len(pairs):], strict=True)]


def swapped(pair: Pair) -> Pair:
    return Pair(pair.context, pair.response_b, pair.response_a)


def prompt_of(text: str, pair: Pair) -> str:
    return fill(text, context=pair.context, response_a=pair.response_a,
                response_b=pair.response_b)


# One run

def run_side(side: str, base_model: str, section: Templates, case: Case) -> Judged:
    """Load the model and judge; meant for a fresh process."""
    matmul_peak = measure.measure_matmul_peak()
    model, tokenizer, text = load(base_model, section)
    kind, size = side.split()
    if kind == "ours":
        keep_freed_memory()

    def judge(pairs: Sequence[Pair]) -> list[Judgment]:
        if kind == "original":
            return original_judge(model, tokenizer, text, pairs, int(size))
        return judge_pairs(model, tokenizer, pairs, text, max_length=MAX_LENGTH,
                           token_budget=int(size))

    judge([WARM_UP])
    shapes, scored = measure.watch_shapes(model), measure.watch_head(model)
    loaded = measure.used_memory()
    measure.reset_peak_memory()
    start = time.perf_counter()
    judged = case.judged(judge)
    measure.wait_for_gpu()
    seconds, memory = time.perf_counter() - start, measure.peak_memory() - loaded
    tokens = sum(len(tokenizer(prompt_of(text, pair))["input_ids"])
                 for one, _ in judged for pair in (one, swapped(one)))
    return Judged(
        seconds, memory, tokens, sum(shape.positions for shape in shapes),
        measure.operations(model, shapes, sum(scored), training=False), matmul_peak,
        {pair: judgment.winner for pair, judgment in judged})


def load(base_model: str, section: Templates):
    """The judge, its tokenizer, and its prompt."""
    model, tokenizer = measure.load(base_model)
    measure.read_weights(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer, judge_text(section, tokenizer, PRINCIPLE)


# Check and report

def check(base_model: str, section: Templates, pairs: Sequence[Pair]) -> None:
    """Print how far apart both sides' probabilities are on a few pairs, without top-p."""
    model, tokenizer, text = load(base_model, section)
    print(measure.machine(base_model))
    theirs = original_judge(model, tokenizer, text, pairs, batch_size=len(pairs), top_p=1.0)
    ours = judge_pairs(model, tokenizer, pairs, text, max_length=MAX_LENGTH)
    apart = max(abs(p - q) for one, other in zip(theirs, ours, strict=True) for p, q in
                zip(one.probabilities[PRINCIPLE], next(iter(other.probabilities.values())),
                    strict=True))
    print(f"\ncheck: on {len(pairs)} pairs p(A) and p(B) are at most {apart:.0e} apart without "
          "top-p\n", flush=True)
    # In bf16 the last layers' rounding depends on the batch: there, numbers are only shown
    if not on_gpu() and apart > 1e-4:
        raise InputError("the two sides' probabilities differ")


def report(title: str, runs: dict[str, list[Judged]]) -> None:
    """Print a case's table, what was chosen, and ours at its fastest against each original."""
    sides = {side: measure.median(Measured, found) for side, found in runs.items()}
    winners = {side: found[0].winners for side, found in runs.items()}
    number = len(next(iter(winners.values())))
    measure.report(title, sides, [
        ("pairs a second", ".2f", lambda one: number / one.seconds), *measure.ROWS])
    best = min((side for side in sides if side.startswith("ours")),
               key=lambda side: sides[side].seconds)
    for side in sides:
        if side.startswith("original"):
            same = [pair for pair in winners[best] if pair in winners[side]]
            agreed = sum(winners[best][pair] == winners[side][pair] for pair in same)
            print(f"  against {side}, {best} is {measure.compare(sides[side], sides[best])}\n"
                  f"    the same choice in {agreed} of {len(same)} pairs that both judged")
    print(flush=True)


if __name__ == "__main__":
    run(main)
