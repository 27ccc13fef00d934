"""scripts/label_samples.py: samples -> rewards -> pairs or demonstrations that training reads.

    python -m pytest tests/test_label_samples.py
"""

import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_judge import save_tiny_judge
from transformers import GenerationConfig

import lm.generation
import self_judge.judgment
import self_judge.off_policy
from lm.models import load_model, load_tokenizer
from lm.records import InputError, read_records
from lm.templates import prompt_ids
from preprocess import jsft_rows, self_judge_rows
from scripts import label_samples
from self_judge import judged_samples
from self_judge.config import Config
from self_judge.judgment import Pair, judge_pairs
from self_judge.templates import judge_templates, load_templates

SAMPLES = 5
FLAGS = {"num_samples": SAMPLES, "max_new_tokens": 12, "top_p": 1.0, "seed": 3,
         "num_accepted": 4, "beta": 0.01}
UF = [{"id": f"cats {number}", "instruction": f" Name {number} cats. \n\nHuman: Now! ",
       "completions": [
           {"response": "yes", "custom_system_prompt": "Be kind." * (number % 2),
            "annotations": {"honesty": {"Rating": "5"}}},
           {"response": "no", "annotations": {"honesty": {"Rating": "1"}}}]}
      for number in range(6)]
HH = [{"chosen": f"{start}\n\nAssistant: yes", "rejected": f"{start}\n\nAssistant: no"}
      for start in (f"\n\nHuman: Hi {number}.\n\nAssistant: Hello?\n\nHuman: Name cats."
                    for number in range(6))]
