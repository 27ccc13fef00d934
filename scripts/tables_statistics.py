"""Intervals for scripts/tables_report.py: over seeds, over prompts, and of paired differences.

A measurement is a figure for each seed, `{"hits", "total", "items"}`; what is made once has one
under the seed None, which goes with every seed of another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm.shares import wilson

if TYPE_CHECKING:
    import numpy

Figure = Mapping[str, object]
Measurement = Mapping[int | None, Figure]
Interval = tuple[float, float] | None
ITEMS = {"0": 0.0, "1": 1.0, "=": 0.5}


@dataclass(frozen=True)
class Difference:
    """Of two rows, in points, with 95 % intervals; None where they cannot be given."""

    mean: float
    by_seed: Interval
    by_prompt: Interval

    def verdict(self) -> str:
        """Whether the first is above the second: only if no interval includes 0."""
        intervals = [self.by_seed, self.by_prompt]
        if None in intervals[:1]:
            return "cannot be told (no spread over seeds is known)"
        given = [interval for interval in intervals if interval]
        if all(low > 0 for low, _ in given):
            return "holds"
        if all(high < 0 for _, high in given):
            return "does not hold"
        return "cannot be told (an interval includes 0)"


def percent(figure: Figure) -> float:
    return 100 * figure["hits"] / figure["total"]


def over_seeds(values: Sequence[float]) -> Interval:
    """The t-interval of a mean, which takes the values for normally distributed.

    None of a single one, and of equal ones, which tell nothing of how far others would lie.

    >>> [round(end, 2) for end in over_seeds([70.0, 73.0, 76.0])]
    [65.55, 80.45]
    """
    from scipy import stats

    if len(set(values)) < 2:
        return None
    mean, error = sum(values) / len(values), stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    return float(low), float(high)


def over_prompts(measured: Measurement) -> Interval:
    """A bootstrap over prompts of the mean over seeds.

    Of one seed, and where the prompts differ from seed to seed, Wilson's interval of all verdicts.
    """
    figures = list(measured.values())
    if len(figures) > 1 and (verdicts := on_the_same_prompts(figures)) is not None:
        return bootstrap(verdicts.mean(0))
    pooled = wilson(sum(figure["hits"] for figure in figures),
                    sum(figure["total"] for figure in figures))
    return 100 * pooled.low, 100 * pooled.high


def difference(one: Measurement, other: Measurement) -> Difference | None:
    """How far `one` is above `other`, by seed and by prompt; None where no seed is common."""
    pairs = [(figure, other.get(seed, other.get(None))) for seed, figure in one.items()]
    if None in one:
        pairs = [(one[None], figure) for figure in other.values()]
    pairs = [(a, b) for a, b in pairs if b]
    if not pairs:
        return None
    points = [percent(a) - percent(b) for a, b in pairs]
    return Difference(sum(points) / len(points), over_seeds(points), by_prompt(pairs))


def by_prompt(pairs: Sequence[tuple[Figure, Figure]]) -> Interval:
    """A bootstrap over prompts of the difference, which is averaged over seeds first."""
    verdicts = on_the_same_prompts([figure for pair in pairs for figure in pair])
    return None if verdicts is None else bootstrap((verdicts[::2] - verdicts[1::2]).mean(0))


def on_the_same_prompts(figures: Sequence[Figure]) -> "numpy.ndarray | None":
    """Verdicts [figures, prompts], 0 to 1; None where they were not measured on equally many."""
    import numpy

    lengths = {len(figure.get("items", "")) for figure in figures}
    if len(lengths) > 1 or 0 in lengths:
        return None
    return numpy.array([[ITEMS[item] for item in figure["items"]] for figure in figures])


def bootstrap(values: "numpy.ndarray") -> tuple[float, float]:
    """The percentile interval, in points, of the mean of what each prompt gives."""
    import numpy
    from scipy import stats

    points = 100 * values
    if not points.std():
        return float(points[0]), float(points[0])
    found = stats.bootstrap([points], numpy.mean, method="percentile", rng=0)
    return tuple(float(end) for end in found.confidence_interval)
