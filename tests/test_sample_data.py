"""data/sample/ keeps its promises, and its script chooses well.

Run: pytest tests/test_sample_data.py -n0
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from lm.records import check_fields, read_records
from lm.rules import judge_by_rules, satisfied
from scripts.make_sample_data import Answerer, choose, is_decent, make_prompts

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"
SETTINGS = yaml.safe_load((SAMPLE / "ingredients.yaml").read_text(encoding="utf-8"))
SPLITS = ("train", "validation", "heldout")


@pytest.fixture(scope="module")
def splits():
    return {split: read_records(SAMPLE / f"{split}.jsonl") for split in SPLITS}


def test_train_records_are_cut_records(splits):
    check_fields(splits["train"], "train.jsonl",
                 {"id": (str,), "instruction": (str,), "input": (str,), "output": (str,),
                  "judgment": (str, type(None)), "constraints": (list,)})
    assert len({record["id"] for record in splits["train"]}) == len(splits["train"])
    for record in splits["train"]:
        assert record["instruction"].strip() and record["output"].strip()
        assert record["input"] == "" and record["judgment"] != ""


def test_prompts_have_constraints_and_no_answers(splits):
    for split in ("validation", "heldout"):
        for record in splits[split]:
            assert set(record) == {"id", "instruction", "constraints"}
            assert record["constraints"]


def test_the_judgment_is_what_the_checkers_say_of_the_output(splits):
    for record in splits["train"]:
        holds = all(satisfied(record["constraints"], record["output"]))
        assert holds == (record["judgment"] is None), record["id"]
        assert judge_by_rules(record, record["output"], seed=0) == record["judgment"]


def test_counts_are_as_promised(splits):
    signs = Counter("negative" if record["judgment"] else "positive"
                    for record in splits["train"])
    assert 190 <= sum(signs.values()) <= 210
    assert signs["positive"] >= 110 and signs["negative"] >= 70
    assert len(splits["validation"]) == len(splits["heldout"]) == 60


def test_every_kind_is_in_every_split_and_has_good_and_bad_answers(splits):
    kinds = set(SETTINGS["wordings"]["train"])
    for records in splits.values():
        assert {record["constraints"][0]["kind"] for record in records} == kinds
    signs = Counter((record["constraints"][0]["kind"], record["judgment"] is None)
                    for record in splits["train"])
    for kind in kinds:
        assert signs[kind, True] >= 15 and signs[kind, False] >= 10


def test_nothing_is_trained_twice_and_both_signs_meet_in_some_prompts(splits):
    answers = Counter((record["instruction"], record["output"]) for record in splits["train"])
    assert max(answers.values()) == 1
    good, bad = ({record["instruction"] for record in splits["train"]
                  if (record["judgment"] is None) == sign} for sign in (True, False))
    assert len(good & bad) >= 25


def test_splits_share_no_prompt_no_topic_and_no_wording(splits):
    for part in ("topics", "wordings"):
        seen = Counter(text for split in SPLITS for text in _texts(SETTINGS[part][split]))
        assert [text for text, count in seen.items() if count > 1] == []
    instructions = [{record["instruction"] for record in splits[split]} for split in SPLITS]
    assert len(set.union(*instructions)) == sum(map(len, instructions))
    for split in ("validation", "heldout"):
        for topic in _texts(SETTINGS["topics"][split]):
            assert not any(f" {topic}." in record["instruction"] for record in splits["train"])


def _texts(part):
    """Topics without their words, or the wordings of all kinds."""
    return ([text.split("|")[0].strip() for text in part] if isinstance(part, list)
            else [text for texts in part.values() for text in texts])


def test_prompt_files_are_what_the_script_makes(splits):
    for split in ("validation", "heldout"):
        assert make_prompts(SETTINGS, split, seed=0) == splits[split]
    made = {prompt["instruction"]: prompt["constraints"]
            for prompt in make_prompts(SETTINGS, "train", seed=0)}
    assert all(made[record["instruction"]] == record["constraints"]
               for record in splits["train"])


def test_another_seed_makes_other_prompts():
    assert make_prompts(SETTINGS, "heldout", 1) != make_prompts(SETTINGS, "heldout", 0)


@pytest.mark.parametrize("text, decent", [
    ("The moon is a silver light in the night sky.", True),
    ("The moon is bright.", False),  # too short
    ("The moon is a silver light in the", False),  # not ended
    ("A tree is a plant that grows in the garden.", False),  # off the topic
    ("The moon is nice, the moon is nice, the moon is nice.", False),  # goes round in circles
    ("The moon is a silver light.\n\n### Response:", False),
    ("The response is about the silver moon at night.", False),  # about the exercise
])
def test_decent_answers(text, decent):
    assert is_decent(text, {"moon", "nigh"}) is decent


def entry(prompt, text, judgment, decent=True):
    return {"instruction": prompt, "constraints": [{"kind": "k", "kwargs": {}}], "output": text,
            "judgment": judgment, "decent": decent}


def test_choice_prefers_prompts_with_good_and_bad_answers_and_takes_one_of_each_first():
    pool = [entry("only good", "g1", None), entry("only good", "g2", None),
            entry("both", "g3", None), entry("both", "g3", None), entry("both", "g4", None),
            entry("both", "b1", "bad"), entry("both", "b2", "bad", decent=False),
            entry("only bad", "b3", "bad")]
    texts = {answer["output"] for answer in choose(pool, {"positive": 2, "negative": 1}, seed=0)}
    assert texts - {"g1", "g2"} == {"g3", "b1"} and len(texts) == 3
    everything = choose(pool, {"positive": 9, "negative": 9}, seed=0)
    assert sorted(answer["output"] for answer in everything) == ["b1", "b3", "g1", "g2", "g3", "g4"]


def test_answers_are_not_asked_for_again(tmp_path, monkeypatch):
    asked = []

    def fake(self, instructions, sampling):
        asked.extend(instructions)
        for index in instructions:
            yield {"index": index, "text": f"answer {index}", "tokens": 2, "whole": True}

    monkeypatch.setattr(Answerer, "_generate", fake)
    prompts = [{"instruction": "a"}, {"instruction": "b"}]
    answerer = Answerer("m", tmp_path, 8, 0)
    answerer.sample(prompts, 2, temperature=1.0, top_p=0.9)
    file, = tmp_path.glob("samples-*.jsonl")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))  # as after a kill
    asked.clear()
    answers = answerer.sample(prompts, 3, temperature=1.0, top_p=0.9)
    assert asked == [3, 4, 5]
    assert [[answer["text"] for answer in of_prompt] for of_prompt in answers] == [
        ["answer 0", "answer 2", "answer 4"], ["answer 1", "answer 3", "answer 5"]]
    assert all(json.loads(line)["whole"] for line in file.read_text().splitlines())
    asked.clear()
    answerer.sample(prompts, 1, temperature=0.7, top_p=0.9)  # other settings, other answers
    assert asked == [0, 1]
