"""Satisfied constraints, counted and compared. Run: pytest tests/test_evaluate_constraints.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lm.records import InputError
from scripts import generate
from scripts.evaluate_constraints import (
    changed,
    main,
    named_answers,
    read_prompts,
    shares_by_kind,
    table_of,
    wilson,
)

ROOT = Path(__file__).resolve().parents[1]
NO_COMMA = {"kind": "punctuation:no_comma", "kwargs": {}}
REQUIRED = {"kind": "keywords:existence", "kwargs": {"keywords": ["tea"]}}
PROMPTS = [{"id": "a", "instruction": "Greet me. No commas.", "constraints": [NO_COMMA]},
           {"id": "b", "instruction": "Say tea.", "constraints": [REQUIRED]},
           {"id": "c", "instruction": "Say tea without commas.",
            "constraints": [REQUIRED, NO_COMMA]}]
BASE = ["Hello, you.", "Some tea.", "Coffee, please."]
BETTER = ["Hello you.", "Coffee.", "Some tea."]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def answer_file(path, texts, prompts=PROMPTS):
    return write(path, [{"instruction": prompt["instruction"], "output": text,
                         "generator": f"some/where/{path.stem}", "dataset": "sample"}
                        for prompt, text in zip(prompts, texts, strict=True)])


@pytest.fixture
def files(tmp_path):
    return (write(tmp_path / "prompts.jsonl", PROMPTS),
            answer_file(tmp_path / "base.json", BASE),
            answer_file(tmp_path / "cut.json", BETTER))


def test_wilson_interval_by_hand():
    # z = 1.96: centre (0.5 + z^2/20) / (1 + z^2/10) = 0.5, half width
    # sqrt(0.25 z^2/10 + z^4/400) / (1 + z^2/10) = sqrt(0.09604 + 0.03690) / 1.38415 = 0.26341
    share = wilson(5, 10)
    assert (share.low, share.high) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    assert wilson(0, 10).low == 0 and wilson(0, 10).high > 0.2
    assert wilson(10, 10).high == pytest.approx(1) and wilson(10, 10).low < 0.8
    assert str(wilson(34, 60)) == "34/60   57 % [ 44,  68]"
    for total in range(1, 200):  # whatever is rounded how
        for share in (wilson(0, total), wilson(total, total)):
            assert share.low <= share.share <= share.high


def test_constraints_are_counted_by_kind_and_overall():
    shares = shares_by_kind(PROMPTS, [[False], [True], [False, True]])
    assert {kind: (share.hits, share.total) for kind, share in shares.items()} == {
        "punctuation:no_comma": (1, 2), "keywords:existence": (1, 2), "all": (2, 4)}


def test_gains_and_losses_are_counted_against_the_first_model():
    verdicts = {"base": [[False], [True, True]], "cut": [[True], [True, False]]}
    assert changed(verdicts, "cut") == {"gained": 1, "lost": 1}
    assert changed(verdicts, "base") == {"gained": 0, "lost": 0}


def test_table_is_aligned_and_shows_the_difference():
    shares = {"base": {"keywords:existence": wilson(3, 12), "all": wilson(30, 60)},
              "a much longer name": {"keywords:existence": wilson(6, 12), "all": wilson(45, 60)}}
    lines = table_of(shares)
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "3/12" in lines[2] and "6/12" in lines[2] and lines[2].endswith("+25.0")
    assert lines[-2].startswith("all") and "75 %" in lines[-2]


def test_whole_command_prints_and_writes(tmp_path):
    prompts, base, cut = (write(tmp_path / "prompts.jsonl", PROMPTS),
                          answer_file(tmp_path / "base.json", BASE),
                          answer_file(tmp_path / "cut.json", BETTER))
    done = subprocess.run(
        [sys.executable, "scripts/evaluate_constraints.py", "--prompts", prompts, "--outputs",
         f"{base},{cut}", "--output", str(tmp_path / "out" / "results.json"), "--show", "1"],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1/4" in done.stdout and "3/4" in done.stdout and "+50.0" in done.stdout
    assert "3 constraints gained, 1 lost" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["models"]["cut"]["all"]["share"] == 0.75
    assert results["answers"][2]["outputs"]["cut"] == {"output": "Some tea.",
                                                       "satisfied": [True, True]}


def test_differing_verdicts_are_shown_first(tmp_path, capsys):
    texts = ["same"] * 20
    prompts = [{"instruction": f"Task {number}.", "constraints": [REQUIRED]}
               for number in range(20)]
    base = answer_file(tmp_path / "base.json", texts, prompts)
    cut = answer_file(tmp_path / "cut.json", [*texts[:13], "tea", *texts[14:]], prompts)
    main(write(tmp_path / "prompts.jsonl", prompts), (base, cut), show=1)
    shown = capsys.readouterr().out
    assert "Task 13." in shown and shown.count("Task") == 1
    assert "base breaks" in shown and "cut  keeps" in shown


def test_empty_answers_are_told(files, tmp_path, capsys):
    prompts, base, better = files
    silent = answer_file(tmp_path / "silent.json", ["", "Tea.", " \n"])
    main(prompts=prompts, outputs=[base, better, silent])
    assert [line for line in capsys.readouterr().out.splitlines() if "are empty" in line] == [
        "silent: 2 of 3 answers are empty and satisfy nothing"]


def test_a_single_model_needs_no_comparison(files, capsys):
    main(files[0], files[1], show=0)
    shown = capsys.readouterr().out
    assert "1/4" in shown and "points" not in shown


def test_a_missing_answer_is_an_error(files, tmp_path):
    short = answer_file(tmp_path / "short.json", BASE[:2], PROMPTS[:2])
    with pytest.raises(InputError, match=r"short.json: no answer to prompt 2"):
        main(files[0], f"{files[1]},{short}")


@pytest.mark.parametrize("record, message", [
    ({"instruction": "x"}, "record 1: field 'constraints' is missing"),
    ({"instruction": "x", "constraints": []}, "record 1: field 'constraints' must be a list"),
    ({"instruction": "x", "constraints": [{"kind": "k"}]}, "record 1: field 'constraints'"),
    (PROMPTS[0], "record 1: field 'instruction' repeats"),
    *(({"instruction": "x", "constraints": [{"kind": kind, "kwargs": kwargs}]},
       f"record 1: field 'constraints': .*{told}.*; correct it") for kind, kwargs, told in (
        ("no:kind", {}, "unknown constraint kind"),
        ("length_constraints:number_words", {"num_words": "ten", "relation": "at least"}, "int"),
        ("length_constraints:number_words", {"num_words": 9, "relation": "about"}, "about"),
        ("keywords:forbidden_words", {"forbidden_words": ["(a"]}, "unterminated"))),
])
def test_bad_prompts_are_named(tmp_path, record, message):
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path / "p.jsonl", [PROMPTS[0], record]))


def test_inputs_are_joined_to_the_instructions_as_the_answers_have_them(tmp_path):
    """Two prompts with one instruction and other inputs are two."""
    prompts = [{"instruction": "Greet:", "input": name, "constraints": [NO_COMMA]}
               for name in ("Ann", "Bob", None)]
    path = write(tmp_path / "p.jsonl", prompts)
    made = generate.answers(generate.load_prompts(path, 0), ["Hello Ann.", "Hi, Bob.", "Hi."], "m")
    assert read_prompts(path)[1]["instruction"] == "Greet:\nBob"
    assert named_answers([write(tmp_path / "answers.json", made)], read_prompts(path)) == {
        "m": ["Hello Ann.", "Hi, Bob.", "Hi."]}
    with pytest.raises(InputError, match="record 3: field 'instruction' repeats"):
        read_prompts(write(tmp_path / "p.jsonl", [*prompts, prompts[0]]))
    with pytest.raises(InputError, match="record 0: field 'input' is"):
        read_prompts(write(tmp_path / "p.jsonl", [{**prompts[0], "input": 3}]))


def test_models_are_named_by_generator_and_never_confused(files, tmp_path):
    (tmp_path / "other").mkdir()
    same_name = answer_file(tmp_path / "other" / "base.json", BETTER)
    assert list(named_answers([files[1], files[2]], PROMPTS)) == ["base", "cut"]
    assert list(named_answers([files[1], same_name], PROMPTS)) == ["base", same_name]
    with pytest.raises(InputError, match="twice"):
        named_answers([files[1], same_name, same_name], PROMPTS)
