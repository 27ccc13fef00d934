"""Shepherd and the summarization critiques become CUT records; disagreements are clear lines."""

import gzip
import json

import pytest

from lm.records import InputError
from scripts.convert2alpaca import from_critiques, from_shepherd, from_ultrafeedback, main

QUESTIONS = [("2 + 2?", "5\n", "It is 4.", "4"), ("Is ice cold?", "No", "It is.", "Yes")]


def write_lines(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return str(path)


def shepherd_lines():
    model = [{"id": 10 + k, "dataset": "d", "question": q, "answer": a, "feedback": f}
             for k, (q, a, f, _) in enumerate(QUESTIONS)]
    raw = [{"id": 10 + k, "metadata": {"context": q, "output_candidate": a, "output_correct": c}}
           for k, (q, a, _, c) in enumerate(QUESTIONS)]
    return model, raw


def critique(text, refinement):
    return {"text": text, "refinement": refinement}


def answer(text, critiques=(), **feedback):
    return {"answer": text, "critiques": list(critiques), "feedback": feedback}


def convert(tmp_path, *questions, suffix=".jsonl"):
    line = {"id": "p7", "passage": {"text": "A passage."}, "questions": list(questions)}
    return from_critiques(write_lines(tmp_path / f"critiques{suffix}", [line]))


def question(*answers, **more):
    return {"question": "What is it?", "answers": list(answers), **more}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_shepherd_record_has_feedback_as_judgment_and_correction(tmp_path, suffix):
    model, raw = shepherd_lines()
    records = from_shepherd(write_lines(tmp_path / f"m{suffix}", model),
                            write_lines(tmp_path / f"r{suffix}", raw))
    assert records == [
        {"id": 10, "instruction": "2 + 2?", "input": "", "output": "5\n", "judgment": "It is 4.",
         "score": 1, "i_ans": "4"},
        {"id": 11, "instruction": "Is ice cold?", "input": "", "output": "No",
         "judgment": "It is.", "score": 1, "i_ans": "Yes"}]


@pytest.mark.parametrize(("field", "value", "message"), [
    ("context", "Is fire cold?", r"m\.jsonl: record 1: field 'question'.*context.*r\.jsonl"),
    ("output_candidate", "No ", r"m\.jsonl: record 1: field 'answer'.*output_candidate"),
    ("output_correct", None, r"r\.jsonl: record 1: field 'metadata\.output_correct' is null"),
])
def test_shepherd_files_that_disagree_are_named_with_the_record(tmp_path, field, value, message):
    model, raw = shepherd_lines()
    raw[1]["metadata"][field] = value
    with pytest.raises(InputError, match=message):
        from_shepherd(write_lines(tmp_path / "m.jsonl", model),
                      write_lines(tmp_path / "r.jsonl", raw))


def test_shepherd_files_of_unequal_length_are_refused(tmp_path):
    model, raw = shepherd_lines()
    with pytest.raises(InputError, match=r"m\.jsonl has 2 records and .*r\.jsonl 1;"):
        from_shepherd(write_lines(tmp_path / "m.jsonl", model),
                      write_lines(tmp_path / "r.jsonl", raw[:1]))


def test_best_ranked_answer_with_joined_critiques_and_last_refinement(tmp_path):
    best = answer("Good.", [critique("Too short.", "First."), critique("Dull.", "Last.")])
    records, skipped = convert(tmp_path, question(answer("Bad."), best, rankings=[1, 3]),
                               suffix=".jsonl.gz")
    assert not skipped
    assert records == [
        {"id": "p7-0", "instruction": "A passage.\nWhat is it?", "input": "", "output": "Good.",
         "judgment": "Too short. Dull.", "score": 1, "i_ans": "Last."}]


@pytest.mark.parametrize("rankings", [
    {"rankings": [2, 2, 1]}, {"feedback": {"rankings": [5, 5, 4]}}])
def test_the_first_of_equals_wins_wherever_rankings_stand(tmp_path, rankings):
    records, _ = convert(tmp_path, question(answer("a"), answer("b"), answer("c"), **rankings))
    assert [record["output"] for record in records] == ["a"]


def test_each_answer_may_carry_its_own_ranking(tmp_path):
    records, _ = convert(tmp_path, question(answer("a", rankings=1), answer("b", rankings=2)))
    assert [record["output"] for record in records] == ["b"]


@pytest.mark.parametrize("critiques", [[], None])
def test_no_critiques_is_a_positive_of_score_seven(tmp_path, critiques):
    records, _ = convert(tmp_path, question({"answer": "Fine.", "critiques": critiques}))
    assert records == [{"id": "p7-0", "instruction": "A passage.\nWhat is it?", "input": "",
                        "output": "Fine.", "judgment": None, "score": 7}]


def test_skipped_questions_are_counted_by_reason(tmp_path):
    records, skipped = convert(
        tmp_path,
        question(answer("Kept.")),
        question(answer("x", skip=True), answer("not instead", skip=False), rankings=[2, 1]),
        question(answer("  ")), question(answer(None)), question(),
        question(answer("x", [critique("Bad.", "Better."), critique("Worse.", "")])),
        question(answer("x", [critique("Bad.", None)])), question(answer("x", [{"text": "Bad."}])))
    assert [record["id"] for record in records] == ["p7-0"]
    assert skipped == {"marked skip": 1, "empty answer": 2, "no answer": 1, "empty refinement": 3}


def test_a_line_may_be_one_question_with_a_plain_passage(tmp_path):
    line = {"passage": "Text.", **question(answer("Fine."))}
    records, _ = from_critiques(write_lines(tmp_path / "c.jsonl", [line, line]))
    assert [(record["id"], record["instruction"]) for record in records] == [
        (0, "Text.\nWhat is it?"), (1, "Text.\nWhat is it?")]


@pytest.mark.parametrize(("bad", "message"), [
    (question(answer("a"), answer("b")), "'rankings' must be a list with a number for each of"),
    (question(answer("a"), answer("b"), rankings=[1]), "a number for each of its 2 answers"),
    (question({"text": "a"}), "answer 0: field 'answer' is missing; expected text or null"),
    (question(answer("a", [{"refinement": "b"}])), "critique 0: field 'text' is missing"),
    (question(answer("a", ["Bad."])), "field 'critiques' holds text at position 0"),
    ({"answers": [answer("a")]}, "field 'question' is missing; expected text"),
    ({**question(answer("a")), "answers": "a"}, "field 'answers' is text; expected a list or null"),
    (question({"answer": "a"}), "answer 0: field 'critiques' is missing"),  # not a silent positive
])
def test_unexpected_critiques_are_named_with_file_record_and_question(tmp_path, bad, message):
    where = r"critiques\.jsonl: record 0: question 1: .*"
    with pytest.raises(InputError, match=where + message):
        convert(tmp_path, question(answer("Fine.")), bad)


def rated(instruction, *ratings):
    """UltraFeedback's record: responses whose two ratings are alike."""
    return {"instruction": instruction, "completions": [
        {"response": f"{instruction} {place}", "annotations": {
            name: {"Rating": rating} for name in ("helpfulness", "honesty")}}
        for place, rating in enumerate(ratings)]}


def test_every_rated_response_becomes_a_record_with_its_reward(tmp_path):
    write_lines(tmp_path / "a.jsonl", [rated("Sing.", "5", "N/A", "2")])
    write_lines(tmp_path / "b.jsonl", [rated("Dance.", "3")])
    records, skipped = from_ultrafeedback(str(tmp_path), 0)
    assert sorted((one["output"], one["score"]) for one in records) == [
        ("Dance. 0", 3.0), ("Sing. 0", 5.0), ("Sing. 2", 2.0)]
    assert {one["judgment"] for one in records} == {None} and skipped["unrated"] == 1


def test_a_limit_counts_instructions_and_must_be_there(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [rated(f"{n}.", "4", "1") for n in range(9)])
    records, _ = from_ultrafeedback(file, 2)
    assert len(records) == 4 and len({one["instruction"] for one in records}) == 2
    assert records == from_ultrafeedback(file, 2)[0]
    with pytest.raises(InputError, match=r"limit is 10; .* has 9 instructions"):
        from_ultrafeedback(file, 10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no \.jsonl file"):
        from_ultrafeedback(str(tmp_path / "empty"), 0)


def test_command_writes_a_list_and_a_summary(tmp_path, run_cli):
    lines = [{"passage": "Text.", **question(answer("Fine."))},
             {"passage": "Text.", **question(answer("x", [critique("Bad.", "Better.")]))},
             {"passage": "Text.", **question(answer("x", skip=True))}]
    output = tmp_path / "new" / "out.json"
    done = run_cli("scripts/convert2alpaca.py", "--output", output,
                   "--critiques", write_lines(tmp_path / "c.jsonl.gz", lines))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (f"{output}: 2 records (1 positive, 1 negative); "
                           "skipped: 1 marked skip\n")
    assert [record["judgment"] for record in json.loads(output.read_text())] == [None, "Bad."]


@pytest.mark.parametrize(("flags", "message"), [
    ({}, "--output is missing"),
    ({"output": "o.json"}, "give either --critiques, or both"),
    ({"output": "o.json", "shepherd_model": "m"}, "give either --critiques, or both"),
    ({"output": "o.json", "critiques": "c", "shepherd_raw": "r"}, "give either --critiques, or"),
    ({"output": "o.json", "critiques": "c", "limit": 9}, "--limit is for --ultrafeedback alone"),
])
def test_wrong_combinations_of_flags_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        main(**flags)


def test_nothing_is_written_when_everything_was_skipped(tmp_path):
    file = write_lines(tmp_path / "c.jsonl", [{"passage": "T", **question(answer(""))}])
    with pytest.raises(InputError, match=r"every question was skipped \(1 empty answer\)"):
        main(critiques=file, output=str(tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()
