"""Two turns, answered by a tiny model and by a server.

    python -m pytest tests/test_generate_dialogues.py -n0
"""

import json
from pathlib import Path

import pytest
from fault_server import FaultServer

from lm.generation import generate
from lm.journal import digest
from lm.models import load_model, load_tokenizer
from lm.records import InputError
from lm.templates import load_template
from scripts import generate_dialogues
from scripts.generate_dialogues import (
    finished,
    main,
    read_questions,
    steps,
    template_text,
    write,
)

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


@pytest.mark.parametrize("temperature", [-1.0, 0.0])
def test_only_new_questions_are_answered_wherever_the_others_stand(flags, temperature):
    """One added, one removed, the others moved: first after a stop, then after the end."""
    new = {"question_id": 84, "category": "stem", "turns": ["Is it so?", "And why?"]}
    first, second, third = QUESTIONS
    flags |= {"base_model_name_or_path": "m", "temperature": temperature, "concurrency": 1}

    def ask(*asked):
        Path(flags["data_path"]).write_text("\n".join(map(json.dumps, asked)))
        main(**flags, base_url=server.url)
        return answers(flags)

    with FaultServer({"And one more?": ["400!"]}, lambda text: f"{text[-40:]}!") as server:
        with pytest.raises(InputError, match=r"1 of . requests failed"):
            ask(*QUESTIONS)
        server.plan.clear()
        before = len(server.asked)
        found = ask(new, third, first, second)
        assert [answer["question_id"] for answer in found] == [84, 83, 81, 82]
        left = len(server.asked) - before
        assert left in (3, 4)  # two of the new one, one that failed, one perhaps not come to
        again = ask(second, first)
        assert again == [found[3], found[2]] and len(server.asked) == before + left
        assert ask(first | {"turns": [first["turns"][0], "Else?"]})[0]["outputs"][0] == (
            found[2]["outputs"][0])
        assert len(server.asked) == before + left + 1


def test_of_questions_that_are_there_twice_no_dialogue_takes_a_reply_of_the_other(flags):
    """They meet at their first replies; what follows belongs to the one that it follows."""
    lines = [{"index": index, "turn": turn, "output": f"{index} {turn}", "content": digest(
        [messages("a", f"{index} 0", "b")[:2 * turn + 1], 0.7])}
        for turn, index in ((0, 0), (0, 3), (1, 3))]
    question = {"category": "generic", "turns": ["a", "b"]}
    done = finished([question] * 3, -1.0, lines)
    assert {place: line["output"] for place, line in done.items()} == {
        (0, 0): "0 0", (1, 0): "3 0", (1, 1): "3 1"}
    assert not finished([question], 0.0, lines)  # of another temperature


def test_the_cost_is_told_before_the_first_request(flags, capsys):
    flags |= {"base_model_name_or_path": "m", "max_new_tokens": 1000}
    with FaultServer() as server:
        main(**flags, base_url=server.url, price_in=10.0, price_out=30.0)
    told = capsys.readouterr()
    assert "5 requests, about 2" in told.out and "at most 5000 new ones, at most $0.1" in told.out
    assert "$0.00" in told.err  # in the progress bar


def test_overwrite_loses_nothing_to_an_error(flags, tiny_llama):
    with FaultServer() as server:
        main(**flags | {"base_model_name_or_path": "m"}, base_url=server.url)
    folder = Path(flags["output_path"]).parent
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert len(before) == 3  # the journal too
    for change, message in (({"base_model_name_or_path": "m", "max_cost": 1.0,
                              "base_url": "http://localhost.example/v1"}, "price of m"),
                            ({"template": "chat"}, "has no chat template")):
        with pytest.raises(InputError, match=message):
            main(**flags | change, overwrite=True)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_the_questions_are_not_written_over(flags):
    with pytest.raises(InputError, match="--output_path is --data_path"):
        main(**flags | {"output_path": flags["data_path"]}, overwrite=True)
    assert len(read_questions(flags["data_path"], 0)) == 3


def test_a_launcher_is_refused(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without a launcher"):
        main(**flags)


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
