"""scripts/annotate.py: nothing lost, nothing asked twice, exit code and summary right.

    python -m pytest tests/test_annotate.py -n0
"""

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_server import FaultServer

from cut.data import examples_of
from lm.processes import part_of, parts
from lm.records import InputError, read_records
from scripts import annotate

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def responses(tmp_path) -> Path:
    """Twelve outputs as scripts/generate.py writes them, some with an earlier judgment."""
    records = [{"instruction": f"Q{number}.", "output": f"Answer {number}.", "generator": "m",
                "dataset": "d", "id": number, **({"judgment": "old", "score": 9} if number % 2
                                                 else {})} for number in range(12)]
    (tmp_path / "responses.json").write_text(json.dumps(records))
    return tmp_path / "responses.json"


def verdict(text: str) -> str:
    """One third is perfect."""
    number = int(re.search(r"Q(\d+)\.", text)[1])
    return "Perfect." if number % 3 == 0 else f"Mistake {number}."


def flags(server: FaultServer, responses: Path, **change) -> dict:
    return {"data_path": str(responses), "output_path": str(responses.parent / "out.json"),
            "judge": "server", "model": "gpt-4", "base_url": server.url, "attempts": 3,
            "timeout": 20.0, "cache": str(responses.parent / "cache"), **change}


def run(options: dict, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(command(options), cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, **environment})


def command(options: dict) -> list[str]:
    return [sys.executable, "scripts/annotate.py",
            *(f"--{name}={value}" for name, value in options.items())]


def exit_code(**options) -> int:
    """0, or what the script gives the shell."""
    try:
        annotate.main(**options)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def quick(monkeypatch):
    """No waiting between attempts."""
    from lm import server

    original = server.Server.__init__
    monkeypatch.setattr(server.Server, "__init__", lambda self, *positional, **named: original(
        self, *positional, **{"first_wait": 0.01, **named}))


def test_judgments_become_records_that_cut_reads(responses, quick):
    with FaultServer(answer=verdict) as server:
        options = flags(server, responses)
        assert exit_code(**options) == 0
    records = json.loads((responses.parent / "out.json").read_text())
    assert [record["judgment"] for record in records] == [
        None if number % 3 == 0 else f"Mistake {number}." for number in range(12)]
    assert records[1] == {"instruction": "Q1.", "output": "Answer 1.", "generator": "m",
                          "dataset": "d", "id": 1, "input": "", "judgment": "Mistake 1."}
    _, counts = examples_of(records, "out.json")
    assert (counts.positives, counts.negatives, counts.dropped) == (4, 8, 0)
    summary = json.loads((responses.parent / "out.json.summary.json").read_text())
    assert (summary["positive"], summary["negative"], summary["failed"]) == (4, 8, 0)
    assert summary["requests"] == 12 and summary["settings"]["model"] == "gpt-4"


FAULTS = {"Q0.": ["429"], "Q1.": ["500", "half"], "Q2.": ["empty"], "Q3.": ["drop"],
          "Q4.": ["429 Retry-After: 0"], "Q5.": ["html"],  # six that pass
          "Q6.": ["500", "500", "500"], "Q7.": ["refusal"], "Q8.": ["say:I'm sorry, I can't."],
          "Q9.": ["cut"], "Q10.": ["null"]}  # five that do not


def test_faults_lose_nothing_and_only_the_failed_are_asked_again(responses, quick, capsys):
    with FaultServer(FAULTS, verdict) as server:
        options = flags(server, responses)
        assert exit_code(**options) == 1
        printed = capsys.readouterr().out
        assert "12 responses: 2 positive, 5 negative, 5 failed; 21 requests" in printed
        assert "record 7 failed: refused" in printed or printed.count(" failed: ") == 3
        out = Path(options["output_path"])
        assert [record["id"] for record in read_records(out)] == [0, 1, 2, 3, 4, 5, 11]
        journal = read_records(annotate.journal_file(out))[1:]
        failed = {line["index"]: line for line in journal if line["status"] == "failed"}
        assert set(failed) == {6, 7, 8, 9, 10}
        assert all(line["judgment"] is None and line["error"] for line in failed.values())
        assert failed[8]["raw"] == "I'm sorry, I can't."
        before = collections.Counter(server.asked)
        assert sum(before.values()) == 21

        assert exit_code(**options) == 0  # the faults have passed
        again = collections.Counter(server.asked) - before
        assert sorted(re.search(r"Q(\d+)\.", text)[1] for text in again) == ["10", "6", "7", "8",
                                                                            "9"]
        assert set(again.values()) == {1}
        assert "12 responses: 4 positive, 8 negative, 0 failed; 26 requests" in (
            capsys.readouterr().out)
        assert [record["id"] for record in read_records(out)] == list(range(12))

        assert exit_code(**options) == 0 and len(server.asked) == 26  # nothing is left to ask


