"""AlpacaEval on judgments made here, and end to end against a local server that plays the judge.

    python -m pytest tests/test_evaluate_alpaca.py
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("diskcache")
pytest.importorskip("tenacity")

import fault_server
from fault_server import FaultServer

from lm.records import InputError, read_records
from scripts.evaluate_alpaca import count, main, read_annotations

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("one", "two", "three", "four", "five", "six")
# What becomes of each pair; the model's answer to the third is the reference's.
FATES = ("won", "lost", "equal", "won", "unreadable", "failed")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def write(path, records):
    path.write_text(json.dumps(records))
    return str(path)


def answers(path, texts, generator):
    return write(path, [{"instruction": f"Say {word}.", "output": text, "generator": generator}
                        for word, text in zip(WORDS, texts, strict=False)])


@pytest.fixture
def files(tmp_path):
    good = {"won": "GOOD", "lost": "BAD", "equal": "same", "unreadable": "GOOD", "failed": "GOOD"}
    bad = {"won": "BAD", "lost": "GOOD", "equal": "same", "unreadable": "BAD", "failed": "BAD"}
    return (answers(tmp_path / "mine.json", [good[fate] for fate in FATES], "mine"),
            answers(tmp_path / "reference.json", [bad[fate] for fate in FATES], "davinci"))


def ranks(text: str) -> str:
    """The ranking that the published prompt asks for: whose answer is GOOD is first."""
    if "Say five." in text:
        return "Both are fine."
    first, second = (1, 2) if text.index('"""GOOD') < text.index('"""BAD') else (2, 1)
    return f"[{{'model': 'model_1', 'rank': {first}}}, {{'model': 'model_2', 'rank': {second}}}]"


def arguments(files, server, tmp_path, **more):
    return {"model_outputs": files[0], "reference_outputs": files[1], "base_url": server.url,
            "output_dir": str(tmp_path / "out"), **more}


def test_a_second_run_waits_and_asks_nothing_twice(tmp_path, capsys):
    files = (answers(tmp_path / "mine.json", ["GOOD", "BAD", "GOOD"], "mine"),
             answers(tmp_path / "reference.json", ["BAD", "GOOD", "BAD"], "davinci"))
    with FaultServer(answer=ranks, delay=0.1) as server, ThreadPoolExecutor() as pool:
        runs = [pool.submit(main, **arguments(files, server, tmp_path)) for _ in range(2)]
        for run in runs:
            run.result()
        assert len(server.asked) == 3
    assert capsys.readouterr().out.count("another run is at work here") == 1


def test_published_figures_follow_from_published_judgments(tmp_path, capsys):
    """2, 2 won, 1 lost, 1.5 and 0 draws, one undecided: (1 + 1 + 0 + 1/2 + 1/2) / 5 = 60 %."""
    path = write(tmp_path / "annotations.json", [
        {"preference": value, "generator_2": "theirs"} for value in (2.0, 2, 1, 1.5, 0, None)])
    main(annotations=path, output_dir=str(tmp_path / "out"), max_undecided=0.2)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["win_rate"] == pytest.approx(60)
    assert result["standard_error"] == pytest.approx(
        100 * statistics.stdev([1, 1, 0, 0.5, 0.5]) / math.sqrt(5))
    assert [result[key] for key in ("n_wins", "n_wins_base", "n_draws", "n_total",
                                    "n_undecided")] == [2, 1, 2, 5, 1]
    row = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("theirs"))
    assert row.split() == ["theirs", "60.00", "18.71", "2", "2", "1", "1", "(16.7", "%)"]


def test_a_win_rate_without_many_of_its_pairs_is_no_success(tmp_path, capsys):
    path = write(tmp_path / "annotations.json", [{"preference": 2.0}] * 8 + [{"preference": None}])
    with pytest.raises(SystemExit) as stop:
        main(annotations=path, output_dir=str(tmp_path / "out"))
    assert stop.value.code == 1
    assert re.fullmatch(r"warning: 1 of 9 pairs are undecided \(11 %; --max_undecided allows 10 "
                        r"%\), .*\n", capsys.readouterr().err)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["n_undecided"] == 1
    main(annotations=path, max_undecided=0.12)


def test_a_limit_holds_for_annotations_too(tmp_path):
    path = write(tmp_path / "annotations.json", [{"preference": 2.0}] * 3 + [{"preference": 1.0}])
    main(annotations=path, output_dir=str(tmp_path / "out"), limit=3)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result["n_total"], result["win_rate"]) == (3, 100)


@pytest.mark.parametrize("value", [3, -1, 0.5, "2"])
def test_other_preferences_are_an_error(tmp_path, value):
    path = write(tmp_path / "a.json", [{"preference": 2}, {"preference": value}])
    with pytest.raises(InputError, match="record 1: field 'preference' is"):
        read_annotations(path)


def test_no_decided_pair_is_no_win_rate():
    with pytest.raises(InputError, match="none of 2 judgments could be read"):
        count([{"preference": None}, {"preference": float("nan")}])


def test_end_to_end_with_resume(files, tmp_path, capsys):
    """The budget ends the first run; later ones ask for what is missing, and for nothing twice."""
    with FaultServer({"Say six.": ["400!"]}, ranks) as server:
        common = arguments(files, server, tmp_path, concurrency=1, max_undecided=0.5)
        with pytest.raises(InputError, match="max_requests"):
            main(**common, max_requests=2)
        assert len(server.asked) == 2
        main(**common)
        assert len(set(server.asked)) == 5  # the equal pair needs no judge
        assert sorted(map(server.asked.count, set(server.asked))) == [1] * 5
        assert {body["model"] for body in server.bodies} == {"gpt-4"}
        assert {body["max_tokens"] for body in server.bodies} == {100}
        shown = capsys.readouterr().out
        assert "2 undecided" in shown
        row = next(line for line in shown.split("\n") if line.startswith("mine"))
        # won, lost, equal, won: (1 + 0 + 1/2 + 1) / 4
        assert row.split() == ["mine", "62.50", "23.94", "2", "1", "1", "2", "(33.3", "%)"]
        main(**common)
        asked_again = sorted(text.split("Say ")[1].split(".")[0] for text in server.asked[5:])
        assert asked_again == ["five", "six"]
    judged = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [record["preference"] for record in judged] == [2, 1, 1.5, 2, None, None]
    assert [record["instruction"] for record in judged] == [f"Say {word}." for word in WORDS]
    undecided = json.loads((tmp_path / "out" / "undecided.json").read_text())
    assert sorted((entry["said"], "400" in entry["error"]) for entry in undecided) == [
        ("", True), ("Both are fine.", False)]
    counted = json.loads((tmp_path / "out" / "results.json").read_text())
    main(annotations=str(tmp_path / "out" / "annotations.json"), output_dir=str(tmp_path / "two"),
         max_undecided=0.5)
    again = json.loads((tmp_path / "two" / "results.json").read_text())
    assert {key: counted[key] for key in again if key != "annotations"} == {
        key: value for key, value in again.items() if key != "annotations"}
    assert counted["n_undecided"] == 2


def test_another_reference_needs_another_folder(files, tmp_path):
    other = answers(tmp_path / "other.json", ["BAD"] * len(FATES), "other")
    with FaultServer(answer=ranks) as server:
        common = arguments(files, server, tmp_path, limit=2)
        main(**common)
        before = (tmp_path / "out" / "results.json").read_text()
        with pytest.raises(InputError, match=r"reference_outputs was .*other\.json.*--output_dir"):
            main(**{**common, "reference_outputs": other})
        with pytest.raises(InputError, match="annotations was None"):
            main(annotations=str(tmp_path / "out/annotations.json"),
                 output_dir=str(tmp_path / "out"))
        assert (tmp_path / "out" / "results.json").read_text() == before
        assert len(server.asked) == 2


def test_another_server_or_model_needs_another_folder(files, tmp_path, monkeypatch):
    with FaultServer(answer=ranks) as server:
        common = arguments(files, server, tmp_path, limit=2)
        main(**common)
        before = (tmp_path / "out" / "results.json").read_text()
        monkeypatch.setenv("OPENAI_BASE_URL", "https://other.org/v1")
        with pytest.raises(InputError, match=r"base_url was .* is 'https://other\.org/v1'"):
            main(**{**common, "base_url": ""})
        answers(tmp_path / "mine.json", ["BAD"] * 2, "yours")
        with pytest.raises(InputError, match="model was 'mine', is 'yours'"):
            main(**common)
        assert (tmp_path / "out" / "results.json").read_text() == before
        assert len(server.asked) == 2


def test_a_budget_counts_earlier_runs(files, tmp_path, capsys):
    """A request of 10 prompt tokens costs $1."""
    with FaultServer(answer=ranks) as server:
        common = arguments(files, server, tmp_path, concurrency=1, limit=4, price_in=1e5,
                           price_out=0.0)
        for _ in range(2):
            with pytest.raises(InputError, match="budget of 2 requests"):
                main(**common, max_requests=2)
            assert len(server.asked) == 2
        main(**common, max_requests=3)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["cost_of_this_run"] == pytest.approx(1)
    told = capsys.readouterr()
    assert told.out.endswith("this run: 1 requests, $1.0000\n") and "$3.00" in told.err


def test_all_unreadable_is_one_clear_line(files, tmp_path):
    with (FaultServer(answer=lambda text: "No idea.") as server,
          pytest.raises(InputError, match="none of 2 judgments could be read")):
        main(**arguments(files, server, tmp_path, limit=2))
    judged = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [record["preference"] for record in judged] == [None, None]


def test_local_annotator_asks_for_a_letter(files, tmp_path):
    """`M is better than K` holds two letters and is not read as either."""
    def letter(text):
        if "Say one." in text:
            return "M is better than K."
        return "Response M." if text.index("GOOD") < text.index("BAD") else " K"

    with FaultServer(answer=letter) as server:
        with pytest.raises(InputError, match="--judge_model is missing"):
            main(**arguments(files, server, tmp_path, annotator="local"))
        main(**arguments(files, server, tmp_path, annotator="local", judge_model="tiny", limit=4,
                         max_undecided=0.25))
        assert {body["model"] for body in server.bodies} == {"tiny"}
        assert {message["role"] for body in server.bodies
                for message in body["messages"]} == {"system", "user"}
    judged = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [record["preference"] for record in judged] == [None, 1, 1.5, 2]


def test_reasoning_annotator_leaves_room_and_temperature(files, tmp_path):
    with FaultServer(answer=lambda text: "M") as server:
        main(**arguments(files, server, tmp_path, annotator="reasoning", judge_model="m", limit=1))
    (body,) = server.bodies
    assert body["max_tokens"] == 4096 and "temperature" not in body
    (judged,) = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert judged["preference"] in (1, 2)


def test_weighted_annotator_reads_probabilities(files, tmp_path, monkeypatch):
    """The first answer shown has three quarters, so a preference is 2 - 3/4 or its mirror."""
    def completion(body, text, **_):
        top = [{"token": "m", "logprob": math.log(0.6), "bytes": None},
               {"token": "M", "logprob": math.log(0.2), "bytes": None}]
        choice = {"message": {"role": "assistant", "content": "m"}, "finish_reason": "length",
                  "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
        return json.dumps({"choices": [choice]}).encode()

    monkeypatch.setattr(fault_server, "_completion", completion)
    with FaultServer() as server:
        common = arguments(files, server, tmp_path, limit=5,
                           annotator="weighted_alpaca_eval_gpt4_turbo")
        main(**common)
        assert all(body["logprobs"] is True and body["top_logprobs"] == 5
                   for body in server.bodies)
        assert len(server.asked) == 4
        main(**common)
        assert len(server.asked) == 4  # probabilities come from the cache too
    judged = json.loads((tmp_path / "out" / "annotations.json").read_text())
    values = [record["preference"] for record in judged]
    assert values[2] == 1.5
    assert {round(value, 6) for value in values} == {1.25, 1.5, 1.75}  # both orders occur


def test_reference_may_be_a_file_of_annotations(files, tmp_path):
    published = write(tmp_path / "published.json", [
        {"instruction": f"Say {word}.", "output_1": "BAD", "generator_1": "davinci",
         "output_2": "other", "preference": 2} for word in WORDS])
    with FaultServer(answer=ranks) as server:
        main(**arguments((files[0], published), server, tmp_path, limit=1))
    (judged,) = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert (judged["output_1"], judged["output_2"], judged["preference"]) == ("BAD", "GOOD", 2)
    with pytest.raises(InputError, match=r"published\.json: holds judgments.*--annotations"):
        main(model_outputs=published, reference_outputs=files[1])


@pytest.mark.parametrize(("flags", "message"), [
    ({}, "give either --model_outputs"),
    ({"model_outputs": "a.json", "annotations": "b.json"}, "give either --model_outputs"),
    ({"annotations": "none.json", "max_undecided": 2.0}, "expected a share"),
    ({"annotations": "none.json", "limit": -1}, "--limit is -1"),
    ({"annotations": "none.json"}, r"none\.json: no such file"),
])
def test_bad_flags(flags, message):
    with pytest.raises(InputError, match=message):
        main(**flags)


def test_bad_files(files, tmp_path):
    short = answers(tmp_path / "short.json", ["BAD"], "davinci")
    with pytest.raises(InputError, match="record 1: the reference has no answer"):
        main(model_outputs=files[0], reference_outputs=short)
    twice = write(tmp_path / "twice.json", read_records(files[0]) * 2)
    with pytest.raises(InputError, match="holds 2 answers to the instruction 'Say one"):
        main(model_outputs=twice, reference_outputs=files[1])


def test_an_unreachable_reference_names_its_flag(files, monkeypatch):
    def away(*_, **__):
        raise OSError("the Hub is away")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", away)
    with pytest.raises(InputError, match=r"\(the Hub is away\); .*--reference_outputs"):
        main(model_outputs=files[0])


@pytest.mark.parametrize(("annotator", "message"), [
    ("alpaca_eval_gpt5", "did you mean alpaca_eval_gpt4"),
    ("chatgpt_fn", "is not a plain question to an OpenAI-compatible server"),
    ("claude", "is not a plain question"),
])
def test_annotators_that_cannot_be_asked(files, annotator, message):
    with pytest.raises(InputError, match=message):
        main(model_outputs=files[0], reference_outputs=files[1], annotator=annotator)


def test_a_key_is_needed_for_openai(run_cli, files, tmp_path):
    done = run_cli("scripts/evaluate_alpaca.py", "--model_outputs", files[0],
                   "--reference_outputs", files[1], "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "OPENAI_API_KEY is not set" in done.stderr


@pytest.mark.skipif(not list(Path(sys.prefix).glob(".installed-*")),
                    reason="the recipe would install its requirements here")
def test_recipe_from_model_to_win_rate(tiny_llama, warm_venv, tmp_path):
    """The shell recipe generates, asks a local server, and prints the win rate."""
    reference = answers(tmp_path / "reference.json", ["x"] * 2, "davinci")
    with FaultServer(answer=lambda text: "M") as server:
        variables = {"ANNOTATOR": "local", "JUDGE_MODEL": "tiny", "BASE_URL": server.url,
                     "OUTPUTS": str(tmp_path / "mine.json"), "PROMPTS": reference,
                     "REFERENCE": reference, "MAX_NEW_TOKENS": "4", "VENV": str(warm_venv)}
        done = subprocess.run(["bash", "scripts/evaluate_alpaca.sh", str(tiny_llama)], cwd=ROOT,
                              env={**os.environ, **variables}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(server.asked) == 2
        again = subprocess.run(["bash", "scripts/evaluate_alpaca.sh", str(tiny_llama)], cwd=ROOT,
                               env={**os.environ, **variables, "REFERENCE": "typo.json"},
                               capture_output=True, text=True)
    assert "win rate" in done.stdout
    assert json.loads((tmp_path / "mine/local-tiny/results.json").read_text())["n_total"] == 2
    assert (again.returncode, again.stdout, again.stderr) == (  # before anything is generated
        2, "", "error: REFERENCE=typo.json: no such file\n")
