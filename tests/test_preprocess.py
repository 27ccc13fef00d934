"""Preference records -> examples -> rows: what is drawn, what is left out, what is learnt.

    python -m pytest tests/test_preprocess.py
"""

import gzip
import json
import random
from types import SimpleNamespace

import pytest
from small_tokenizers import TOKENIZERS

from lm.records import InputError
from lm.templates import prompt_ids
from preprocess import (
    jsft_examples,
    jsft_rows,
    judge_pairs_of,
    judgments,
    self_judge_rows,
)
from self_judge.preferences import Pair, context_text, found_in, hh, ultrafeedback
from self_judge.preview import marked
from self_judge.rows import row_of, sft_pieces
from self_judge.sources import Counts, has_split, local_files, settings_of, sources_of
from self_judge.templates import chat_text, judge_prompt_ids, judge_templates, load_templates

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# As Llama-2's: the system message within the first user turn, a BOS before each, texts stripped.
INST = ("{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}"
        "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' }}"
        "{% set ns.system = '' %}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}")
PLAIN = ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")  # writes no EOS
USER = "{context}\n\nA: {response_a}\n\nB: {response_b}\n\nWhich?"
SECTION = {"judge": {"default": {"user": USER, "assistant": "Better:\n"}},
           "decision_rationale": {"decision": "{decision}", "rationale": None}}
PRINCIPLES = ("helpfulness", "honesty")
WITH_PRINCIPLES = {
    "judge": {name: {"user": f"{USER} ({name})", "assistant": "Better:\n"} for name in PRINCIPLES},
    "decision_rationale": {"decision": "{decision}",
                           "rationale": "\nA: {evaluation_a}\nB: {evaluation_b}"}}
TALK = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Name a colour.\n\nAssistant:"
QUOTING = ["<|im_end|>\n<|im_start|>assistant\nno", "</s><s>[INST] x [/INST] y </s>",
           "\n\n### Assistant:\nfine", "assistant: no\nuser: yes", "Better:\nA", "⁂ {context} {%"]


def chatml():
    tokenizer = TOKENIZERS["byte_level"]()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>",
                                  "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer, None


def with_chat(name, chat):
    return lambda: (TOKENIZERS[name](), chat)


# Tokenizer and `chat` of the section, as kinds of models have them
MODELS = {
    "chatml": chatml, "llama2": with_chat("sentencepiece", INST),
    "base": with_chat("byte_level", "configs/templates/chat.jinja"),
    "base_with_bos": with_chat("byte_level_with_bos", "configs/templates/chat.jinja"),
    "no_eos": with_chat("byte_level_with_bos", PLAIN),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """A tokenizer and the templates that go with it."""
    tokenizer, chat = MODELS[request.param]()
    return SimpleNamespace(tokenizer=tokenizer, name=request.param,
                           templates=load_templates({**SECTION, "chat": chat}))


def base():
    tokenizer, chat = MODELS["base"]()
    return tokenizer, load_templates({**SECTION, "chat": chat})


def talk(*contents, system=None):
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[place % 2], "content": content}
                   for place, content in enumerate(contents)]


def learnt(row, tokenizer):
    """The texts of the learnt runs."""
    runs, last = [], 0
    for token, is_learnt in zip(row["input_ids"], row["completion_mask"], strict=True):
        if is_learnt and not last:
            runs.append([])
        if is_learnt:
            runs[-1].append(token)
        last = is_learnt
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def sft(messages):
    return {"kind": "sft", "messages": messages}


def completion(response, system=None, **ratings):
    """Ratings by principle; a tuple is rating and rationale."""
    given = {name: value if isinstance(value, tuple) else (value, f"{name} of {response}.")
             for name, value in ratings.items()}
    return {"response": response, "custom_system_prompt": system, "annotations": {
        name: {"Rating": rating, "Rationale": said} for name, (rating, said) in given.items()}}


def uf(*completions, instruction="Name a colour."):
    return {"instruction": instruction, "completions": list(completions)}


# --- HH -------------------------------------------------------------------------------------


def test_hh_dialogue_and_pair():
    found = hh({"chosen": f"{TALK} Red.", "rejected": f"{TALK} No."}, system="Be kind.")
    assert found.dialogue == talk("Hi", "Yes?", "Name a colour.", "Red.", system="Be kind.")
    pair, = found.pairs
    assert pair.context == "User: Hi\n\nAssistant: Yes?\n\nUser: Name a colour."
    assert (pair.chosen, pair.rejected) == ("Red.", "No.")
    assert pair.prompt == found.dialogue[:-1]


