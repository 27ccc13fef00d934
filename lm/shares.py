"""Shares with their confidence intervals: so many of so many."""

import math
from dataclasses import dataclass

MARGIN = 1.959964  # of a two-sided 95 % interval, in standard deviations


@dataclass(frozen=True)
class Share:
    """So many of so many, with the Wilson 95 % interval of the share."""

    hits: float  # a tie may count one half
    total: int
    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return (f"{self.hits:g}/{self.total}  {100 * self.share:3.0f} % "
                f"[{100 * self.low:3.0f},{100 * self.high:4.0f}]")


def wilson(hits: float, total: int) -> Share:
    """Wilson's score interval: sensible for few trials and for shares near 0 and 1.

    >>> str(wilson(34, 60))
    '34/60   57 % [ 44,  68]'
    """
    share, spread = hits / total, MARGIN**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    # At 0 and 1 an end of the interval is the share itself, but for rounding
    return Share(hits, total, share, max(0.0, min(share, centre - half)),
                 min(1.0, max(share, centre + half)))
