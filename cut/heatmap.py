"""What judgments flag, token by token: look at this before training.

    python finetune_unlikelihood.py --visualize 5 --base_model ... --data_path ... --output_dir ...

Each token of an unsatisfactory response is coloured by the ratio p(y|x,j) / p(y|x) of its
probabilities with the judgment in the prompt and without it: red where the judgment makes it more
likely, blue where less. U, the tokens above the threshold lambda, is underlined. The same goes to
the terminal and, with the probabilities under the pointer, into one HTML file.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from cut.data import Example, Rows, collate
from cut.loss import CutLoss, cut_loss
from cut.trainer import CutSettings
from lm.log_probs import supervised_log_probs
from lm.models import evaluating
from lm.records import InputError, write_text
from lm.terminal import printable, wants_colour

THRESHOLDS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
STRONGEST = 4.0  # the ratio, or its inverse, from which on a colour is at its strongest
# From which ratio on, red for more likely and blue for less: 256-colour numbers that can be read
# on dark and on light terminals. Below the first ratio a token keeps the terminal's colour.
STEPS = ((1.1, 138, 103), (1.5, 174, 68), (2.0, 167, 33), (STRONGEST, 196, 27))
MEANING = ("ratio p(y|x,j) / p(y|x): how much likelier the judgment in the prompt makes a token of "
           "the response")


@dataclass(frozen=True, eq=False)
class TokenRatios:
    """The N tokens of an unsatisfactory response with and without its judgment; [N] each."""

    pieces: tuple[str, ...]  # joined they are the response and EOS; "" if only part of a character
    judged: Tensor  # log p(y|x,j)
    plain: Tensor  # log p(y|x)
    log_ratio: Tensor  # their difference
    inappropriate: Tensor  # bool: U
    cut: int  # tokens of both rows that did not fit into cutoff_len


def show(model, tokenizer, examples: Sequence[Example], rows: Sequence[Rows],
         settings: CutSettings, html_path: str | Path) -> None:
    """Print the heat maps of some negative examples and write them to an HTML file.

    `examples` and `rows` are parallel and hold pairs only; the folder of `html_path` exists.
    """
    if not rows:
        raise InputError("none of the training examples has a judgment to show; "
                         "lower --val_set_size, or leave out --debug")
    colour = wants_colour()
    print(terminal_legend(settings.threshold, colour))
    shown = []
    for example, pair in zip(examples, rows, strict=True):
        shown.append(token_ratios(model, tokenizer, pair, settings))
        print(terminal_example(example, shown[-1], colour), flush=True)
    print(terminal_table(shown, settings.threshold))
    write_text(html_path, html_page(examples, shown, settings.threshold))
    print(f"\nwith the probabilities of each token: {html_path}")


@torch.no_grad()
def token_ratios(model, tokenizer, rows: Rows, settings: CutSettings) -> TokenRatios:
    """Run a pair's two rows and compare their response tokens, as training does."""
    if rows.misaligned is None:
        raise InputError(f"{rows.record}: has no judgment, so nothing is compared")
    batch = collate([rows], pad_id=0).to(model.device)
    with evaluating(model):
        flat = supervised_log_probs(model, batch.input_ids, batch.loss_mask)
    # The aligned row comes first; it may be supervised from its prompt on (train_on_inputs).
    judged = flat[:rows.aligned.supervised][-rows.response:].cpu()
    plain = flat[-rows.response:].cpu()
    losses = _losses(judged, plain, **asdict(settings))
    return TokenRatios(pieces_of(tokenizer, rows.misaligned.ids, rows.response), judged, plain,
                       losses.log_ratio[0], losses.inappropriate[0], rows.cut)


def pieces_of(tokenizer, ids: Sequence[int], count: int) -> tuple[str, ...]:
    """The text that each of the last `count` ids adds to what stands before it.

    A character that several tokens spell belongs to the last of them; the others add "".
    """
    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(list(ids[start:stop]), skip_special_tokens=False,
                                clean_up_tokenization_spaces=False)

    pieces = []
    spelt = len(ids) - count  # ids before this one are spelt out
    context = 0  # decoding starts here, a little earlier: some decoders treat the start specially
    for end in range(spelt + 1, len(ids) + 1):
        text = decode(context, end)
        if text.endswith("\ufffd") and end < len(ids):  # bytes of a character are missing
            pieces.append("")
            continue
        pieces.append(text[len(decode(context, spelt)):])
        context, spelt = spelt, end
    return tuple(pieces)


def flagged_shares(shown: Sequence[TokenRatios],
                   thresholds: Sequence[float] = THRESHOLDS) -> dict[float, float]:
    """The share of all shown tokens that is in U, for each threshold."""
    total = max(sum(len(tokens.pieces) for tokens in shown), 1)
    return {threshold: sum(
        _losses(tokens.judged, tokens.plain, threshold=threshold,
                weight_unlike=1.0).inappropriate.sum().item() for tokens in shown) / total
        for threshold in thresholds}