def test_hh_only_turn_markers_split():
    """The released code deletes the words anywhere in a message."""
    said = "I am Human: you?\nAssistant: is a word, Human: too.\n\n Human: not here"
    found = hh({"chosen": f"\n\nHuman: {said}\n\nAssistant: Assistant: yes",
                "rejected": f"\n\nHuman: {said}\n\nAssistant: no"})
    assert found.dialogue == talk(said, "Assistant: yes")


def test_hh_trailing_turns_of_others_are_dropped():
    tail = "\n\nHuman: Thanks\n\nHuman: Bye"
    found = hh({"chosen": f"{TALK} Red.{tail}", "rejected": f"{TALK} No.{tail}"})
    assert found.dialogue[-1] == {"role": "assistant", "content": "Red."}
    assert found.pairs[0].rejected == "No."


def test_hh_two_turns_of_one_speaker_are_joined():
    """As most chat templates refuse them."""
    found = hh({"chosen": "\n\nHuman: Hi\n\nHuman: You?\n\nAssistant: Yes\n\nAssistant: Me.",
                "rejected": "\n\nHuman: Hi\n\nHuman: You?\n\nAssistant: No."})
    assert found.dialogue == talk("Hi\n\nYou?", "Yes\n\nMe.")
    assert found.notes["joined"] == 2 and len(found.pairs) == 1


@pytest.mark.parametrize("chosen, rejected, note, has_dialogue", [
    (f"{TALK} Red.", f"{TALK} Red.", "same", True),
    (f"{TALK} Red.", "\n\nHuman: Hey\n\nAssistant: No.", "contexts", True),
    (f"{TALK} Red.", f"{TALK} ", "empty", True),
    (f"{TALK}", f"{TALK} No.", "empty", False),
    ("\n\nHuman: Hi", f"{TALK} No.", "turnless", False),
    (f"{TALK} Red.", "\n\nHuman: Hi", "turnless", False),
    ("\n\nAssistant: Hi", "\n\nAssistant: Ho", "turnless", False),
    ("", "", "turnless", False),
])
def test_hh_records_without_a_pair_are_noted(chosen, rejected, note, has_dialogue):
    found = hh({"chosen": chosen, "rejected": rejected})
    assert found.pairs == [] and found.notes[note] == 1
    assert bool(found.dialogue) == has_dialogue


@pytest.mark.parametrize("record, message", [
    ({"chosen": "x"}, "field 'chosen' begins with 'x'|field 'rejected' is missing"),
    ({"chosen": f"Hello.{TALK} Red.", "rejected": TALK}, "field 'chosen' begins with 'Hello"),
    ({"chosen": ["a"], "rejected": "b"}, "field 'chosen' is a list; expected text"),
    ({"chosen": f"{TALK} Red.", "rejected": None}, "field 'rejected' is null; expected text"),
    ({"text": "x"}, "neither the fields 'chosen' and 'rejected'"),
])
def test_bad_records_name_the_field(record, message):
    with pytest.raises(InputError, match=message):
        found_in(record)


def test_hh_has_no_principles():
    with pytest.raises(InputError, match="leave only 'default'"):
        found_in({"chosen": f"{TALK} Red.", "rejected": f"{TALK} No."}, PRINCIPLES)


# --- UltraFeedback --------------------------------------------------------------------------


def test_uf_best_by_mean_rating_then_length():
    record = uf(completion("short", helpfulness="5", honesty="3"),
                completion("the longer one", helpfulness="4", honesty="4"),
                completion("worst", helpfulness="1", honesty="1"))
    found = ultrafeedback(record)
    assert found.dialogue == talk("Name a colour.", "the longer one")
    pair, = found.pairs
    assert (pair.chosen, pair.rejected) == ("the longer one", "worst")  # the tie is not lower
    assert pair.context == "User: Name a colour." and pair.evaluations is None


def test_uf_ratings_that_are_no_numbers_are_left_out_of_the_mean():
    record = uf(completion("a", helpfulness="N/A", honesty="3"),
                completion("b", helpfulness="4", honesty=None),
                completion("c", helpfulness="N/A", honesty="nan"))
    found = ultrafeedback(record)
    assert found.dialogue[-1]["content"] == "b" and found.pairs[0].rejected == "a"
    assert found.notes["unrated"] == 1


def test_uf_missing_annotations_are_no_error():
    bare = {"response": "c"}
    empty = {"response": "d", "annotations": None}
    null = {"response": "e", "annotations": {"honesty": None, "helpfulness": {}}}
    found = ultrafeedback(uf(bare, empty, null, completion("a", honesty="3"),
                             completion(" ", honesty="5")))
    assert found.notes == {"unrated": 3, "empty": 1, "tied": 1}
    assert found.dialogue[-1]["content"] == "a"


@pytest.mark.parametrize("completions", [[], None, [completion("a", honesty="N/A")]])
def test_uf_records_without_a_rated_completion_are_noted(completions):
    found = ultrafeedback({"instruction": "x", "completions": completions})
    assert found.dialogue is None and found.pairs == [] and found.notes["answerless"] == 1


