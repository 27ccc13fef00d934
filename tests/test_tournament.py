"""The knock-out: who meets whom, how often, and who wins.

    python -m pytest tests/test_tournament.py

The judge is a script, except where a test says so: the longer response is the better one.
"""

import copy

import pytest
from tiny_judge import PRINCIPLES, tiny_model, tiny_tokenizer

from lm.records import InputError
from self_judge import tournament_rejection_sampling
from self_judge.judgment import Pair, Probabilities, judge_pairs, judgment_of
from self_judge.tournament import knockout, remember

CONTEXTS = ["User: Name a colour.", "User: Count.", "User: Hi."]
RESPONSES = [["red", "green", "violet", "blue", "greenish blue"], ["one, two"],
             ["hi", "hello", "good day"]]


class Longer:
    """Notes what it is asked, round by round."""

    def __init__(self):
        self.rounds = []

    def __call__(self, matches):
        self.rounds.append(list(matches))
        return [judgment_of(Pair("", a, b), {"": Probabilities(
            float(len(a) > len(b)), float(len(b) > len(a)), float(len(b) > len(a)),
            float(len(a) > len(b)))}) for _, a, b in matches]


def games(bracket):
    return [game for played in bracket.rounds for game in played]


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("count", range(1, 10))
def test_n_responses_take_one_match_less_and_the_best_wins(count, seed):
    """Whatever the draw; each that is not the winner loses exactly once."""
    texts = ["x" * (1 + place * 7 % count) for place in range(count)]
    judge = Longer()
    bracket, = knockout([texts], judge, seed)
    played = games(bracket)
    assert len(played) == sum(map(len, judge.rounds)) == count - 1
    assert len(texts[bracket.winner]) == max(map(len, texts))
    losers = [game.b if game.winner == game.a else game.a for game in played]
    assert sorted([*losers, bracket.winner]) == list(range(count))


def test_a_rounds_matches_of_all_contexts_are_judged_together():
    judge = Longer()
    brackets = knockout(RESPONSES, judge, seed=None)
    assert [len(matches) for matches in judge.rounds] == [3, 2, 1]
    assert {match.context for match in judge.rounds[0]} == {0, 2}
    assert [RESPONSES[place][bracket.winner] for place, bracket in enumerate(brackets)] == [
        "greenish blue", "one, two", "good day"]
    assert brackets[1].rounds == []


def test_one_without_an_opponent_plays_first_in_the_next_round():
    """Of a, b, c: a meets b, then c meets the winner, as the first of the two."""
    judge = Longer()
    knockout([["a", "bb", "ccc"]], judge, seed=None)
    assert judge.rounds == [[(0, "a", "bb")], [(0, "ccc", "bb")]]


def test_a_tie_goes_to_the_second():
    bracket, = knockout([["a", "b"]], Longer(), seed=None)
    assert games(bracket)[0].judgment.winner is None and bracket.winner == 1


def test_the_draw_follows_from_seed_and_responses_alone():
    def order(responses, seed):
        judge = Longer()
        knockout(responses, judge, seed)
        return [match[1:] for match in judge.rounds[0] if match.context == len(responses) - 1]

    texts = RESPONSES[0]
    assert order([texts], 3) == order([RESPONSES[2], texts], 3) == order([texts], 3)
    assert len({str(order([texts], seed)) for seed in range(9)}) > 2


def test_the_callers_lists_stay_as_they_are():
    given = copy.deepcopy(RESPONSES)
    knockout(given, Longer(), seed=5)
    assert given == RESPONSES


def test_matches_that_are_known_are_not_judged_again():
    """The first four of eight play among themselves what they play in the whole tournament."""
    judge = Longer()
    again = remember(judge)
    texts = [["a", "bb", "ccc", "dddd", "e", "ff", "ggg", "h"]]
    knockout(texts, again, seed=None)
    rounds = len(judge.rounds)
    bracket, = knockout([texts[0][:4]], again, seed=None)
    assert len(judge.rounds) == rounds and texts[0][bracket.winner] == "dddd"


def test_published_function_asks_the_model():
    """Random weights judge; every verdict of the bracket is `judge_pairs`'."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    winners, brackets = tournament_rejection_sampling(
        model, tokenizer, CONTEXTS, RESPONSES, PRINCIPLES, seed=1, return_bracket=True)
    assert winners == tournament_rejection_sampling(model, tokenizer, CONTEXTS, RESPONSES,
                                                    PRINCIPLES, judge_batch_size=3, seed=1)
    for context, texts, winner, bracket in zip(CONTEXTS, RESPONSES, winners, brackets, strict=True):
        assert winner == texts[bracket.winner] and len(games(bracket)) == len(texts) - 1
        for game in games(bracket):
            found, = judge_pairs(model, tokenizer, [Pair(context, texts[game.a], texts[game.b])],
                                 PRINCIPLES)
            assert game.winner == {"A": game.a, "B": game.b}[found.winner]
    assert tournament_rejection_sampling(model, tokenizer, [], [], PRINCIPLES) == []


@pytest.mark.parametrize(("responses", "message"), [
    ([["a"], []], "context 1: has no responses; a tournament needs at least one"),
    (["ab", "cd"], "responses to context 0 is a text; expected a list of texts"),
    ([["a"]], "2 contexts and 1 lists of responses; expected as many of each")])
def test_what_cannot_be_played_is_one_line(responses, message):
    with pytest.raises(InputError, match=message):
        tournament_rejection_sampling(None, None, CONTEXTS[:2], responses, PRINCIPLES)
