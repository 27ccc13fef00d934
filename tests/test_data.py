"""Records -> examples -> rows -> batch: nothing but response and EOS is supervised.

    python -m pytest tests/test_data.py
"""

import random
from dataclasses import replace

import pytest
from small_tokenizers import TOKENIZERS

from cut.data import Example, Row, Rows, collate, examples_of, join_input, rows_of, within_budget
from lm.records import InputError
from lm.templates import Template, load_template, prompt_ids, response_ids

ALPACA = load_template("alpaca")
SHORT = Template("short", "Do: {instruction}\nAnswer:\n",
                 "Do: {instruction}\nSaid: {judgment}\nAnswer:\n")
ROOMY = 100_000
TEXTS = ["Red, green and blue.", "the cat\n\nsat", "", "\n\nA list:\n- one", "  two spaces",
         "### Response:\nthe cat\n\n### Judgment:\nfine", "{instruction} {x} }{ {judgment}",
         "é 😀", "x\n", "the dog " * 300]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def pair(instruction="Name three colours.", response="the cat", judgment="too long"):
    return Example("f: record 0", instruction, response, judgment)


def record(**fields):
    return {"instruction": "Sing.", "input": "", "output": "La.", "judgment": None} | fields


def supervised(row):
    return [token for token, chosen in zip(row.ids, row.loss_mask, strict=True) if chosen]


# --- rows: what is supervised ---------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_exactly_response_and_eos_are_supervised(tokenizer, text):
    """In the place of the response, and in each text of the prompt."""
    for example in (pair(response=text), pair(instruction=text), pair(judgment=text or " ")):
        rows = rows_of(example, ALPACA, tokenizer, ROOMY)
        response = response_ids(tokenizer, example.response)
        for row, judgment in ((rows.aligned, example.judgment), (rows.misaligned, None)):
            assert supervised(row) == response
            prompt = ALPACA.render(example.instruction, judgment)
            assert row.ids == prompt_ids(tokenizer, prompt) + response
        assert (rows.response, rows.cut) == (len(response), 0)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "words"])
def test_supervised_tokens_read_as_the_response(name, text):
    tokenizer = TOKENIZERS[name]()
    row = rows_of(replace(pair(response=text), judgment=None), ALPACA, tokenizer, ROOMY).aligned
    assert row.ids[-1] == tokenizer.eos_token_id
    whole, prompt = (tokenizer.decode(ids, skip_special_tokens=True)
                     for ids in (row.ids, row.ids[:-row.supervised]))
    assert whole == prompt + text
    assert prompt.endswith("\n\n### Response:\n")


def released_rows(instruction, response, judgment, tokenizer):
    """Ids and labels of the released code: one string, the prompt's length from itself, EOS."""
    prompt = ALPACA.render(instruction, judgment)
    ids = tokenizer(prompt + response)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    before = tokenizer(prompt)["input_ids"]
    length = len(before) - (before[-1] == tokenizer.eos_token_id)
    return ids, [-100] * length + ids[length:]


@pytest.mark.parametrize("response", ["Red, green and blue.", "1. one\n2. two\n", "é 😀 (why?)",
                                      "def f(x):\n    return {x}"])
@pytest.mark.parametrize("judgment", [None, "Too long.\n\nAnd wrong."])
def test_uncut_rows_equal_the_released_computation(tokenizer, response, judgment):
    example = pair("Translate:\nthe cat", response, judgment)
    rows = rows_of(example, ALPACA, tokenizer, ROOMY)
    for row, said in ((rows.aligned, judgment), (rows.misaligned, None)):
        if row:
            ids, labels = released_rows("Translate:\nthe cat", response, said, tokenizer)
            ours = [token if chosen else -100
                    for token, chosen in zip(row.ids, row.loss_mask, strict=True)]
            assert (row.ids, ours) == (ids, labels)


def test_positive_example_has_one_row(tokenizer):
    rows = rows_of(replace(pair(), judgment=None), ALPACA, tokenizer, ROOMY)
    assert rows.misaligned is None and rows.tokens == len(rows.aligned.ids)


def test_train_on_inputs_supervises_the_aligned_row_but_its_first_token(tokenizer):
    rows = rows_of(pair(), ALPACA, tokenizer, ROOMY, train_on_inputs=True)
    assert supervised(rows.aligned) == rows.aligned.ids[1:]
    assert supervised(rows.misaligned) == response_ids(tokenizer, "the cat")
    assert rows.response == rows.misaligned.supervised


