"""The online loop on a tiny model: two rounds, kills, audits, changed settings.

    python -m pytest tests/test_online.py -n0

Stages run in this process, by the same command lines; the kills are of real processes.
"""

import hashlib
import inspect
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fault_server import FaultServer

from cut.online import audit, in_order
from lm.cli import _reject_unknown_flags
from lm.records import InputError, read_records, write_json
from lm.stages import content_hash
from scripts import online, online_stages, plot_online
from scripts.make_sample_data import make_instructions

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["annotate", "evaluate", "generate", "merge", "sample", "train"]


def records(count: int, start: int = 0) -> list[dict]:
    """Instructions; a random model keeps the constraint of every second one, hardly the others."""
    constraints = ({"kind": "punctuation:no_comma", "kwargs": {}},
                   {"kind": "keywords:existence", "kwargs": {"keywords": ["rainbow"]}})
    return [{"instruction": f"Name {number} cats.", "constraints": [constraints[number % 2]]}
            for number in range(start, start + count)]


def here(command: list[str], lock: object = None) -> int:
    """What `python SCRIPT ...` would return, without the seconds that its imports take."""
    arguments, sys.argv = sys.argv, command[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = arguments
    return 0


@pytest.fixture
def in_process(monkeypatch) -> list[list[str]]:
    """Stages run in this process; the list of their commands."""
    commands = []
    monkeypatch.setattr(online_stages, "call",
                        lambda command, lock: commands.append(command) or here(command))
    return commands


@pytest.fixture(scope="module")
def settings(tiny_llama, tmp_path_factory) -> dict:
    """Flags of two tiny rounds."""
    folder = tmp_path_factory.mktemp("online")
    for name, prompts in {"pool": records(8), "eval": records(2, start=7)}.items():
        write_json(folder / f"{name}.json", prompts)
    return {"model": str(tiny_llama), "instructions": str(folder / "pool.json"),
            "output_dir": str(folder / "run"), "rounds": 2, "per_round": 3, "samples": 2,
            "temperature": 1.0, "max_new_tokens": 6, "judge": "rules", "repeats": 2,
            "eval_prompts": str(folder / "eval.json"),
            "train_settings": "batch_size=2 learning_rate=1e-2 warmup_steps=0 downsample=-1 "
                              "cutoff_len=256 save_steps=1"}


@pytest.fixture(scope="module")
def finished(settings) -> Path:
    """The folder of a run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_stages, "call", here)
        online.main(**settings)
    return Path(settings["output_dir"])


def manifests(folder: Path) -> dict[str, dict]:
    """By round and stage: all that does not depend on the clock."""
    return {f"{path.parent.parent.name} {path.stem}": {
        key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
        for path in sorted(folder.glob("round*/manifests/*.json"))}


def copy_until(finished: Path, folder: Path, last: str) -> Path:
    """The run as it was when the stage `last` of its first round had ended."""
    order = ["sample", "generate", "annotate", "train", "merge", "evaluate"]
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("round2"))
    for stage in order[order.index(last) + 1:]:
        (folder / f"round1/manifests/{stage}.json").unlink()
    for made in ("adapter", "model"):
        shutil.rmtree(folder / "round1" / made)
    for made in (folder / "round1").glob("answers.json*"):
        made.unlink()
    return folder


def checked(settings: dict, **change) -> SimpleNamespace:
    """All flags, as a stage gets them."""
    defaults = {name: flag.default
                for name, flag in inspect.signature(online.main).parameters.items()}
    flags = SimpleNamespace(**defaults | settings | change)
    online.check(flags)
    online.load_pool(flags)
    flags.folder, flags.lock = Path(flags.output_dir), None
    return flags


def test_two_rounds(finished, settings):
    found = manifests(finished)
    assert sorted(found) == ["round0 evaluate", *(f"round{number} {stage}" for number in (1, 2)
                                                  for stage in STAGES)]
    for number in (1, 2):
        counts = found[f"round{number} annotate"]["counts"]
        assert counts["responses"] == 6 and counts["failed"] == 0
        assert counts["positive"] and counts["negative"]
        assert "repeats" not in counts  # rules always say the same
        assert found[f"round{number} train"]["counts"]["records"] == 6
    assert found["round2 train"]["inputs"]["model"] == found["round1 merge"]["outputs"]["model"]
    assert found["round2 train"]["inputs"]["model"] != found["round1 train"]["inputs"]["model"]
    assert found["round1 generate"]["outputs"]["responses"] == hashlib.sha256(
        (finished / "round1/responses.json").read_bytes()).hexdigest()
    told = json.loads((finished / "online.json").read_text())
    assert told["status"] == "finished" and told["settings"]["seed"] == 0
    assert [entry["round"] for entry in told["rounds"]] == [0, 1, 2]
    assert all(0 <= entry["low"] <= entry["score"] <= entry["high"] <= 100
               and entry["measure"] == "constraints satisfied, %" for entry in told["rounds"])
    assert (finished / "online.png").stat().st_size > 10_000


def test_no_instruction_comes_twice_and_none_is_evaluated_on(finished, settings):
    drawn = Counter(record["instruction"] for number in (1, 2)
                    for record in read_records(finished / f"round{number}/instructions.jsonl"))
    assert len(drawn) == 6 and set(drawn.values()) == {2}  # samples
    assert not drawn.keys() & {record["instruction"]
                               for record in read_records(settings["eval_prompts"])}
    outputs = {record["output"] for record in read_records(finished / "round1/responses.json")}
    assert len(outputs) > 3  # samples of an instruction differ


def test_the_order_depends_on_the_seed_alone():
    pool = [*records(9), {"instruction": "Name 3 cats.", "input": ""},
            {"instruction": "Name 3", "input": "cats."}]
    order = in_order(pool, records(1), seed=0)
    assert len(order) == 9  # 9 + 2 - one that comes again - one to evaluate on
    assert order == in_order(pool, records(1), seed=0)
    assert order != in_order(pool, records(1), seed=1)


def test_finished_stages_are_skipped_and_a_used_model_may_be_gone(finished, settings, tmp_path,
                                                                  in_process, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "round1/model")
    (folder / "round2/answers.json").unlink()
    # What changes no result may change.
    online.main(**settings | {"output_dir": str(folder), "gpus": 3, "max_positive": 0.9,
                              "generate_settings": "batch_tokens=64"})  # 3 divides no batch of 2
    assert in_process == [] and manifests(folder) == manifests(finished)
    printed = capsys.readouterr().out
    assert printed.count(" is done\n") == 11 and printed.count(" is done; gone since: ") == 2
    assert f"round1: merge is done; gone since: {folder}/round1/model\n" in printed
    rows = re.findall(r"^[012] .*", printed, re.M)
    assert len(rows) == 3 and all(" %      -      3 " in row for row in rows[1:])  # no repeats


@pytest.mark.parametrize("victims", ["the loop alone", "its stage too"])
def test_kill_9_and_the_same_command_ends_with_the_same(victims, finished, settings, tmp_path,
                                                        in_process, capsys):
    """A real loop is killed while it trains. If its stage lives on, that is waited for."""
    folder = copy_until(finished, tmp_path / "run", "annotate")
    flags = settings | {"output_dir": str(folder), "rounds": 1}
    command = [sys.executable, "scripts/online.py", *(f"--{name}={value}"
                                                      for name, value in flags.items())]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (folder / "round1/adapter/run.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "ended before the kill"
        time.sleep(0.005)
    (os.kill if victims == "the loop alone" else os.killpg)(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "round1/manifests/train.json").exists()
    online.main(**flags)
    if victims == "the loop alone":
        assert "waiting for its end" in capsys.readouterr().out
    expected = manifests(finished)
    assert manifests(folder) == {key: value for key, value in expected.items()
                                 if not key.startswith("round2")}


def test_changed_settings_and_inputs_are_told(finished, settings, tmp_path, in_process,
                                              monkeypatch):
    folder = copy_until(finished, tmp_path / "run", "annotate")
    flags = settings | {"output_dir": str(folder)}
    with pytest.raises(InputError, match=r"online.json: .*\(temperature was 1.0, is 0.5\); "
                                         r".*another --output_dir"):
        online.main(**flags | {"temperature": 0.5})
    write_json(tmp_path / "pool.json", records(9))
    with pytest.raises(InputError, match=r"\(instructions was '\w{64}', is '\w{64}'\)"):
        online.main(**flags | {"instructions": str(tmp_path / "pool.json")})
    monkeypatch.setattr(online, "read_records", lambda source: read_records(
        source if Path(source).exists() else settings["instructions"]))
    record = json.loads((folder / "online.json").read_text())
    write_json(folder / "online.json", {**record, "data": {"path": "org/old", "sha256": None}})
    with pytest.raises(InputError, match=r"\(instructions was 'org/old', is 'org/new'\)"):
        online.main(**flags | {"instructions": "org/new"})
    write_json(folder / "online.json", record)
    made = (folder / "round1/responses.json").read_text()
    (folder / "round1/responses.json").write_text("[]")
    with pytest.raises(InputError, match=r"round1/manifests/generate.json: .*responses.json is not "
                                         "what this stage made; put that back, or delete"):
        online.main(**flags)
    (folder / "round1/responses.json").write_text(made)
    (folder / "round1/judged.json").unlink()  # training is still to come
    with pytest.raises(InputError, match=r"round1/manifests/train.json: judgments .*judged.json "
                                         "is gone; delete the manifest of the stage that made it"):
        online.main(**flags)
    assert in_process == []
    (folder / "round1/manifests/annotate.json").unlink()
    flags = checked(flags)
    online_stages.judge(flags, 1)
    assert manifests(folder)["round1 annotate"] == manifests(finished)["round1 annotate"]
    assert in_process  # its script was run again


def test_how_to_train_is_open_until_a_round_is_trained(finished, settings, tmp_path):
    changed = settings | {"train_settings": "learning_rate=1e-3 batch_size=2"}
    for last, rate in (("annotate", "1e-3"), ("train", "1e-2")):
        folder = copy_until(finished, tmp_path / last, last)
        flags = checked(changed, output_dir=str(folder))
        if last == "train":
            with pytest.raises(InputError, match=r"train_settings was .*'1e-2'.*, is .*'1e-3'"):
                online.open_record(flags)
        else:
            online.open_record(flags)
        told = json.loads((folder / "online.json").read_text())["settings"]["train_settings"]
        assert told["learning_rate"] == rate


@pytest.mark.parametrize(("changed", "name"), [("tokenizer.json", "model"),
                                               ("template.json", "template_text")])
def test_another_tokenizer_or_template_is_noticed(changed, name, settings, tiny_llama, tmp_path,
                                                  monkeypatch):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    template = tmp_path / "template.json"
    template.write_text((ROOT / "configs/templates/alpaca.json").read_text())
    flags = checked(settings, output_dir=str(tmp_path / "run"), model=str(model),
                    template=str(template))
    write_json(tmp_path / "run/round1/instructions.jsonl", records(1))
    monkeypatch.setattr(online_stages, "answer", lambda *given: write_json(given[4], [
        {"output": "La."}]))
    online_stages.respond(flags, 1, str(model))
    path = template if changed == "template.json" else model / changed
    path.write_text(path.read_text().replace("### R", "### Your r").replace(" t", " d"))
    with pytest.raises(InputError, match=rf"\({name} was '\w+', is '\w+'\)"):
        online_stages.respond(flags, 1, str(model))


def test_a_stage_that_stops_stops_the_loop_in_one_line(finished, settings, tmp_path, in_process):
    folder = copy_until(finished, tmp_path / "run", "annotate")
    with pytest.raises(InputError, match=r"finetune_unlikelihood.py stopped with exit code 2; .* "
                                         r"the same command goes on"):
        online.main(**settings | {"output_dir": str(folder), "train_settings":
                                  f"{settings['train_settings']} lora_target_modules=none_such"})
    assert not (folder / "round1/manifests/train.json").exists()


COUNTS = {"responses": 10, "failed": 0, "positive": 5, "negative": 5}


@pytest.mark.parametrize(("change", "found"), [
    ({}, None), ({"failed": 1, "negative": 4}, None), ({"repeats": 5, "alike": 4}, None),
    ({"failed": 2, "negative": 3}, r"2 of 10 failed \(20 %; expected 0 to 10 %, --max_failed"),
    ({"failed": 10, "positive": 0, "negative": 0}, "10 of 10 failed"),
    ({"positive": 10, "negative": 0}, r"10 of 10 positive \(100 %; expected 5 to 95 %"),
    ({"positive": 0, "negative": 10}, "0 of 10 positive"),
    ({"repeats": 5, "alike": 3}, r"3 of 5 alike when asked for again \(60 %; expected 80 to")])
def test_audit(change, found):
    bad = audit({**COUNTS, **change}, 0.1, 0.05, 0.95, 0.8)
    assert bad == [] if found is None else len(bad) == 1 and re.match(found, bad[0])


def test_no_judgment_at_all_is_bad_whatever_may_fail():
    none = {**COUNTS, "failed": 10, "positive": 0, "negative": 0}
    assert audit(none, 1, 0, 1, 0) == ["none of 10 is judged"]


def test_audit_stops_at_failed_or_one_sided_judgments_and_goes_on_with_good_ones(
        settings, tmp_path, in_process):
    """The human judge: nothing is filled in; all of it the same; then something is wrong."""
    folder, sheet = tmp_path / "run", tmp_path / "sheet.jsonl"
    flags = settings | {"output_dir": str(folder), "rounds": 1, "judge": "human",
                        "judge_settings": f"sheet={sheet}"}
    with pytest.raises(InputError, match=r"round 1: stopped before training.* 6 of 6 failed "
                                         r"\(100 %; expected 0 to 10 %"):
        online.main(**flags)
    assert not (folder / "round1/manifests/annotate.json").exists()
    rows = read_records(sheet)
    write_json(sheet, [{**row, "judgment": "Perfect."} for row in rows[:-1]] + rows[-1:])
    with pytest.raises(InputError, match=r"1 of 6 failed \(17 %.*; 5 of 5 positive \(100 %"):
        online.main(**flags)
    assert not (folder / "round1/adapter").exists()
    write_json(sheet, [*read_records(sheet)[:-1], {**rows[-1], "judgment": "It is too short."}])
    in_process.clear()
    online.main(**flags)
    assert in_process[0][1].endswith("annotate.py")  # nothing before it is done again
    counts = manifests(folder)["round1 annotate"]["counts"]
    assert (counts["positive"], counts["negative"]) == (5, 1) and "repeats" not in counts


def test_audit_stops_a_judge_that_contradicts_itself(settings, tmp_path, in_process, monkeypatch):
    """Asked again, with another seed, it says the opposite; the first answers were half good."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    asked = Counter()

    def contradict(text: str) -> str:
        asked[text] += 1
        good = (hashlib.sha256(text.encode()).digest()[0] + asked[text]) % 2
        return "perfect" if good else "It is wrong."

    folder = tmp_path / "run"
    with FaultServer(answer=contradict) as server, pytest.raises(
            InputError, match=r"0 of 2 alike when asked for again \(0 %; expected 80 to 100 %"):
        online.main(**settings | {
            "output_dir": str(folder), "judge": "server", "judge_model": "gpt-4",
            "judge_settings": f"base_url={server.url} cache={tmp_path / 'cache'} concurrency=1"})
    assert len(server.asked) == 8 and [body.get("seed") for body in server.bodies] == [
        None] * 6 + [1] * 2
    assert not (folder / "round1/adapter").exists()


@pytest.mark.parametrize(("judge", "judge_settings", "twice"), [
    ("server", "", True), ("local", "temperature=0.7", True), ("local", "", False),
    ("local", "temperature=0.0", False), ("rules", "seed=3", False), ("human", "", False)])
def test_only_a_judge_that_could_say_something_else_is_asked_again(
        judge, judge_settings, twice, settings, tiny_llama, tmp_path, monkeypatch):
    asked = []

    def ask(settings, responses, output, flags) -> dict:
        records = [{**record, "judgment": None} for record in read_records(responses)]
        write_json(output, records)
        asked.append(int(flags.get("seed", 0)))
        return {"responses": len(records), "failed": 0, "positive": len(records), "negative": 0,
                "requests": 0, "cost": 0.0}

    monkeypatch.setattr(online_stages, "ask", ask)
    flags = checked(settings, output_dir=str(tmp_path / "run"), judge=judge, max_positive=1.0,
                    judge_model=str(tiny_llama) if judge in ("server", "local") else "",
                    judge_settings=judge_settings)
    write_json(tmp_path / "run/round1/responses.json", records(3))
    counts = online_stages.judge(flags, 1)["counts"]
    assert (counts.get("repeats"), counts.get("alike")) == ((2, 2) if twice else (None, None))
    assert [seed - asked[0] for seed in asked] == [0, 1][:1 + twice]
    stages = {"annotate": {"counts": counts}, "train": {"counts": {"steps": 3}}}
    assert plot_online.judgments(stages)[3] == ("2 of 2" if twice else "-")


def test_a_rounds_budget_holds_for_judgments_that_are_asked_for_twice_too(settings, tmp_path,
                                                                         in_process, monkeypatch):
    """Six judgments and two repeats: 7 requests are not enough, 8 are; nothing is asked thrice."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")

    def judge(text: str) -> str:
        good = hashlib.sha256(text.encode()).digest()[0] % 2
        return "perfect" if good else "It is wrong."

    flags = settings | {"output_dir": str(tmp_path / "run"), "judge": "server",
                        "judge_model": "gpt-4", "min_positive": 0.0, "max_positive": 1.0}
    with FaultServer(answer=judge) as server:
        of_server = f"base_url={server.url} cache= concurrency=1"
        checked_flags = checked(flags)
        folder = online_stages.folder_of(checked_flags, 1)
        write_json(folder / "responses.json", [
            {"instruction": f"Q{number}.", "output": "A."} for number in range(6)])
        for limit, message in ((6, "max_requests=6 is spent, and some judgments are to be asked"),
                               (7, "annotate.py stopped with exit code 2")):
            with pytest.raises(InputError, match=message):
                online_stages.judge(checked(flags, judge_settings=f"{of_server} "
                                            f"max_requests={limit}"), 1)
        counts = online_stages.judge(checked(
            flags, judge_settings=f"{of_server} max_requests=8"), 1)["counts"]
        assert len(server.asked) == 8 and counts["repeats"] == counts["alike"] == 2


def test_a_win_rate_of_few_pairs_stops_the_round(settings, tmp_path, in_process, monkeypatch):
    """One of three judgments cannot be read; the limit may then be raised."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = [{"instruction": f"Say {word}.", "output": word, "generator": "davinci"}
               for word in ("one", "two", "three")]
    write_json(tmp_path / "reference.json", prompts)
    with FaultServer(answer=lambda text: "?" if "Say two." in text else "M") as server:
        common = (f"base_url={server.url} judge_model=tiny "
                  f"reference_outputs={tmp_path / 'reference.json'}")
        flags = settings | {"output_dir": str(tmp_path / "run"), "annotator": "local",
                            "eval_prompts": str(tmp_path / "reference.json")}
        with pytest.raises(InputError, match=r"evaluate_alpaca.py stopped with exit code 1"):
            online_stages.evaluate(checked(flags, evaluate_settings=common), 0, settings["model"])
        counts = online_stages.evaluate(checked(
            flags, evaluate_settings=f"{common} max_undecided=0.4"), 0, settings["model"])["counts"]
    assert counts["undecided"] == 1
    write_json(tmp_path / "reference.json", prompts[::-1])
    with pytest.raises(InputError, match="reference was"):
        online_stages.evaluate(checked(flags, evaluate_settings=common), 0, settings["model"])


