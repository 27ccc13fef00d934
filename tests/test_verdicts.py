"""Judge prompts and the reading of replies. Run: pytest tests/test_verdicts.py -n0"""

import pytest

from lm.records import InputError
from lm.verdicts import load_judge_prompt

ANNOTATOR, AI_JUDGE = load_judge_prompt("annotator"), load_judge_prompt("ai_judge")


@pytest.mark.parametrize("reply", ["perfect", "Perfect.", "PERFECT", " perfect.\n", '"Perfect."',
                                   "**Perfect**", "Perfect. It answers everything."])
def test_replies_that_begin_with_perfect_are_positive(reply):
    judgment = ANNOTATOR.read(reply)
    assert (judgment.text, judgment.status, judgment.raw) == (None, "ok", reply)


@pytest.mark.parametrize("reply", ["The response is not perfect: it is too long.",
                                   "Perfectly polite but wrong.", "It says {response}.",
                                   "Sorrow is misspelt.", "Unfortunately, it is too long.",
                                   "I think that the date is wrong.",
                                   "The response is correct, but too long.",
                                   "No errors in spelling, but two commas.",
                                   "{name} is never replaced, nor is {date}.",
                                   "As a language model, the assistant has eaten no pizza.",
                                   "The response leaves </think>\"Perfect\" in its text",
                                   "It ends with `</think>`", "{}" * 2000 + "x"])
def test_other_replies_are_the_judgment(reply):
    assert ANNOTATOR.read(f" {reply}\n").text == reply


@pytest.mark.parametrize(("reply", "finish_reason", "error"), [
    ("", "stop", "says nothing"), (" ...\n", "stop", "says nothing"),
    ("The response is", "length", "cut off"), ("", "length", "cut off"),
    ("I'm sorry, but I can't assist with that.", "stop", "refuses"),
    ("I’m very sorry, this is harmful.", "stop", "refuses"),
    ("Sorry, I can't help.", "stop", "refuses"), ("I cannot judge this.", "stop", "refuses"),
    ("I am unable to evaluate it.", "stop", "refuses"), ("As an AI, I do not.", "stop", "refuses"),
    ("Unfortunately, I cannot evaluate this response.", "stop", "refuses"),
    ("As a language model, I cannot evaluate it.", "stop", "refuses"),
    ("As an AI developed by OpenAI, I cannot assess that.", "stop", "refuses"),
    ("As a large language model trained by Google, I cannot.", "stop", "refuses"),
    ("I must decline to evaluate this.", "stop", "refuses"),
    *((said, "stop", "names no fault") for said in (
        "Correct.", "Looks good.", "The response is very good.",
        "There are no issues with this response.",
        "The response is perfect.", "It's perfect.", "Response: perfect", "No mistakes.", "N/A",
        "There are no grammatical errors.", "$ERROR$", '{"error": "overloaded"}',
        "{'error': 'overloaded'}")),
    ("<think>It should", "stop", "says nothing"), ("<think>It should", "length", "cut off")])
def test_what_is_no_judgment_has_failed(reply, finish_reason, error):
    judgment = ANNOTATOR.read(reply, finish_reason)
    assert judgment.status == "failed" and error in judgment.error
    assert judgment.text is None and judgment.raw.strip() == reply.strip()


def test_thoughts_are_no_part_of_a_reply():
    for thoughts in ("<think>Is it perfect?\n</think>\n\n", "<THINK></THINK>",
                     "Well.\n</think>\n", "Well.</think>\n\n", "</think>"):
        assert ANNOTATOR.read(f"{thoughts}Perfect.").text is None
        assert ANNOTATOR.read(f"{thoughts}Too long.").text == "Too long."
        assert AI_JUDGE.read(f"{thoughts}Too long.\nNo.").text == "Too long."


@pytest.mark.parametrize(("reply", "text"), [
    ("It is too long.\nNo.", "It is too long."), ("Two\nlines.\n\nno", "Two\nlines."),
    ("The response is perfect.\nYes.", None), ("Yes", None), ("It ends well.\n**Yes.**\n", None)])
def test_decision_of_the_ai_judge(reply, text):
    for finish_reason in ("stop", "length"):  # its last line tells that it is complete
        judgment = AI_JUDGE.read(reply, finish_reason)
        assert (judgment.text, judgment.status) == (text, "ok")


@pytest.mark.parametrize(("reply", "error"), [
    ("It is too long.", "no last line"), ("It should have said no.", "no last line"),
    ("It is too long.\nNo.\nAnd it", "no last line"), ("No.", "says nothing"), ("", "no last line"),
    ("I cannot judge this.\nNo.", "refuses"), ("The response is perfect.\nNo.", "names no fault")])
def test_ai_judge_without_judgment_or_decision_has_failed(reply, error):
    judgment = AI_JUDGE.read(reply)
    assert error in judgment.error and judgment.text is None and judgment.raw == reply


def test_prompts_hold_instruction_and_response_with_braces():
    system, user = ANNOTATOR.render("Print {response}.", "{instruction}")
    assert (system["role"], user["role"]) == ("system", "user") and "perfect" in system["content"]
    assert user["content"] == ("### Instruction:\nPrint {response}.\n\n"
                               "### Response:\n{instruction}")
    text = AI_JUDGE.render("Print {response}.", "{instruction}")
    assert text.endswith("### Instruction:\nPrint {response}.\n\n### Response:\n{instruction}\n\n"
                         "### Judgment:\n")


@pytest.mark.parametrize("judgment", [None, "Too long.", "Line one.\nLine {two}."])
def test_what_the_ai_judge_learns_is_read_as_it_was_meant(judgment):
    learnt = AI_JUDGE.completion(judgment)
    assert learnt.endswith("\nYes." if judgment is None else f"{judgment}\nNo.")
    assert AI_JUDGE.read(learnt).text == judgment


@pytest.mark.parametrize(("text", "message"), [
    ("verdict: maybe", "verdict is perfect or yes_no"),
    ("verdict: perfect\nsystem: a\nuser: '{instruction}'", "'user' must hold .*{response}"),
    ("verdict: perfect\nsystem: a\nuser: '{instruction} {response} {instruction}'", "once each"),
    ("verdict: perfect\nsystem: 7\nuser: '{instruction} {response}'", "all with texts"),
    ("verdict: [", "broken YAML")])
def test_wrong_judge_prompt_is_one_line(text, message, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"p\.yaml: .*{message}") as error:
        load_judge_prompt(str(tmp_path / "p.yaml"))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="anotator: no such prompt"):
        load_judge_prompt("anotator")
