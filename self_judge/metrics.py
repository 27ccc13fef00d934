"""What the log of a self-training run says, beside trl's own metrics; means over all processes.

`judge/pairs` is the share of queries that made a pair; the rates of ties, disagreement
(1 - consistency) and cut prompts are shares of the pairs that were judged, identical responses
left out. `seconds/*` are those of a step, `tokens_per_second/*` of all processes together.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from self_judge.pairs import Comparison

PER_PAIR = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
            "logps/chosen", "logps/rejected")
PER_STEP = ("judge/pairs", "judge/margin", "judge/consistency", "judge/tie_rate",
            "judge/identical_rate", "judge/cut_rate", "query_cut_rate", "response_cut_rate",
            "response_empty_rate", "response_length/chosen", "response_length/rejected",
            *(f"{kind}/{phase}" for kind in ("seconds", "tokens_per_second")
              for phase in ("sample", "judge", "train")))


class Means:
    """Means since the last log over all processes: sums of values and of their weights."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = tuple(names)  # the same on every process, whatever was added there
        self.device = device
        self.sums: Counter = Counter()
        self.weights: Counter = Counter()

    def add(self, name: str, total: float, weight: float) -> None:
        """Count `weight` values that add up to `total`."""
        if name not in self.names:
            raise KeyError(name)
        self.sums[name] += total
        self.weights[name] += weight

    def take(self, accelerator) -> dict[str, float]:
        """The means of the names that have any, and start anew."""
        counts = torch.tensor([[self.sums[name], self.weights[name]] for name in self.names],
                              dtype=torch.float64, device=self.device)
        self.sums, self.weights = Counter(), Counter()
        totals = accelerator.reduce(counts).tolist()
        return {name: total / weight for name, (total, weight)
                in zip(self.names, totals, strict=True) if weight}


def count_step(means: Means, compared: Sequence[Comparison], winners: Sequence[str | None]) -> None:
    """Add what became of a step's queries."""
    kept = [pair.ranked(winner) for pair, winner in zip(compared, winners, strict=True) if winner]
    judged = [pair.judgment for pair in compared if not pair.judgment.identical]
    responses = [response for pair in compared for response in (pair.response_a, pair.response_b)]
    for name, values in (
            ("judge/pairs", [winner is not None for winner in winners]),
            ("judge/margin", [abs(judgment.margin) for judgment in judged]),
            ("judge/consistency", [judgment.consistent for judgment in judged]),
            ("judge/tie_rate", [judgment.winner is None for judgment in judged]),
            ("judge/identical_rate", [pair.judgment.identical for pair in compared]),
            ("judge/cut_rate", [judgment.cut for judgment in judged]),
            ("query_cut_rate", [pair.query_cut for pair in compared]),
            ("response_cut_rate", [response.finish_reason == "length" for response in responses]),
            ("response_empty_rate", [not response.text.strip() for response in responses])):
        means.add(name, sum(values), len(values))
    count_lengths(means, [(chosen.token_ids, rejected.token_ids) for chosen, rejected in kept])


def count_lengths(means: Means, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Add the lengths of chosen and rejected responses, ids."""
    for place, name in enumerate(("chosen", "rejected")):
        means.add(f"response_length/{name}", sum(len(pair[place]) for pair in pairs), len(pairs))


@dataclass
class Work:
    """What a phase of a step worked on."""

    tokens: int = 0


@contextlib.contextmanager
def counted_tokens(model: torch.nn.Module, work: Work) -> Iterator[None]:
    """Count the tokens that the model reads meanwhile, padding included."""
    def count(module, args):
        work.tokens += args[0].numel()

    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def shown(compared: Comparison, winner: str | None) -> str:
    """A query's end, its two responses and their verdict, for people."""
    judgment = compared.judgment
    verdict = ("identical, no pair" if judgment.identical else
               f"{winner} is chosen" if winner else "no pair")
    return (f"... {compared.query[-300:]}\n--- A ({judgment.score_a:.3f})\n"
            f"{compared.response_a.text}\n--- B ({judgment.score_b:.3f})\n"
            f"{compared.response_b.text}\n--- {verdict}"
            f"{'' if judgment.consistent else ' (the two orders disagree)'}")
