"""RSO's, RAFT's and ReST's choice among samples, against what the papers say.

    python -m pytest tests/test_off_policy.py
"""

import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from self_judge.judgment import Pair, Probabilities, judgment_of
from self_judge.off_policy import (
    above,
    accepted_pairs,
    first_round,
    matches_of,
    rejection_sample,
    rewards,
    rewards_of,
    share,
)


def published(candidates, beta, count, uniform):
    """Algorithm 1 of RSO step by step, as the paper tells it: a dictionary that loses what it gave.

    `uniform` are the random numbers in the order of their use.
    """
    uniform, chosen = iter(uniform), []
    candidates = dict(candidates)
    while len(chosen) < count:
        max_reward = max(candidates.values())
        to_remove = []
        for candidate, reward in candidates.items():
            if next(uniform) >= math.exp((reward - max_reward) / beta):
                continue
            chosen.append(candidate)
            to_remove.append(candidate)
            if len(chosen) == count:
                break
        for candidate in to_remove:
            candidates.pop(candidate)
    return chosen


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_the_sampler_is_the_published_algorithm(beta):
    for seed in range(30):
        draw = random.Random(seed)
        found = [draw.random() for _ in range(12)]
        count = draw.randint(1, 12)
        numbers = random.Random(f"u{seed}")
        uniform = (numbers.random() for _ in range(10 ** 6))
        assert (rejection_sample(found, beta, count, random.Random(f"u{seed}"))
                == published(enumerate(found), beta, count, uniform))


def test_accepted_samples_follow_the_tilted_distribution():
    """p(y) exp(r / beta) / Z over four answers, from 200 samples of p, of which five are taken."""
    p, reward, beta = [0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.5, 0.9], 0.4
    weights = [share * math.exp(r / beta) for share, r in zip(p, reward, strict=True)]
    expected = [weight / sum(weights) for weight in weights]
    rng, accepted = random.Random(0), Counter()
    for _ in range(1000):
        candidates = rng.choices(range(4), p, k=200)
        taken = rejection_sample([reward[answer] for answer in candidates], beta, 5, rng)
        accepted.update(candidates[place] for place in taken)
    found = [accepted[answer] / 5000 for answer in range(4)]
    assert max(abs(a - b) for a, b in zip(expected, p, strict=True)) > 0.15
    assert found == pytest.approx(expected, abs=0.025)  # three standard errors: 0.021


def test_beta_goes_from_the_best_samples_to_any():
    found = [0.3, 0.9, 0.1, 0.8, 0.5]
    assert rejection_sample(found, 1e-6, 3, random.Random(0)) == [1, 3, 4]
    assert rejection_sample(found, 1e6, 3, random.Random(0)) == [0, 1, 2]
    assert sorted(rejection_sample(found, 0.1, 9, random.Random(0))) == [0, 1, 2, 3, 4]
    assert rejection_sample([], 0.1, 2, random.Random(0)) == []


def test_pairs_of_the_first_round_hold_each_accepted_sample_once():
    pairs = first_round([4, 7, 1, 9, 3], random.Random(1))
    assert len(pairs) == 2 and len({*pairs[0], *pairs[1]} & {4, 7, 1, 9, 3}) == 4
    assert len({tuple(first_round(range(6), random.Random(seed))) for seed in range(20)}) > 5


@pytest.mark.parametrize(("opponents", "matches"), [(0, 28), (1, 7), (3, 18), (8, 28)])
def test_a_reward_is_the_mean_share_against_the_opponents(opponents, matches):
    """By the definition, with both orders of each pair written out."""
    draw = random.Random(opponents)
    worth = [draw.random() for _ in range(8)]

    def preferred(a, b):
        return worth[a] / (worth[a] + worth[b])

    played = matches_of(8, opponents)
    assert len(played) == len(set(played)) == matches
    found = rewards(8, {(a, b): preferred(a, b) for a, b in played}, opponents)
    for sample in range(8):
        met = [other for other in range(opponents or 8) if other != sample]
        mean = sum(preferred(sample, other) for other in met) / len(met) if met else 0.5
        assert found[sample] == pytest.approx(mean)


def test_a_share_is_debiased_and_swapping_the_responses_turns_it():
    pair = Pair("c", "a", "b")
    judgment = judgment_of(pair, {"one": Probabilities(A_ab=0.6, B_ab=0.2, A_ba=0.5, B_ba=0.1)})
    swapped = judgment_of(pair, {"one": Probabilities(A_ab=0.5, B_ab=0.1, A_ba=0.6, B_ba=0.2)})
    assert share(judgment) == pytest.approx((0.6 + 0.1) / (0.6 + 0.2 + 0.5 + 0.1))
    assert share(judgment) + share(swapped) == pytest.approx(1)
    assert share(SimpleNamespace(score_a=0.0, score_b=0.0)) == 0.5


def test_a_rising_threshold_keeps_ever_fewer():
    found = [[0.2, 0.5, 0.7, 0.5], [0.6, 0.1, 0.3, 0.4]]
    assert [len(above(found, threshold)) for threshold in (0.1, 0.5, 0.6, 0.7)] == [7, 2, 1, 0]
    assert above(found, 0.5) == [(0, 2), (1, 0)]  # not what is equal to it


def test_identical_and_tied_pairs_are_counted_and_left_out():
    """Three prompts of two samples each, which are one text twice, tied, and decided for B."""
    responses, asked = [["a", "a"], ["a", "b"], ["c", "d"]], []

    def judge(matches):
        asked.extend(matches)
        return [SimpleNamespace(winner="B" if match.context == 2 else None, score_a=0.4,
                                score_b=0.6) for match in matches]

    scores = rewards_of(responses, 0, judge)
    assert scores == [[0.5, 0.5], [0.4, 0.6], [0.4, 0.6]] and len(asked) == 2
    kept, dropped = accepted_pairs(responses, scores, judge, 2, 0.1, seeds=["0", "1", "2"])
    assert kept == [(2, 1, 0)] and dropped == {"identical": 1, "tied": 1}
