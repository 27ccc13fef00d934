"""data/sample/preferences/ keeps its promises, and its script rates by the truth.

Run: pytest tests/test_preference_data.py -n0
"""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import yaml

from lm.records import read_records
from lm.rules import WORD, satisfied
from scripts.make_preference_data import (
    annotations,
    constraint,
    helpfulness,
    hh_records,
    make_exercises,
)

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"
SETTINGS = yaml.safe_load((SAMPLE / "ingredients.yaml").read_text(encoding="utf-8"))
SPLITS = ("train", "validation", "heldout")
KINDS = {"at_most", "no_comma"}


@pytest.fixture(scope="module")
def records():
    return {split: read_records(SAMPLE / "preferences" / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def pairs():
    return {split: read_records(SAMPLE / "preferences" / f"hh_{split}.jsonl") for split in SPLITS}


def test_ratings_are_what_the_checkers_say(records):
    for record in chain(*records.values()):
        ratings = []
        for completion in record["completions"]:
            holds = all(satisfied(record["constraints"], completion["response"]))
            rated = completion["annotations"]["instruction_following"]
            assert rated["Rating"] == ("5" if holds else "1"), record["id"]
            assert rated["Rationale For Rating"]
            ratings.append(rated["Rating"])
        assert set(ratings) == {"1", "5"}, record["id"]  # there is something to tell apart


def test_of_each_pair_exactly_the_chosen_one_satisfies_the_constraint(pairs, records):
    constraints = {record["instruction"]: record["constraints"]
                   for record in chain(*records.values())}
    for pair in chain(*pairs.values()):
        chosen, rejected = (pair[name].rsplit("\n\nAssistant: ", 1) for name in
                            ("chosen", "rejected"))
        assert chosen[0] == rejected[0] and chosen[0].startswith("\n\nHuman: ")
        truth = constraints[chosen[0].removeprefix("\n\nHuman: ")]
        assert all(satisfied(truth, chosen[1])), pair["id"]
        assert not all(satisfied(truth, rejected[1])), pair["id"]


def test_kinds_are_equally_often_in_every_split(records):
    for split in SPLITS:
        kinds = Counter(record["id"].split("-")[1] for record in records[split])
        assert set(kinds) == KINDS and len(set(kinds.values())) == 1


def test_splits_share_no_prompt_no_wording_and_no_answer(records):
    for texts in (
        {split: {record["instruction"] for record in records[split]} for split in SPLITS},
        {split: {text for kind in SETTINGS["preferences"]["wordings"][split].values()
                 for text in kind} for split in SPLITS},
        {split: {completion["response"] for record in records[split]
                 for completion in record["completions"]} for split in SPLITS},
    ):
        assert len(set.union(*texts.values())) == sum(map(len, texts.values()))
    for split in SPLITS:
        assert len({record["instruction"] for record in records[split]}) == len(records[split])


def test_the_folder_is_small():
    files = list((SAMPLE / "preferences").glob("*.jsonl"))
    assert sum(file.stat().st_size for file in files) < 600_000


def test_bounds_are_what_the_words_say():
    nine = "one two three four five six seven eight nine"
    assert len(WORD.findall(nine)) == 9
    for kind, n, holds in (("at_most", 9, True), ("at_most", 8, False), ("no_comma", 0, True)):
        assert satisfied([constraint(kind, n)], nine) == [holds], (kind, n)


def test_exercises_follow_from_the_seed_and_have_good_and_bad_answers():
    pools = {f"topic {number}": ["a b c, d", "word " * 20, "word " * 30] for number in range(30)}
    made = make_exercises(SETTINGS, "heldout", pools, seed=3)
    assert made == make_exercises(SETTINGS, "heldout", pools, seed=3)
    assert made != make_exercises(SETTINGS, "heldout", pools, seed=4)
    for exercise in made:
        assert all(all(satisfied(exercise["constraints"], text)) for text in exercise["good"])
        assert not any(all(satisfied(exercise["constraints"], text)) for text in exercise["bad"])


def test_every_answer_is_in_a_pair():
    exercise = {"id": "x", "instruction": "Do it.", "constraints": [], "good": ["1", "2"],
                "bad": ["3"]}
    pairs = [(pair["chosen"][-1], pair["rejected"][-1]) for pair in hh_records(exercise)]
    assert pairs == [("1", "3"), ("2", "3")]


@pytest.mark.parametrize("text, rating", [
    ("The moon is a silver light in the dark night sky.", 5),
    ("The moon is a silver light in the dark night", 4),  # breaks off
    ("A tree is a plant that grows well in the garden.", 4),  # off the topic
    ("A tree", 2),
])
def test_helpfulness(text, rating):
    assert helpfulness(text, {"moon", "nigh"})[0] == rating


def test_annotations_are_ultrafeedbacks():
    exercise = {"instruction": "Do it.", "constraints": [constraint("no_comma", 0)]}
    rated = annotations(exercise, "Well, no.", {"well"}, seed=0)
    assert rated["instruction_following"]["Rating"] == "1"
    assert "comma" in rated["instruction_following"]["Rationale For Rating"]
    assert rated["truthfulness"]["Rating"] == "N/A"
    assert json.dumps(rated) == json.dumps(annotations(exercise, "Well, no.", {"well"}, seed=0))