def test_response_without_a_prompt_is_refused():
    """Nothing would stand before its first token, so nothing could predict it."""
    bare = Template("bare", "{instruction}", "{instruction}{judgment}")
    with pytest.raises(InputError, match=r"f: record 0: its prompt has no tokens.*'bare'"):
        rows_of(pair(instruction=""), bare, TOKENIZERS["byte_level"](), ROOMY)
    with_bos = TOKENIZERS["byte_level_with_bos"]()
    row = rows_of(pair(instruction=""), bare, with_bos, ROOMY).misaligned
    assert row.ids[0] == with_bos.bos_token_id and row.loss_mask[:2] == [False, True]


# --- rows: what is cut ----------------------------------------------------------------------


def framed(tokenizer, with_judgment):
    """Least number of tokens of a prompt's head and tail: those of the empty instruction."""
    return len(prompt_ids(tokenizer, SHORT.render("", "" if with_judgment else None)))


@pytest.mark.parametrize("seed", range(8))
def test_cut_rows_fit_and_keep_template_response_end_and_eos(tokenizer, seed):
    draw = random.Random(seed)
    words = ["the", "cat", "x1.", "(é)", "\nfox"]
    texts = [" ".join(draw.choices(words, k=draw.choice((1, 9, 80)))) for _ in range(3)]
    least = framed(tokenizer, True) * 4 // 3 + 2
    for cutoff in (least, least + 7, 2 * least, 5 * least):
        example = pair(*texts)
        rows = rows_of(example, SHORT, tokenizer, cutoff)
        uncut = rows_of(example, SHORT, tokenizer, ROOMY)
        assert supervised(rows.aligned) == supervised(rows.misaligned)
        assert supervised(rows.aligned) == supervised(uncut.aligned)[-rows.response:]
        assert rows.aligned.ids[-1] == tokenizer.eos_token_id
        assert rows.cut == uncut.tokens - rows.tokens
        for row, full in ((rows.aligned, uncut.aligned), (rows.misaligned, uncut.misaligned)):
            assert len(row.ids) <= cutoff
            assert_frame_kept(tokenizer, row)
            if len(full.ids) <= cutoff and not rows.cut:
                assert row == full
        # Room is not wasted: the longer row is full as soon as anything is lost.
        assert len(rows.aligned.ids) == min(cutoff, len(uncut.aligned.ids))


def assert_frame_kept(tokenizer, row):
    """The prompt begins and ends with the template's own words."""
    prompt = tokenizer.decode(row.ids[:-row.supervised], skip_special_tokens=True)
    squeezed = "".join(prompt.lower().split())
    assert squeezed.startswith("do:") and squeezed.endswith("answer:")
    if tokenizer.bos_token_id is not None:
        assert row.ids[0] == tokenizer.bos_token_id


def test_long_response_leaves_the_prompt_a_quarter():
    """Released rows of such a response hold no prompt at all, so the judgment had no effect."""
    tokenizer = TOKENIZERS["byte_level"]()
    example = pair("the fox " * 100, "the dog " * 400, "the hat " * 100)
    rows = rows_of(example, SHORT, tokenizer, 200)
    assert len(rows.aligned.ids) == 200
    prompt = 200 - rows.response
    assert prompt >= 50
    assert rows.aligned.ids[:prompt] != rows.misaligned.ids[:prompt]
    text = tokenizer.decode(rows.aligned.ids[:prompt])
    assert text.startswith("Do:") and text.endswith("the hat \nAnswer:\n")


def test_only_the_prompt_is_cut_while_the_response_fits():
    tokenizer = TOKENIZERS["byte_level"]()
    example = pair("the fox " * 100, "the dog", "the hat")
    rows = rows_of(example, SHORT, tokenizer, 60)
    assert supervised(rows.aligned) == response_ids(tokenizer, "the dog")
    assert len(rows.aligned.ids) == 60
    # only the judgment tells the two rows apart: they keep the same part of the instruction
    instructions = [tokenizer.decode(row.ids).count("fox") for row in rows.rows]
    assert instructions[0] == instructions[1] < 100
    assert tokenizer.decode(rows.aligned.ids).endswith("\nSaid: the hat\nAnswer:\nthe dog</s>")


