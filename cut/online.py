"""What the rounds of scripts/online.py rest on: fresh instructions, and an audit."""

import random
from collections.abc import Iterable, Mapping

from lm.records import Record, join_input


def in_order(pool: Iterable[Record], evaluated: Iterable[Record], seed: int) -> list[Record]:
    """The instructions in the order in which rounds take them: none twice, none of `evaluated`."""
    distinct = {join_input(record): record for record in pool}
    for record in evaluated:
        distinct.pop(join_input(record), None)
    return random.Random(f"instructions {seed}").sample(list(distinct.values()), len(distinct))


def audit(counts: Mapping[str, int], max_failed: float, min_positive: float, max_positive: float,
          min_agreement: float) -> list[str]:
    """What speaks against training on judgments with these counts, with its numbers.

    >>> audit({"responses": 8, "failed": 2, "positive": 3, "negative": 3}, 0.1, 0.05, 0.95, 0.8)
    ['2 of 8 failed (25 %; expected 0 to 10 %, --max_failed)']
    """
    judged = counts["positive"] + counts["negative"]
    shares = [
        ("failed", counts["failed"], counts["responses"], 0, max_failed, "--max_failed"),
        ("positive", counts["positive"], judged, min_positive, max_positive,
         "--min_positive and --max_positive"),
        ("alike when asked for again", counts.get("alike", 0), counts.get("repeats", 0),
         min_agreement, 1, "--min_agreement")]
    bad = [f"{hits} of {total} {what} ({100 * hits / total:.0f} %; expected {100 * low:g} to "
           f"{100 * high:g} %, {flags})" for what, hits, total, low, high, flags in shares
           if total and not low <= hits / total <= high]
    return bad or ([] if judged else [f"none of {counts['responses']} is judged"])
