"""The token heat map: text pieces, U, flagged shares, and what the terminal and the page show.

    python -m pytest tests/test_heatmap.py
"""

import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from cut.data import Example, Row, Rows, collate, rows_of
from cut.heatmap import (
    TokenRatios,
    flagged_shares,
    html_page,
    pieces_of,
    show,
    terminal_example,
    terminal_legend,
    terminal_table,
    token_ratios,
)
from cut.trainer import CutSettings, cut_losses
from lm.records import InputError
from lm.templates import load_template, prompt_ids, response_ids

SETTINGS = CutSettings(threshold=1.02)  # a random model hardly minds the judgment
TEXTS = [
    "Red, green and blue.", "日本語の文、そして漢字。", "Party 🎉👩\u200d👩\u200d👧 and 🇫🇷!",
    "\n\n  a\n\n\tb \n", "", "real \ufffd here", "ends in \ufffd", " leading space", "naïve café",
]
CRITICISM = "The answer names <four> colours & the instruction asks for three."


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer of Llama-2's kind: "▁" for spaces, single bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehilnr"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(known)}, [],
                                   unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["tokenizer", "byte_fallback"])
def test_pieces_join_to_the_response(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    response = response_ids(tokenizer, text)
    ids = prompt_ids(tokenizer, "Name\n\nit:\n") + response
    pieces = pieces_of(tokenizer, ids, len(response))
    assert len(pieces) == len(response)
    assert pieces[-1] == "</s>" or text.endswith("\ufffd")  # which cannot be told from half of one
    assert "".join(pieces) == text + "</s>"
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(tokenizer):
    response = response_ids(tokenizer, "é!")
    assert pieces_of(tokenizer, prompt_ids(tokenizer, "x") + response, len(response)) == (
        "", "é", "!", "</s>")


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_inappropriate_tokens_are_those_of_training(model, tokenizer, train_on_inputs):
    text = "Red, green, blue and 🎉 are three colours of the rainbow, as all of us say."
    rows = _rows(tokenizer, _example(text), train_on_inputs)
    found = []
    for threshold in (0.5, 1.0, 2.0):
        settings = CutSettings(threshold)
        tokens = token_ratios(model, tokenizer, rows, settings)
        with torch.no_grad():
            losses = cut_losses(model.eval(), collate([rows], pad_id=0), settings)
        found.append(losses.inappropriate[0, -rows.response:].tolist())
        assert tokens.inappropriate.tolist() == found[-1]
        torch.testing.assert_close(tokens.log_ratio, losses.log_ratio[0, -rows.response:])
    assert rows.response > sum(found[0]) > sum(found[1]) > sum(found[2]) > 0


def test_probabilities_are_those_of_the_full_logits(model, tokenizer):
    rows = _rows(tokenizer, _example("Red, green."))
    tokens = token_ratios(model, tokenizer, rows, SETTINGS)
    torch.testing.assert_close(tokens.judged, _log_probs(model, rows.aligned))
    torch.testing.assert_close(tokens.plain, _log_probs(model, rows.misaligned))


def test_the_model_is_in_evaluation_mode_and_then_as_it_was(model, tokenizer):
    modes = []
    hook = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.train()
    tokens = token_ratios(model, tokenizer, _rows(tokenizer, _example("Red.")), SETTINGS)
    hook.remove()
    assert modes == [False] and model.training
    assert not tokens.judged.requires_grad
    model.eval()


def test_flagged_shares_by_hand():
    """Ratios 0.9, 1, 1.05, 1.15, 1.25 in one response, 1.35, 1.45, 2 in another: of 8 tokens 6
    are above 1.0 (strictly), 5 above 1.1, 4 above 1.2, 3 above 1.3, 2 above 1.4, 1 above 1.5."""
    shown = [_tokens([0.9, 1, 1.05, 1.15, 1.25]), _tokens([1.35, 1.45, 2])]
    assert flagged_shares(shown) == {1.0: 6 / 8, 1.1: 5 / 8, 1.2: 4 / 8, 1.3: 3 / 8, 1.4: 2 / 8,
                                     1.5: 1 / 8}


def test_flagged_shares_never_rise_with_the_threshold(model, tokenizer):
    example = _example("Red, green, blue and yellow are colours of the rainbow, as all say.")
    tokens = token_ratios(model, tokenizer, _rows(tokenizer, example), SETTINGS)
    shares = list(flagged_shares([tokens]).values())
    assert shares[0] > shares[-1]
    assert shares == sorted(shares, reverse=True)


def test_without_colour_runs_of_inappropriate_tokens_are_in_brackets():
    tokens = _tokens([2, 2, 1, 0.5, 2, 1], ["Red", " and", " blue", "", "é", "</s>"])
    text = terminal_example(_example("any"), tokens, colour=False)
    assert text.endswith("Response, 3 of 6 tokens (50%) in U:\n[Red and] blue[é]</s>")
    assert "in brackets" in terminal_legend(1.1, colour=False)


def test_with_colour_inappropriate_tokens_are_underlined_and_lines_end_their_style():
    tokens = _tokens([5, 1.6, 1, 0.2], ["Red", "\n", " blue", "</s>"])
    text = terminal_example(_example("any"), tokens, colour=True)
    assert text.endswith("\x1b[4;38;5;196mRed\x1b[0m\x1b[4;38;5;174m⏎\x1b[0m\n blue"
                         "\x1b[38;5;27m</s>\x1b[0m")


def test_data_cannot_steer_the_terminal():
    tokens = _tokens([2, 1], ["\x1b[2J\x9b", "</s>"])
    text = terminal_example(_example("x", instruction="\x07\x1b]0;x", judgment="\r"), tokens,
                            colour=False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert r"\x1b[2J" in text


def test_the_table_marks_the_threshold_of_the_run():
    assert "> λ 1.1    50.0%  " in terminal_table([_tokens([1.15, 1])], 1.1)
    assert "> λ 2.0     0.0%" in terminal_table([_tokens([1.15, 1])], 2)


@pytest.mark.parametrize("tty, no_color, coloured", [
    (False, "", False), (True, "1", False), (True, "", True)])
def test_colour_codes_only_on_a_terminal_that_wants_them(
        model, tokenizer, tmp_path, monkeypatch, tty, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = io.StringIO()
    screen.isatty = lambda: tty
    monkeypatch.setattr("sys.stdout", screen)
    example = _example("Red.")
    show(model, tokenizer, [example], [_rows(tokenizer, example)], SETTINGS, tmp_path / "map.html")
    assert ("\x1b[" in screen.getvalue()) == coloured
    assert CRITICISM in screen.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]


def test_the_page_is_escaped_and_keeps_every_text(model, tokenizer, tmp_path):
    hostile = "<script>alert('1')</script> & \"quotes\" 🎉\n</div>"
    example = Example("<b>file</b>: record 0", hostile, hostile, hostile)
    show(model, tokenizer, [example], [_rows(tokenizer, example)], SETTINGS, tmp_path / "map.html")
    page = _Page((tmp_path / "map.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "b", "link", "img"}
    assert page.texts == [hostile, hostile, hostile + "</s>"]
    assert page.left_open == []
    assert len(page.tips) == len(response_ids(tokenizer, hostile))
    assert all(re.search(r"\np\(y\|x,j\) .*\np\(y\|x\) .*\nratio ", tip) for tip in page.tips)


def test_the_page_shows_numbers_and_needs_nothing_else():
    tokens = _tokens([2, 0.5], ["Red", "</s>"], plain=0.25)
    text = html_page([_example("Red")], [tokens], 1.1)
    assert ('<span class="more u" style="--s:0.50" data-tip="Red&#10;p(y|x,j)  0.5&#10;p(y|x)    '
            '0.25&#10;ratio     2  in U">Red</span>') in text
    assert '<span class="less" style="--s:0.50"' in text
    assert "<tr class=now><th>1.1</th><td>50.0%</td>" in text
    assert not re.search(r"https?:|src=|href=|url\(|@import", text)


def test_nothing_to_show_is_an_error(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="none of the training examples has a judgment"):
        show(model, tokenizer, [], [], SETTINGS, tmp_path / "map.html")


def _example(response: str, instruction: str = "Name three colours of the rainbow.",
             judgment: str = CRITICISM) -> Example:
    return Example("file.json: record 0", instruction, response, judgment)


def _rows(tokenizer, example: Example, train_on_inputs: bool = False) -> Rows:
    return rows_of(example, load_template("alpaca"), tokenizer, 1024, train_on_inputs)


def _tokens(ratios: list[float], pieces: list[str] | None = None, plain: float = 0.1):
    """Tokens of probability `plain` without the judgment; those of ratio > 1.1 are in U."""
    judged = torch.tensor([math.log(ratio * plain) for ratio in ratios])
    without = torch.full_like(judged, math.log(plain))
    return TokenRatios(tuple(pieces or ["x"] * len(ratios)), judged, without, judged - without,
                       torch.tensor(ratios) > 1.1, cut=0)


def _log_probs(model, row: Row) -> torch.Tensor:
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[-row.supervised:, 0]


class _Page(HTMLParser):
    """Tags, the text of each `text` block, and the tips of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.tips, self.left_open = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        if tag != "meta":
            self.left_open.append((tag, "text" in attributes.get("class", "").split()))
        if self.left_open[-1][1]:
            self.texts.append("")
        if "data-tip" in attributes:
            self.tips.append(attributes["data-tip"])

    def handle_endtag(self, tag):
        assert self.left_open.pop()[0] == tag

    def handle_data(self, data):
        if any(is_text for _, is_text in self.left_open):
            self.texts[-1] += data
