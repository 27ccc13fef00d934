"""Scores of dialogues by a judge: read strictly, asked once, and averaged as by hand.

    python -m pytest tests/test_evaluate_mt_bench.py -n0
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_server import FaultServer

from lm.prompts import load_prompt
from lm.records import InputError, write_json
from scripts import evaluate_vicuna, generate_dialogues
from scripts.evaluate_mt_bench import (
    FIELDS,
    main,
    mean,
    means,
    question,
    read_score,
    refuse_other_inputs,
)

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = [
    {"question_id": number, "category": "math" if number < 3 else "writing",
     "turns": [f"Q{number}.", f"More on Q{number}?"],
     "outputs": [f"First {{answer}} {number}.", f"Second {number}."],
     "generator": "mine", **({"reference": ["Truth {turn}.", ""]} if number == 1 else {})}
    for number in (1, 2, 3)]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def flags(tmp_path) -> dict:
    path = tmp_path / "mt_bench.json"
    path.write_text(json.dumps(ANSWERS))
    return {"answers": str(path), "judge_model": "some/judge"}


def score(text: str) -> str:
    """The first reply to question N gets N + 6, the second N."""
    number = int(re.search(r"Q(\d)", text)[1])
    return f"Well said.\nScore: {number + (0 if 'More on' in text else 6)}"


@pytest.mark.parametrize(("reply", "value"), [
    ("Good.\nScore: 7", 7), ("**Score: 10**", 10), ("score: 1.", 1), ("Score: 8.5/10", 8.5),
    ("Score: 7\nIndeed.\nScore: 7", 7), ("Score:\n9", 9),
    ("7", None), ("Score: 7\nScore: 8", None), ("Score: 0", None), ("Score: 11", None),
    ("Score: seven", None), ("A score of 7", None), ("Score: 7 or 8", None), ("", None),
    ("Score: -3", None)])
def test_only_one_clear_score_is_a_score(reply, value):
    assert read_score(reply) == value


def test_the_judge_reads_the_dialogue_so_far_and_the_references():
    prompt = load_prompt("mt_bench", FIELDS)
    texts = [question(prompt, ANSWERS[0], turn)[1]["content"] for turn in (0, 1)]
    assert "First {answer} 1." in texts[0] and "More on" not in texts[0]
    assert "More on Q1?" in texts[1] and texts[1].index("Second 1.") > texts[1].index("First")
    for text in texts:  # the second turn's reference is empty
        assert text.count("message 1 of the user") == 1 and text.count("of the user, for") == 1
        assert text.endswith("Truth {turn}.")
    assert "correct answer" not in question(prompt, ANSWERS[2], 1)[1]["content"]


def test_means_by_hand():
    """8 and 2, 9 and 3 in math; (7 + 1 + 9 + 3) / 4 = 5. A failed one does not count."""
    judged = [{"question_id": number, "category": category, "turn": turn, "score": value}
              for number, category, turn, value in [
                  (1, "math", 1, 7), (1, "math", 2, 1), (2, "math", 1, 9), (2, "math", 2, 3),
                  (3, "writing", 1, 10), (3, "writing", 2, None)]]
    scores = means(judged)
    assert list(scores) == ["math", "writing", "all"] and list(scores["all"]) == ["1", "2", "all"]
    assert [scores["math"][turn]["mean"] for turn in ("1", "2", "all")] == [8, 2, 5]
    assert scores["writing"]["2"] == {"mean": None, "low": None, "high": None, "count": 0}
    assert (scores["all"]["all"]["mean"], scores["all"]["all"]["count"]) == (6, 5)
    # Of two questions a quarter of all draws takes the lower twice, a quarter the higher.
    assert (scores["math"]["all"]["low"], scores["math"]["all"]["high"]) == (4, 6)


def test_the_interval_takes_turns_of_a_question_for_one_draw():
    """Were the turns drawn apart, the interval would be narrower."""
    equal = [{"question_id": number // 2, "score": 1 + 8 * (number // 2 % 2)}
             for number in range(80)]
    alone = [{**entry, "question_id": number} for number, entry in enumerate(equal)]
    width = [found["high"] - found["low"] for found in (mean(equal), mean(alone))]
    # 40 tosses of 1 or 9: standard error 4 / sqrt(40) = 0.63, twice 1.96 of it; 80: 0.45
    assert width == pytest.approx([2 * 1.96 * 4 / 40**0.5, 2 * 1.96 * 4 / 80**0.5], rel=0.1)


def test_failed_judgments_are_no_scores_and_only_they_are_asked_again(flags, tmp_path, capsys):
    faults = {"More on Q1": ["say:I like it."], "Q2.": ["cut"], "Q3.": ["400"]}
    with FaultServer(faults, score) as server:
        main(**flags, base_url=server.url, concurrency=1)
        assert len(server.asked) == 6
        shown = capsys.readouterr().out
        assert "3 of 6 judgments failed" in shown
        folder = tmp_path / "mt_bench" / "some_judge"
        judged = json.loads((folder / "judgments.json").read_text())
        assert [entry["score"] for entry in judged] == [7, None, None, 2, None, 3]
        assert judged[1]["reply"] == "I like it." and judged[1]["error"] == "cannot be read"
        assert "cut off" in judged[2]["error"] and "400" in judged[4]["error"]
        results = json.loads((folder / "results.json").read_text())
        assert results["failed"] == 3 and results["scores"]["all"]["all"]["count"] == 3
        assert (results["model"], results["benchmark"]) == ("mine", "mt_bench")
        main(**flags, base_url=server.url, concurrency=1)
        assert len(server.asked) == 9 and "judgments failed" not in capsys.readouterr().out
        main(**flags, base_url=server.url, concurrency=1)
        assert len(server.asked) == 9
    results = json.loads((folder / "results.json").read_text())
    assert {turn: found["mean"] for turn, found in results["scores"]["all"].items()} == {
        "1": 8, "2": 2, "all": 5}
    assert results["failed"] == 0
    with FaultServer(answer=lambda text: "Fine.") as server, pytest.raises(
            InputError, match="no judgment could be read"):
        main(**flags, base_url=server.url)


def test_a_second_run_waits_and_asks_nothing_twice(flags, capsys):
    with FaultServer(answer=score, delay=0.1) as server, ThreadPoolExecutor() as pool:
        runs = [pool.submit(main, **flags, base_url=server.url) for _ in range(2)]
        for run in runs:
            run.result()
        assert len(server.asked) == 6
    assert capsys.readouterr().out.count("another run is at work here") == 1


def test_the_table_stands_beside_the_papers(flags, capsys):
    with FaultServer(answer=score) as server:
        main(**flags, base_url=server.url)
    shown = capsys.readouterr().out
    row = next(line for line in shown.split("\n") if line.startswith("math"))
    assert row.split()[1::4] == ["7.50", "1.50", "4.50"] and row.split()[-1] == "4"
    assert "paper: SELF-JUDGE 7b, HH" in shown and "4.80" in shown


@pytest.mark.parametrize("record", [
    {"question_id": 2, "reference": ["Other {x}.", "Two."]},
    {"question_id": "2", "choices": [{"turns": ["Other {x}.", "Two."]}]}])
def test_references_of_a_file(flags, tmp_path, record, capsys):
    path = tmp_path / "references.jsonl"
    path.write_text(json.dumps(record))
    with FaultServer(answer=score) as server:
        main(**flags, base_url=server.url, references=str(path))
    asked = {text for text in server.asked if "correct answer" in text}
    assert len(asked) == 2 and all("Other {x}." in text for text in asked)
    assert sum("Two." in text for text in asked) == 1
    assert "1 of 3 questions have a reference" in capsys.readouterr().out


@pytest.mark.parametrize(("records", "message"), [
    ([{"question_id": 2, "choices": []}], "record 0: expected 'reference', a list of texts"),
    ([{"question_id": 2, "reference": ["x"]}, {"question_id": 3, "reference": [7]}],
     r"record 1: field 'reference\[0\]' is a number; expected text"),
    ([{"question_id": 2, "choices": [{"turns": "x"}]}],
     r"record 0: field 'choices\[0\].turns' is text; expected a list"),
    ([{"question_id": 2, "reference": ["x"]}] * 2, "record 1: field 'question_id' repeats"),
    ([{"question_id": 7, "reference": ["x"]}, {"question_id": 2, "reference": [""]}],
     "no reference to any of these questions .*there 'question_id' '7' ..., here '1'"),
])
def test_references_that_could_not_be_used_are_an_error(flags, tmp_path, records, message):
    path = tmp_path / "references.json"
    path.write_text(json.dumps(records))
    with pytest.raises(InputError, match=rf"references\.json: .*{message}"):
        main(**flags, base_url="http://localhost:1/v1", references=str(path))


@pytest.mark.parametrize(("change", "message"), [
    ({"outputs": ["x", None]}, r"record 1: field 'outputs\[1\]' is null; expected text"),
    ({"turns": [1, "x"]}, r"record 1: field 'turns\[0\]' is a number; expected text"),
    ({"reference": [3]}, r"record 1: field 'reference\[0\]' is a number; expected text"),
    ({"question_id": "1"}, "record 1: field 'question_id' repeats that of an earlier record"),
    ({"turns": [], "outputs": []}, "record 1: has 0 turns and 0 outputs")])
def test_answers_that_could_not_be_judged_are_an_error(flags, change, message):
    Path(flags["answers"]).write_text(json.dumps([ANSWERS[0], {**ANSWERS[1], **change}]))
    with pytest.raises(InputError, match=rf"mt_bench\.json: {message}"):
        main(**flags, base_url="http://localhost:1/v1")


def test_results_of_other_inputs_are_not_replaced(flags, tmp_path):
    """Nor those of another benchmark in the same folder; the same path may be written otherwise."""
    references = tmp_path / "references.json"
    references.write_text(json.dumps([{"question_id": "2", "reference": ["Two."]}]))
    with FaultServer(answer=score) as server:
        main(**flags, base_url=server.url)
        path = tmp_path / "mt_bench/some_judge/results.json"
        before = path.read_text()
        with pytest.raises(InputError, match=r"results\.json: .*references was '', .*--output_dir"):
            main(**flags, base_url=server.url, references=str(references))
        with pytest.raises(InputError, match="benchmark was 'mt_bench', is 'vicuna'"):
            evaluate_vicuna.main(**flags, baseline=flags["answers"], base_url=server.url)
        assert path.read_text() == before and len(server.asked) == 6
        main(**{**flags, "answers": os.path.relpath(flags["answers"])}, base_url=server.url)
        main(**flags, base_url=server.url, references=str(references),
             output_dir=str(tmp_path / "other"))


@pytest.mark.parametrize(("before", "now", "same"), [
    ("https://api.openai.com/v1", "https://other.org/v1", False),
    ("https://other.org/a/../v1", "https://other.org/v1", False),  # a URL is no path
    ("https://other.org//v1", "https://other.org/v1", False),
    ("http://localhost:8000/v1", "https://localhost.org/v1", False),
    ("http://localhost:8000/v1", "http://127.0.0.1:9000/v1", True)])
def test_another_server_needs_another_folder(before, now, same, tmp_path):
    """But one on this machine has another port each time."""
    write_json(tmp_path / "results.json", {"base_url": before})
    if same:
        refuse_other_inputs(tmp_path, {"base_url": now})
    else:
        with pytest.raises(InputError, match=f"base_url was '{before}', is '{now}'"):
            refuse_other_inputs(tmp_path, {"base_url": now})


def test_another_server_or_model_replaces_no_results(flags, tmp_path, monkeypatch):
    """Changed answers of the same model do."""
    results = tmp_path / "mt_bench/some_judge/results.json"
    with FaultServer(answer=score) as server:
        main(**flags, base_url=server.url)
        before = results.read_text()
        monkeypatch.setenv("OPENAI_BASE_URL", "https://other.org/v1")
        with pytest.raises(InputError, match=r"base_url was .* is 'https://other\.org/v1'"):
            main(**flags)
        for generator, outputs in (("other", ["a", "b"]), ("mine", ["c", "d"])):
            Path(flags["answers"]).write_text(json.dumps(
                [{**record, "generator": generator, "outputs": outputs} for record in ANSWERS]))
            if generator == "other":
                with pytest.raises(InputError, match="model was 'mine', is 'other'"):
                    main(**flags, base_url=server.url)
                assert results.read_text() == before and len(server.asked) == 6
        main(**flags, base_url=server.url)
        assert len(server.asked) == 12


def test_a_budget_counts_earlier_runs(flags, tmp_path, capsys):
    """A request of 10 prompt tokens costs $1, at most $200 before it is known."""
    with FaultServer(answer=score) as server:
        common = {**flags, "base_url": server.url, "concurrency": 1, "price_in": 1e5,
                  "price_out": 0.0}
        for _ in range(2):
            with pytest.raises(InputError, match=r"budget of 2 requests .*--max_requests goes on"):
                main(**common, max_requests=2)
            assert len(server.asked) == 2
        assert capsys.readouterr().out.count("this run: 2 requests, $2.0000\n") == 1
        with pytest.raises(InputError, match=r"\$2\.0000 are spent.*higher --max_cost goes on"):
            main(**common, max_cost=2.5)
        assert len(server.asked) == 2
        main(**common, max_requests=6)
    assert json.loads((tmp_path / "mt_bench/some_judge/results.json").read_text())[
        "cost_of_this_run"] == pytest.approx(4)
    told = capsys.readouterr()
    assert told.out.endswith("this run: 4 requests, $4.0000\n") and "$6.00" in told.err


def test_a_judge_must_be_given_room(flags):
    with pytest.raises(InputError, match="--max_new_tokens is 0; expected 1 or more"):
        main(**flags, max_new_tokens=0, dry_run=True)


def test_bad_input_is_one_line(flags, tmp_path, run_cli):
    Path(flags["answers"]).write_text(json.dumps([{**ANSWERS[0], "outputs": ["x"]}]))
    done = run_cli("scripts/evaluate_mt_bench.py", "--answers", flags["answers"], "--judge_model",
                   "m", "--base_url", "http://localhost:1/v1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "record 0: has 2 turns and 1 outputs" in done.stderr
    prompt = tmp_path / "p.yaml"
    prompt.write_text("system: a\nuser: '{dialog}'\nreference: '{turn} {reference}'")
    with pytest.raises(InputError, match=r"field 'user' must be a text with \{dialogue\}"):
        load_prompt(str(prompt), FIELDS)
    with pytest.raises(InputError, match="mtbench: no such prompt"):
        load_prompt("mtbench", FIELDS)


@pytest.mark.skipif(not list(Path(sys.prefix).glob(".installed-*")),
                    reason="the recipe would install its requirements here")
def test_recipe_from_model_to_scores(tiny_llama, warm_venv, tmp_path):
    """MT-Bench and VicunaEval by one command, on answers that are there with its own settings."""
    questions, out = tmp_path / "question.jsonl", tmp_path / "out"
    questions.write_text("".join(json.dumps({key: record[key] for key in (
        "question_id", "category", "turns")}) + "\n" for record in ANSWERS))
    for name, temperature in (("mt_bench", -1.0), ("vicuna", 0.0), ("vicuna_sft", 0.0)):
        generate_dialogues.main(str(tiny_llama), str(out / f"{name}.json"), str(questions),
                                limit=2, max_new_tokens=4, temperature=temperature)

    def reply(text):
        return "Score: 4" if "Grade" in text else "Verdict: A"

    with FaultServer(answer=reply) as server:
        variables = {"JUDGE": "tiny", "BASE_URL": server.url, "OUT": str(out),
                     "MT_BENCH": str(questions), "VICUNA": str(questions), "REFERENCES": "",
                     "LIMIT": "2", "MAX_NEW_TOKENS": "4", "SFT": str(tiny_llama),
                     "VENV": str(warm_venv)}
        done = subprocess.run(
            ["bash", "scripts/evaluate_dialogues.sh", str(tiny_llama)], cwd=ROOT,
            env={**os.environ, **variables}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("already there") == 3
        # Four replies; two pairs of equal answers, so that both orders are one question
        assert len(server.asked) == 4 + 2
    results = json.loads((out / "mt_bench/tiny/results.json").read_text())
    assert results["scores"]["all"]["all"] == {"mean": 4, "low": 4, "high": 4, "count": 4}
    results = json.loads((out / "vicuna/tiny/results.json").read_text())
    assert results["shares"]["tie"]["share"] == 1 and results["shares"]["win_rate"]["share"] == 0.5
