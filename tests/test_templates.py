"""Templates, and how prompts and responses become ids for several kinds of tokenizer.

    python -m pytest tests/test_templates.py
"""

import json

import pytest
from small_tokenizers import TOKENIZERS

from lm.records import InputError
from lm.templates import Template, load_template, prompt_ids, response_ids

PROMPT = "### Instruction:\nName three colours.\n\n### Response:\n"
LOSSLESS = [name for name in TOKENIZERS if name != "words"]
ORDINARY = ["Red, green and blue.", "the cat", "1. one\n2. two\n", "def f(x):\n    return {x}",
            '"quoted"', "é 😀 日本語", "(why?)", "30", "a", "...", "- one\n- two"]
AWKWARD = ["", "\n", " ", "\n\nA list:\n- one", "\n \n x", "  indented", "\tx", "\r\nx", "x\n\n",
           "### Response:\nagain", "{instruction} {judgment} {", "\u0301combining", "\u00a0x",
           "an </s> inside", "\\n"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module", params=LOSSLESS)
def lossless(request):
    return TOKENIZERS[request.param]()


def decoded(tokenizer, ids):
    ids = ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", ORDINARY + AWKWARD)
def test_response_ids_continue_any_prompt_and_end_in_one_eos(lossless, text):
    """Also where text and prompt would merge if they were one string."""
    ids = response_ids(lossless, text)
    assert ids[-1] == lossless.eos_token_id
    for prompt in (PROMPT, "Answer:", "Say it: ", "the"):
        before = prompt_ids(lossless, prompt)
        assert decoded(lossless, before) == prompt
        assert decoded(lossless, before + ids[:-1]) == prompt + text


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_has_the_ids_of_the_released_computation(tokenizer, text):
    """Released: prompt and response as one string, EOS appended if it is not there."""
    whole = tokenizer(PROMPT + text)["input_ids"]
    if whole[-1] != tokenizer.eos_token_id:
        whole.append(tokenizer.eos_token_id)
    assert prompt_ids(tokenizer, PROMPT) + response_ids(tokenizer, text) == whole


def test_sentencepiece_puts_no_space_before_a_response():
    tokenizer = TOKENIZERS["sentencepiece"]()
    alone = tokenizer.tokenize("the cat")
    assert alone[0] == "▁the"
    ids = response_ids(tokenizer, "the cat")
    assert not tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
    assert response_ids(tokenizer, " the cat")[:-1] == tokenizer.convert_tokens_to_ids(alone)


def test_newlines_that_merge_with_the_prompt_stay_in_the_response():
    """As one string the boundary would lie inside a token, and the labels slip by one."""
    tokenizer = TOKENIZERS["byte_level"]()
    text = "\n\nA list"
    before, whole = prompt_ids(tokenizer, PROMPT), prompt_ids(tokenizer, PROMPT + text)
    assert whole[:len(before)] != before  # they do merge
    assert tokenizer.decode(response_ids(tokenizer, text)[:-1]) == text


@pytest.mark.parametrize("text", ["</s>", "the end</s>", "the end </s>"])
def test_text_that_ends_in_eos_gets_no_second_one(tokenizer, text):
    ids = response_ids(tokenizer, text)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("name", "bos"), [("byte_level", 0), ("byte_level_with_bos", 1),
                                           ("sentencepiece", 1), ("words", 1)])
def test_special_tokens_are_the_tokenizers_own(name, bos):
    tokenizer = TOKENIZERS[name]()
    ids = prompt_ids(tokenizer, PROMPT)
    assert ids.count(tokenizer.eos_token_id) == 0
    if bos:
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.bos_token_id not in response_ids(tokenizer, "the cat")
    assert prompt_ids(tokenizer, "") == [tokenizer.bos_token_id] * bos


def test_tokenizer_that_merges_with_everything_is_refused():
    class Whole:
        """Every text is one token."""

        eos_token_id = 0

        def __init__(self):
            self.known = ["</s>"]

        def __call__(self, text, add_special_tokens=True):
            if text not in self.known:
                self.known.append(text)
            return {"input_ids": [self.known.index(text)]}

    with pytest.raises(InputError, match="merges 'the cat' with every text before it"):
        response_ids(Whole(), "the cat")


def test_alpaca_by_name_and_by_path(tmp_path):
    by_name = load_template("alpaca")
    assert by_name.render("Sing.").endswith("### Instruction:\nSing.\n\n### Response:\n")
    assert by_name.render("Sing.", "Too low.").endswith(
        "### Instruction:\nSing.\n\n### Judgment:\nToo low.\n\n### Response:\n")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"prompt": by_name.prompt, "note": "other keys are ignored",
                                "prompt_with_judgment": by_name.prompt_with_judgment}))
    assert load_template(str(path)).render("x", "y") == by_name.render("x", "y")


def test_fields_inside_texts_are_left_alone():
    template = Template("t", "I: {instruction}", "I: {instruction} J: {judgment}")
    text = "{judgment} {instruction} {0} {} }{"
    assert template.render(text) == f"I: {text}"
    assert template.render(text, "{instruction}") == f"I: {text} J: {{instruction}}"
    assert template.render("x", "") == "I: x J: "  # an empty judgment is one


def test_pieces_are_own_text_and_fields_in_turn():
    template = Template("t", "Do: {instruction}!\n", "{judgment} on {instruction}: ")
    assert template.pieces("x") == ["Do: ", "x", "!\n"]
    assert template.pieces("x", "{instruction}") == ["", "{instruction}", " on ", "x", ": "]


@pytest.mark.parametrize(("content", "message"), [
    ('{"prompt": "{instruction}",\n"prompt_with_judgment": }', "line 2: broken JSON"),
    ('["{instruction}"]', r"field 'prompt' must be a text with \{instruction\}"),
    ('{"prompt": 7}', "field 'prompt'"),
    ('{"prompt": "no field"}', "field 'prompt'"),
    ('{"prompt": "{instruction} {judgment}"}', "field 'prompt'"),
    ('{"prompt": "{instruction}"}', "field 'prompt_with_judgment'"),
    ('{"prompt": "{instruction}", "prompt_with_judgment": "{instruction}"}',
     r"field 'prompt_with_judgment' must be a text with \{instruction\} and \{judgment\}"),
])
def test_bad_template_file_is_one_line(content, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(InputError, match=f"bad.json: .*{message}") as error:
        load_template(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["alpacca", "none/such.json", "", "../alpaca"])
def test_unknown_template_names_those_there_are(name):
    with pytest.raises(InputError, match=r"unknown template; use one of .*alpaca"):
        load_template(name)


def test_a_template_with_a_fixed_judgment_says_which():
    assert load_template("alpaca_positive").fixed_judgment == "The response is satisfactory."
    assert [load_template(name).fixed_judgment for name in ("alpaca", "plain")] == ["", ""]
