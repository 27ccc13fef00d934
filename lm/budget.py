"""What asking a hosted model may cost, and how fast it may go.

A `Budget` is shared by all the threads that ask: before each request it sets the most that this
one can cost aside, and after it what it did cost, so that the limit holds however many are under
way. A `Pace` spaces requests out, and makes all of them wait when the server asks one to.
"""

import contextlib
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lm.journal import append
from lm.records import InputError
from lm.threads import Unasked

PRICES = Path(__file__).resolve().parents[1] / "configs" / "prices.yaml"
LOCAL = re.compile(r"https?://(localhost|127(\.\d+){3}|0\.0\.0\.0|\[::1\])(:\d+)?(/|$)")
BYTES_PER_TOKEN = 3  # few enough that a prompt seldom has more tokens than this says


class BudgetSpent(InputError):
    """A limit on requests or money was reached; what is done is kept."""


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens; None where nobody said."""

    prompt: float | None
    new: float | None

    @property
    def known(self) -> bool:
        """Whether costs can be told."""
        return self.prompt is not None and self.new is not None

    def of(self, prompt_tokens: int, new_tokens: int) -> float:
        """Dollars for so many tokens; 0 where the price is not known.

        >>> Price(30, 60).of(1000, 500)
        0.06
        """
        if not self.known:
            return 0.0
        return (prompt_tokens * self.prompt + new_tokens * self.new) / 1e6


def price_of(model: str, base_url: str, price_in: float = -1, price_out: float = -1) -> Price:
    """The given price, or nothing for a server on this machine, or that of configs/prices.yaml."""
    if (price_in < 0) != (price_out < 0):
        raise InputError("--price_in and --price_out belong together; give both, in dollars per "
                         "million tokens")
    if price_in >= 0:
        return Price(price_in, price_out)
    if LOCAL.match(base_url):
        return Price(0.0, 0.0)
    import yaml

    for name, prices in yaml.safe_load(PRICES.read_text(encoding="utf-8"))["models"].items():
        if re.fullmatch(re.escape(name) + r"(-\d[\d-]*)?", model):
            return Price(*prices)
    return Price(None, None)


def tokens_of(text: str) -> int:
    """About how many tokens a text has, rather too many than too few."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


class Budget:
    """Requests and dollars, spent and left; 0 is no limit."""

    def __init__(self, max_requests: int = 0, max_cost: float = 0.0):
        self.max_requests, self.max_cost = max_requests, max_cost
        self.requests, self.cost = 0, 0.0
        self._under_way, self._reserved = 0, 0.0  # requests, and what they cost at most
        self._changed = threading.Condition()

    def spent(self, under_way: bool = False) -> dict[str, float]:
        """Requests and dollars so far, for a journal's lines.

        `under_way` adds what the requests that are will cost at most: where they are given up.
        """
        return {"requests": self.requests,
                "cost": self.cost + (self._reserved if under_way else 0.0)}

    def go_on_from(self, lines: Collection[Mapping]) -> None:
        """Count what earlier runs spent, as the lines of their journal say."""
        told = told_last(lines)
        self.requests, self.cost = told["requests"], told["cost"]

    def reserve(self, cost: float) -> None:
        """Set aside what a request costs at most, or stop; wait if others may yet leave enough."""
        with self._changed:
            while spent := self._spent(cost):
                if not self._under_way:
                    raise BudgetSpent(spent)
                self._changed.wait()
            self.requests += 1
            self._under_way += 1
            self._reserved += cost

    def _spent(self, cost: float) -> str:
        """Why there may be no further request of this cost; empty where there may."""
        if self.max_requests and self.requests >= self.max_requests:
            return (f"the budget of {self.max_requests} requests is spent; the same command with a "
                    "higher --max_requests goes on")
        if self.max_cost and self.cost + self._reserved + cost > self.max_cost:
            return (f"${self.cost:.4f} are spent, and the next request could exceed the budget of "
                    f"${self.max_cost:g}; the same command with a higher --max_cost goes on")
        return ""

    def settle(self, reserved: float, cost: float, sent: bool = True) -> None:
        """Replace what was set aside by what it cost; a request that was not sent is none."""
        with self._changed:
            self.requests -= not sent
            self._under_way -= 1
            self._reserved = self._reserved - reserved if self._under_way else 0.0  # no rounding
            self.cost += cost
            self._changed.notify_all()


@contextlib.contextmanager
def noting_costs(file: IO[str], budget: "Budget | None") -> Iterator[None]:
    """At the end, whatever it is, note what was spent: failed requests have no lines of their own.

    Nor have those that an interrupt gives up. The next run's budget counts it.
    """
    try:
        yield
    finally:
        spent = budget.spent(under_way=True) if budget else {}
        if spent and (spent["cost"] or budget.max_requests):
            append(file, spent)


def told_last(lines: Collection[Mapping]) -> dict[str, float]:
    """What the last of a journal's lines that speak of spending says.

    >>> told_last([{"index": 0, "requests": 1, "cost": 0.5}, {"index": 1}])
    {'requests': 1, 'cost': 0.5}
    """
    last = next((line for line in reversed(list(lines)) if "requests" in line), {})
    return {"requests": last.get("requests", 0), "cost": last.get("cost", 0.0)}


class Pace:
    """When the next request may be sent; 0 requests a minute is no limit."""

    def __init__(self, requests_per_minute: float = 0):
        self._gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = self._paused = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Until this request's turn; raises `Unasked` if all are told to stop meanwhile."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        while (left := max(turn, self._paused) - time.monotonic()) > 0:
            if stop.wait(left):
                break
        if stop.is_set():
            raise Unasked

    def pause(self, seconds: float) -> None:
        """Nobody sends anything for so long."""
        with self._lock:
            self._paused = max(self._paused, time.monotonic() + seconds)
