"""The rule judge: IFEval's verdicts, our words. Run: pytest tests/test_rules.py -n0"""

import subprocess
import sys

import pytest

from lm.records import InputError
from lm.rules import PHRASES, judge_by_rules, satisfied


def at_most(words):
    return {"kind": "length_constraints:number_words",
            "kwargs": {"num_words": words + 1, "relation": "less than"}}


NO_COMMA = {"kind": "punctuation:no_comma", "kwargs": {}}
FORBIDDEN = {"kind": "keywords:forbidden_words", "kwargs": {"forbidden_words": ["rain"]}}
REQUIRED = {"kind": "keywords:existence", "kwargs": {"keywords": ["umbrella"]}}
ONE_THE = {"kind": "keywords:frequency",
           "kwargs": {"keyword": r"\bthe\b", "frequency": 2, "relation": "less than"}}


def judgments(constraint, response, seeds=60):
    record = {"instruction": "Say something.", "constraints": [constraint]}
    return {judge_by_rules(record, response, seed) for seed in range(seeds)}


@pytest.mark.parametrize("constraint, good, bad", [
    (at_most(5), "One two three four five.", "One two three four five six."),
    (NO_COMMA, "Rain falls and falls.", "Rain, rain."),
    (FORBIDDEN, "The rainbow trains.", "Some Rain falls."),  # whole words only, any case
    (REQUIRED, "Take an Umbrella.", "Take a coat."),
    (ONE_THE, "The dog and other cats.", "The dog saw the cat."),
])
def test_verdict_and_judgment_agree(constraint, good, bad):
    assert satisfied([constraint], good) == [True]
    assert satisfied([constraint], bad) == [False]
    assert judgments(constraint, good) == {None}
    assert None not in judgments(constraint, bad)


@pytest.mark.parametrize("constraint, response, details", [
    (at_most(3), "Rain falls on my\nhead today.", ("3", '"Rain falls on"')),
    (NO_COMMA, "Cold days, warm soup, and bread.", ('"days, warm"',)),
    (FORBIDDEN, "I like summer rain best.", ('"rain"', '"summer rain"')),
    (REQUIRED, "Take a coat.", ('"umbrella"',)),
    (ONE_THE, "The dog saw the cat and the bird.", ('"the"', '"the cat"')),
])
def test_every_phrasing_says_what_is_wrong_and_where(constraint, response, details):
    found = judgments(constraint, response)
    assert len(found) >= 4
    for judgment in found:
        assert all(detail in judgment for detail in details), judgment
        assert len(judgment.split()) <= 30


def test_counts_are_told():
    assert any("6 words" in text for text in judgments(at_most(3), "Rain falls on my head today."))
    assert any("2 commas" in text for text in judgments(NO_COMMA, "Cold, wet, dark."))
    assert any("3 times" in text for text in judgments(ONE_THE, "The dog, the cat, the bird."))
    at_least = {"kind": "length_constraints:number_words",
                "kwargs": {"num_words": 9, "relation": "at least"}}
    assert any("2 words" in text and "9" in text for text in judgments(at_least, "Too short."))


@pytest.mark.parametrize("response", ["", "  \n"])
def test_an_empty_response_satisfies_nothing(response):
    assert satisfied([NO_COMMA, at_most(5)], response) == [False, False]
    assert judgments(NO_COMMA, response) <= {"The response is empty.", "Nothing was answered."}


def test_each_failed_constraint_is_named_and_no_other():
    record = {"instruction": "x", "constraints": [NO_COMMA, REQUIRED, FORBIDDEN]}
    judgment = judge_by_rules(record, "Sun, and wind.", 0)
    assert "comma" in judgment.lower() and '"umbrella"' in judgment and "rain" not in judgment


def test_phrasing_follows_from_seed_instruction_and_response():
    record = {"instruction": "Say something.", "constraints": [NO_COMMA]}
    assert judge_by_rules(record, "a, b", 3) == judge_by_rules(dict(record, id=7), "a, b", 3)
    assert len({judge_by_rules(record, f"a, {word}", 3).split('"')[0] for word in "bcdefgh"}) > 1


def test_a_kind_without_phrases_of_its_own_is_judged_by_its_description():
    constraint = {"kind": "startend:quotation", "kwargs": {}}
    assert constraint["kind"] not in PHRASES
    assert "quotation" in judgments(constraint, "No marks.").pop()
    assert judgments(constraint, '"Marks."') == {None}


def test_unknown_kinds_and_incomplete_kwargs_are_errors():
    with pytest.raises(InputError, match="unknown constraint kind 'punctuation:none'"):
        satisfied([{"kind": "punctuation:none", "kwargs": {}}], "x")
    with pytest.raises(InputError, match="number_sentences"):
        satisfied([{"kind": "length_constraints:number_sentences",
                    "kwargs": {"num_sentences": 1, "relation": "less than"}}], "x")
    with pytest.raises(InputError, match="num_words"):
        satisfied([{"kind": "length_constraints:number_words", "kwargs": {"num_words": 3}}], "x")


def test_nothing_is_downloaded_and_lm_eval_is_imported_only_when_judging():
    code = ("import sys, socket\n"
            "def refuse(*a, **k): raise AssertionError('network')\n"
            "socket.getaddrinfo = socket.socket.connect = refuse\n"
            "from lm.rules import satisfied\n"
            "assert 'lm_eval' not in sys.modules and 'nltk' not in sys.modules\n"
            "print(satisfied([{'kind': 'punctuation:no_comma', 'kwargs': {}}], 'a b'))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[True]\n", 0), done.stderr
