"""A JSFT model's own rationale as the judgment. Run: pytest tests/test_self_judge_annotator.py"""

import json

import pytest
import torch
import yaml
from tiny_judge import tiny_model, tiny_tokenizer

from lm.judges import Question
from lm.records import InputError, read_records
from preprocess import judgments
from scripts import annotate
from self_judge.annotator import JsftJudge, clearest, read_evaluation
from self_judge.judgment import Pair, Probabilities, judgment_of
from self_judge.preferences import Pair as Preference
from self_judge.preferences import context_text
from self_judge.rows import row_of
from self_judge.templates import load_templates

USER = "{context}\nA: {response_a}\nB: {response_b}\n"
SECTION = {
    "chat": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "judge": {name: {"system": None, "user": USER + question, "assistant": "The better answer is"}
              for name, question in (("help", "Helps?"), ("honesty", "Honest?"))},
    "decision_rationale": {"decision": " {decision}",
                           "rationale": "\nA: {evaluation_a}\nB: {evaluation_b}"}}
TEMPLATES = load_templates(SECTION)
# Under each principle: what is said of the better answer, "red", and of the worse one, "no".
SAID = {"help": ("Right.", "It is rude."), "honesty": ("Sure.", "It hides.")}


@pytest.fixture(scope="module")
def trained():
    """A tiny model that has learnt the rationales of one pair by heart, in both orders."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    context = context_text([{"role": "user", "content": "Cat?"}])
    rows = [row_of(example, TEMPLATES, tokenizer, 512) for principle, said in SAID.items()
            for example in judgments(Preference(principle, [], context, "red", "no", said),
                                     TEMPLATES)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        for row in rows:
            labels = [token if learnt else -100 for token, learnt
                      in zip(row["input_ids"], row["completion_mask"], strict=True)]
            loss = model(input_ids=torch.tensor([row["input_ids"]]),
                         labels=torch.tensor([labels])).loss
            (loss / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def question(response: str, other: str) -> Question:
    return Question("Cat?", response, {"other": other})


def test_the_worse_response_gets_what_the_rationale_says_of_it(trained):
    judge = JsftJudge(*trained, TEMPLATES, max_new_tokens=40)
    found = dict(judge({4: question("no", "red"), 7: question("red", "no"),
                        9: question("red", "red")}))
    assert set(found) == {4, 7, 9}
    assert found[4].text in {said[1] for said in SAID.values()} and found[4].status == "ok"
    assert found[4].raw.startswith(f"\nA: {found[4].text}\nB: ")
    assert found[7].text is None and found[7].status == "ok"
    assert "same text" in found[9].error


def test_the_model_is_asked_as_it_was_trained(trained):
    """The prompt and its decision are the first ids of the training row."""
    judge = JsftJudge(*trained, TEMPLATES, max_new_tokens=40)
    pair = Pair(context_text([{"role": "user", "content": "Cat?"}]), "no", "red")
    (verdict,) = judge._compare({0: pair})
    (row,) = [row_of(example, TEMPLATES, trained[1], 512)
              for example in judgments(Preference(clearest(verdict), [], pair.context, "red", "no",
                                                  ("x", "y")), TEMPLATES)
              if example["response_a"] == "no"]
    prompt = judge._prompt(pair, verdict)
    assert prompt == row["input_ids"][:len(prompt)]
    assert row["completion_mask"][:len(prompt)] == [0] * (len(prompt) - 1) + [1]

    other_way = load_templates({**SECTION, "decision_rationale": {
        "decision": " {decision}", "rationale": "\n{evaluation_b}\n{evaluation_a}"}})
    asked = trained[1].decode(JsftJudge(*trained, other_way, 40)._prompt(pair, verdict))
    assert "A: red\nB: no\n" in asked and asked.endswith("The better answer is A")


def test_cut_rationales_and_long_prompts_have_failed_alone(trained):
    judge = JsftJudge(*trained, TEMPLATES, max_new_tokens=3)
    found = dict(judge({0: question("no", "red"), 1: question("no " * 900, "red"),
                        2: question("red", "no")}))
    assert "no evaluation of the trained form" in found[0].error and found[0].raw
    assert "too long" in found[1].error and found[1].text is None
    assert found[2].status == "ok"


def test_the_principle_by_which_the_first_response_falls_behind_most():
    behind = {"help": Probabilities(0.4, 0.6, 0.6, 0.4),
              "honesty": Probabilities(0.1, 0.9, 0.9, 0.1),
              "truth": Probabilities(0.9, 0.1, 0.1, 0.9)}
    assert clearest(judgment_of(Pair("c", "a", "b"), behind)) == "honesty"


@pytest.mark.parametrize(("said", "rationale", "text"), [
    ("\nA: Too long.\nB: Fine.", "\nA: {evaluation_a}\nB: {evaluation_b}", "Too long."),
    ("A: Two\nlines.\nB:", "\nA: {evaluation_a}\nB: {evaluation_b}", "Two\nlines."),
    ("\nToo long.\nFine.", "\n{evaluation_a}\n{evaluation_b}", "Too long."),
    ("\n[x] (1)? [y] (2)?", "\n[x] {evaluation_b} [y] {evaluation_a}", "(1)?"),
    ("\nA: Perfect for children only.\nB: b", "\nA: {evaluation_a}\nB: {evaluation_b}",
     "Perfect for children only."),
    ("\nA: Too long.", "\nA: {evaluation_a}\nB: {evaluation_b}", None),
    ("\nToo long.\nB: Fine.", "\nA: {evaluation_a}\nB: {evaluation_b}", None),
    ("\nA: Too long.\nA: Short.\nB: Fine.", "\nA: {evaluation_a}\nB: {evaluation_b}", None),
    ("\nA: \nB: Fine.", "\nA: {evaluation_a}\nB: {evaluation_b}", None),
    ("", "\n{evaluation_a}\n{evaluation_b}", None)])
def test_what_is_read_of_a_rationale(said, rationale, text):
    judgment = read_evaluation(said, rationale)
    assert judgment.text == text and judgment.raw == said
    assert judgment.status == ("failed" if text is None else "ok")


@pytest.fixture
def files(trained, tmp_path) -> dict[str, str]:
    """Two files of responses, and the folder of the model as train_jsft.py leaves it."""
    for part in trained:
        part.save_pretrained(tmp_path / "jsft")
    (tmp_path / "jsft" / "config.yaml").write_text(yaml.safe_dump({"templates": SECTION}))
    for name, outputs in (("one", ["no", "red", "red"]), ("two", ["red", "no", "red"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(
            [{"instruction": "Cat?", "output": output, "id": place}
             for place, output in enumerate(outputs)]))
    return {"data_path": str(tmp_path / "one.json"), "other_path": str(tmp_path / "two.json"),
            "output_path": str(tmp_path / "out.json"), "judge": "jsft",
            "model": str(tmp_path / "jsft"), "max_new_tokens": 40}


def test_annotate_with_a_jsft_model(files, capsys):
    with pytest.raises(SystemExit, match="1"):  # the third pair is one text twice
        annotate.main(**files)
    found = read_records(files["output_path"])
    assert [record["id"] for record in found] == [0, 1]
    assert found[0]["judgment"] in {said[1] for said in SAID.values()}
    assert found[1]["judgment"] is None and found[1]["other"] == "no"
    annotate.main(**{**files, "max_failed": 0.4})
    assert "2 of 3 are judged already" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "message"), [
    ({"other_path": ""}, "needs --other_path"),
    ({"model": ""}, "--judge jsft needs --model: its folder"),
    ({"template": "none.yaml"}, r"no such file none\.yaml"),
    ({"template": "configs/templates/judge_hh.yaml"}, "not trained to say why")])
def test_what_the_judge_cannot_do_without_is_named(files, change, message):
    with pytest.raises(InputError, match=message):
        annotate.main(**{**files, **change})


def test_other_responses_must_be_to_the_same_instructions(files):
    others = read_records(files["other_path"])
    for wrong in (others[:2], [*others[:2], {**others[2], "instruction": "Dog?"}]):
        with open(files["other_path"], "w") as file:
            json.dump(wrong, file)
        with pytest.raises(InputError, match=r"two\.json: record 2: is not a response to the "
                                             r"instruction of record 2"):
            annotate.main(**files)
