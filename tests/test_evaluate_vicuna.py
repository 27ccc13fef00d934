"""Wins, ties and losses of a judge that sees each pair in both orders.

    python -m pytest tests/test_evaluate_vicuna.py -n0
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from fault_server import FaultServer

from lm.records import InputError
from lm.shares import wilson
from scripts.evaluate_vicuna import main, outcome, read_pairs, read_verdict

# What the judge thinks of each question: of the answers, or of the place where they stand.
FATES = ("better", "better", "worse", "tie", "first", "better")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write(path, generator: str, texts: list[str]) -> str:
    path.write_text(json.dumps([
        {"question_id": number, "category": "generic", "turns": [f"Q{number}."],
         "outputs": [text], "generator": generator} for number, text in enumerate(texts)]))
    return str(path)


@pytest.fixture
def flags(tmp_path) -> dict:
    return {"answers": write(tmp_path / "vicuna.json", "mine", ["MINE {x}"] * len(FATES)),
            "baseline": write(tmp_path / "sft.json", "sft", ["SFT"] * len(FATES)),
            "judge_model": "judge"}


def verdict(text: str) -> str:
    fate = FATES[int(re.search(r"Q(\d)\.", text)[1])]
    mine_first = text.index("MINE") < text.index("SFT")
    letter = {"better": "AB"[not mine_first], "worse": "AB"[mine_first], "tie": "tie",
              "first": "A"}[fate]
    return f"They differ.\nVerdict: {letter}"


@pytest.mark.parametrize(("reply", "found"), [
    ("Verdict: A", "a"), ("B lacks it.\n**Verdict: tie**", "tie"), ("verdict: B.", "b"),
    ("Verdict: A\nVerdict: A", "a"), ("Verdict: A\nVerdict: B", None), ("A", None), ("", None),
    ("Verdict: A or B", None), ("Verdict: Answer A", None), ("The verdict: A", None)])
def test_only_one_clear_verdict_is_a_verdict(reply, found):
    assert read_verdict(reply) == found


def test_a_verdict_is_the_models_whatever_the_order():
    assert [outcome(verdict, shown) for shown in ("model", "baseline")
            for verdict in ("a", "b", "tie", None)] == [
                "win", "loss", "tie", None, "loss", "win", "tie", None]


def test_shares_by_hand(flags, tmp_path, capsys):
    """Won three, lost one, one tie, one that is won by place alone, which is a tie."""
    with FaultServer(answer=verdict) as server:
        main(**flags, base_url=server.url)
        assert len(server.asked) == 12
        assert sum("MINE {x}" in text and "SFT" in text for text in server.asked) == 12
        main(**flags, base_url=server.url)
        assert len(server.asked) == 12
    results = json.loads((tmp_path / "vicuna/judge/results.json").read_text())
    shares = {name: (share["hits"], share["total"]) for name, share in results["shares"].items()}
    assert shares == {"win": (3, 6), "tie": (2, 6), "loss": (1, 6), "win_rate": (4, 6),
                      "consistency": (5, 6), "chose_first": (6, 10)}
    assert results["shares"]["win_rate"]["low"] == wilson(4, 6).low
    assert (results["model"], results["baseline"], results["undecided"]) == ("mine", "sft", 0)
    shown = capsys.readouterr().out
    assert "mine against sft" in shown and "66.67" in shown and "76.25" in shown


def test_a_second_run_waits_and_asks_nothing_twice(flags, capsys):
    with FaultServer(answer=verdict, delay=0.1) as server, ThreadPoolExecutor() as pool:
        runs = [pool.submit(main, **flags, base_url=server.url) for _ in range(2)]
        for run in runs:
            run.result()
        assert len(server.asked) == 12
    assert capsys.readouterr().out.count("another run is at work here") == 1


def test_a_pair_that_lacks_a_verdict_is_left_out_and_asked_again(flags, tmp_path):
    with FaultServer({"Q2.": ["say:Hard to tell."]}, verdict) as server:
        main(**flags, base_url=server.url, concurrency=1)
        results = json.loads((tmp_path / "vicuna/judge/results.json").read_text())
        assert (results["failed"], results["undecided"]) == (1, 1)
        assert results["shares"]["win_rate"]["total"] == 5
        main(**flags, base_url=server.url, concurrency=1)
        assert len(server.asked) == 13 and "Q2." in server.asked[-1]
    results = json.loads((tmp_path / "vicuna/judge/results.json").read_text())
    assert (results["failed"], results["undecided"]) == (0, 0)
    judged = json.loads((tmp_path / "vicuna/judge/judgments.json").read_text())
    assert [entry["verdict"] for entry in judged[4:6]] == ["loss", "loss"]


def test_another_baseline_needs_another_folder(flags, tmp_path):
    other = write(tmp_path / "other.json", "other", ["SFT, too"] * len(FATES))
    with FaultServer(answer=verdict) as server:
        main(**flags, base_url=server.url)
        results = tmp_path / "vicuna/judge/results.json"
        before = results.read_text()
        with pytest.raises(InputError, match=r"baseline_answers was .*other\.json.*--output_dir"):
            main(**{**flags, "baseline": other}, base_url=server.url)
        assert results.read_text() == before and len(server.asked) == 12
        main(**{**flags, "baseline": other}, base_url=server.url,
             output_dir=str(tmp_path / "second"))
    assert json.loads((tmp_path / "second/results.json").read_text())["baseline"] == "other"


def test_another_server_or_model_needs_another_folder(flags, tmp_path):
    with FaultServer(answer=verdict) as server:
        main(**flags, base_url=server.url)
        before = (tmp_path / "vicuna/judge/results.json").read_text()
        with pytest.raises(InputError, match=r"base_url was .* is 'https://other\.org/v1'"):
            main(**flags, base_url="https://other.org/v1")
        write(tmp_path / "sft.json", "dpo", ["SFT"] * len(FATES))
        with pytest.raises(InputError, match="baseline was 'sft', is 'dpo'"):
            main(**flags, base_url=server.url)
        write(tmp_path / "vicuna.json", "yours", ["MINE {x}"] * len(FATES))
        with pytest.raises(InputError, match="model was 'mine', is 'yours'"):
            main(**flags, base_url=server.url)
        assert len(server.asked) == 12
    assert (tmp_path / "vicuna/judge/results.json").read_text() == before


def test_a_budget_counts_earlier_runs(flags, tmp_path, capsys):
    with FaultServer(answer=verdict) as server:
        common = {**flags, "base_url": server.url, "concurrency": 1, "price_in": 1e5,
                  "price_out": 0.0}
        for _ in range(2):
            with pytest.raises(InputError, match="budget of 5 requests"):
                main(**common, max_requests=5)
        assert len(server.asked) == 5
        main(**common, max_requests=12)
    results = json.loads((tmp_path / "vicuna/judge/results.json").read_text())
    assert results["cost_of_this_run"] == pytest.approx(7)
    assert capsys.readouterr().out.endswith("this run: 7 requests, $7.0000\n")


def test_a_judge_must_be_given_room(flags):
    with pytest.raises(InputError, match="--max_new_tokens is -1; expected 1 or more"):
        main(**flags, max_new_tokens=-1, dry_run=True)


def test_numbers_of_questions_are_compared_as_text(flags, tmp_path):
    baseline = json.loads((tmp_path / "sft.json").read_text())
    (tmp_path / "sft.json").write_text(json.dumps(
        [{**record, "question_id": str(record["question_id"])} for record in baseline]))
    assert len(read_pairs(flags["answers"], flags["baseline"])) == len(FATES)


def test_answers_to_other_questions_are_an_error(flags, tmp_path):
    short = write(tmp_path / "short.json", "sft", ["SFT"])
    with pytest.raises(InputError, match=r"vicuna\.json: record 1: .*short\.json has no answer"):
        main(**{**flags, "baseline": short}, base_url="http://localhost:1/v1")