def test_only_new_responses_are_judged_wherever_the_others_stand(responses, quick):
    """Added, removed, moved, one of them twice; what else a record holds may change."""
    with FaultServer({"Q5.": ["refusal"]}, verdict) as server:
        options = flags(server, responses, cache="", max_requests=20)
        assert exit_code(**options) == 1
        first = json.loads(responses.read_text())
        moved = [*({**record, "id": f"new {record['id']}"} for record in first[:2:-1]),
                 *({**first[0], "instruction": "Q20."} for _ in range(2)), first[4]]
        responses.write_text(json.dumps(moved))
        assert exit_code(**options) == 0
        again = [re.search(r"Q(\d+)\.", text)[1] for text in server.asked[12:]]
        assert sorted(again) == ["20", "4", "5"]  # equal requests are sent once
    found = json.loads((responses.parent / "out.json").read_text())
    assert [record["id"] for record in found] == [record["id"] for record in moved]
    assert [record["judgment"] for record in found[:9]] == [
        None if number % 3 == 0 else f"Mistake {number}." for number in range(11, 2, -1)]
    summary = json.loads((responses.parent / "out.json.summary.json").read_text())
    assert summary["responses"] == 12 == summary["positive"] + summary["negative"]
    assert summary["requests"] == 15  # those of records that are gone too


def test_a_share_of_failures_can_be_allowed(responses, quick):
    with FaultServer({"Q7.": ["refusal!"]}, verdict) as server:
        assert exit_code(**flags(server, responses, max_failed=0.08)) == 1
        assert exit_code(**flags(server, responses, max_failed=0.09)) == 0
        assert sum("Q7." in text for text in server.asked) == 2


def test_hanging_server(responses, quick):
    with FaultServer({"Q3.": ["hang!"]}, verdict) as server:
        assert exit_code(**flags(server, responses, timeout=1.0, attempts=2)) == 1
        assert sum("Q3." in text for text in server.asked) == 2
        assert len(read_records(responses.parent / "out.json")) == 11