SYSTEM = {"file": "configs/templates/judge_hh.yaml", "system": "Answer."}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Ends at any of 60 tokens, as a random model seldom comes to its EOS."""
    folder = save_tiny_judge(tmp_path_factory.mktemp("tiny_judge"))
    GenerationConfig(eos_token_id=list(range(60))).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The prompts in both schemas, and as instructions."""
    folder = tmp_path_factory.mktemp("prompts")
    plain = [{"instruction": "Sing.", "input": f"Song {number}"} for number in range(6)]
    for name, records in (("uf", UF), ("hh", HH), ("plain", plain)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return {name: str(folder / f"{name}.jsonl") for name in ("uf", "hh", "plain")}


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("templates") / "own.yaml"
    path.write_text(json.dumps({"templates": SYSTEM}))
    return str(path)


@pytest.fixture(scope="module")
def reference(model, files, templates, tmp_path_factory) -> Path:
    """RSO's pairs of an uninterrupted run, and its journal."""
    output = tmp_path_factory.mktemp("reference") / "rso.jsonl"
    label_samples.main(model, files["uf"], str(output), "rso", templates, **FLAGS)
    return output


@pytest.fixture
def asked(monkeypatch) -> dict[str, int]:
    """How many samples and matches the model is asked for from now on."""
    found = {"samples": 0, "matches": 0}
    generate, judge = lm.generation.generate, self_judge.judgment.judge_pairs

    def noted_generate(model, tokenizer, prompts, **settings):
        found["samples"] += len(prompts)
        return generate(model, tokenizer, prompts, **settings)

    def noted_judge(model, tokenizer, pairs, *args, **settings):
        found["matches"] += len(pairs)
        return judge(model, tokenizer, pairs, *args, **settings)

    monkeypatch.setattr(lm.generation, "generate", noted_generate)
    monkeypatch.setattr(self_judge.judgment, "judge_pairs", noted_judge)
    return found


def journal(output: Path) -> Path:
    return output.with_name(output.name + ".samples.jsonl")


def samples_in(output: Path) -> dict[int, list[dict]]:
    """By prompt, the samples of a journal."""
    found: dict[int, list[dict]] = {}
    for line in read_records(journal(output)):
        if "sample" in line:
            found.setdefault(line["prompt"], {})[line["sample"]] = line
    return {prompt: [found[prompt][number] for number in range(SAMPLES)] for prompt in found}


def config(dataset: str, kind: str, **own) -> Config:
    return Config(kind=kind, path="run.yaml", training_args={}, model={}, templates=SYSTEM,
                  dataset=dataset, **{f"{kind}_args": own})


def preferred(model: str, place: int, texts: list[str]) -> list[list[float]]:
    """The share of each text against each other one, from the judge itself."""
    tokenizer = load_tokenizer(model)
    prompts = judge_templates(load_templates(SYSTEM), tokenizer)
    pairs = [Pair(f"User: {UF[place]['instruction']}", a, b) for a in texts for b in texts]
    shares = [judgment.score_a / (judgment.score_a + judgment.score_b)
              for judgment in judge_pairs(load_model(model), tokenizer, pairs, prompts)]
    return [shares[start:start + len(texts)] for start in range(0, len(shares), len(texts))]


@pytest.mark.parametrize("schema", ["uf", "hh", "plain"])
@pytest.mark.parametrize("select", ["rso", "rest"])
def test_training_reads_the_prompts_that_were_sampled(schema, select, model, files, templates,
                                                      tmp_path):
    """System prompts, dialogues of several turns and odd blanks included; and the answers."""
    output = tmp_path / "out.jsonl"
    label_samples.main(model, files[schema], str(output), select, templates, opponents=1,
                       thresholds="0", **FLAGS)
    tokenizer = load_tokenizer(model)
    if schema == "plain":
        queries = [f"Answer.\n\n### User:\nSing.\nSong {number}\n\n### Assistant:\n"
                   for number in range(6)]
    else:
        original = self_judge_rows(config(files[schema], "self_judge"), tokenizer)
        queries = original["query"]
    answers = {query: [line["output"] for line in samples_in(output)[place]]
               for place, query in enumerate(queries)}
    if select == "rso":
        rows = self_judge_rows(config(str(output), "self_judge"), tokenizer)
        assert 6 < len(rows) <= 12 and set(rows["query"]) <= set(queries)
        for row in rows:
            assert row["chosen"] != row["rejected"]
            assert {row["chosen"], row["rejected"]} <= set(answers[row["query"]])
            if schema != "plain":
                assert row["context"] == original[queries.index(row["query"])]["context"]
    else:
        rows = jsft_rows(config(str(output), "jsft", examples="sft"), tokenizer)
        ends = [len(row["input_ids"]) - row["completion_mask"][::-1].index(0) for row in rows]
        learnt = [(row["input_ids"][:end], tokenizer.decode(
            row["input_ids"][end:], skip_special_tokens=True).strip())
            for row, end in zip(rows, ends, strict=True)]
        expected = [(prompt_ids(tokenizer, query), line["output"])
                    for place, query in enumerate(queries) for line in samples_in(output)[place]
                    if line["finish_reason"] == "stop" and line["output"]]
        assert learnt == expected and len(learnt) > 12


def test_rso_pairs_are_accepted_and_labelled_as_told(reference, model):
    """Rewards, acceptance, random pairs and verdicts again, by hand, for three prompts."""
    rows = {}
    for row in read_records(reference):
        rows.setdefault(row["id"], []).append(tuple(one["response"] for one in row["completions"]))
    assert len(rows) > 3
    for place in range(3):
        texts = [line["output"] for line in samples_in(reference)[place]]
        share = preferred(model, place, texts)
        rewards = [sum(share[i][j] for j in range(SAMPLES) if j != i) / (SAMPLES - 1)
                   for i in range(SAMPLES)]
        rng, left, accepted = random.Random(f"3 rso {place}"), list(range(SAMPLES)), []
        while len(accepted) < 4:
            best = max(rewards[i] for i in left)
            for i in list(left):
                if rng.random() < math.exp((rewards[i] - best) / 0.01):
                    accepted.append(i)
                    left.remove(i)
                    if len(accepted) == 4:
                        break
        rng.shuffle(accepted)
        expected = []
        for i, j in (accepted[:2], accepted[2:]):
            chosen, rejected = (i, j) if share[i][j] > 0.5 else (j, i)
            if samples_in(reference)[place][chosen]["finish_reason"] == "stop":
                expected.append((texts[chosen], texts[rejected]))
        assert rows.get(UF[place]["id"], []) == expected


def test_raft_learns_the_tournaments_winner_and_rest_what_is_above(reference, model, files,
                                                                   templates, tmp_path, asked):
    """From one journal: raft and rest ask for nothing that rso did not."""
    shutil.copy(journal(reference), tmp_path / "all.jsonl")
    flags = FLAGS | {"samples_path": str(tmp_path / "all.jsonl")}
    label_samples.main(model, files["uf"], str(tmp_path / "raft.jsonl"), "raft", templates, **flags)
    for row in read_records(tmp_path / "raft.jsonl"):
        place = int(row["id"][-1])
        texts = [line["output"] for line in samples_in(reference)[place]]
        left, share = list(range(SAMPLES)), preferred(model, place, texts)
        while len(left) > 1:
            pairs = list(zip(left[::2], left[1::2], strict=False))
            left = left[len(left) - len(left) % 2:] + [
                a if share[a][b] > 0.5 else b for a, b in pairs]
        assert [one["response"] for one in row["completions"]] == [texts[left[0]]]
    asked.update(samples=0, matches=0)
    label_samples.main(model, files["uf"], str(tmp_path / "rest.jsonl"), "rest", templates,
                       thresholds="0.1,0.5,0.51", **flags)
    assert asked == {"samples": 0, "matches": 0}
    steps = [[(row["id"], row["completions"][0]["response"]) for row in read_records(path)]
             for path in (tmp_path / "rest.improve1.jsonl", tmp_path / "rest.improve2.jsonl",
                          tmp_path / "rest.jsonl")]
    assert set(steps[0]) > set(steps[1]) > set(steps[2])
    label_samples.main(model, files["uf"], str(tmp_path / "best.jsonl"), "rest", templates,
                       thresholds="50%", **flags)
    ranked = []
    for place, of_prompt in samples_in(reference).items():
        texts = [line["output"] for line in of_prompt]
        for own, row in enumerate(preferred(model, place, texts)):
            ranked.append(((sum(row) - row[own]) / (len(row) - 1), texts[own],
                           of_prompt[own]["finish_reason"]))
    found = [row["completions"][0]["response"] for row in read_records(tmp_path / "best.jsonl")]
    assert found and sorted(found) == sorted(text for _, text, end in sorted(ranked)[-15:]
                                             if end == "stop")


def test_a_shared_journal_knows_the_outputs_that_are_its_own(reference, model, files, templates,
                                                             tmp_path, asked, capsys):
    """Whatever else has one of their names is kept; a journal of old notes none."""
    shared, output = tmp_path / "all.jsonl", tmp_path / "new" / "rest.jsonl"
    shutil.copy(journal(reference), shared)
    flags = FLAGS | {"samples_path": str(shared), "thresholds": "0.1,0.5"}
    label_samples.main(model, files["uf"], str(output), "rest", templates, **flags)
    first = output.read_bytes()
    assert read_records(shared)[-2:] == [{"written": "new/rest.improve1.jsonl"},
                                         {"written": "new/rest.jsonl"}]
    output.write_text("half")
    label_samples.main(model, files["uf"], str(output), "rest", templates, **flags)
    assert output.read_bytes() == first and asked == {"samples": 0, "matches": 0}
    lines = read_records(shared)
    assert sum("written" in line for line in lines) == 2
    verdicts = sum("probabilities" in line for line in lines)
    assert f"going on after 30 samples and {verdicts} verdicts" in capsys.readouterr().out

    for name in ("mine.jsonl", "rest.jsonl", "rso.improve1.jsonl"):
        (tmp_path / name).write_text("mine")
    for name, found in (("mine", "mine"), ("rest", "rest"), ("rso", "rso.improve1")):
        with pytest.raises(InputError, match=rf"/{found}\.jsonl: is there already, and .*all\.jsonl"
                                             " does not note that it was made of its samples"):
            label_samples.main(model, files["uf"], str(tmp_path / f"{name}.jsonl"), "rest",
                               templates, **flags)
        assert (tmp_path / f"{found}.jsonl").read_text() == "mine"


@pytest.mark.parametrize("flag", ["data_path", "samples_path"])
def test_an_output_is_none_of_the_inputs(flag, model, files, templates, tmp_path):
    own = tmp_path / "own.jsonl"
    shutil.copy(files["uf"], own)
    flags = {"data_path": files["uf"], "select": "rso", "templates": templates, **FLAGS}
    with pytest.raises(InputError, match=rf"own\.jsonl: is to be written, and is --{flag}"):
        label_samples.main(model, output_path=str(own), overwrite=True,
                           **flags | {flag: str(own)})
    assert own.read_text() == Path(files["uf"]).read_text()


@pytest.mark.parametrize(("number", "pairs"), [(2, 1), (3, 1), (5, 1), (9, 2)])
def test_half_of_the_samples_are_accepted_if_nothing_else_is_told(number, pairs, monkeypatch, model,
                                                                  files, templates, tmp_path):
    """However few there are, of which one pair is made at least."""
    seen = []

    def noted(responses, scores, judge, count, *rest):
        seen.append(count // 2)
        return real(responses, scores, judge, count, *rest)

    real = self_judge.off_policy.accepted_pairs
    monkeypatch.setattr(self_judge.off_policy, "accepted_pairs", noted)
    label_samples.main(model, files["hh"], str(tmp_path / "rso.jsonl"), "rso", templates,
                       opponents=1, **FLAGS | {"num_samples": number, "num_accepted": 0})
    assert seen == [pairs]


@pytest.mark.parametrize("done", [0, 7, 30, 47])
def test_a_run_that_was_stopped_goes_on(done, reference, model, files, templates, tmp_path, asked):
    """After so many lines of the journal, in which all samples are the first 30."""
    lines = journal(reference).read_text().splitlines()
    output = tmp_path / "rso.jsonl"
    journal(output).write_text("\n".join(lines[:1 + done]) + '\n{"prompt": 5, "sam')
    label_samples.main(model, files["uf"], str(output), "rso", templates, **FLAGS)
    assert output.read_bytes() == reference.read_bytes()
    assert asked["samples"] == max(0, 30 - done)
    assert asked["matches"] == len(lines) - 1 - max(30, done)


def test_two_processes_give_what_one_gives(reference, model, files, templates, warm_venv, tmp_path):
    """Each accepts the same samples of its prompts as one process would."""
    output = tmp_path / "rso.jsonl"
    result = subprocess.run(
        [warm_venv / "bin/torchrun", "--standalone", "--nproc_per_node=2",
         "scripts/label_samples.py", f"--model={model}", f"--data_path={files['uf']}",
         f"--output_path={output}", "--select=rso", f"--templates={templates}",
         *(f"--{name}={value}" for name, value in FLAGS.items())],
        cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert output.read_bytes() == reference.read_bytes()
    assert len(journal(output).read_text().splitlines()) == (
        len(journal(reference).read_text().splitlines()))


def test_what_was_done_is_told(reference, model, files, templates, tmp_path, capsys):
    output = tmp_path / "rso.jsonl"
    shutil.copy(journal(reference), journal(output))
    label_samples.main(model, files["uf"], str(output), "rso", templates, **FLAGS)
    printed = capsys.readouterr().out
    verdicts = sum("probabilities" in line for line in read_records(journal(output)))
    assert f"6 prompts, {6 * SAMPLES} samples, " in printed
    assert f"{verdicts} matches judged: " in printed and verdicts <= 6 * 10
    count = len(read_records(output))
    assert f"{output}: {count} pairs; left out: " in printed
    told = dict(part.split(" ", 1)[::-1] for part in
                printed.rstrip().rpartition("left out: ")[2].split(", "))
    assert count + sum(map(int, told.values())) == 12  # two pairs a prompt


def test_answers_that_training_would_read_otherwise_are_left_out():
    """Cut ones, empty ones, those that hold a marker of HH's turns; a rejected one may be cut."""
    prompt = [{"role": "user", "content": "Name cats."}]
    samples = [[{"output": text, "finish_reason": reason} for text, reason in (
        ("Tom", "stop"), ("Tom and", "length"), ("", "stop"), ("Tom\n\nHuman: Why?", "stop"))]]
    record = {"chosen": "\n\nHuman: Name cats.\n\nAssistant: a", "rejected": "x"}
    for given, left in ((record, {(0,), (0, 1)}),
                        ({"instruction": "Name cats."}, {(0,), (0, 1), (0, 3), (3,)})):
        kept = set()
        for places in ((0,), (1,), (2,), (3,), (0, 1), (1, 0), (0, 3)):
            dropped = label_samples.Counter()
            rows = list(label_samples.written([given], [prompt], samples, [(0, *places)], "",
                                              dropped))
            assert len(rows) + sum(dropped.values()) == 1
            kept |= {places} if rows else set()
        assert kept == left


def test_prompts_are_those_that_a_run_trains_on(files, model, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({
        "training_args": {"output_dir": "out"}, "self_judge_args": {},
        "model": {"pretrained_model_name_or_path": model}, "templates": SYSTEM,
        "dataset": {"path": files["uf"], "eval_size": 2}}))
    templates = load_templates(SYSTEM)
    records, prompts = label_samples.read_prompts(str(path), templates, 0)
    rows = self_judge_rows(config({"path": files["uf"], "eval_size": 2}, "self_judge"),
                           load_tokenizer(model))
    assert len(records) == len(rows) == 4
    queries, contexts = judged_samples.rendered(prompts, templates, load_tokenizer(model))
    assert contexts == rows["context"]
    assert [load_tokenizer(model).decode(ids) for ids in queries] == rows["query"]


def test_bad_records_are_left_out_as_the_run_left_them_out(model, tmp_path, capsys, monkeypatch):
    """A line that is no JSON, and a record that is no dialogue; one more than allowed is told."""
    lines = [*map(json.dumps, HH[:2]), '{"chosen": ', json.dumps({"chosen": "Hi.", "rejected": 5})]
    (tmp_path / "hh.jsonl").write_text("\n".join(lines))
    run = {"training_args": {"output_dir": "out"}, "self_judge_args": {}, "templates": SYSTEM,
           "model": {"pretrained_model_name_or_path": model},
           "dataset": {"path": str(tmp_path / "hh.jsonl"), "skip_bad": 2}}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run))
    assert label_samples.read_prompts(str(path), load_templates(SYSTEM), 0)[0] == HH[:2]
    assert "2 bad records left out" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")  # one process of several says it
        label_samples.read_prompts(str(path), load_templates(SYSTEM), 0)
    assert not capsys.readouterr().out
    run["dataset"]["skip_bad"] = 1
    path.write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"hh\.jsonl: record 3: field .* \(more than skip_bad 1"):
        label_samples.read_prompts(str(path), load_templates(SYSTEM), 0)