def test_uf_a_tied_record_teaches_the_longest_and_has_no_pair():
    found = ultrafeedback(uf(completion("a", honesty="3"), completion("bb", honesty="3")))
    assert found.dialogue[-1]["content"] == "bb"
    assert found.pairs == [] and found.notes["tied"] == 1


def test_uf_the_best_one_brings_its_own_system_prompt():
    record = uf(completion("a", system="Be true.", honesty="3"),
                completion("b", system="Lie.", honesty="1"))
    assert ultrafeedback(record, system="Other.").dialogue[0]["content"] == "Be true."
    record["completions"][0]["custom_system_prompt"] = None
    assert ultrafeedback(record).dialogue == talk("Name a colour.", "a")  # not the text "None"
    assert ultrafeedback(record, system="Other.").dialogue[0]["content"] == "Other."


def many(count=40):
    return [uf(*(completion(f"answer {place} of {index}", honesty=str(place), helpfulness="2")
                 for place in range(1, 5)), instruction=f"Question {index}")
            for index in range(count)]


def test_uf_draws_follow_from_seed_and_record_alone():
    def drawn(records, seed=42):
        return {record["instruction"]: ultrafeedback(record, seed=seed).pairs[0].rejected
                for record in records}
    records = many()
    first = drawn(records)
    random.random()
    assert drawn(records[::-1]) == first and drawn(records[7:9]).items() <= first.items()
    assert drawn(records, seed=43) != first
    assert {text.split()[1] for text in first.values()} == {"1", "2", "3"}  # all lower ones


def test_uf_a_principle_draws_the_same_whatever_others_there_are():
    one = [ultrafeedback(record, ("honesty",)).pairs[0] for record in many()]
    both = [ultrafeedback(record, ("helpfulness", "honesty")).pairs[0] for record in many()]
    assert one == both  # helpfulness is tied in all of them


def test_uf_principle_pairs_follow_its_own_ratings():
    """First in rank order with any comparison; the target may lose it."""
    record = uf(completion("best", helpfulness="5", honesty="2"),
                completion("other", helpfulness="1", honesty="4"))
    found = ultrafeedback(record, PRINCIPLES, rationales=True)
    assert [(p.principle, p.chosen, p.rejected) for p in found.pairs] == [
        ("helpfulness", "best", "other"), ("honesty", "other", "best")]
    assert found.pairs[1].evaluations == ("honesty of other.", "honesty of best.")
    assert found.notes["losers"] == 1


def test_uf_targets_are_walked_until_one_has_a_comparison():
    record = uf(completion("first", helpfulness="5", honesty="N/A"),
                completion("second", helpfulness="4", honesty="4"),
                completion("third", helpfulness="3", honesty="1"))
    pair = ultrafeedback(record, ("honesty",)).pairs[0]
    assert (pair.chosen, pair.rejected) == ("second", "third")


def test_uf_principles_without_a_comparison_are_noted():
    record = uf(completion("a", helpfulness="3", honesty="3"),
                completion("b", helpfulness="3", honesty="3"))
    assert ultrafeedback(record, PRINCIPLES).notes["incomparable"] == 2
    assert ultrafeedback(record, ("truthfulness",)).notes["incomparable"] == 1


@pytest.mark.parametrize("said, is_used", [
    ("Better than Text 2.", False), ("Texts 1 and 2 agree.", False), ("It is Text-like.", False),
    ("Texture is described.", True), ("The text is fine.", True), ("", False), (None, False)])
def test_uf_rationales_that_name_a_text_or_are_missing(said, is_used):
    record = uf(completion("a", honesty=("5", said)), completion("b", honesty="1"))
    found = ultrafeedback(record, ("honesty",), rationales=True)
    assert bool(found.pairs) == is_used
    assert found.notes["rationales"] == (0 if is_used else 1)
    assert ultrafeedback(record, ("honesty",), rationales=False).pairs  # only learnt if wanted


def test_uf_the_rationale_is_that_of_the_rating():
    record = uf(completion("a", honesty="5"), completion("b", honesty="1"))
    for given in record["completions"]:
        given["annotations"]["honesty"] |= {"Rationale": "About the type.",
                                            "Rationale For Rating": f"About {given['response']}."}
    record["completions"][1]["annotations"]["honesty"]["Rationale For Rating"] = None
    pair = ultrafeedback(record, ("honesty",), rationales=True).pairs[0]
    assert pair.evaluations == ("About a.", "About the type.")


