"""scripts/evaluate_judge.py: pairs of each schema, and what is reported of a judge.

    python -m pytest tests/test_evaluate_judge.py

What the numbers mean is tested in tests/test_judgment.py.
"""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_judge import save_tiny_judge

from lm.models import load_model, load_tokenizer
from lm.records import InputError
from scripts import evaluate_judge
from scripts.evaluate_judge import read_pairs
from self_judge.judgment import judge_metrics, judge_preferences
from self_judge.templates import judge_templates, load_templates

PRINCIPLES = "configs/templates/judge_uf_principles.yaml"
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
UF = {"instruction": "Sing.", "completions": [
    {"response": text, "annotations": {"honesty": {"Rating": rating}}}
    for text, rating in (("La la.", "5"), ("No.", "1"))]}
OWN = {"instruction": "Sing.", "chosen": "La la.", "rejected": "No."}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_judge(tmp_path_factory.mktemp("tiny_judge")))


def write(path: Path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_pairs_of_each_schema(tmp_path, capsys):
    plain, by_principle = load_templates(evaluate_judge.TEMPLATES), load_templates(PRINCIPLES)
    song = {"context": "User: Sing.", "chosen": "La la.", "rejected": "No."}
    assert read_pairs(write(tmp_path / "own", OWN, song, {**song, "principle": "honesty"}),
                      plain) == [song, song, {**song, "principle": "honesty"}]
    hh = write(tmp_path / "hh", HH, {**HH, "rejected": HH["chosen"]})
    for templates in (plain, by_principle):  # without one of their own, all principles vote
        assert read_pairs(hh, templates) == [
            {"context": "User: Hi", "chosen": "Hello.", "rejected": "No."}]
    assert "1 of 2 records hold no pair" in capsys.readouterr().out
    uf = write(tmp_path / "uf", UF)
    assert read_pairs(uf, plain) == [song]
    assert read_pairs(uf, by_principle) == [{**song, "principle": "honesty"}]


@pytest.mark.parametrize(("record", "message"), [
    ({"context": "x", "chosen": "a"}, "record 1: field 'rejected' is missing; expected text"),
    ({**OWN, "principle": 1}, "record 1: field 'principle' is a number"),
    ({**HH, "chosen": None}, "record 1: field 'chosen' is null"),
    ({"a": 1}, "record 1: has neither the fields")])
def test_a_bad_record_is_named(record, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_pairs(write(tmp_path / "pairs.jsonl", OWN, record),
                   load_templates(evaluate_judge.TEMPLATES))


def test_reports_what_the_judge_says(model, tmp_path, capsys):
    """Table and file hold the shares of the judgments, of all pairs and by principle."""
    records = [{"context": f"User: Name {number} cats.", "chosen": f"Cat {number}.",
                "rejected": "No, I will not.", "principle": name}
               for number in range(4) for name in ("honesty", "helpfulness")]
    pairs, output = write(tmp_path / "pairs.jsonl", *records), tmp_path / "audit.json"
    evaluate_judge.main(model, pairs, templates=PRINCIPLES, output=str(output))
    tokenizer = load_tokenizer(model)
    judgments, asked = judge_preferences(
        load_model(model), tokenizer, records,
        judge_templates(load_templates(PRINCIPLES), tokenizer))
    shares = judge_metrics(judgments, asked)
    found = json.loads(output.read_text())
    assert set(found["metrics"]) == {"all", "helpfulness", "honesty"}
    assert {name: share["share"] for name, share in found["metrics"]["all"].items()} == (
        pytest.approx({name: share.share for name, share in shares.items()}))
    assert [line["winner"] for line in found["judgments"]] == [one.winner for one in judgments]
    assert found["judgments"][0]["margin"] == pytest.approx(judgments[0].margin, abs=1e-6)
    assert sum(found["verdicts"].values()) == 8
    printed = capsys.readouterr().out
    for name, share in shares.items():
        line = next(line for line in printed.splitlines()
                    if line.startswith(evaluate_judge.MEANINGS[name]))
        assert f"{100 * share.share:.1f}" in line and f"{100 * share.low:.1f} to" in line
    assert "accuracy by principle" in printed


def test_an_unknown_principle_is_told_before_a_model_is_looked_for(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", OWN, {**OWN, "principle": "honestly"})
    with pytest.raises(InputError, match=r"pairs\.jsonl: pair 1: principle 'honestly' has no judge "
                                         rf"template in {PRINCIPLES}, .*honesty.*--templates"):
        evaluate_judge.main("./none", pairs, templates=PRINCIPLES)


def test_an_output_that_cannot_be_written_is_told_before_anything_is_judged(model, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", OWN)
    for output, message in ((f"{pairs}/audit.json", "cannot be written"),
                            (str(tmp_path), "is a folder")):
        with pytest.raises(InputError, match=f"--output {output}: {message}"):
            evaluate_judge.main("./none", pairs, output=output)


def test_a_chat_model_is_asked_in_its_own_frame(model, tmp_path, capsys):
    """configs/templates/chat_judge.yaml, for models that never saw JSFT."""
    folder = save_tiny_judge(tmp_path / "chat")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = (ROOT / "configs/templates/chat.jinja").read_text()
    tokenizer.save_pretrained(folder)
    evaluate_judge.main(str(folder), write(tmp_path / "pairs.jsonl", OWN),
                        templates="configs/templates/chat_judge.yaml", limit=1)
    assert "1 pairs" in capsys.readouterr().out