@pytest.mark.parametrize(("change", "message"), [
    ({"select": "rlhf"}, "--select is 'rlhf'; expected one of rso, raft, rest"),
    ({"num_samples": 1}, "--num_samples is 1; expected 2 or more"),
    ({"num_accepted": 6}, r"--num_accepted is 6; expected 2 to num_samples \(5\)"),
    ({"opponents": 9}, "--opponents is 9"), ({"beta": 0.0}, "--beta is 0.0; expected more than 0"),
    ({"beta": math.nan}, "--beta is nan"),
    ({"thresholds": "0.5,0.4"}, "--thresholds is '0.5,0.4'; expected numbers"),
    ({"thresholds": "high"}, "--thresholds is 'high'"),
    ({"thresholds": "0.5,60%"}, "--thresholds is '0.5,60%'; .* or all in per cent"),
    ({"thresholds": "100%"}, "--thresholds is '100%'"),
    ({"select": "rest", "thresholds": "0.999"}, "nothing is left to learn from .no reward"),
    ({"limit": -1}, "--limit is -1"), ({"data_path": "none.json"}, r"none\.json: no such file"),
    ({"max_length": 9}, "max_length 9 leaves no room")])
def test_bad_input_is_one_line(change, message, reference, model, files, templates, tmp_path):
    flags = {"select": "rso", "data_path": files["uf"], "templates": templates, **FLAGS, **change}
    output = tmp_path / "out.jsonl"
    shutil.copy(journal(reference), journal(output))
    with pytest.raises(InputError, match=message) as error:
        label_samples.main(model, output_path=str(output), **flags)
    assert "\n" not in str(error.value) and not output.exists()