@pytest.mark.parametrize("record, message", [
    ({"completions": []}, "field 'instruction' is missing"),
    (uf(instruction=7), "field 'instruction' is a number; expected text"),
    ({"instruction": "x", "completions": "y"}, "field 'completions' is text"),
    (uf("y"), r"field 'completions\[0\]' is 'y'; expected an object"),
    (uf({"answer": "y"}), r"field 'completions\[0\].response' is missing"),
    (uf({"response": "y", "annotations": []}), r"'completions\[0\].annotations' is a list"),
    (uf({"response": "y", "annotations": {"honesty": "4"}}), r"annotations.honesty' is '4'"),
    (uf({"response": "y", "annotations": {"honesty": {"Rationale": 1}}}),
     r"annotations.honesty.Rationale' is a number"),
])
def test_uf_bad_records_name_the_field(record, message):
    with pytest.raises(InputError, match=message):
        found_in(record)


# --- examples -------------------------------------------------------------------------------


def test_a_pair_is_judged_in_both_orders():
    templates = load_templates(WITH_PRINCIPLES)
    pair = Pair("honesty", [], "User: Hi", "good", "bad {x}", ("Says {evaluation_b}.", "Lies."))
    assert [tuple(example[key] for key in ("response_a", "response_b", "decision", "rationale"))
            for example in judgments(pair, templates)] == [
        ("good", "bad {x}", "A", "\nA: Says {evaluation_b}.\nB: Lies."),
        ("bad {x}", "good", "B", "\nA: Lies.\nB: Says {evaluation_b}.")]
    assert {example["principle"] for example in judgments(pair, templates)} == {"honesty"}
    plain = judgments(pair, load_templates(SECTION))
    assert [example["rationale"] for example in plain] == ["", ""]


def test_records_for_sft_only_have_no_judgments():
    found = hh({"chosen": f"{TALK} Red.", "rejected": f"{TALK} No."})
    templates = load_templates(SECTION)
    assert [e["kind"] for e in jsft_examples(found, templates)] == ["sft", *["judgment"] * 2]
    assert [e["kind"] for e in jsft_examples(found, templates, sft_only=True)] == ["sft"]
    assert [e["kind"] for e in jsft_examples(found, templates, wanted="sft")] == ["sft"]
    assert [e["kind"] for e in jsft_examples(found, templates, wanted="judge")] == ["judgment"] * 2


# --- rows -----------------------------------------------------------------------------------

def written(model, text, is_last):
    """The learnt text of an answer as the model's chat template has it."""
    if model.name == "llama2":  # its decoder takes off the space that begins a text
        return text + " </s>"
    if model.name == "no_eos":  # a row ends in one EOS, though the template writes none
        return f" {text}" + ("</s>" if is_last and not text.endswith("</s>") else "")
    return text + ("<|im_end|>" if model.name == "chatml" else "</s>")


@pytest.mark.parametrize("answer", ["Red, green.", "the cat\n\nsat", "é 😀", *QUOTING])
def test_exactly_the_answers_and_their_eos_are_learnt(model, answer):
    """Whatever they quote, and whatever the questions quote."""
    answer = answer.strip()
    for messages in (talk("Hi", answer), talk(answer, "the mat"),
                     talk("Hi", answer, "Why?", "the mat"), talk("Hi", "the mat", answer, answer),
                     talk("Hi", answer, system=answer)):
        row = row_of(sft(messages), model.templates, model.tokenizer, 5000)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        expected = [written(model, text, place == len(answers) - 1)
                    for place, text in enumerate(answers)]
        assert learnt(row, model.tokenizer) == expected
        assert row["input_ids"][-1] == model.tokenizer.eos_token_id
        assert row["completion_mask"][-1] == 1 and not row["cut"]


def test_the_row_is_what_the_chat_template_writes(model):
    messages = talk("Hi", "Yes?", "Name a colour.", "the cat", system="Be kind.")
    row = row_of(sft(messages), model.templates, model.tokenizer, 5000)
    whole = chat_text(model.templates, model.tokenizer, messages, add_generation_prompt=False)
    said = model.tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False)
    if model.name == "no_eos":
        whole = whole.strip() + "</s>"
    bos = model.tokenizer.bos_token or ""
    assert said.removeprefix(bos).replace(" ", "") == (
        whole.strip().removeprefix(bos).replace(" ", ""))


def test_the_answer_follows_the_ids_of_the_prompt_at_inference(model):
    """The last prompt of one exchange is tokenized as `lm.generation` tokenizes a query."""
    messages = talk("Name a colour.", "the cat", system="Be kind.")
    row = row_of(sft(messages), model.templates, model.tokenizer, 5000)
    query = chat_text(model.templates, model.tokenizer, messages[:-1], add_generation_prompt=True)
    ids = prompt_ids(model.tokenizer, query)
    assert row["input_ids"][:len(ids)] == ids
    assert sum(row["completion_mask"]) == len(row["input_ids"]) - len(ids)
    if model.tokenizer.bos_token_id is not None and model.name != "chatml":
        assert row["input_ids"].count(model.tokenizer.bos_token_id) == ids.count(
            model.tokenizer.bos_token_id) == (1 if ids[0] == model.tokenizer.bos_token_id else 0)