def test_cutoff_shorter_than_the_template_is_one_line(tokenizer):
    frame = len(prompt_ids(tokenizer, ALPACA.render("")))
    message = f"--cutoff_len {frame} leaves no room for a response: template 'alpaca'"
    with pytest.raises(InputError, match=message):
        rows_of(pair("the fox " * 100), ALPACA, tokenizer, frame)


# --- records --------------------------------------------------------------------------------


def test_kinds_of_record():
    records = [record(judgment="Too loud."), record(judgment=None),
               record(judgment="Too loud.", score=7), record(judgment="Too loud.", score=6.5),
               record(judgment="Too loud.", score=None), record(judgment=None, score=1)]
    examples, counts = examples_of(records, "f")
    assert [bool(example.judgment) for example in examples] == [True, False, False, True, True,
                                                                False]
    assert (counts.negatives, counts.positives, counts.positives_kept) == (3, 3, 3)


def test_input_is_joined_with_one_newline_whatever_it_says():
    assert join_input(record(input="No input")) == "Sing.\nNo input"
    assert [join_input(record(input=empty)) for empty in ("", None)] == ["Sing."] * 2
    without = record()
    del without["input"]
    assert join_input(without) == "Sing."


def test_failed_judgments_are_dropped_and_counted_or_kept_as_text():
    records = [record(judgment=text) for text in ("bad", "$ERROR$", "", " \n", " $ERROR$ ", None)]
    examples, counts = examples_of(records, "f")
    assert [example.judgment for example in examples] == ["bad", None]
    assert (counts.dropped, counts.negatives, counts.records) == (4, 1, 6)
    assert "4 with a failed judgment dropped" in str(counts)

    examples, counts = examples_of(records, "f", as_released=True)
    assert [example.judgment for example in examples] == [r["judgment"] for r in records]
    assert (counts.dropped, counts.negatives) == (0, 5)


def test_failed_judgment_of_a_good_response_is_no_loss():
    examples, counts = examples_of([record(judgment="$ERROR$", score=8), record(judgment="x")], "f")
    assert [example.judgment for example in examples] == [None, "x"] and counts.dropped == 0


def many(positives=20, negatives=7):
    """Positives and negatives mixed, each with its number as its instruction."""
    kinds = [None] * positives + ["bad"] * negatives
    random.Random(3).shuffle(kinds)
    return [record(instruction=str(i), judgment=kind) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 1, 2, 2.5])
def test_downsampling_is_that_of_the_released_code(ratio):
    """int(negatives * ratio) positives, `random.sample` seeded 42, the file's order."""
    records = many()
    positives = [r["instruction"] for r in records if r["judgment"] is None]
    random.seed(42)
    kept = set(random.sample(positives, int(7 * ratio)))
    expected = [r["instruction"] for r in records if r["judgment"] or r["instruction"] in kept]

    examples, counts = examples_of(records, "f", downsample=ratio)
    assert [example.instruction for example in examples] == expected
    assert (counts.positives, counts.positives_kept) == (20, int(7 * ratio))


@pytest.mark.parametrize("ratio", [-1, 20 / 7, 3, 100])
def test_downsampling_never_drops_when_there_are_too_few(ratio):
    records = many()
    examples, counts = examples_of(records, "f", downsample=ratio)
    assert [example.instruction for example in examples] == [r["instruction"] for r in records]
    assert counts.positives_kept == 20


def test_downsampling_counts_the_negatives_that_are_left():
    records = many() + [record(judgment="$ERROR$")] * 5
    assert examples_of(records, "f", downsample=1)[1].positives_kept == 7
    assert examples_of(records, "f", downsample=1, as_released=True)[1].positives_kept == 12


def test_same_record_twice_is_two_examples():
    examples, _ = examples_of([record(judgment="x")] * 2 + [record()] * 6, "f", downsample=1)
    assert [example.judgment for example in examples] == ["x", "x", None, None]


@pytest.mark.parametrize(("bad", "message"), [
    ({"instruction": None}, "record 1: field 'instruction' is null; expected text"),
    ({"output": 7}, "record 1: field 'output' is a number; expected text"),
    ({"judgment": ["x"]}, "record 1: field 'judgment' is a list; expected text or null"),
    ({"judgment": False}, "record 1: field 'judgment' is true or false; expected text or null"),
    ({"score": "7"}, "record 1: field 'score' is text; expected a number or null"),
    ({"score": True}, "record 1: field 'score' is true or false; expected a number or null"),
    ({"input": {}}, "record 1: field 'input' is an object; expected text or null"),
])
def test_wrong_types_are_one_line(bad, message):
    with pytest.raises(InputError, match=f"^my.json: {message}$"):
        examples_of([record(judgment="x"), record(**bad)], "my.json")