def terminal_legend(threshold: float, colour: bool) -> str:
    """What the marks mean."""
    if not colour:
        return f"{MEANING}\n[in brackets]: U, the tokens of ratio > {threshold:g}"
    bounds = [bound for bound, *_ in STEPS]
    lower = [_styled(f"1/{bound:g}", -math.log(bound), False) for bound in reversed(bounds)]
    upper = [_styled(f"{bound:g}", math.log(bound), False) for bound in bounds]
    return (f"{MEANING}\n{'  '.join([*lower, '1', *upper])}   "
            f"\x1b[4munderlined\x1b[0m: U, ratio > {threshold:g}")


def terminal_example(example: Example, tokens: TokenRatios, colour: bool) -> str:
    """Instruction, judgment, and the response with its marks."""
    bold, end = ("\x1b[1m", "\x1b[0m") if colour else ("", "")
    marked = _coloured(tokens) if colour else _bracketed(tokens)
    return "\n".join([
        "", f"{bold}=== {printable(example.record)}{end}",
        f"{bold}Instruction:{end} {printable(example.instruction)}",
        f"{bold}Judgment:{end} {printable(example.judgment)}",
        f"{bold}Response{end}, {summary(tokens)}:", marked])


def terminal_table(shown: Sequence[TokenRatios], threshold: float) -> str:
    """Flagged shares with bars; the run's own threshold is marked."""
    lines = ["", f"share of the {_count(shown)} response tokens in U, by threshold λ:"]
    for value, share in _shares_with(shown, threshold).items():
        mark = ">" if value == threshold else " "
        lines.append(f"{mark} λ {value:<5} {share:6.1%}  {'█' * round(40 * share)}".rstrip())
    return "\n".join(lines)


def summary(tokens: TokenRatios) -> str:
    """How much of a response is in U."""
    flagged, count = int(tokens.inappropriate.sum()), len(tokens.pieces)
    cut = f"; its rows lost {tokens.cut} tokens to --cutoff_len" if tokens.cut else ""
    return f"{flagged} of {count} tokens ({flagged / count:.0%}) in U{cut}"