def test_the_eos_of_each_turn_is_learnt_and_what_follows_it_is_not():
    tokenizer, _ = chatml()
    templates = load_templates(SECTION)
    pieces = sft_pieces(talk("Hi", "Yes?", "Red?", "No."), templates, tokenizer)
    assert pieces == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes?<|im_end|>", True),
        ("\n<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n", False),
        ("No.<|im_end|>", True)]


def test_a_row_that_is_too_long_loses_its_end():
    tokenizer, templates = base()
    example = sft(talk("Hi", "the cat sat on the mat"))
    whole = row_of(example, templates, tokenizer, 1000)
    row = row_of(example, templates, tokenizer, len(whole["input_ids"]) - 2)
    assert row["cut"] and row["input_ids"] == whole["input_ids"][:-2]
    assert row["completion_mask"] == whole["completion_mask"][:-2]


def test_a_chat_template_that_rewrites_past_turns_is_an_error():
    tokenizer, _ = base()
    chat = ("{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last or m.role == 'user'"
            " else '...') + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    templates = load_templates({**SECTION, "chat": chat})
    assert row_of(sft(talk("Hi", "Yes?")), templates, tokenizer, 100)
    with pytest.raises(InputError, match=r"writes a turn in another way .* set templates\.chat"):
        row_of(sft(talk("Hi", "Yes?", "So?", "No.")), templates, tokenizer, 100)


def judgment(decision="A", rationale="", principle="default", **texts):
    return {"kind": "judgment", "principle": principle, "context": "User: Hi",
            "response_a": "the cat", "response_b": "the mat", "decision": decision,
            "rationale": rationale} | texts


@pytest.mark.parametrize("quoted", ["the cat", *QUOTING])
def test_only_the_decision_is_learnt_after_the_ids_of_judgment(model, quoted):
    for place in ("context", "response_a", "response_b"):
        found = {}
        for decision in "AB":
            example = judgment(decision, **{place: quoted})
            row = row_of(example, model.templates, model.tokenizer, 1000)
            text = judge_templates(model.templates, model.tokenizer)["default"]
            prompt, _ = judge_prompt_ids(model.tokenizer, text, example["context"],
                                         example["response_a"], example["response_b"], 1000)
            assert row["input_ids"][:-1] == prompt
            assert row["completion_mask"] == [0] * len(prompt) + [1]
            found[decision] = row["input_ids"][-1]
        assert [model.tokenizer.decode([found[letter]]) for letter in "AB"] == ["A", "B"]


@pytest.mark.parametrize("quoted", ["It is true.", *QUOTING])
def test_rationale_and_eos_are_learnt_after_the_decision(model, quoted):
    row = row_of(judgment("B", f"\nA: {quoted}"), model.templates, model.tokenizer, 1000)
    said, = learnt(row, model.tokenizer)
    assert said == f"B\nA: {quoted}{model.tokenizer.eos_token}" or (
        quoted.endswith("</s>") and said == f"B\nA: {quoted}")  # which is the EOS already
    assert row["input_ids"][-1] == model.tokenizer.eos_token_id


def test_a_long_judgment_keeps_prompt_and_decision():
    """Cut as at judgment; the rationale has what is left."""
    tokenizer, templates = base()
    long = "the cat sat on the mat; " * 20
    row = row_of(judgment("A", context=long), templates, tokenizer, 120)
    assert row["cut"] and len(row["input_ids"]) == 120 and row["completion_mask"][-1] == 1
    plain = row_of(judgment("A"), templates, tokenizer, 1000)
    row = row_of(judgment("A", long), templates, tokenizer, len(plain["input_ids"]) + 5)
    assert row["cut"] and row["input_ids"][:len(plain["input_ids"])] == plain["input_ids"]
    assert sum(row["completion_mask"]) == 6 and tokenizer.eos_token_id != row["input_ids"][-1]


def test_each_principle_has_its_own_prompt():
    tokenizer, _ = base()
    templates = load_templates({**WITH_PRINCIPLES, "chat": PLAIN})
    texts = {name: tokenizer.decode(row_of(judgment(principle=name), templates, tokenizer,
                                           1000)["input_ids"]) for name in PRINCIPLES}
    assert "(honesty)" in texts["honesty"] and "(helpfulness)" in texts["helpfulness"]


def test_marks_are_around_what_is_learnt():
    tokenizer, templates = base()
    row = row_of(sft(talk("Hi\x1b[2J", "the é 😀")), templates, tokenizer, 100)
    assert marked(row, tokenizer, colour=False).endswith("### Assistant:\n⟦the é 😀</s>⟧")
    shown = marked(row, tokenizer, colour=True)
    assert shown.endswith("\x1b[1;4mthe é 😀</s>\x1b[0m")
    assert "\x1b[2J" not in shown and "Hi\\x1b[2J" in shown


# --- the dataset section --------------------------------------------------------------------


def hh_records(count=12):
    return [{"chosen": f"\n\nHuman: Question {place}\n\nAssistant: Yes {place}.",
             "rejected": f"\n\nHuman: Question {place}\n\nAssistant: No {place}."}
            for place in range(count)]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((record if isinstance(record, str) else json.dumps(record)) + "\n"
                        for record in records)
    return path


def config(dataset, section=SECTION, max_length=400, seed=42):
    chat = {"chat": "configs/templates/chat.jinja"}
    return SimpleNamespace(dataset=dataset if isinstance(dataset, dict) else str(dataset),
                           templates=section | chat, jsft_args={"max_length": max_length},
                           seed=seed, kind="jsft")


def test_a_file_a_folder_and_a_hub_id(tmp_path):
    file = write(tmp_path / "a.jsonl.gz", hh_records())
    for name in ("train-0.jsonl", "train-1.json", "test.jsonl.gz", "other.jsonl", "train.txt"):
        write(tmp_path / "folder" / name, hh_records(1))
    def names(dataset, split):
        return [str(source).rpartition("/")[2] for source in sources_of(dataset, split)]
    assert names(str(file), "train") == ["a.jsonl.gz"] and names(str(file), "eval") == []
    folder = str(tmp_path / "folder")
    assert names(folder, "train") == ["train-0.jsonl", "train-1.json"]
    assert names(folder, "eval") == ["test.jsonl.gz"]
    assert names({"path": folder, "train": "other", "eval": None}, "train") == ["other.jsonl"]
    assert names({"path": folder, "train": "other", "eval": None}, "eval") == []
    assert names({"path": str(file), "eval": f"{folder}/other.jsonl"}, "eval") == ["other.jsonl"]
    assert local_files(folder)[2].name == "test.jsonl.gz" and local_files("a/b") == []
    assert has_split(folder, "eval") and not has_split(str(file), "eval")
    assert has_split({"path": str(file), "eval_size": 2}, "eval")


def test_the_subfolders_of_hh(tmp_path, monkeypatch):
    """On the Hub and in a folder alike: some for everything, some for SFT only."""
    import datasets

    for folder in ("helpful-base", "helpful-online"):
        write(tmp_path / folder / "train.jsonl.gz", hh_records(2))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, data_dir, split: (
        datasets.Dataset.from_list(hh_records(2)) if split == "train" else None))
    for path in (str(tmp_path), "Anthropic/hh-rlhf"):
        rows = jsft_rows(config({"path": path, "subfolders": ["helpful-base"],
                                 "sft_subfolders": ["helpful-online"]}), base()[0])
        assert rows["kind"] == ["sft", "judgment", "judgment"] * 2 + ["sft"] * 2
    assert [str(source) for source in sources_of(
        {"path": "Anthropic/hh-rlhf", "subfolders": ["helpful-base"]}, "eval")] == [
        "Anthropic/hh-rlhf helpful-base"]


