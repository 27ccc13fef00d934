"""Two turns, answered by a tiny model and by a server.

    python -m pytest tests/test_generate_dialogues.py -n0
"""

import json

import pytest
from fault_server import FaultServer

from lm.generation import generate
from lm.models import load_model, load_tokenizer
from lm.records import InputError
from lm.templates import load_template
from scripts import generate_dialogues
from scripts.generate_dialogues import main, read_questions, steps, template_text, write

QUESTIONS = [
    {"question_id": 81, "category": "math", "turns": ["Add {one} and one.", "And one more?"],
     "reference": ["2", "3"]},
    {"question_id": 82, "category": "writing", "turns": ["Name a colour.", "Another one?"]},
    {"question_id": 83, "category": "generic", "turns": ["Say that is all."]},
]
JINJA = "configs/templates/chat.jinja"


@pytest.fixture
def questions(tmp_path) -> str:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return str(path)


@pytest.fixture
def flags(questions, tmp_path, tiny_llama) -> dict:
    return {"base_model_name_or_path": str(tiny_llama), "data_path": questions,
            "output_path": str(tmp_path / "out" / "answers.json"), "max_new_tokens": 5}


def answers(flags) -> list[dict]:
    with open(flags["output_path"]) as file:
        return json.load(file)


def messages(*texts: str) -> list[dict]:
    return [{"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


def test_a_dialogue_in_alpacas_frame():
    alpaca = load_template("alpaca")
    first, later = alpaca.render("Add {one}.").split("### ", 1)[0], "### Instruction:\n"
    text = write(alpaca.chat_template(), messages("Add {one}.", "1 {instruction}", "More?"))
    assert text == (f"{first}{later}Add {{one}}.\n\n### Response:\n1 {{instruction}}\n\n"
                    f"{later}More?\n\n### Response:\n")
    ended = write(alpaca.chat_template(), messages("a", "b", "c"), eos_token="</s>")
    assert "### Response:\nb</s>\n\n### Instruction:\nc" in ended
    assert write(alpaca.chat_template(), messages("Hi '\"\\ {{ x }}")) == alpaca.render(
        "Hi '\"\\ {{ x }}")


def test_replies_are_those_to_the_whole_dialogue(flags, tiny_llama):
    """Each reply by hand, one at a time; greedy, so that a batch changes nothing."""
    main(**flags, temperature=0.0)
    model, tokenizer = load_model(str(tiny_llama)), load_tokenizer(str(tiny_llama))
    alpaca = load_template("alpaca")
    for question, answer in zip(QUESTIONS, answers(flags), strict=True):
        assert {key: answer[key] for key in question} == question
        assert answer["generator"] == tiny_llama.name
        said = []
        for turn, asked in enumerate(question["turns"]):
            history = [text for pair in zip(question["turns"], said, strict=False)
                       for text in pair]
            prompt = write(alpaca.chat_template(), messages(*history, asked), eos_token="</s>")
            (_, response), = generate(model, tokenizer, [prompt], max_new_tokens=5)
            said.append(response.text.strip())
            assert answer["outputs"][turn] == said[-1]


def test_categories_have_mt_benchs_temperatures():
    """Those that MT-Bench does not know have its default; a given one is everybody's."""
    assert list(steps(QUESTIONS, -1.0, {})) == [
        (0, 0.0, [0]), (0, 0.7, [1, 2]), (1, 0.0, [0]), (1, 0.7, [1])]
    assert list(steps(QUESTIONS, 0.3, {(0, 0): {}, (0, 1): {}, (2, 0): {}})) == [
        (0, 0.3, [1]), (1, 0.3, [1])]


def test_a_stop_between_replies_changes_nothing(flags, monkeypatch):
    main(**flags)
    whole = answers(flags)
    original, left = generate_dialogues.append, [2]

    def append(file, line):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        original(file, line)

    monkeypatch.setattr(generate_dialogues, "append", append)
    with pytest.raises(KeyboardInterrupt):
        main(**flags, overwrite=True)
    monkeypatch.setattr(generate_dialogues, "append", original)
    main(**{**flags, "batch_tokens": 1})
    assert answers(flags) == whole


def test_a_finished_output_is_kept_and_others_are_not_mixed_with_it(flags, capsys):
    main(**flags)
    main(**flags)
    assert "already there" in capsys.readouterr().out
    with pytest.raises(InputError, match="max_new_tokens was 5, is 6"):
        main(**{**flags, "max_new_tokens": 6})


def test_other_templates(flags, tiny_llama):
    """SELF-JUDGE's has an end of text after each reply of the model."""
    main(**flags, template=JINJA, temperature=0.0)
    model, tokenizer = load_model(str(tiny_llama)), load_tokenizer(str(tiny_llama))
    answer = answers(flags)[0]
    first = "### User:\nAdd {one} and one.\n\n### Assistant:\n"
    prompts = [first, f"{first}{answer['outputs'][0]}</s>\n\n### User:\nAnd one more?\n\n"
               "### Assistant:\n"]
    by_hand = dict(generate(model, tokenizer, prompts, max_new_tokens=5))
    assert [by_hand[turn].text.strip() for turn in (0, 1)] == answer["outputs"]
    with pytest.raises(InputError, match="has no chat template"):
        main(**flags, template="chat", overwrite=True)
    with pytest.raises(InputError, match=r"none\.jinja: no such chat template"):
        template_text("none.jinja")


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_a_server_completes_or_chats(flags, template):
    with FaultServer(answer=lambda text: f"reply to {len(text)}") as server:
        main(**flags | {"base_model_name_or_path": "some/model"}, base_url=server.url,
             template=template, concurrency=1)
        main(**flags | {"base_model_name_or_path": "some/model"}, base_url=server.url,
             template=template)
        assert len(server.asked) == 5
    answer = answers(flags)[0]
    (second,) = (body for body in server.bodies if "And one more?" in json.dumps(body))
    dialogue = messages("Add {one} and one.", answer["outputs"][0], "And one more?")
    if template == "chat":
        assert second["messages"] == dialogue
    else:
        assert second["prompt"] == write(load_template("alpaca").chat_template(), dialogue)
    assert answer["generator"] == "model" and second["temperature"] == 0
    with pytest.raises(InputError, match="are for models that run here"):
        main(**flags, base_url="http://localhost:1/v1", template=JINJA)


@pytest.mark.parametrize(("change", "message"), [
    ({"turns": []}, "record 1: field 'turns' must be a list of texts, at least one"),
    ({"turns": ["a", 1]}, "record 1: field 'turns' must be"),
    ({"question_id": 81}, "record 1: field 'question_id' repeats"),
    ({"category": None}, "record 1: field 'category' is null")])
def test_bad_questions(tmp_path, change, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps({**QUESTIONS[1], **change}))
    with pytest.raises(InputError, match=message):
        read_questions(str(path), 0)


def test_missing_questions_name_the_download():
    with pytest.raises(InputError, match=r"download_data\.py vicuna`"):
        read_questions("data/downloads/vicuna/none.jsonl", 0)
