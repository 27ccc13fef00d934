"""Off-policy: which of a frozen policy's own samples are learnt from (papers.md 2.4).

The policy answers each prompt n times before training, judges its answers, and then learns from
some of them, while they fall ever further behind what it would answer by then:

- RSO (Liu et al. 2023, arXiv 2309.06657): statistical rejection sampling thins the samples until
  they are distributed as those of the policy that the preference loss aims at; the accepted ones
  meet in pairs, and the judge says which is chosen. DPO on the pairs.
- RAFT (Dong et al. 2023, arXiv 2304.06767): the best of n, here the winner of the judge's
  tournament (tournament.py). Maximum likelihood on it.
- ReST (Gulcehre et al. 2023, arXiv 2308.08998): all samples whose reward is above a threshold,
  which rises from one improve step to the next. Maximum likelihood on them. A judge that is seldom
  sure gives rewards near 1/2, so the threshold may also be a quantile of them.

Samples are named by their places in a prompt's list, and `judge` gets matches of all prompts, as in
a tournament; scripts/label_samples.py brings the model. It compares two answers, so the reward of
one is made of its comparisons:

    r_i = mean over the opponents o != i of  s_io,   s_io = score_i / (score_i + score_o),

with the debiased scores of judgment.py: the probability, 0 to 1, that the judge prefers i to an
opponent. The opponents are all samples of the prompt, since a reward that hangs on a single
opponent is as noisy as one verdict. That takes n (n - 1) / 2 matches a prompt, and a match two
forward passes (a principle): 56 for n = 8. With the first k samples alone as opponents, k may be
1, it is k (n - k) + k (k - 1) / 2 matches; k = 1 are the n - 1 of a tournament, and RSO's own
way to a reward (one baseline answer, whose reward is then 1/2).
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from self_judge.judgment import Judgment
from self_judge.tournament import Match, knockout

Judge = Callable[[list[Match]], Sequence[Judgment]]
Kept = tuple[int, ...]  # a prompt, its sample to learn and, of a pair, the one that this is above


def share(judgment: Judgment) -> float:
    """s_ab, the first response's part of both debiased scores: 0 to 1, and 1/2 for a tie."""
    total = judgment.score_a + judgment.score_b
    return judgment.score_a / total if total else 0.5


def matches_of(samples: int, opponents: int = 0) -> list[tuple[int, int]]:
    """The matches that rewards need, by places: of all pairs those with one of the opponents.

    Those are the first samples, or all where `opponents` is 0.

    >>> matches_of(3), matches_of(4, opponents=1)
    ([(0, 1), (0, 2), (1, 2)], [(0, 1), (0, 2), (0, 3)])
    """
    return [(a, b) for a, b in itertools.combinations(range(samples), 2)
            if a < (opponents or samples)]


def rewards(samples: int, shares: Mapping[tuple[int, int], float],
            opponents: int = 0) -> list[float]:
    """r_i of each sample from s_ab of the matches of `matches_of`; 1/2 without an opponent.

    >>> rewards(3, {(0, 1): 0.25, (0, 2): 0.75, (1, 2): 0.75})
    [0.5, 0.75, 0.25]
    >>> rewards(3, {(0, 1): 0.25, (0, 2): 0.75}, opponents=1)
    [0.5, 0.75, 0.25]
    """
    preferred: list[list[float]] = [[] for _ in range(samples)]
    for (a, b), share_a in shares.items():
        preferred[b].append(1 - share_a)
        if b < (opponents or samples):
            preferred[a].append(share_a)
    return [sum(found) / len(found) if found else 0.5 for found in preferred]