@pytest.mark.parametrize("dataset, message", [
    ("nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
    ({"path": "x", "num_process": 2}, "unknown key 'num_process'; did you mean 'num_proc'"),
    ({"train": "x"}, "field 'dataset.path' is missing"),
    ({"path": "a/b", "num_proc": "2"}, "field 'dataset.num_proc' is text"),
    ({"path": "a/b", "skip_bad": -1}, "dataset.skip_bad is -1; expected 0 or more"),
])
def test_mistakes_of_the_section(dataset, message):
    with pytest.raises(InputError, match=message):
        sources_of(dataset, "train")


def test_missing_splits_say_what_to_set(tmp_path):
    with pytest.raises(InputError, match=r"begins with 'train'; set dataset\.train"):
        sources_of(str(tmp_path), "train")
    file = write(tmp_path / "a.jsonl", hh_records())
    with pytest.raises(InputError, match=r"set dataset\.eval to them, or dataset\.eval_size"):
        judge_pairs_of(config(file))
    with pytest.raises(InputError, match=r"no such file nowhere\.jsonl"):
        judge_pairs_of(config({"path": str(file), "eval": "nowhere.jsonl"}))


def test_held_out_records_are_not_trained_on(tmp_path):
    file = write(tmp_path / "a.jsonl", hh_records())
    given = config({"path": str(file), "eval_size": 3})
    held_out = {pair["context"] for pair in judge_pairs_of(given)}
    trained = {pair["context"] for pair in judge_pairs_of(given, "train")}
    assert len(held_out) == 3 and len(trained) == 9 and not held_out & trained
    assert held_out == {pair["context"] for pair in judge_pairs_of(given)}
    with pytest.raises(InputError, match="eval_size 12 leaves nothing of 12"):
        judge_pairs_of(config({"path": str(file), "eval_size": 12}))


def test_num_proc_changes_nothing(tmp_path):
    file = write(tmp_path / "a.jsonl", many(12))
    tokenizer, _ = base()
    section = {**SECTION, "judge": {"honesty": SECTION["judge"]["default"]}}
    one, three = (jsft_rows(config({"path": str(file), "num_proc": processes}, section), tokenizer)
                  for processes in (1, 3))
    assert one.to_list() == three.to_list() and len(one) == 36
    assert set(one.column_names) == {"input_ids", "completion_mask", "kind"}


def test_bad_records_stop_the_run_or_are_counted(tmp_path, capsys):
    records = hh_records(6)
    bad = ['{"chosen": "x', "[1]", {"chosen": 1, "rejected": "x"}]
    file = write(tmp_path / "a.jsonl", [*records[:2], *bad, *records[2:]])
    tokenizer, _ = base()
    for allowed, message in ((0, r"a.jsonl: line 3: broken JSON"),
                             (1, r"a.jsonl: record 3: is a list; .* \(more than skip_bad 1\)"),
                             (2, r"a.jsonl: record 4: field 'chosen' is a number; expected text")):
        with pytest.raises(InputError, match=message) as error:
            jsft_rows(config({"path": str(file), "skip_bad": allowed}), tokenizer)
        assert "\n" not in str(error.value)
    rows = jsft_rows(config({"path": str(file), "skip_bad": 3}), tokenizer)
    assert "6 records, 3 bad ones skipped, 6 SFT examples, 6 pairs; 18 rows" in (
        capsys.readouterr().out)
    assert rows.to_list() == jsft_rows(config(write(tmp_path / "b.jsonl", records)),
                                       tokenizer).to_list()


def test_an_unknown_principle_names_the_nearest(tmp_path):
    file = write(tmp_path / "a.jsonl", many(2))
    section = {**SECTION, "judge": {"honnesty": SECTION["judge"]["default"]}}
    with pytest.raises(InputError, match=r"'honnesty', by which no record .* 'honesty'"):
        jsft_rows(config(file, section), base()[0])


def test_a_principle_that_is_never_rated_gives_no_pairs_but_no_error(tmp_path):
    """As in the sample data, where truthfulness is N/A throughout."""
    records = [uf(completion("a", honesty="4", truthfulness="N/A"),
                  completion("b", honesty="1", truthfulness="N/A"))]
    user = SECTION["judge"]["default"]
    section = {**SECTION, "judge": {"honesty": user, "truthfulness": user}}
    pairs = judge_pairs_of(config(write(tmp_path / "a.jsonl", records), section), "train")
    assert [pair["principle"] for pair in pairs] == ["honesty"]


def test_answers_alone_need_no_ratings_by_principle(tmp_path):
    """A demonstration, whose one rating is no principle's, and a record of two dialogues."""
    file = write(tmp_path / "a.jsonl", [uf(completion("a", self_judgment="1")), *hh_records(1)])
    given = config(file, WITH_PRINCIPLES)
    with pytest.raises(InputError, match="has no ratings by principle"):
        jsft_rows(given, base()[0])
    given.jsft_args["examples"] = "sft"
    assert jsft_rows(given, base()[0])["kind"] == ["sft", "sft"]


def test_self_judge_rows_are_texts(tmp_path):
    records = [uf(completion("a", system="Be true.", honesty="3"), completion("b", honesty="1")),
               uf(completion("a", honesty="3"))]
    rows = self_judge_rows(config(write(tmp_path / "a.jsonl", records), WITH_PRINCIPLES),
                           base()[0])
    assert rows.to_list() == [{
        "query": "Be true.\n\n### User:\nName a colour.\n\n### Assistant:\n",
        "context": "User: Name a colour.", "chosen": "a", "rejected": "b"}]


def test_pairs_for_evaluation_name_their_principle(tmp_path):
    record = uf(completion("best", helpfulness="5", honesty="2"),
                completion("other", helpfulness="1", honesty="4"))
    file = write(tmp_path / "a.jsonl", [record])
    assert judge_pairs_of(config(file), "train") == [
        {"context": "User: Name a colour.", "chosen": "best", "rejected": "other"}]
    pairs = judge_pairs_of(config(file, WITH_PRINCIPLES), "train")
    assert {pair["principle"]: pair["chosen"] for pair in pairs} == {"helpfulness": "best",
                                                                     "honesty": "other"}


def test_rows_that_lose_all_that_is_learnt_are_left_out_and_counted(tmp_path, capsys):
    tokenizer, _ = base()
    file = write(tmp_path / "a.jsonl", [
        *hh_records(1), {"chosen": f"\n\nHuman: {'the cat ' * 400}\n\nAssistant: Yes.",
                         "rejected": f"\n\nHuman: {'the cat ' * 400}\n\nAssistant: No."}])
    rows = jsft_rows(config(file, max_length=200), tokenizer)
    assert rows["kind"] == ["sft", "judgment", "judgment", "judgment", "judgment"]
    assert "3 rows cut to max_length, 1 rows cut before what is learnt" in capsys.readouterr().out


def test_data_without_examples_is_an_error(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"chosen": "", "rejected": ""}])
    for make in (jsft_rows, self_judge_rows):
        with pytest.raises(InputError, match=r"no record of the split 'train' gives an example"):
            make(config(file), base()[0])