def html_page(examples: Sequence[Example], shown: Sequence[TokenRatios], threshold: float) -> str:
    """The whole page; it needs nothing but itself."""
    sections = "\n".join(map(_html_example, examples, shown))
    ticks = "".join(f"<span>{tick}</span>" for tick in (
        f"≤ 1/{STRONGEST:g}", f"1/{STRONGEST ** .5:g}", "1", f"{STRONGEST ** .5:g}",
        f"≥ {STRONGEST:g}"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the judgments flag</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>What the judgments flag</h1>
<p>Each response token is coloured by how much likelier the judgment <i>j</i> in the prompt makes
it. The <u>underlined</u> ones are in <i>U</i>, ratio &gt; {threshold:g}: training makes them
unlikely, and the others likely. Point at a token for its probabilities.</p>
<figure><figcaption>ratio p(y|x,j) / p(y|x)</figcaption>
<div class="scale"></div><div class="ticks numbers">{ticks}</div>
<div class="ticks ends"><span>less likely with the judgment</span>
<span>more likely</span></div></figure>
{_html_table(shown, threshold)}
{sections}
</main>
</body>
</html>
"""


def _losses(judged: Tensor, plain: Tensor, **settings) -> CutLoss:
    """What training makes of one pair's response; its U is the U."""
    every = torch.ones(1, len(plain), dtype=torch.bool)
    return cut_loss(judged[None], plain[None], every, every[:, 0], **settings)


def _count(shown: Sequence[TokenRatios]) -> int:
    return sum(len(tokens.pieces) for tokens in shown)


def _shares_with(shown: Sequence[TokenRatios], threshold: float) -> dict[float, float]:
    return flagged_shares(shown, sorted({*THRESHOLDS, float(threshold)}))


def _bracketed(tokens: TokenRatios) -> str:
    """The response with each run of tokens in U in brackets."""
    marked = []
    pairs = zip(tokens.pieces, tokens.inappropriate.tolist(), strict=True)
    for flagged, run in groupby(pairs, key=lambda pair: pair[1]):
        text = printable("".join(piece for piece, _ in run))
        marked.append(f"[{(text or '·').replace(chr(10), '⏎' + chr(10))}]" if flagged else text)
    return "".join(marked)


def _coloured(tokens: TokenRatios) -> str:
    texts = [printable(piece) or "·" for piece in tokens.pieces]
    return "".join(map(_styled, texts, tokens.log_ratio.tolist(), tokens.inappropriate.tolist()))


def _styled(text: str, log_ratio: float, flagged: bool) -> str:
    """Text in its colour; each line ends its style, so that no line break carries it on."""
    colours = [f"38;5;{red if log_ratio > 0 else blue}" for bound, red, blue in STEPS
               if abs(log_ratio) >= math.log(bound)]
    codes = (["4"] if flagged else []) + colours[-1:]
    if not codes:
        return text
    lines = text.replace("\n", "⏎\n").split("\n")
    return "\n".join(f"\x1b[{';'.join(codes)}m{line}\x1b[0m" if line else "" for line in lines)


def _html_example(example: Example, tokens: TokenRatios) -> str:
    spans = "".join(map(_html_token, tokens.pieces, tokens.judged.tolist(), tokens.plain.tolist(),
                        tokens.inappropriate.tolist()))
    record, instruction, judgment = (html.escape(printable(text)) for text in (
        example.record, example.instruction, example.judgment))
    return f"""<section>
<h2>{record}</h2>
<h3>Instruction</h3><div class="text">{instruction}</div>
<h3>Judgment</h3><div class="text">{judgment}</div>
<h3>Response <small>{summary(tokens)}</small></h3><div class="text response">{spans}</div>
</section>"""


def _html_token(piece: str, judged: float, plain: float, flagged: bool) -> str:
    ratio = judged - plain
    strength = min(abs(ratio) / math.log(STRONGEST), 1.0)
    text = printable(piece)
    name = text.replace("\n", "⏎").replace(" ", "␣") or "part of the next character"
    tip = (f"{name}\np(y|x,j)  {math.exp(judged):.3g}\np(y|x)    {math.exp(plain):.3g}\n"
           f"ratio     {math.exp(min(ratio, 700)):.3g}{'  in U' if flagged else ''}")
    tip = html.escape(tip).replace("\n", "&#10;")  # the newlines of an attribute
    body = html.escape(text).replace("\n", "<i></i>\n")
    kind = ("more" if ratio > 0 else "less") + (" u" if flagged else "")
    return f'<span class="{kind}" style="--s:{strength:.2f}" data-tip="{tip}">{body}</span>'


def _html_table(shown: Sequence[TokenRatios], threshold: float) -> str:
    rows = "".join(
        f"<tr{' class=now' if value == threshold else ''}><th>{value}</th><td>{share:.1%}</td>"
        f'<td class="bar"><div style="width:{share:.1%}"></div></td></tr>\n'
        for value, share in _shares_with(shown, threshold).items())
    return (f"<table><caption>Share of the {_count(shown)} response tokens in <i>U</i></caption>\n"
            f"<tr><th>λ</th><th>share</th><td class=bar></td></tr>\n{rows}</table>")


# Colours lie over the page's own background in the strength of --s, so that one scale serves
# light and dark pages. The tip is a bar at the foot of the window: no script, never off the edge.
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d1d1f; --faint: #6a6a72;
  --line: #dcdce2; --panel: #f6f6f8; --more: 222 60 52; --less: 44 108 222; }
@media (prefers-color-scheme: dark) { :root { --page: #15161a; --ink: #e9e9ee; --faint: #9c9ca8;
  --line: #34353d; --panel: #1d1e24; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2rem 1.25rem 9rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: .8rem; font-weight: 600; color: var(--faint); margin: 1rem 0 .2rem; }
h3 small { font-weight: 400; font-size: .8rem; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.response { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem 1.1rem; line-height: 1.95; }
.response span { padding: .18em 0; border-radius: 2px; cursor: default; }
.response span:last-child { font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: .8em; }
.response span:empty::before { content: "·"; }
.response i::before { content: "⏎"; font-style: normal; opacity: .45; }
.more { background: rgb(var(--more) / calc(var(--s) * .62)); }
.less { background: rgb(var(--less) / calc(var(--s) * .62)); }
.u, u { text-decoration: underline 2px; text-underline-offset: .26em;
  text-decoration-skip-ink: none; }
.response span:hover { box-shadow: 0 0 0 2px var(--ink); }
.response span:hover::after { content: attr(data-tip); position: fixed; left: 50%; bottom: 1rem;
  transform: translateX(-50%); min-width: 17rem; max-width: 92vw; padding: .7rem 1rem;
  white-space: pre-wrap; text-align: left; pointer-events: none; z-index: 1; border-radius: 8px;
  display: inline-block; background: var(--ink); color: var(--page);
  font: 14px/1.5 ui-monospace, Menlo, Consolas, monospace; }
figure { margin: 1.25rem 0; max-width: 30rem; }
figcaption, caption { font-size: .85rem; color: var(--faint); text-align: left;
  padding-bottom: .35rem; }
.scale { height: .9rem; border-radius: 4px; border: 1px solid var(--line);
  background: linear-gradient(to right, rgb(var(--less) / .62), rgb(var(--less) / 0) 50%,
  rgb(var(--more) / 0) 50%, rgb(var(--more) / .62)); }
.ticks { display: flex; justify-content: space-between; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
.numbers span { width: 0; display: flex; justify-content: center; white-space: nowrap; }
.numbers span:first-child { justify-content: flex-start; }
.numbers span:last-child { justify-content: flex-end; }
.ends { color: var(--faint); }
table { border-collapse: collapse; table-layout: fixed; width: 30rem; max-width: 100%;
  font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; font-weight: 400; }
th { width: 4.5rem; } .bar { width: auto; padding-right: 0; }
tr:first-of-type > * { color: var(--faint); }
.bar div { height: .6rem; background: rgb(var(--more) / .62); border-radius: 2px; }
.now > * { font-weight: 700; } .now th::before { content: "▸ "; }
"""