def rejection_sample(rewards: Sequence[float], beta: float, count: int,
                     rng: random.Random) -> list[int]:
    """RSO's Algorithm 1: the places of `count` accepted samples, in the order of acceptance.

    Of samples of the policy p, those that are accepted follow p(y) exp(r(y) / beta) / Z, as long
    as they are few among the candidates. In each pass a candidate is accepted with the probability
    exp((r - r_max) / beta), where r_max is the best reward among those that are left; those that
    were not accepted are the candidates of the next pass. With too few candidates, all of them.

    `beta` has the rewards' unit. A small one takes the best samples, a large one any. (As
    published 0.5 in logits, whose slope is 4 where rewards are near 1/2: 0.125 here.)
    """
    accepted, left = [], list(range(len(rewards)))
    while left and len(accepted) < count:
        best = max(rewards[place] for place in left)
        passed = []
        for place in left:
            is_accepted = (len(accepted) < count
                           and rng.random() < math.exp((rewards[place] - best) / beta))
            (accepted if is_accepted else passed).append(place)
        left = passed
    return accepted


def first_round(accepted: Sequence[int], rng: random.Random) -> list[tuple[int, int]]:
    """RSO's first-round-rank: the accepted samples in random pairs; an odd one is left over."""
    order = list(accepted)
    rng.shuffle(order)
    return list(zip(order[::2], order[1::2], strict=False))


def rewards_of(responses: Sequence[Sequence[str]], opponents: int,
               judge: Judge) -> list[list[float]]:
    """r_i of each sample of each prompt; identical samples need no match."""
    pairs = matches_of(len(responses[0]), opponents)
    matches = [Match(place, texts[a], texts[b]) for place, texts in enumerate(responses)
               for a, b in pairs if texts[a] != texts[b]]
    shares = {match: share(judgment) for match, judgment
              in zip(matches, judge(matches), strict=True)}
    return [rewards(len(texts), {(a, b): shares.get(Match(place, texts[a], texts[b]), 0.5)
                                 for a, b in pairs}, opponents)
            for place, texts in enumerate(responses)]


def accepted_pairs(responses: Sequence[Sequence[str]], scores: Sequence[Sequence[float]],
                   judge: Judge, count: int, beta: float,
                   seeds: Sequence[str]) -> tuple[list[Kept], Counter]:
    """RSO's pairs, the judge's choice first, and how many it could not decide.

    `count` samples of each prompt are accepted, by random numbers from the prompt's seed.
    """
    pairs = []
    for place, (of_prompt, seed) in enumerate(zip(scores, seeds, strict=True)):
        rng = random.Random(seed)
        accepted = rejection_sample(of_prompt, beta, count, rng)
        pairs += [(place, *sorted(pair)) for pair in first_round(accepted, rng)]
    matches = {(place, a, b): Match(place, responses[place][a], responses[place][b])
               for place, a, b in pairs if responses[place][a] != responses[place][b]}
    winners = {pair: judgment.winner for pair, judgment
               in zip(matches, judge(list(matches.values())), strict=True)}
    kept = [(place, *((a, b) if winner == "A" else (b, a)))
            for (place, a, b), winner in winners.items() if winner]
    return kept, Counter(identical=len(pairs) - len(matches), tied=len(winners) - len(kept))


def best_of(responses: Sequence[Sequence[str]], judge: Judge) -> list[Kept]:
    """RAFT's demonstrations: the winners of the tournaments."""
    return [(place, bracket.winner)
            for place, bracket in enumerate(knockout(responses, judge, seed=None))]


def above(scores: Sequence[Sequence[float]], threshold: float) -> list[Kept]:
    """ReST's demonstrations: every sample whose reward exceeds the threshold.

    >>> above([[0.5, 0.75, 0.25], [0.6, 0.4, 0.5]], 0.5)
    [(0, 1), (1, 0)]
    """
    return [(place, sample) for place, of_prompt in enumerate(scores)
            for sample, reward in enumerate(of_prompt) if reward > threshold]


def quantile(scores: Sequence[Sequence[float]], percent: float) -> float:
    """The least reward that so many per cent of all samples do not exceed.

    >>> quantile([[0.5, 0.75, 0.25], [0.6]], 75)
    0.6
    """
    rewards = sorted(itertools.chain.from_iterable(scores))
    return rewards[max(0, math.ceil(percent * len(rewards) / 100) - 1)]