@pytest.mark.parametrize("field", ["instruction", "output", "judgment"])
def test_missing_field_is_an_error_and_null_judgment_is_not(field):
    bad = record()
    del bad[field]
    with pytest.raises(InputError, match=f"^f: record 1: field '{field}' is missing; expected te"):
        examples_of([record(judgment="x"), bad], "f")


@pytest.mark.parametrize("records", [[record()], [record(judgment="x", score=9)],
                                     [record(judgment="$ERROR$")]])
def test_no_negatives_is_one_line(records):
    with pytest.raises(InputError, match=r"^f: no record has a negative judgment"):
        examples_of(records, "f")


def test_plain_fine_tuning_needs_no_negatives():
    examples, counts = examples_of([record(), record()], "f", contrast=False)
    assert [example.judgment for example in examples] == [None, None] and counts.positives_kept == 2
    with pytest.raises(InputError, match="no record has a negative judgment"):
        examples_of([record(judgment="$ERROR$")], "f", contrast=False)  # nothing at all is left


def test_negative_downsampling_is_one_line():
    with pytest.raises(InputError, match=r"--downsample is -0\.5; expected 0 or more, or -1"):
        examples_of(many(), "f", downsample=-0.5)


def test_example_names_its_record():
    examples, _ = examples_of([record(judgment="x", id=17), record()], "my.json")
    assert [e.record for e in examples] == ["my.json: record 0 (id 17)", "my.json: record 1"]


# --- batch ----------------------------------------------------------------------------------


def test_batch_keeps_order_weight_and_padding():
    good = Rows("a", Row([5, 9], 1), None, 1)
    bad = Rows("b", Row([5, 6, 7, 8], 3), Row([4, 7, 8], 2), 2, weight=0.0)
    batch = collate([good, bad, good, bad], pad_id=3)
    assert batch.input_ids.tolist() == [[5, 9, 3, 3], [5, 6, 7, 8], [5, 9, 3, 3], [5, 6, 7, 8],
                                        [4, 7, 8, 3], [4, 7, 8, 3]]
    assert batch.lengths.tolist() == [2, 4, 2, 4, 3, 3]
    assert batch.loss_mask.sum(-1).tolist() == [1, 3, 1, 3, 2, 2]
    assert batch.negative.tolist() == [False, True, False, True]
    assert batch.weight.tolist() == [1, 0, 1, 0]
    assert batch.records == ["a", "b", "a", "b"]
    assert collate([good], pad_id=0).input_ids.shape == (1, 2)  # no padding where none is needed


@pytest.mark.parametrize(("sizes", "groups"), [
    ([5, 5, 1], [[5, 5], [1]]), ([11, 1, 12], [[12], [11], [1]]), ([3, 3, 3, 1], [[3, 3, 3], [1]]),
    ([10], [[10]]), ([4, 7, 3], [[7], [4, 3]])])
def test_groups_hold_at_most_the_budget_or_one_example(sizes, groups):
    examples = [Rows(str(i), Row([0] * size, 1), None, 1) for i, size in enumerate(sizes)]
    got = within_budget(examples, 10)
    assert [[example.tokens for example in group] for group in got] == groups
    assert sorted(example.record for group in got for example in group) == [
        example.record for example in examples]


def test_rows_without_padding_count_as_they_are():
    examples = [Rows(str(size), Row([0] * size, 1), Row([0], 1), 1) for size in (4, 3, 2)]
    sizes = {padded: [[example.width for example in group]
                      for group in within_budget(examples, 9, padded)] for padded in (True, False)}
    assert sizes == {True: [[4], [3], [2]], False: [[4, 3], [2]]}


def test_a_long_judgment_keeps_the_marker_that_names_it(tokenizer):
    """Cut from within: the instruction goes first, then the judgment's start, never the frame."""
    template = load_template("alpaca")
    example = Example("r", "Sing. " * 40, "La la.", "Too long. " * 150 + "The end.")
    text = tokenizer.decode(rows_of(example, template, tokenizer, 300).aligned.ids)
    text = text.replace(" ", "").replace("#", "").lower()  # word pieces
    assert "ment:" in text and "theend." in text and "sing." not in text
