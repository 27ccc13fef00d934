"""ROUGE of summaries, with arithmetic a reader can redo.

    python -m pytest tests/test_evaluate_summarization.py
"""

import json
import subprocess
from pathlib import Path

import pytest

from lm.records import InputError
from lm.tables import paper_rows
from scripts.evaluate_summarization import (
    KINDS,
    read_summaries,
    reference_texts,
    score,
    summary,
)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "scripts/evaluate_summarization.py"
RECORDS = [  # found faulty and corrected; found good; found faulty, nobody corrected it
    {"instruction": "the cat sat on the mat\nWho sat?", "input": "", "output": "a dog",
     "judgment": "It was the cat.", "score": 1, "i_ans": "the cat sat there"},
    {"instruction": "the quick brown fox\nWhat is it?", "input": "", "output": "a quick brown fox",
     "judgment": None, "score": 7},
    {"instruction": "that is all\nIs it?", "input": "", "output": "no", "judgment": "Wrong."},
]
SUMMARIES = ["the cat", "a quick brown fox", "yes"]


def write(path, records):
    path.write_text(json.dumps(records))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "test.json", RECORDS)


@pytest.fixture
def answers(tmp_path):
    return write(tmp_path / "answers.json", [
        {"instruction": record["instruction"], "output": text, "generator": "by hand"}
        for record, text in zip(RECORDS, SUMMARIES, strict=True)])


def test_references_are_the_corrected_or_the_faultless_answers():
    assert reference_texts(RECORDS, "r") == ["the cat sat there", "a quick brown fox", None]
    assert reference_texts([{**RECORDS[0], "ref": "mine"}, {**RECORDS[1], "output": ""}], "r") == [
        "mine", None]
    with pytest.raises(InputError, match="no record has a reference"):
        reference_texts(RECORDS[2:], "r")
    with pytest.raises(InputError, match="record 0: field 'judgment' is missing"):
        reference_texts([{"output": "x"}], "r")


def test_scores_by_hand():
    """"the cat" against "the cat sat there": 2 of 2 words right, 2 of 4 found: F = 2/3; of the
    pairs of words 1 of 1 and 1 of 3: F = 1/2; the longest common run has both words: F = 2/3.
    The second summary is its reference: 1. The third has no reference and does not count."""
    result = score(SUMMARIES, reference_texts(RECORDS, "r"), stemmer=False)
    means = [result[kind]["mean"] for kind in KINDS]
    assert means == pytest.approx([100 * (2 / 3 + 1) / 2, 75, 100 * (2 / 3 + 1) / 2,
                                   100 * (2 / 3 + 1) / 2])
    # Of two records, a quarter of all draws takes the worse one twice, a quarter the better one.
    assert (result["rouge1"]["low"], result["rouge1"]["high"]) == pytest.approx((200 / 3, 100))


def test_stems_count_as_equal_only_on_demand():
    assert score(["running foxes"], ["run fox"], stemmer=False)["rouge1"]["mean"] == 0
    assert score(["running foxes"], ["run fox"], stemmer=True)["rouge1"]["mean"] == 100


def test_lines_count_for_lsum_alone():
    """L needs the words in one order; Lsum takes the union over the reference's lines."""
    result = score(["b one\na two"], ["a two\nb one"], stemmer=False)
    assert result["rougeL"]["mean"] == 50 and result["rougeLsum"]["mean"] == 100


def test_the_interval_narrows_with_more_records():
    few, many = (score(["a", "b"] * count, ["a", "c"] * count, False)["rouge1"]
                 for count in (10, 200))
    assert few["mean"] == many["mean"] == 50
    assert few["low"] < many["low"] < 50 < many["high"] < few["high"]
    # The standard error of 400 tosses of a coin is 2.5 points.
    assert many["high"] - many["low"] == pytest.approx(2 * 1.96 * 2.5, rel=0.1)


def test_summaries_of_other_records_are_an_error(data, tmp_path):
    path = write(tmp_path / "other.json", [{"instruction": "something else", "output": "x"}])
    with pytest.raises(InputError, match=r"other\.json: record 0: does not answer"):
        read_summaries(path, [record["instruction"] for record in RECORDS])
    short = write(tmp_path / "short.json", [{"instruction": RECORDS[0]["instruction"],
                                             "output": "x"}])
    with pytest.raises(InputError, match=r"short\.json: record 1: does not answer"):
        read_summaries(short, [record["instruction"] for record in RECORDS])


def test_from_a_file_of_summaries(run_warm, data, answers, tmp_path):
    done = run_warm(SCRIPT, "--data_path", data, "--outputs", answers,
                   "--output", tmp_path / "rouge.json")
    assert done.returncode == 0, done.stderr
    assert "83.33 [66.67, 100.00]" in done.stdout
    assert "2 records, 1 without a reference left out" in done.stdout
    saved = json.loads((tmp_path / "rouge.json").read_text())
    assert saved["models"][answers]["rouge2"]["mean"] == 75
    assert (saved["records"], saved["without_reference"]) == (2, 1)


def test_generation_included_and_done_once(run_warm, tiny_llama, data, tmp_path):
    arguments = ["--data_path", data, "--base_model_name_or_path", tiny_llama, "--limit", 2,
                 "--max_new_tokens", 4, "--output", tmp_path / "out" / "rouge.json"]
    first = run_warm(SCRIPT, *arguments)
    assert first.returncode == 0, first.stderr
    summaries = json.loads((tmp_path / "out" / "rouge.summaries.json").read_text())
    assert [answer["instruction"] for answer in summaries] == [
        record["instruction"] for record in RECORDS[:2]]
    again = run_warm(SCRIPT, *arguments)
    assert "already there" in again.stdout
    assert first.stdout.split("model ")[1] == again.stdout.split("model ")[1]


def test_two_processes_share_the_generation_and_one_scores(tiny_llama, data, warm_venv, tmp_path):
    result = subprocess.run(
        [warm_venv / "bin/torchrun", "--standalone", "--nproc_per_node=2", SCRIPT,
         "--data_path", data, "--base_model_name_or_path", tiny_llama, "--max_new_tokens", "4",
         "--output", tmp_path / "rouge.json"], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ROUGE-Lsum") == 1
    assert json.loads((tmp_path / "rouge.json").read_text())["records"] == 2


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "nothing to score"),
    (["--base_model_name_or_path", "x/y"], "--output is missing"),
    (["--outputs", "none.json"], "none.json: no such file"),
])
def test_bad_input_is_one_line(run_cli, data, arguments, message):
    done = run_cli(SCRIPT, "--data_path", data, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


def test_the_papers_figures_stand_beside():
    kinds = {kind: {"mean": 1.0, "low": 0.5, "high": 2.0} for kind in KINDS}
    lines = summary({"mine": kinds}).split("\n")
    assert lines[2].startswith("mine") and "1.00 [ 0.50,  2.00]" in lines[2]
    assert len(lines) == 3 + len(paper_rows(*KINDS)) == 9
    assert lines[-1].split()[-4:] == ["45.31", "29.04", "39.96", "40.12"]