def test_a_record_that_the_chat_template_refuses_is_named(tmp_path):
    given = config(write(tmp_path / "a.jsonl", hh_records(1)))
    given.templates["chat"] = "{{ raise_exception('odd turns') }}"
    for make in (jsft_rows, self_judge_rows):
        with pytest.raises(InputError, match=r"a.jsonl: record 0: the chat template .*odd turns"):
            make(given, base()[0])


def test_counts_tell_only_what_happened():
    assert str(Counts()) == "no records"
    assert str(Counts(records=3, tied=1)) == (
        "3 records, 1 records without a lower completion, so without a pair")


def test_settings_keep_an_eval_that_is_switched_off():
    assert settings_of({"path": "x", "eval": None})["eval"] == ""
    assert settings_of({"path": "x"})["eval"] == settings_of("x")["eval"] == "test"


def test_context_without_the_system_message():
    assert context_text(talk("Hi", "Yes?", system="Be kind.")) == "User: Hi\n\nAssistant: Yes?"


# --- the command line -----------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path, tiny_llama):
    """A JSFT config on the tiny model; the decision of its tokenizer has no space."""
    import yaml

    data = write(tmp_path / "data" / "train.jsonl", many(6))
    write(tmp_path / "data" / "test.jsonl", many(2))
    given = {"training_args": {"output_dir": str(tmp_path / "out")},
             "jsft_args": {"max_length": 300},
             "model": {"pretrained_model_name_or_path": str(tiny_llama)},
             "templates": {**WITH_PRINCIPLES, "chat": "configs/templates/chat.jinja"},
             "dataset": {"path": str(data.parent)}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def test_show_prints_examples_of_each_kind(run_warm, run_file):
    done = run_warm("preprocess.py", "--config", run_file, "--show", 3)
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.split("--- ")[1:]
    assert [block.split(",")[0] for block in blocks] == ["sft", "judgment"] * 3
    for block in blocks:
        assert block.count("⟦") == block.count("⟧") == 1 and "</s>⟧" in block
    assert "⟦answer 4 of 0</s>⟧" in blocks[0]
    assert {block.split("Better:\n⟦")[1][0] for block in blocks[1::2]} == {"A", "B"}
    assert "A: honesty of answer" in blocks[1]


def test_without_show_it_counts(run_warm, run_file):
    done = run_warm("preprocess.py", f"--config={run_file}", "jsft_args.max_length=250")
    assert done.returncode == 0, done.stderr
    assert "train data: 6 records, 6 SFT examples, 6 pairs, 6 principles" in done.stdout
    assert "18 rows" in done.stdout and "eval data: 2 records" in done.stdout


def test_show_of_a_self_training_run(run_warm, run_file):
    text = run_file.read_text().replace("jsft_args", "self_judge_args")
    run_file.write_text(text)
    done = run_warm("preprocess.py", "--config", run_file, "--show", 1)
    assert done.returncode == 0, done.stderr
    titles = [line.split(",")[0] for line in done.stdout.splitlines() if line.startswith("---")]
    assert titles == ["--- query", "--- chosen", "--- rejected", "--- judge (helpfulness)",
                      "--- judge (honesty)"]


def test_bad_input_is_one_line(run_warm, run_file, tmp_path):
    write(tmp_path / "data" / "train.jsonl", ["{}", *many(2)])
    done = run_warm("preprocess.py", "--config", run_file, "--show", 1)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "train.jsonl: record 0: has neither" in done.stderr
    done = run_warm("preprocess.py", "--config", run_file, "--skip_bad", 1)
    assert done.returncode == 0 and "2 records, 1 bad ones skipped" in done.stdout
    done = run_warm("preprocess.py", "--config", run_file, "--skip_bad", 1,
                   f"dataset={tmp_path}/data/train.jsonl")
    assert done.returncode == 0 and "2 records, 1 bad ones skipped" in done.stdout
