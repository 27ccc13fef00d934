"""What the AI judge learns, and how it is measured. Run: pytest tests/test_ai_judge.py -n0"""

import json

import pytest

from lm.records import InputError, read_records
from lm.verdicts import load_judge_prompt
from scripts import annotate, evaluate_ai_judge, make_judge_data

PROMPT = load_judge_prompt("ai_judge")


def write(path, records) -> str:
    path.write_text(json.dumps(records))
    return str(path)


@pytest.fixture
def known(tmp_path) -> str:
    """Two responses to each of ten instructions; one judgment has failed."""
    return write(tmp_path / "known.json", [
        {"instruction": f"Say {number // 2}.", "input": "la" if number == 4 else "",
         "output": f"Answer {number}.", "judgment":
         "$ERROR$" if number == 7 else None if number % 3 else f"Wrong {number}."}
        for number in range(20)])


def test_what_is_learnt_is_the_prompt_and_a_judgment_that_is_read_back(known, tmp_path, capsys):
    make_judge_data.main(known, str(tmp_path / "new" / "data"), held_out=4)
    train = read_records(tmp_path / "new/data/train.json")
    held_out = read_records(tmp_path / "new/data/held_out.json")
    assert len(train) + len(held_out) == 19 and len(held_out) in (4, 5)
    assert "1 failed judgments left out" in capsys.readouterr().out
    expected = {PROMPT.render(record["instruction"] + ("\nla" if record["input"] else ""),
                              record["output"]): record["judgment"]
                for record in read_records(known) if record["judgment"] != "$ERROR$"}
    for record in train:
        assert record["judgment"] is None and not record["input"]
        assert PROMPT.read(record["output"]).text == expected[record["instruction"]]
    assert {record["output"].splitlines()[-1] for record in train} == {"Yes.", "No."}
    asked = {record["instruction"] for record in held_out}
    assert all(f"### Instruction:\n{instruction}\n" not in record["instruction"]
               for instruction in asked for record in train)
    assert {*map(str, expected.values())} >= {str(record["judgment"]) for record in held_out}


def test_less_data_is_part_of_more_and_the_held_out_part_stays(known, tmp_path, capsys):
    found = {}
    for limit in (0, 10, 5):
        make_judge_data.main(known, str(tmp_path / str(limit)), held_out=4, limit=limit)
        found[limit] = [read_records(tmp_path / str(limit) / f"{name}.json")
                        for name in ("train", "held_out")]
    assert "only" not in capsys.readouterr().out
    make_judge_data.main(known, str(tmp_path / "more"), held_out=4, limit=99)
    assert read_records(tmp_path / "more/train.json") == found[0][0]
    assert f"note: --limit 99, but only {len(found[0][0])} are left\n" in capsys.readouterr().out
    assert found[5][0] == found[10][0][:5] == found[0][0][:5] and len(found[10][0]) == 10
    assert found[5][1] == found[10][1] == found[0][1]
    make_judge_data.main(f"{known},{known}", str(tmp_path / "twice"), held_out=4)
    assert len(read_records(tmp_path / "twice/train.json")) >= 30


def test_settings_are_chosen_on_responses_that_are_neither_learnt_nor_held_out(known, tmp_path):
    parts = {}
    for split in ("heldout", "validation"):
        make_judge_data.main(known, str(tmp_path / split), held_out=4, split=split)
        parts[split] = [read_records(tmp_path / split / f"{name}.json")
                        for name in ("train", "held_out")]
    (learnt, apart), (less, validation) = parts["heldout"], parts["validation"]
    assert len(validation) >= 4 and len(less) + len(validation) == len(learnt)
    assert {record["instruction"] for record in validation}.isdisjoint(
        record["instruction"] for record in apart)
    assert {PROMPT.render(record["instruction"], record["output"]) for record in validation} == {
        record["instruction"] for record in learnt} - {record["instruction"] for record in less}


@pytest.mark.parametrize(("change", "message"), [
    ({"split": "train"}, "--split train: expected heldout or validation"),
    ({"held_out": 10, "split": "validation"}, r"leaves nothing of [89] responses"),
    ({"held_out": 19}, "--held_out 19 leaves nothing of 19 responses"),
    ({"held_out": 0}, "1 or more"), ({"limit": -1}, "must be 0"),
    ({"template": "annotator"}, "has no target to learn")])
