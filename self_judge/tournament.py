"""Self-rejection: of N sampled responses, the one that wins a knock-out by the model's judgment.

    best = tournament_rejection_sampling(model, tokenizer, contexts, responses, judge_templates)

`responses` holds a list of texts for each context. N responses take N - 1 matches; each round's
matches of all contexts are judged together, in both orders (self_judge/judgment.py). What differs
from the released code: draws follow from the seed and the responses alone, the caller's lists stay
as they are, and a context without a response is an error.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lm.records import InputError
from self_judge.judgment import Judgment, Pair, Templates, check_texts, judge_pairs

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase


class Match(NamedTuple):
    """Two responses to one context, by its place in the list of contexts."""

    context: int
    response_a: str
    response_b: str


@dataclass(frozen=True)
class Game:
    """A match that was judged; the responses are named by their places in their list."""

    a: int
    b: int
    judgment: Judgment
    winner: int


@dataclass(frozen=True)
class Bracket:
    """A context's tournament."""

    winner: int
    rounds: list[list[Game]]


def tournament_rejection_sampling(
        model: "Module", tokenizer: "PreTrainedTokenizerBase", contexts: Sequence[str],
        responses: Sequence[Sequence[str]], judge_templates: Templates,
        token_id_a: int | None = None, token_id_b: int | None = None, judge_batch_size: int = 1,
        max_length: int = 2048, seed: int | None = 0, return_bracket: bool = False,
) -> list[str] | tuple[list[str], list[Bracket]]:
    """The winner of each context's responses; with `return_bracket` the brackets too.

    The other arguments are those of `get_batch_judgments` and `knockout`.
    """
    if len(contexts) != len(responses):
        raise InputError(f"{len(contexts)} contexts and {len(responses)} lists of responses; "
                         "expected as many of each")
    check_texts("contexts", contexts)
    for place, texts in enumerate(responses):
        check_texts(f"responses to context {place}", texts)

    def judge(matches: Sequence[Match]) -> list[Judgment]:
        return judge_pairs(
            model, tokenizer, [Pair(contexts[place], a, b) for place, a, b in matches],
            judge_templates, token_id_a=token_id_a, token_id_b=token_id_b, max_length=max_length,
            judge_batch_size=judge_batch_size)

    brackets = knockout(responses, judge, seed)
    winners = [texts[bracket.winner] for texts, bracket in zip(responses, brackets, strict=True)]
    return (winners, brackets) if return_bracket else winners


def knockout(responses: Sequence[Sequence[str]],
             judge: Callable[[list[Match]], Sequence[Judgment]],
             seed: int | None = 0) -> list[Bracket]:
    """Let each context's responses meet in pairs until one is left.

    `judge` gets the matches of a round, of all contexts. A tie goes to the second of the two, as
    in the released code. One without an opponent goes on, and plays first in the next round.

    The order is drawn from the seed and the responses; with `seed` None it is the given one. Then
    the first 2, 4, 8 ... of the responses play the same matches among themselves as without the
    others, so that `remember(judge)` gives the smaller tournaments for nothing.
    """
    for place, texts in enumerate(responses):
        if not texts:
            raise InputError(f"context {place}: has no responses; a tournament needs at least one")
    left = [drawn(texts, seed) for texts in responses]
    rounds: list[list[list[Game]]] = [[] for _ in responses]
    while any(len(order) > 1 for order in left):
        pairs = [list(zip(order[::2], order[1::2], strict=False)) for order in left]
        judged = iter(judge([Match(place, responses[place][a], responses[place][b])
                             for place, games in enumerate(pairs) for a, b in games]))
        for place, games in enumerate(pairs):
            if not games:
                continue
            played = [game(a, b, next(judged)) for a, b in games]
            waiting = left[place][-1:] if len(left[place]) % 2 else []
            left[place] = waiting + [one.winner for one in played]
            rounds[place].append(played)
    return [Bracket(order[0], played) for order, played in zip(left, rounds, strict=True)]


def drawn(texts: Sequence[str], seed: int | None) -> list[int]:
    """The responses' places in the order of the draw, whatever other contexts there are."""
    order = list(range(len(texts)))
    if seed is not None:
        random.Random(f"{seed} {list(texts)}").shuffle(order)
    return order


def game(a: int, b: int, judgment: Judgment) -> Game:
    """The match with its winner."""
    return Game(a, b, judgment, winner=a if judgment.winner == "A" else b)


def remember(judge: Callable[[list[Match]], Sequence[Judgment]],
             known: Mapping[Match, Judgment] | None = None
             ) -> Callable[[list[Match]], list[Judgment]]:
    """The same judge, asked once for each match, and not for those that are `known` already."""
    known = dict(known or {})

    def judge_new(matches: Sequence[Match]) -> list[Judgment]:
        new = [match for match in dict.fromkeys(matches) if match not in known]
        if new:
            known.update(zip(new, judge(new), strict=True))
        return [known[match] for match in matches]

    return judge_new