def test_what_a_stopped_evaluation_paid_is_counted(settings, tmp_path, in_process, monkeypatch):
    """Two of three judgments of $1, then a stop."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = [{"instruction": f"Say {word}.", "output": word, "generator": "davinci"}
               for word in ("one", "two", "three")]
    write_json(tmp_path / "reference.json", prompts)
    with FaultServer(answer=lambda text: "M") as server:
        common = (f"base_url={server.url} judge_model=tiny price_in=100000 price_out=0 "
                  f"concurrency=1 reference_outputs={tmp_path / 'reference.json'}")
        flags = settings | {"output_dir": str(tmp_path / "run"), "annotator": "local",
                            "eval_prompts": str(tmp_path / "reference.json")}
        with pytest.raises(InputError, match=r"evaluate_alpaca.py stopped with exit code 2"):
            online_stages.evaluate(checked(flags, evaluate_settings=f"{common} max_requests=2"), 0,
                                   settings["model"])
        cost = online_stages.evaluate(checked(flags, evaluate_settings=common), 0,
                                      settings["model"])["cost"]
        assert len(server.asked) == 3
    assert cost == pytest.approx(3)


def test_alpaca_eval_scores_prompts_without_constraints(settings, tmp_path, in_process,
                                                        monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = [{"instruction": f"Say {word}.", "output": word, "generator": "davinci"}
               for word in ("one", "two", "three")]
    write_json(tmp_path / "reference.json", prompts)
    with FaultServer(answer=lambda text: "M") as server:
        flags = checked(settings, output_dir=str(tmp_path / "run"), annotator="local",
                        eval_prompts=str(tmp_path / "reference.json"),
                        evaluate_settings=f"base_url={server.url} judge_model=tiny "
                                          f"reference_outputs={tmp_path / 'reference.json'}")
        counts = online_stages.evaluate(flags, 0, settings["model"])["counts"]
        assert len(server.asked) == 3
    assert counts["measure"] == "AlpacaEval win rate, %" and 0 <= counts["score"] <= 100
    assert counts["low"] <= counts["score"] <= counts["high"] and counts["undecided"] == 0


def test_jsft_compares_each_response_with_the_next_to_the_same_instruction(settings, tmp_path,
                                                                           monkeypatch):
    flags = checked(settings, output_dir=str(tmp_path / "run"), judge="jsft", judge_model="org/m",
                    samples=3,
                    judge_settings="template=configs/templates/judge_sample_principles.yaml")
    said = []
    monkeypatch.setattr(online_stages, "ask", lambda *given: said.append(given[-1]) or {**COUNTS})
    folder = tmp_path / "run/round1"
    write_json(folder / "responses.json", [{"output": text} for text in "abcdef"])
    online_stages.judge(flags, 1)
    assert said[0]["other_path"] == folder / "others.json"
    others = read_records(folder / "others.json")
    assert "".join(record["output"] for record in others) == "bcaefd"


def test_the_weights_of_a_local_judge_are_an_input(settings, tiny_llama, tmp_path, monkeypatch):
    """A judge that was trained again is another judge, whatever its folder is called."""
    judge = shutil.copytree(tiny_llama, tmp_path / "judge")
    flags = checked(settings, output_dir=str(tmp_path / "run"), judge="local",
                    judge_model=str(judge), repeats=0)
    monkeypatch.setattr(online_stages, "ask", lambda *_: {**COUNTS})
    write_json(tmp_path / "run/round1/responses.json", records(1))
    online_stages.judge(flags, 1)
    (judge / "model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="judge_weights was"):
        online_stages.judge(flags, 1)


def test_a_local_judge_takes_all_gpus_and_one_that_stopped_is_told(settings, tiny_llama, tmp_path,
                                                                   monkeypatch):
    """A failed torchrun exits with 1, as annotate.py does where judgments failed."""
    commands = []
    monkeypatch.setattr(online_stages, "call", lambda command, lock: commands.append(command) or 1)
    flags = checked(settings, output_dir=str(tmp_path / "run"), judge="local", gpus=8,
                    judge_model=str(tiny_llama), train_settings="")
    with pytest.raises(InputError, match=r"annotate\.py stopped; what it said stands above"):
        online_stages.ask(flags, tmp_path / "responses.json", tmp_path / "judged.json", {})
    assert commands[0][:2] == ["torchrun", "--nproc_per_node=8"]


@pytest.mark.parametrize(("change", "message"), [
    ({"rounds": 3}, "has 7 different instructions that are not evaluated on, but 3 rounds of 3"),
    ({"temperature": 0.0}, "--samples 2 with --temperature 0 would all be the same"),
    ({"judge": "gpt"}, "--judge 'gpt': expected one of server, local, jsft, rules, human"),
    ({"judge": "server"}, "--judge server needs --judge_model"),
    ({"judge": "server", "judge_model": "gpt-4"}, "^OPENAI_API_KEY is not set"),
    ({"judge": "server", "judge_model": "m", "judge_settings": "base_url=http://h max_cost=1"},
     "^--max_cost needs the price of m"),
    ({"judge": "server", "judge_model": "m", "judge_settings": "template=nope"},
     "nope: no such prompt"),
    ({"judge": "local", "judge_model": "./none"}, "no such model folder"),
    ({"judge": "jsft", "judge_model": "./none"}, "none"),
    ({"judge": "jsft", "judge_model": "x", "samples": 1}, "--judge jsft compares two responses"),
    ({"eval_prompts": "tatsu-lab/alpaca_eval", "annotator": "xx"},
     "^--annotator: no configuration xx"),
    ({"model": "./none"}, "no such model folder"), ({"per_round": 0}, "expected 1 or more"),
    ({"max_failed": 2.0}, "expected a share"),
    ({"train_settings": "learning_rat=1"}, "words like learning_rate=VALUE"),
    ({"train_settings": "data_path=x.json"}, "--train_settings: 'data_path=x.json' cannot be set"),
    ({"train_settings": "learning_rate=2e-3x"},
     "--train_settings: --learning_rate is '2e-3x'; expected float"),
    ({"judge_settings": "max_cost=much"}, "--judge_settings: --max_cost is 'much'; expected float"),
    ({"generate_settings": "top_p=a"}, "--generate_settings: --top_p is 'a'; expected float"),
    ({"evaluate_settings": "max_undecided=True"}, "--evaluate_settings: --max_undecided is True"),
    ({"train_settings": "batch_size=6", "gpus": 4},
     "--train_settings: --batch_size 6 is not a multiple of --micro_batch_size 1 x 4 processes"),
    ({"train_settings": "objective=cutt"}, "--train_settings: "),
    ({"judge_settings": "max_cost"}, "words like max_cost=VALUE"),
    ({"instructions": "none.json"}, "none.json: no such file")])
def test_bad_flags_are_one_line(change, message, settings, tmp_path, in_process, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match=message) as error:
        online.main(**settings | {"output_dir": str(tmp_path / "run"), **change})
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_several_gpus_train_by_torchrun(settings, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(online_stages, "call", lambda command, lock: commands.append(command) or -9)
    flags = checked(settings, gpus=8, train_settings="")
    with pytest.raises(InputError, match="was killed by signal 9"):
        online_stages.execute(flags, "merge.py", processes=8, device="cpu", overwrite=True)
    assert commands == [["torchrun", "--nproc_per_node=8", os.path.relpath(ROOT / "merge.py"),
                         "--device", "cpu", "--overwrite", "True"]]
    assert capsys.readouterr().out.startswith("$ torchrun --nproc_per_node=8 ")


def test_digest_of_a_model_is_that_of_its_weights(tiny_llama, tmp_path):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    (copy / "merge.json").write_text("{}")
    assert content_hash(copy) == content_hash(tiny_llama) and len(content_hash(copy)) == 64
    (copy / "model.safetensors").write_bytes(b"other")
    assert content_hash(copy) != content_hash(tiny_llama)
    assert content_hash("org/name") == "org/name"


def test_plot_needs_a_finished_round(tmp_path):
    with pytest.raises(InputError, match="not there; give the --output_dir"):
        plot_online.main(str(tmp_path))
    write_json(tmp_path / "online.json", {"status": "running"})
    with pytest.raises(InputError, match="no round is finished yet"):
        plot_online.main(str(tmp_path))


@pytest.mark.skipif(not list(Path(sys.prefix).glob(".installed-*")),
                    reason="the recipe would install its requirements here")
@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/cut_online*.env")),
                         ids=lambda path: path.stem)
def test_recipe_gives_the_loop_flags_that_it_takes(config):
    """Both environment files; a shell function stands for python and shows what it would get."""
    shown = subprocess.run(
        ["bash", "-c", 'python() { printf "%s\\n" "$@"; }; export -f python; '
         "bash scripts/cut_online.sh --repeats 3"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CONFIG": str(config), "VENV": sys.prefix, "ROUNDS": "7"})
    assert shown.returncode == 0, shown.stderr
    words = shown.stdout.split("scripts/online.py\n")[1].splitlines()
    _reject_unknown_flags(online.main, words)
    assert words[words.index("--rounds") + 1] == "7" and words[-2:] == ["--repeats", "3"]
    tables = yaml.safe_load((ROOT / "configs/paper_tables.yaml").read_text())["tables"]
    others = {row["run"].split("/")[0] for listed in tables for row in listed["rows"]
              if "run" in row}
    assert Path(words[words.index("--output_dir") + 1]).name not in others  # made by other recipes
    texts = [word.partition("=") for word in words if "_settings=" in word]
    assert len(texts) >= 2
    for flag, _, text in texts:
        assert online.read_settings(flag[2:].removesuffix("_settings"), text)


def test_sample_instructions_are_what_the_script_makes_and_new_to_the_evaluation():
    sample = ROOT / "data/sample"
    made = read_records(sample / "instructions.jsonl")
    ingredients = yaml.safe_load((sample / "ingredients.yaml").read_text(encoding="utf-8"))
    assert made == make_instructions(ingredients, seed=0)
    texts = {record["instruction"] for record in made}
    assert len(texts) == len(made) >= 300 and len({record["id"] for record in made}) == len(made)
    for split in ("validation", "heldout"):
        assert not texts & {record["instruction"]
                            for record in read_records(sample / f"{split}.jsonl")}