def test_bad_flags_are_one_line(known, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        make_judge_data.main(known, str(tmp_path), **change)


def judge(tmp_path, truth: str, said: list, records=None) -> str:
    """What annotate.py leaves: a text, None for perfect, or "!" for a failure."""
    lines = [{"judge": "local", "model": "m"}]
    contents = annotate.contents_of("local", records or read_records(truth))
    for index, (content, text) in enumerate(zip(contents, said, strict=False)):
        about = {"index": index, "content": content}
        lines += [{**about, "status": "failed", "judgment": None, "error": "e", "raw": "r"},
                  {**about, "status": "failed" if text == "!" else "ok", "error": "",
                   "judgment": None if text == "!" else text, "raw": text or "Yes."}]
    (tmp_path / "judged.json.judgments.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "judged.json")


def test_what_cannot_be_read_is_not_right(tmp_path, capsys):
    """Of six known, four are perfect. One is not read; 2 of the 4 and 1 of the others are right."""
    truth = write(tmp_path / "truth.json", [
        {"instruction": f"Q{number}", "output": "O", "judgment": text}
        for number, text in enumerate([None, None, None, None, "Bad.", "Worse."])])
    judged = judge(tmp_path, truth, [None, None, "Hm.", "!", "Awful.", None])
    evaluate_ai_judge.main(truth, judged, str(tmp_path / "r.json"), show=6)
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert {name: (share["hits"], share["total"]) for name, share in metrics.items()} == {
        "readable": (5, 6), "right": (3, 6), "right_perfect": (2, 4), "right_faulty": (1, 2),
        "majority": (4, 6)}
    printed = capsys.readouterr().out
    assert "m, 6 known judgments" in printed and "83.3" in printed
    assert "      known  Worse." in printed and "      judge  (nothing is wrong)" in printed


def test_judgments_of_other_records_or_of_some_are_refused(tmp_path):
    truth = write(tmp_path / "truth.json", [{"instruction": "Q", "output": "O", "judgment": None},
                                            {"instruction": "R", "output": "O", "judgment": "x"}])
    with pytest.raises(InputError, match=r"record 1 of .* and 0 more are not judged there"):
        evaluate_ai_judge.main(truth, judge(tmp_path, truth, [None]))
    with pytest.raises(InputError, match=r"record 0 of .* and 1 more are not judged there"):
        evaluate_ai_judge.main(truth, judge(tmp_path, truth, [None, None], [
            {"instruction": word, "output": "O"} for word in ("S", "T")]))


def test_failed_annotations_are_not_known_and_half_a_line_is_not_read(tmp_path, capsys):
    """Four known, two failed; the last line of the journal was being written when a kill came."""
    truth = write(tmp_path / "truth.json", [
        {"instruction": f"Q{number}", "output": "O", "judgment": text}
        for number, text in enumerate([None, "$ERROR$", "Bad.", " ", None, "Worse."])])
    judged = judge(tmp_path, truth, [None, None, "Awful.", "Hm.", None, None])
    with open(f"{judged}.judgments.jsonl", "a") as journal:
        journal.write('{"index": 0, "conte')
    evaluate_ai_judge.main(truth, judged, str(tmp_path / "r.json"))
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert {name: (share["hits"], share["total"]) for name, share in metrics.items()} == {
        "readable": (4, 4), "right": (3, 4), "right_perfect": (2, 2), "right_faulty": (1, 2),
        "majority": (2, 4)}
    assert "truth.json: 2 failed judgments left out" in capsys.readouterr().out


def test_no_judgments_is_one_line(tmp_path):
    truth = write(tmp_path / "truth.json", [{"instruction": "Q", "output": "O",
                                             "judgment": "$ERROR$"}])
    with pytest.raises(InputError, match=r"judgments.jsonl: no such file; run annotate.py"):
        evaluate_ai_judge.main(truth, str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="no record has a judgment"):
        evaluate_ai_judge.main(truth, judge(tmp_path, truth, ["Bad."]))
