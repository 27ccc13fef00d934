"""scripts/self_reject.py: winners of tournaments, nothing sampled or judged twice.

    python -m pytest tests/test_self_reject.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_judge import save_tiny_judge

import lm.generation
import self_judge.base
import self_judge.judgment
from lm.journal import finished_lines
from lm.models import load_model, load_tokenizer
from lm.processes import parts
from lm.records import InputError, read_records, write_json
from preprocess import self_judge_example
from scripts import self_reject
from self_judge import judged_samples
from self_judge.preferences import found_in
from self_judge.templates import judge_templates, load_templates
from self_judge.tournament import tournament_rejection_sampling

PROMPTS = 12
# Without a nucleus: in other batches probabilities round otherwise, and among a random model's near
# equal tokens two may change places.
FLAGS = {"num_samples": 8, "max_new_tokens": 6, "top_p": 1.0, "seed": 3}
SAMPLES = PROMPTS * FLAGS["num_samples"]
MATCHES = SAMPLES - PROMPTS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_judge(tmp_path_factory.mktemp("tiny_judge")))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "cats.json"
    write_json(path, [{"instruction": f"Name {number} cats. " * (1 + number % 3), "id": number}
                      for number in range(PROMPTS)])
    return str(path)


@pytest.fixture(scope="module")
def reference(model, prompts, tmp_path_factory) -> Path:
    """What an uninterrupted run writes."""
    output = tmp_path_factory.mktemp("reference") / "winners.json"
    self_reject.main(model, str(output), data_path=prompts, nested="1,2,3,4",
                     brackets=str(output.with_name("brackets.json")), **FLAGS)
    return output


@pytest.fixture
def asked(monkeypatch) -> dict[str, list]:
    """What the model is asked from now on: samples by their keys, and matches."""
    found = {"samples": [], "matches": []}
    generate, judge_pairs = lm.generation.generate, self_judge.judgment.judge_pairs

    def noted_generate(model, tokenizer, prompts, **settings):
        found["samples"] += prompts
        return generate(model, tokenizer, prompts, **settings)

    def noted_judge(model, tokenizer, pairs, *args, **settings):
        found["matches"] += pairs
        return judge_pairs(model, tokenizer, pairs, *args, **settings)

    monkeypatch.setattr(lm.generation, "generate", noted_generate)
    monkeypatch.setattr(self_judge.judgment, "judge_pairs", noted_judge)
    return found


def read(path: Path) -> list:
    return json.loads(path.read_text())


def outputs(path: Path) -> list[str]:
    return [record["output"] for record in read(path)]


def journal(output: Path) -> Path:
    return output.with_name(output.name + ".samples.jsonl")


def drawn(output: Path, count: int = FLAGS["num_samples"]) -> list[list[str]]:
    """The first samples of each prompt."""
    lines = {(line["prompt"], line["sample"]): line["output"]
             for line in read_records(journal(output)) if "sample" in line}
    return [[lines[prompt, number] for number in range(count)] for prompt in range(PROMPTS)]


def test_output_has_alpaca_evals_fields(reference, model):
    name = Path(model).name
    for path, generator in ((reference, name), (reference.with_name("winners.n2.json"),
                                                f"{name}-n2")):
        records = read(path)
        assert len(records) == PROMPTS
        assert list(records[1]) == ["instruction", "output", "generator", "dataset", "id"]
        assert records[1]["instruction"] == "Name 1 cats. Name 1 cats. "
        assert records[1]["generator"] == generator and records[1]["dataset"] == "cats"
        assert all(record["output"] == record["output"].strip() for record in records)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_winners_are_those_of_the_published_tournament(size, reference, model, prompts):
    path = reference if size == 8 else reference.with_name(f"winners.n{size}.json")
    tokenizer = load_tokenizer(model)
    contexts = [f"User: {record['instruction']}" for record in read(Path(prompts))]
    templates = judge_templates(load_templates(self_reject.TEMPLATES), tokenizer)
    winners = tournament_rejection_sampling(load_model(model), tokenizer, contexts,
                                            drawn(reference, size), templates, seed=None)
    assert outputs(path) == winners
    if size > 1:
        assert winners != [texts[0] for texts in drawn(reference)]


def test_a_run_of_its_own_gives_the_nested_file(reference, model, prompts, tmp_path):
    output = tmp_path / "two.json"
    self_reject.main(model, str(output), data_path=prompts, **FLAGS | {"num_samples": 2})
    assert drawn(output, 2) == drawn(reference, 2)
    assert outputs(output) == outputs(reference.with_name("winners.n2.json"))


def test_prompts_are_written_as_self_training_writes_them(model):
    tokenizer = load_tokenizer(model)
    record = {"chosen": "\n\nHuman: Sing.\n\nAssistant: La", "rejected": "\n\nHuman: Sing.\n\n"
              "Assistant: No"}
    for system in ("", "Be kind."):
        templates = load_templates({"file": self_reject.TEMPLATES, "system": system})
        (pair,) = found_in(record, system=system).pairs
        trained = self_judge_example(pair, templates, tokenizer)
        prompts = judged_samples.messages_of([{"instruction": "Sing."}], templates)
        (query,), (context,) = judged_samples.rendered(prompts, templates, tokenizer)
        assert tokenizer.decode(query) == trained["query"]
        assert context == trained["context"]


def test_killed_run_goes_on_where_it_was(reference, model, prompts, tmp_path, asked):
    output = tmp_path / "winners.json"
    flags = {"data_path": prompts, "nested": "1,2,3,4", **FLAGS}
    kill_at_first_verdict(output, model, flags)
    assert not output.exists()  # the final file is whole or absent
    lines = finished_lines(journal(output))[1:]  # the kill may have left a part of one more
    verdicts = [line for line in lines if "probabilities" in line]
    assert len(lines) - len(verdicts) == SAMPLES and 0 < len(verdicts) < MATCHES
    with open(journal(output), "a") as file:
        file.write('{"prompt": 5, "a":')  # what a kill in the middle of a line leaves

    self_reject.main(model, str(output), **flags)
    assert not asked["samples"]
    new = read_records(journal(output))[1 + len(lines):]
    assert len(asked["matches"]) == len(new) > 0
    matches = [(line["prompt"], line["a"], line["b"]) for line in (*verdicts, *new)]
    assert len(matches) == len(set(matches))  # none was judged twice
    for name in ("winners.json", "winners.n1.json", "winners.n3.json", "winners.n4.json"):
        assert read(output.with_name(name)) == read(reference.with_name(name))


def test_two_processes_finish_what_three_had_begun(reference, model, prompts, warm_venv, tmp_path):
    """They share prompts, samples and matches; each finds what any of the three had noted."""
    output = tmp_path / "winners.json"
    settings, *lines = journal(reference).read_text().splitlines()
    for place in range(3):
        own = journal(output).with_name(
            f"winners.json.samples{f'.process{place}' if place else ''}.jsonl")
        own.write_text("\n".join([settings, *lines[place:90:3]]) + "\n")
    flags = {"data_path": prompts, "nested": "1,2,3,4", **FLAGS}
    result = subprocess.run(
        [warm_venv / "bin/torchrun", "--standalone", "--nproc_per_node=2",
         "scripts/self_reject.py", f"--model={model}", f"--output_path={output}",
         *(f"--{name}={value}" for name, value in flags.items())],
        cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"{PROMPTS} prompts, {SAMPLES} samples") == 1
    for name in ("winners.json", "winners.n1.json", "winners.n3.json", "winners.n4.json"):
        assert read(output.with_name(name)) == read(reference.with_name(name))
    assert list(tmp_path.glob("*.samples*")) == [journal(output)]
    found = read_records(journal(output))[1:]
    names = [(line["prompt"], line.get("sample"), line.get("a"), line.get("b")) for line in found]
    assert len(names) == len(set(names)) == len(lines)  # nothing was done twice


def test_only_journals_of_its_own_processes_are_gathered_or_discarded(tmp_path):
    """Whatever digits other runs have in their names."""
    own = tmp_path / "s.jsonl"
    others = [tmp_path / name for name in ("s.2.jsonl", "s.2x.jsonl", "s.10.process1.jsonl",
                                          "s.process1.old.jsonl")]
    further = [tmp_path / "s.process1.jsonl", tmp_path / "s.process12.jsonl"]
    for path in (own, *further, *others):
        path.write_text('{"seed": 1}\n{"prompt": 0}\n')
    assert parts(own) == [own, *further]
    file, lines = judged_samples.open_samples([tmp_path / "out"], own, {}, True, 0, 1)
    file.close()
    assert lines == [] and sorted(tmp_path.iterdir()) == sorted([own, *others])


def test_verdicts_that_were_found_together_are_noted_together(model, prompts, tmp_path,
                                                              monkeypatch):
    noted = []
    monkeypatch.setattr(judged_samples, "append", lambda file, *lines: noted.append(lines))
    self_reject.main(model, str(tmp_path / "out.json"), data_path=prompts,
                     **FLAGS | {"num_samples": 2})
    assert [len(lines) for lines in noted if "probabilities" in lines[0]] == [PROMPTS]


def kill_at_first_verdict(output: Path, model: str, flags: dict) -> None:
    """Start the real command; kill -9 it when all samples are drawn and the first ones judged."""
    command = [sys.executable, "scripts/self_reject.py", f"--model={model}",
               f"--output_path={output}", *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not journal(output).exists() or "probabilities" not in journal(output).read_text():
        assert process.poll() is None and time.monotonic() < deadline, "ended before the kill"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(("samples", "matches"), [(0, 0), (5, 0), (SAMPLES, 7)])
def test_what_is_noted_is_not_done_again(samples, matches, reference, model, prompts, tmp_path,
                                         asked):
    settings, *lines = journal(reference).read_text().splitlines()
    noted = lines[:samples + matches]
    output = tmp_path / "winners.json"
    journal(output).write_text("\n".join([settings, *noted]) + "\n")
    self_reject.main(model, str(output), data_path=prompts, **FLAGS)
    done = {(line["prompt"], line["sample"]) for line in map(json.loads, noted) if "sample" in line}
    every = {(prompt, number) for prompt in range(PROMPTS)
             for number in range(FLAGS["num_samples"])}
    assert len(asked["samples"]) == SAMPLES - samples and set(asked["samples"]) == every - done
    assert len(asked["matches"]) == MATCHES - matches
    assert read(output) == read(reference)


def test_finished_samples_serve_again_without_a_model(reference, model, prompts, tmp_path, asked,
                                                      monkeypatch, capsys):
    """Half of the samples plays matches that the whole tournament has played."""
    output = tmp_path / "winners.json"
    journal(output).write_text(journal(reference).read_text())
    monkeypatch.setattr(self_judge.base, "load_base", None)
    self_reject.main(model, str(output), data_path=prompts, nested="2, 4,8", generator="x", **FLAGS)
    assert asked == {"samples": [], "matches": []}
    for size in (2, 4):
        name = f"winners.n{size}.json"
        assert outputs(output.with_name(name)) == outputs(reference.with_name(name))
    assert outputs(output.with_name("winners.n8.json")) == outputs(output) == outputs(reference)
    printed = capsys.readouterr().out
    assert f"{PROMPTS} prompts, {SAMPLES} samples" in printed and f"{MATCHES} matches" in printed
    assert "winners.n4.json" in printed


def test_brackets_hold_every_match(reference):
    brackets = read(reference.with_name("brackets.json"))
    assert [bracket["samples"] for bracket in brackets] == drawn(reference)
    assert [bracket["samples"][bracket["winner"]] for bracket in brackets] == outputs(reference)
    for bracket in brackets:
        assert [len(games) for games in bracket["rounds"]] == [4, 2, 1]
        for game in (game for games in bracket["rounds"] for game in games):
            assert game["winner"] == game["a" if game["margin"] > 0 else "b"]


def test_one_sample_is_greedy_and_needs_no_judge(model, prompts, tmp_path, asked, capsys):
    output = tmp_path / "greedy.json"
    self_reject.main(model, str(output), data_path=prompts, limit=4, num_samples=1, temperature=0.0,
                     max_new_tokens=6)
    tokenizer = load_tokenizer(model)
    queries = [f"### User:\n{record['instruction']}\n\n### Assistant:\n"
               for record in read(Path(prompts))[:4]]
    found = dict(lm.generation.generate(load_model(model), tokenizer, queries, max_new_tokens=6))
    assert outputs(output) == [found[place].text.strip() for place in range(4)]
    assert not asked["matches"] and "matches" not in capsys.readouterr().out


def test_other_settings_are_an_error_and_overwrite_starts_again(model, prompts, tmp_path, asked):
    output = tmp_path / "winners.json"
    flags = {"data_path": prompts, "limit": 2, "num_samples": 2, "max_new_tokens": 4}
    self_reject.main(model, str(output), **flags)
    with pytest.raises(InputError, match=r"\(max_new_tokens was 4, is 5\); .*--overwrite"):
        self_reject.main(model, str(output), **flags | {"max_new_tokens": 5})
    self_reject.main(model, str(output), overwrite=True, **flags | {"max_new_tokens": 5})
    assert len(asked["samples"]) == 8
    journal(output).unlink()  # now it could be anyone's
    with pytest.raises(InputError, match=r"is there already, and winners\.json\.samples\.jsonl is"):
        self_reject.main(model, str(output), **flags)
    output.rename(tmp_path / "winners.n1.json")
    with pytest.raises(InputError, match=r"n1\.json: is there already, and winners\.json\.samples"):
        self_reject.main(model, str(output), nested="1", **flags)


def test_the_prompts_are_never_an_output(model, prompts, tmp_path):
    own = tmp_path / "cats.n2.json"
    message = r"cats\.n2\.json: is to be written, and is --data_path"
    own.write_text(Path(prompts).read_text())
    for output in (own, tmp_path / "cats.json"):
        with pytest.raises(InputError, match=message):
            self_reject.main(model, str(output), data_path=str(own), nested="2", overwrite=True,
                             **FLAGS)
    assert own.read_text() == Path(prompts).read_text()


@pytest.mark.parametrize(("change", "message"), [
    ({"nested": "1,9"}, r"--nested is '1,9'; expected numbers from 1 to num_samples \(8\)"),
    ({"nested": "1;2"}, "--nested is '1;2'"),
    ({"num_samples": 0}, "--num_samples is 0"),
    ({"temperature": 0.0}, "--temperature 0 makes all 8 samples of a prompt the same"),
    ({"max_new_tokens": 1020}, r"prompt \(\d+, 0\): .* exceed the model's context of 1024"),
    ({"max_length": 9}, "max_length 9 leaves no room"),
    ({"limit": -1}, "--limit is -1"),
    ({"data_path": "none.json"}, r"none\.json: no such file"),
    ({"templates": "none.yaml"}, r"no such file none\.yaml"),
    ({"peft_model_path": "./none"}, "no such adapter"),
])
def test_bad_input_is_one_line(change, message, model, prompts, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        self_reject.main(model, str(tmp_path / "out.json"),
                         **{"data_path": prompts, **FLAGS, **change})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.json").exists()
