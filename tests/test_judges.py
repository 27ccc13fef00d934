"""The judges behind one protocol. Run: pytest tests/test_judges.py -n0"""

import csv
import json
from pathlib import Path

import pytest
from fault_server import FaultServer

from lm.judges import HumanJudge, LocalJudge, Question, RuleJudge, ServerJudge
from lm.models import load_model, load_tokenizer
from lm.records import InputError
from lm.rules import judge_by_rules
from lm.server import Server
from lm.verdicts import JudgePrompt, load_judge_prompt

NO_COMMA = [{"kind": "punctuation:no_comma", "kwargs": {}}]


def question(number: int, **record) -> Question:
    return Question.of({"instruction": f"Q{number}.", "output": f"A, {number}", **record})


def test_a_question_joins_instruction_and_input():
    asked = Question.of({"instruction": "Sing", "input": "la", "output": "lo", "id": 7})
    assert (asked.instruction, asked.response, asked.record["id"]) == ("Sing\nla", "lo", 7)


def test_rules():
    asked = {3: question(1, constraints=NO_COMMA), 5: Question("Q.", "Fine", {
        "instruction": "Q.", "constraints": NO_COMMA})}
    judgments = dict(RuleJudge(seed=4)(asked))
    assert judgments[3].text == judge_by_rules(asked[3].record, "A, 1", 4)
    assert judgments[5].text is None and judgments[5].status == "ok"


def test_server_judge_asks_with_the_prompt_and_forgets_what_is_useless(tmp_path):
    answers = {"Q0.": "perfect", "Q1.": "Too short.", "Q2.": "I'm sorry, I can't."}
    with FaultServer(answer=lambda text: next(a for q, a in answers.items() if q in text)) as http:
        server = Server("m", http.url, cache=str(tmp_path))
        judge = ServerJudge(server, load_judge_prompt("annotator"), max_new_tokens=9, seed=3)
        asked = {index: question(index) for index in range(3)}
        judgments = dict(judge(asked))
        assert [judgments[i].text for i in range(3)] == [None, "Too short.", None]
        assert [judgments[i].status for i in range(3)] == ["ok", "ok", "failed"]
        assert judgments[2].raw == "I'm sorry, I can't."
        body = next(body for body in http.bodies if "Q1." in str(body))
        assert "A, 1" in body["messages"][1]["content"] and body["messages"][0]["role"] == "system"
        assert (body["max_tokens"], body["temperature"], body["seed"]) == (9, 0.0, 3)
        assert len(dict(judge(asked))) == 3
        assert len(http.asked) == 4 and "Q2." in http.asked[-1]  # the refusal only
        dict(ServerJudge(server, judge.prompt, max_new_tokens=9)(asked))
        assert len(http.asked) == 7 and "seed" not in http.bodies[-1]  # another seed asks anew


def test_local_judge_reads_replies_of_the_model(tiny_llama):
    """What a random model says is no judgment; that of a prompt, it says whatever the batch."""
    model, tokenizer = load_model(str(tiny_llama)), load_tokenizer(str(tiny_llama))
    prompt = load_judge_prompt("ai_judge")
    asked = {index: question(index) for index in (1, 4, 6)}
    judgments = dict(LocalJudge(model, tokenizer, prompt, max_new_tokens=6)(asked))
    assert set(judgments) == set(asked)
    assert all(judgment.status == "failed" and judgment.raw for judgment in judgments.values())
    alone = dict(LocalJudge(model, tokenizer, prompt, max_new_tokens=6, batch_tokens=1)(asked))
    assert alone == judgments


def test_a_prompt_that_is_too_long_fails_alone(tiny_llama):
    model, tokenizer = load_model(str(tiny_llama)), load_tokenizer(str(tiny_llama))
    asked = {0: Question("Q", "word " * 1500), 1: question(1)}
    judgments = dict(LocalJudge(model, tokenizer, load_judge_prompt("ai_judge"), 6)(asked))
    assert "too many for the judge's context of 1024" in judgments[0].error
    assert judgments[1].raw


def test_local_chat_judge_uses_the_models_chat_template(tiny_llama):
    model, tokenizer = load_model(str(tiny_llama)), load_tokenizer(str(tiny_llama))
    prompt = JudgePrompt("p", "perfect", "{instruction}{response}", system="S")
    with pytest.raises(InputError, match="no chat template"):
        dict(LocalJudge(model, tokenizer, prompt, 4)({0: question(0)}))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    assert len(dict(LocalJudge(model, tokenizer, prompt, 4)({0: question(0)}))) == 1


def fill_in(sheet: Path, words: dict[str, str], delimiter: str = ",") -> None:
    """What a person does with a spreadsheet program."""
    rows = list(csv.DictReader(sheet.read_text(encoding="utf-8-sig").splitlines()))
    with open(sheet, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, "judgment": words.get(row["instruction"], "")} for row in rows)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_human_fills_in_a_csv(tmp_path, delimiter):
    sheet = tmp_path / "new" / "sheet.csv"
    judge, asked = HumanJudge(sheet), {index: question(index) for index in range(3)}
    first = dict(judge(asked))
    assert all("not filled in yet" in judgment.error for judgment in first.values())
    fill_in(sheet, {"Q0.": "Perfect", "Q1.": ' Too "short", and wrong. ',
                    "Q2.": "Sorry, off topic."}, delimiter)
    second = dict(judge(asked))
    assert [second[i].text for i in range(3)] == [
        None, 'Too "short", and wrong.', "Sorry, off topic."]  # people do not refuse
    before = sheet.read_bytes()
    dict(judge(asked))
    assert sheet.read_bytes() == before
    assert dict(judge({0: question(1), 1: question(9)}))[0].text == 'Too "short", and wrong.'
    assert dict(judge(asked))[1].text == 'Too "short", and wrong.'  # a row more, none lost


def test_a_sheet_runs_nothing_in_a_spreadsheet(tmp_path):
    sheet = tmp_path / "sheet.csv"
    dict(HumanJudge(sheet)({0: Question("=1+1", '=HYPERLINK("http://x")\nline two')}))
    with open(sheet, encoding="utf-8-sig", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["instruction"] == "'=1+1" and row["response"].startswith("'=H")
    assert row["response"].endswith("\nline two")


def test_human_fills_in_a_jsonl(tmp_path):
    sheet = tmp_path / "sheet.jsonl"
    judge, asked = HumanJudge(sheet), {0: question(0), 1: question(1)}
    dict(judge(asked))
    rows = [json.loads(line) for line in sheet.read_text().splitlines()]
    rows[1]["judgment"] = "Wrong."
    sheet.write_text("\n".join(map(json.dumps, rows)))
    judgments = dict(judge(asked))
    assert judgments[0].error and judgments[1].text == "Wrong."


def test_a_sheet_without_its_columns_is_an_error(tmp_path):
    (tmp_path / "sheet.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"sheet\.csv: record 0: field 'key' is missing"):
        dict(HumanJudge(tmp_path / "sheet.csv")({0: question(0)}))