def test_kill_9_and_resume(responses):
    """A real command, killed while requests are under way; the key is in no file and no output."""
    with FaultServer(answer=verdict, delay=0.3) as server:
        options = flags(server, responses, concurrency=2)
        journal = annotate.journal_file(Path(options["output_path"]))
        process = subprocess.Popen(command(options), cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
            assert process.poll() is None and time.monotonic() < deadline, "ended before the kill"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not Path(options["output_path"]).exists()
        finished = journal.read_text().count('"status": "ok"')
        assert 3 <= finished < 12
        with open(journal, "a") as file:
            file.write('{"index": 11, "sta')  # a kill in the middle of a line
        server.delay = 0
        done = run(options)
        assert done.returncode == 0, done.stderr
        asked = collections.Counter(server.asked)
        assert len(asked) == 12 and len(server.asked) <= 12 + 2  # only what was under way, again
    records = read_records(options["output_path"])
    assert [record["id"] for record in records] == list(range(12))
    assert sum(record["judgment"] is None for record in records) == 4
    assert "12 responses: 4 positive, 8 negative, 0 failed" in done.stdout
    assert "are judged already" in done.stdout
    for file in responses.parent.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in done.stdout + done.stderr


def test_budget_stops_cleanly_and_counts_what_earlier_runs_spent(responses, quick, capsys):
    with FaultServer(answer=verdict) as server:
        options = flags(server, responses, max_requests=5)
        with pytest.raises(InputError, match=r"budget of 5 requests .*--max_requests.*"
                                             r"7 not judged yet; 5 requests"):
            annotate.main(**options)
        assert not Path(options["output_path"]).exists()
        with pytest.raises(InputError, match="budget of 5 requests is spent"):
            annotate.main(**options)
        assert len(server.asked) == 5
        assert exit_code(**{**options, "max_requests": 12}) == 0
        assert len(server.asked) == 12
        assert "gpt-4 at" in capsys.readouterr().out


def test_the_budget_counts_requests_of_earlier_runs_that_gave_no_judgment(responses, quick):
    """Half replies may have been charged, and the next attempt could exceed the budget."""
    with FaultServer({"Q": ["half!"]}, verdict) as server:
        options = flags(server, responses, price_in=10.0, price_out=30.0, concurrency=1)
        for _ in range(3):
            with pytest.raises(InputError, match="--max_cost goes on"):
                annotate.main(**options, max_cost=0.05)
        assert len(server.asked) == 1
        server.plan.clear()
        assert exit_code(**options, max_cost=1.0) == 0 and len(server.asked) == 13
    summary = json.loads((responses.parent / "out.json.summary.json").read_text())
    assert summary["requests"] == 13 and summary["cost"] > 0.03 + 12 * 0.00025


def test_cost_is_estimated_before_counted_during_and_told_after(responses, quick, capsys):
    with FaultServer(answer=verdict) as server:
        prices = {"price_in": 1000.0, "price_out": 2000.0}  # a reply: 10 and 5 tokens, 2 cents
        assert exit_code(**flags(server, responses, **prices)) == 0
        printed = capsys.readouterr()
        assert re.search(r"12 requests, about \d+ prompt tokens and at most 12288 new ones, "
                         r"at most \$\d+\.\d\d", printed.out)
        assert "12 requests, $0.2400" in printed.out and "$0.24" in printed.err
        other = {"output_path": str(responses.parent / "other.json")}
        assert exit_code(**flags(server, responses, **prices, **other)) == 0
        printed = capsys.readouterr().out
        assert "0 requests, about 0" in printed and "12 more are answered in the cache" in printed
        assert len(server.asked) == 12


def test_refused_key_is_one_line_and_exit_code_2(responses):
    with FaultServer({"Q": ["401!"]}) as server:
        done = run(flags(server, responses))
        assert done.returncode == 2 and KEY not in done.stdout + done.stderr
        assert re.search(r"^error: .*the key is refused", done.stderr, re.M)
        assert "Traceback" not in done.stderr
        server.plan.clear()
        done = run(flags(server, responses, seed=5))  # nothing was finished, so nothing binds
        assert done.returncode == 0, done.stderr


def test_other_settings_are_not_mixed_and_foreign_files_are_kept(responses, quick):
    with FaultServer(answer=verdict) as server:
        options = flags(server, responses)
        assert exit_code(**options) == 0
        with pytest.raises(InputError, match=r"model was 'gpt-4', is 'other'"):
            annotate.main(**{**options, "model": "other"})
        assert exit_code(**{**options, "model": "other", "overwrite": True}) == 0
        assert len(server.asked) == 24
        annotate.journal_file(Path(options["output_path"])).unlink()
        with pytest.raises(InputError, match="not known to be made by this script"):
            annotate.main(**options)
        with pytest.raises(InputError, match="choose another"):
            annotate.main(**{**options, "output_path": options["data_path"]})


def test_two_servers_are_not_mixed_wherever_their_address_stands(responses, quick, monkeypatch):
    with FaultServer(answer=verdict) as one, FaultServer(answer=verdict) as two:
        options = flags(one, responses, base_url="", max_requests=3)
        monkeypatch.setenv("OPENAI_BASE_URL", one.url)
        with pytest.raises(InputError, match="budget of 3 requests is spent"):
            annotate.main(**options)
        monkeypatch.setenv("OPENAI_BASE_URL", two.url)
        with pytest.raises(InputError, match=f"base_url was '{one.url}', is '{two.url}'"):
            annotate.main(**options)
        assert not two.asked


def test_what_would_stop_an_overwriting_run_does_so_before_a_loss(responses, quick, monkeypatch):
    with FaultServer(answer=verdict) as server:
        options = flags(server, responses)
        assert exit_code(**options) == 0
        journal = annotate.journal_file(Path(options["output_path"])).read_text()
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
            annotate.main(**{**options, "base_url": "", "overwrite": True})
    assert annotate.journal_file(Path(options["output_path"])).read_text() == journal


def test_an_overwritten_output_does_not_outlive_its_judgments(responses, quick):
    """All judgments of the second run fail; those of the first are not what is left to train on."""
    with FaultServer(answer=verdict) as server:
        options = flags(server, responses)
        assert exit_code(**options) == 0 and Path(options["output_path"]).exists()
        server.answer = lambda text: "I cannot judge this."
        assert exit_code(**{**options, "model": "other", "overwrite": True}) == 1
        assert not Path(options["output_path"]).exists()


def test_rules_judge_the_sample_data_as_it_was_judged(tmp_path):
    output = tmp_path / "out.jsonl"
    annotate.main("data/sample/train.jsonl", str(output), "rules")
    given, found = read_records(ROOT / "data/sample/train.jsonl"), read_records(output)
    assert len(found) == 200
    assert [record["judgment"] is None for record in found] == [
        record["judgment"] is None for record in given]


def test_human_takes_two_runs(responses, tmp_path):
    options = {"data_path": str(responses), "output_path": str(tmp_path / "out.json"),
               "judge": "human", "sheet": str(tmp_path / "sheet.jsonl")}
    assert exit_code(**options) == 1 and not (tmp_path / "out.json").exists()
    rows = read_records(tmp_path / "sheet.jsonl")
    assert len(rows) == 12
    (tmp_path / "sheet.jsonl").write_text("\n".join(
        json.dumps({**row, "judgment": verdict(row["instruction"])}) for row in rows))
    assert exit_code(**options) == 0
    assert sum(record["judgment"] is None for record in read_records(tmp_path / "out.json")) == 4


def test_local_judge_of_random_weights_fails_and_is_asked_anew_once_trained(tiny_llama, responses,
                                                                           tmp_path):
    options = {"data_path": str(responses), "output_path": str(tmp_path / "out.json"),
               "judge": "local", "model": str(tiny_llama), "max_new_tokens": 4}
    assert exit_code(**options) == 1
    assert not (tmp_path / "out.json").exists()
    journal = read_records(annotate.journal_file(tmp_path / "out.json"))
    assert len(journal) == 13 and journal[0]["weights"]
    assert {line["status"] for line in journal[1:]} == {"failed"}


def test_two_processes_judge_as_one_does(tiny_llama, responses, warm_venv, tmp_path):
    options = {"data_path": str(responses), "judge": "local", "model": str(tiny_llama),
               "max_new_tokens": 4, "temperature": 1.0, "max_failed": 1.0}
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert exit_code(**options, output_path=str(alone)) == 0
    settings, *lines = read_records(annotate.journal_file(alone))
    for place in (0, 5):  # of a run of six processes that was killed; what failed is asked again
        part = part_of(annotate.journal_file(shared), place)
        part.write_text(f"{json.dumps(settings)}\n{json.dumps(lines[place])}\n")
    torchrun = [warm_venv / "bin/torchrun", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, *command({**options, "output_path": str(shared)})[1:]], cwd=ROOT, text=True,
        capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("12 responses: 0 positive, 0 negative, 12 failed") == 1
    assert parts(annotate.journal_file(shared)) == [annotate.journal_file(shared)]
    _, *found = read_records(annotate.journal_file(shared))
    assert len(found) == 14
    assert {line["index"]: line for line in found} == {line["index"]: line for line in lines}


def test_a_judgment_counts_before_failures_of_the_same_response():
    """Wherever they stand: each process has a journal, and responses may have moved."""
    lines = [{"index": 4, "content": "a", "status": "ok"}, {"requests": 3, "cost": 0.5},
             {"index": 0, "content": "a", "status": "failed"},
             {"index": 1, "content": "b", "status": "failed"}]
    done, failed = annotate.judged(lines, ["a", "b", "c"])
    assert done == {0: lines[0]} and failed == {1: lines[3]}


def test_weights_that_change_while_they_judge_cost_no_judgment(tiny_llama, responses, tmp_path,
                                                              monkeypatch):
    """They were loaded before: `cp` to the same place gives them another date."""
    model = shutil.copytree(tiny_llama, tmp_path / "judge")
    ask = annotate.annotate

    def meanwhile(*args):
        ask(*args)
        os.utime(model / "model.safetensors", (1, 1))

    monkeypatch.setattr(annotate, "annotate", meanwhile)
    annotate.main(str(responses), str(tmp_path / "out.json"), judge="local", model=str(model),
                  max_new_tokens=4, max_failed=1.0)
    assert json.loads((tmp_path / "out.json.summary.json").read_text())["failed"] == 12


def test_only_models_in_the_process_are_launched_several_times(responses, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--judge human works in one process"):
        annotate.main(str(responses), str(tmp_path / "out.json"), judge="human")


@pytest.mark.parametrize(("change", "message"), [
    ({"judge": "gpt"}, "--judge 'gpt': expected one of server"),
    ({"model": ""}, "--judge server needs --model"),
    ({"judge": "local", "model": "./none"}, "no such model folder"),
    ({"template": "none"}, "no such prompt"),
    ({"output_path": "out.csv"}, "expected a .json or .jsonl file"),
    ({"judge": "rules"}, "record 0: field 'constraints' is missing"),
    ({"max_failed": 2.0}, "a share between 0 and 1"),
    ({"max_new_tokens": 0}, "--max_new_tokens is 0; expected 1 or more"),
    ({"judge": "human", "sheet": "s.xlsx"}, "--sheet s.xlsx: expected a .csv or .jsonl file"),
    ({"cache": __file__}, "test_annotate.py: cannot keep replies there"),
    ({"limit": -1}, "must be 0"), ({"price_in": 2.0}, "belong together"),
    ({"base_url": "https://example.org/v1", "max_cost": 1.0, "model": "mine"}, "needs the price")])
def test_bad_flags_are_one_line(change, message, responses, tmp_path):
    options = {"data_path": str(responses), "output_path": str(tmp_path / "out.json"),
               "judge": "server", "model": "gpt-4", "base_url": "http://127.0.0.1:9/v1",
               "cache": "", **change}
    with pytest.raises(InputError, match=message) as error:
        annotate.main(**options)
    assert "\n" not in str(error.value)
