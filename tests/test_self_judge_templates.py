"""Chat frames and judge prompts: checked once, and turned into ids in one way.

    python -m pytest tests/test_self_judge_templates.py
"""

import re

import pytest
from conftest import ROOT
from small_tokenizers import TOKENIZERS

from lm.records import InputError
from lm.templates import prompt_ids
from self_judge.templates import (
    chat_text,
    check_judge_template,
    decision_ids,
    fill,
    judge_prompt_ids,
    judge_templates,
    load_templates,
    read_section,
)

SHIPPED = sorted((ROOT / "configs" / "templates").glob("judge_*.yaml"))
USER = "{context}\n\nA: {response_a}\n\nB: {response_b}\n\nWhich?"
# Jinja drops a template's own last newline, so templates write it as a text.
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content + '\\n' }}{% endfor %}" \
       "{{ '[assistant]\\n' }}"
LOSSLESS = [name for name in TOKENIZERS if name != "words"]
LONG = "the cat sat on the mat; " * 8
FRAME = {"judge": {"default": {"user": USER, "assistant": "Better:\n"}}, "chat": CHAT,
         "decision_rationale": {"decision": "{decision}", "rationale": None}}


@pytest.fixture(scope="module", params=LOSSLESS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def section(**keys):
    return {**FRAME, **keys}


def judge(**texts):
    return section(judge={"default": {"user": USER} | texts})


def prompt_text(tokenizer, given=FRAME):
    return judge_templates(load_templates(given), tokenizer)["default"]


# --- the section ----------------------------------------------------------------------------


def test_published_keys_load():
    loaded = load_templates({
        "skip_first_token": True, "chat": CHAT, "user": "[user]", "assistant": "[assistant]",
        "judge": {"honesty": {"system": "Judge.", "user": USER, "assistant": "Better:"}},
        "decision_rationale": {"decision": " {decision}",
                               "rationale": "\n{evaluation_a}\n{evaluation_b}"}})
    assert loaded.judge["honesty"].system == "Judge."
    assert (loaded.chat, loaded.user, loaded.assistant) == (CHAT, "[user]", "[assistant]")
    assert loaded.skip_first_token and loaded.rationale


def test_without_decision_rationale_the_decision_stands_alone():
    loaded = load_templates({"judge": FRAME["judge"]})
    assert (loaded.decision, loaded.rationale, loaded.chat) == (" {decision}", "", None)
    with_default = load_templates(section(decision_rationale={"decision": "{decision}"}))
    assert with_default.rationale == "\n{evaluation_a}\n{evaluation_b}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sections_load_and_render(path, tokenizer):
    texts = judge_templates(load_templates(path), tokenizer)
    for text in texts.values():
        check_judge_template(text)
        assert re.search(r"[aA]ssistant:?\nThe [a-z ]+ is$", text)


def test_shipped_sections_are_those_that_the_configs_name():
    hh, uf, principles = (load_templates(f"configs/templates/judge_{name}.yaml")
                          for name in ("hh", "uf", "uf_principles"))
    assert set(hh.judge) == set(uf.judge) == {"default"}
    assert set(principles.judge) == {"helpfulness", "honesty", "instruction_following",
                                     "truthfulness"}
    assert principles.rationale and not hh.rationale and not uf.rationale


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_judge_prompt_is_cheap(path, tokenizer):
    """The frame of a pair of short answers stays below 50 words."""
    for text in judge_templates(load_templates(path), tokenizer).values():
        assert len(fill(text, context="", response_a="", response_b="").split()) < 50


def test_section_and_texts_may_be_files(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT + "\n")
    (tmp_path / "user.txt").write_text(USER)
    file = tmp_path / "judge.yaml"
    file.write_text(f"chat: {tmp_path}/chat.jinja\n"
                    f"judge: {{default: {{user: {tmp_path}/user.txt}}}}\n")
    for given in (file, str(file), {"file": str(file)}):
        loaded = load_templates(given)
        assert (loaded.chat, loaded.judge["default"].user) == (CHAT, USER)
    own = load_templates({"file": str(file), "chat": None, "system": "Be brief."})
    assert (own.chat, own.system) == (None, "Be brief.")


def test_paths_of_the_repository_work_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_templates("configs/templates/judge_hh.yaml").judge


def test_a_file_may_hold_the_key_templates_itself(tmp_path):
    file = tmp_path / "judge.yaml"
    file.write_text("templates: {judge: {default: {}}}")
    assert read_section(file) == {"judge": {"default": {}}}


@pytest.mark.parametrize("given, message", [
    (None, "templates is missing"),
    ({}, "templates.judge is missing"),
    (section(jugde={}), "unknown key 'jugde'; did you mean 'judge'"),
    (judge(asistant="x"), "did you mean 'assistant'"),
    (judge(user="{context} {response_a}"), r"\{response_b\} 0 times"),
    (judge(user="{context} {responce_a} {response_b}"), r"did you mean it by \{responce_a\}"),
    (judge(user=USER + "{context}"), r"\{context\} 2 times"),
    (judge(system="{context}"), "templates.judge.default.system has a field"),
    (judge(user=7), "templates.judge.default.user is 7; expected a text"),
    (section(judge={"default": "x"}), "must have the keys system, user and assistant"),
    (section(chat="nowhere/chat.jinja"), "templates.chat: no such file nowhere/chat.jinja"),
    ("nowhere.yaml", "templates: no such file nowhere.yaml"),
    (section(decision_rationale={"decision": " X"}), r"expected a text with \{decision\}"),
    (section(decision_rationale={"rationale": "{evaluation_a}"}), "evaluation_b"),
    (section(decision_rationale={"reason": ""}), "unknown key 'reason'"),
])
def test_mistakes_are_one_line_that_says_what_to_do(given, message):
    with pytest.raises(InputError, match=message) as error:
        load_templates(given)
    assert "\n" not in str(error.value)


def test_broken_yaml_is_one_line(tmp_path):
    file = tmp_path / "judge.yaml"
    file.write_text("judge: {default: [\n")
    with pytest.raises(InputError, match="broken YAML") as error:
        load_templates(file)
    assert "\n" not in str(error.value)


# --- the chat frame -------------------------------------------------------------------------


def test_the_tokenizers_own_chat_template_is_used_where_none_is_given():
    tokenizer = TOKENIZERS["byte_level"]()
    tokenizer.chat_template = CHAT
    own = load_templates({"judge": FRAME["judge"]})
    messages = [{"role": "user", "content": "Hi {{ x }} {context}"}]
    assert chat_text(own, tokenizer, messages, True) == "[user] Hi {{ x }} {context}\n[assistant]\n"


def test_no_chat_template_anywhere_is_an_error():
    with pytest.raises(InputError, match=r"set templates\.chat"):
        prompt_text(TOKENIZERS["byte_level"](), {"judge": FRAME["judge"]})


@pytest.mark.parametrize("chat", ["{{ raise_exception('no system, please') }}", "{% if %}"])
def test_a_chat_template_that_fails_says_why(chat):
    with pytest.raises(InputError, match="the chat template cannot write the turns user"):
        prompt_text(TOKENIZERS["byte_level"](), section(chat=chat))


def test_a_chat_template_that_drops_the_text_is_noticed():
    with pytest.raises(InputError, match="in the chat frame"):
        prompt_text(TOKENIZERS["byte_level"](), section(chat="{{ messages[0].role }}"))


def test_the_system_message_comes_first():
    given = judge(system="Judge well.", assistant="Better:")
    text = prompt_text(TOKENIZERS["byte_level"](), given)
    assert text == f"[system] Judge well.\n[user] {USER}\n[assistant]\nBetter:"


# --- the prompt's ids -----------------------------------------------------------------------


@pytest.mark.parametrize("texts", [
    ("User: Hi", "the cat", "the mat"), ("", "", ""), ("{response_b}", "{context} {}", "}{%"),
    ("[assistant]\nBetter:\nA", "</s><s>", "\n\n"), ("é 😀", "x\n", " y ")])
def test_what_fits_is_the_filled_text(tokenizer, texts):
    """Whatever the texts quote."""
    text = prompt_text(tokenizer)
    context, one, other = texts
    ids, cut = judge_prompt_ids(tokenizer, text, *texts, max_length=1000)
    whole = (text.replace("{context}", "\0").replace("{response_a}", "\1")
             .replace("{response_b}", "\2")
             .replace("\0", context).replace("\1", one).replace("\2", other))
    assert fill(text, context=context, response_a=one, response_b=other) == whole
    assert ids == prompt_ids(tokenizer, whole) and not cut


def test_bos_is_the_tokenizers_own_and_single():
    for name, bos in (("byte_level", None), ("sentencepiece", 1), ("byte_level_with_bos", 0)):
        tokenizer = TOKENIZERS[name]()
        for chat in (CHAT, "{{ bos_token }}" + CHAT):
            text = prompt_text(tokenizer, section(chat=chat))
            ids, _ = judge_prompt_ids(tokenizer, text, "User: Hi", "a", "b", 1000)
            assert ids[:3].count(tokenizer.bos_token_id) == (bos is not None)


@pytest.mark.parametrize("lost", [1, 7, 30])
def test_too_long_a_context_loses_its_start(tokenizer, lost):
    text = prompt_text(tokenizer)
    whole, _ = judge_prompt_ids(tokenizer, text, LONG, "the cat", "the mat", 1000)
    ids, cut = judge_prompt_ids(tokenizer, text, LONG, "the cat", "the mat", len(whole) + 1 - lost)
    assert cut and len(ids) == len(whole) - lost
    start = next(place for place, (one, other) in enumerate(zip(ids, whole, strict=False))
                 if one != other)
    assert ids[start:] == whole[start + lost:]  # the rest is whole


def test_the_end_of_a_long_context_stays(tokenizer):
    text = prompt_text(tokenizer)
    numbered = " ".join(map(str, range(100, 160)))
    whole, _ = judge_prompt_ids(tokenizer, text, numbered, "a", "b", 1000)
    ids, cut = judge_prompt_ids(tokenizer, text, numbered, "a", "b", len(whole) - 20)
    said = tokenizer.decode(ids)
    assert cut and "159" in said and "100" not in said


def test_room_for_the_decision_is_within_max_length(tokenizer):
    text = prompt_text(tokenizer)
    whole, _ = judge_prompt_ids(tokenizer, text, "User: Hi", "a", "b", 1000)
    assert judge_prompt_ids(tokenizer, text, "User: Hi", "a", "b", len(whole) + 1)[1] is False
    ids, cut = judge_prompt_ids(tokenizer, text, "User: Hi", "a", "b", len(whole))
    assert cut and len(ids) + 1 == len(whole)


def test_then_the_longer_response_loses_its_end(tokenizer):
    text = prompt_text(tokenizer)
    frame = len(judge_prompt_ids(tokenizer, text, "", "", "", 1000)[0])
    ids, cut = judge_prompt_ids(tokenizer, text, LONG, LONG, "a dog", frame + 31)
    said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert cut and len(ids) <= frame + 30
    assert "B: a dog\n\nWhich?" in said and said.endswith("Better:\n")
    kept = said.split("A: ")[1].split("\n\nB:")[0]
    assert len(kept) > 5 and LONG.startswith(kept)
    assert LONG[-9:] not in said.split("A: ")[0]  # nothing is left of the context


def test_both_orders_see_the_same_parts(tokenizer):
    text = prompt_text(tokenizer)
    frame = len(judge_prompt_ids(tokenizer, text, "", "", "", 1000)[0])
    for room in (12, 25, 40):
        shown = []
        for pair in ((LONG, "dog " * 15), ("dog " * 15, LONG)):
            ids, cut = judge_prompt_ids(tokenizer, text, "", *pair, frame + room)
            said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            one, other = said.split("A: ")[1].split("\n\nWhich?")[0].split("\n\nB: ")
            assert cut
            shown.append((one, other))
        assert shown[0] == shown[1][::-1]


def test_a_max_length_below_the_frame_is_an_error(tokenizer):
    with pytest.raises(InputError, match="max_length 12 leaves no room for the responses"):
        judge_prompt_ids(tokenizer, prompt_text(tokenizer), "User: Hi", "the cat", "the mat", 12)


# --- the decision ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decisions_are_the_tokens_that_follow_the_prompt(name):
    tokenizer = TOKENIZERS[name]()
    text = prompt_text(tokenizer)
    ids = decision_ids(tokenizer, text, "{decision}")
    assert len(set(ids)) == 2
    for letter, token in zip("AB", ids, strict=True):
        assert tokenizer.decode([token]).strip().lower() == letter.lower()
        filled = fill(text, context="User: Hi", response_a="x", response_b="y")
        assert prompt_ids(tokenizer, filled + letter) == [*prompt_ids(tokenizer, filled), token]


def test_sentencepiece_decisions_have_their_space_only_in_context():
    tokenizer = TOKENIZERS["sentencepiece"]()
    alone = tokenizer("A", add_special_tokens=False)["input_ids"]
    assert decision_ids(tokenizer, "{response_b}\n", "{decision}")[0] == alone[-1]
    assert len(alone) == 2  # the space that the tokenizer puts before a text is not the decision


@pytest.mark.parametrize("decision", [" the {decision}", "Answer {decision}", ""])
def test_decisions_of_several_tokens_or_none_are_an_error(decision):
    tokenizer = TOKENIZERS["byte_level"]()
    with pytest.raises(InputError, match="is not one token of its own"):
        decision_ids(tokenizer, prompt_text(tokenizer), decision)


def test_decisions_that_are_the_same_token_are_an_error():
    with pytest.raises(InputError, match="the same token for both"):
        decision_ids(TOKENIZERS["byte_level"](), "{response_b}\n", "x")
