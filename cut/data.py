"""CUT data: records -> examples -> rows -> batch.

A record is a JSON object `{instruction, input?, output, judgment, score?, id?, ...}`. It becomes
one example: Align-P (a satisfactory response) or a pair, Align-N and Misalign (an unsatisfactory
response, with the judgment that says so and without it). A row is token ids of which the last
few are supervised; an Align-P example has one row, a pair two.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import NoneType

import torch
from torch import Tensor

from lm.records import InputError, Record, check_fields, join_input
from lm.templates import Template, ids_in_pieces, response_ids

POSITIVE_SCORE = 7  # released code: such a score makes a record positive whatever its judgment
FAILED = "$ERROR$"  # an annotation that failed, in the published iteration files
DOWNSAMPLE_SEED = 42  # released code
FIELDS = {"required": {"instruction": (str,), "output": (str,), "judgment": (str, NoneType)},
          "optional": {"input": (str, NoneType), "i_ans": (str, NoneType),
                       "score": (int, float, NoneType)}}


@dataclass(frozen=True)
class Example:
    """One text to learn from; `judgment` is None for Align-P, the criticism for a pair.

    What the last three fields are for, `cut/objectives.py` says.
    """

    record: str  # which record of which file, for messages
    instruction: str
    response: str
    judgment: str | None
    refinement: str | None = None  # a better response
    score: float | None = None  # reward of the response
    contrast: bool = True  # whether the judgment makes a pair; else it stands in the one row
    given: str | None = None  # a response that the prompt holds, if `response` is its judgment


@dataclass
class Counts:
    """What became of the records."""

    records: int = 0
    positives: int = 0
    negatives: int = 0
    dropped: int = 0  # blank or failed judgments
    positives_kept: int = 0

    def __str__(self) -> str:
        return (f"{self.records} records: {self.negatives} negative, {self.positives_kept} of "
                f"{self.positives} positive used, {self.dropped} with a failed judgment dropped")


@dataclass(frozen=True)
class Row:
    """Token ids; the last `supervised` of them have a loss."""

    ids: list[int]
    supervised: int

    @property
    def loss_mask(self) -> list[bool]:
        """True where the token is supervised."""
        return [False] * (len(self.ids) - self.supervised) + [True] * self.supervised


@dataclass(frozen=True)
class Rows:
    """The rows of one example. The last `response` tokens of each row are the response and EOS."""

    record: str
    aligned: Row  # Align-P, or Align-N with the judgment
    misaligned: Row | None  # Misalign: the same response without the judgment
    response: int
    cut: int = 0  # tokens that did not fit into cutoff_len
    weight: float = 1.0  # 0 for the padding examples that make batches even across processes

    @property
    def rows(self) -> list[Row]:
        """The one or two rows."""
        return [self.aligned, self.misaligned] if self.misaligned else [self.aligned]

    @property
    def tokens(self) -> int:
        """Tokens of the rows together."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def width(self) -> int:
        """Tokens of the longer row."""
        return max(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class Batch:
    """B examples as R rows, B aligned ones and then the Misalign rows of the pairs, in order."""

    input_ids: Tensor  # [R, T], right-padded
    loss_mask: Tensor  # bool [R, T]
    lengths: Tensor  # [R]: tokens of each row
    negative: Tensor  # bool [B]: which examples are pairs
    response: Tensor  # [B]: response tokens of each example
    weight: Tensor  # [B]
    records: list[str] = field(default_factory=list)  # [B]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()
                                if isinstance(value, Tensor)})


def judgment_of(record: Record) -> str | None:
    """What is wrong with the response; None where nothing is, "" where judging it failed."""
    if (record.get("score") or 0) >= POSITIVE_SCORE or record["judgment"] is None:
        return None
    return "" if record["judgment"].strip() in ("", FAILED) else record["judgment"]


def examples_of(records: Sequence[Record], source: str, *, downsample: float = -1,
                as_released: bool = False,
                contrast: bool = True) -> tuple[list[Example], Counts]:
    """Check every record and turn it into an example.

    Blank and `$ERROR$` judgments are dropped, or kept as text with `as_released`. Unless
    `downsample` is -1, only int(negatives * downsample) positives are kept, drawn with seed 42,
    in the order of the file. Where none is negative there is nothing to contrast: an error, unless
    `contrast` is False, as for plain fine-tuning.
    """
    check_fields(records, source, **FIELDS)
    if downsample < 0 and downsample != -1:
        raise InputError(f"--downsample is {downsample}; expected 0 or more, or -1 to keep all")
    counts = Counts(records=len(records))
    examples = []
    for index, record in enumerate(records):
        judgment = judgment_of(record)
        if judgment == "":
            if not as_released:
                counts.dropped += 1
                continue
            judgment = record["judgment"]
        name = f"{source}: record {index}" + (f" (id {record['id']})" if "id" in record else "")
        examples.append(Example(name, join_input(record), record["output"], judgment,
                                record.get("i_ans"), record.get("score")))
    positives = [example for example in examples if example.judgment is None]
    counts.positives = len(positives)
    counts.negatives = len(examples) - len(positives)
    if not counts.negatives and (contrast or not positives):
        raise InputError(f"{source}: no record has a negative judgment, so there is nothing to "
                         "contrast; expected text in field 'judgment' of some records, or "
                         "--weight_unlike 0 for plain fine-tuning")
    kept = _downsampled(positives, counts.negatives, downsample)
    counts.positives_kept = len(kept)
    names = {example.record for example in kept}
    return [e for e in examples if e.judgment is not None or e.record in names], counts


def rows_of(example: Example, template: Template, tokenizer, cutoff_len: int,
            train_on_inputs: bool = False) -> Rows:
    """Tokenize an example's rows; a pair's two rows end in the same response ids.

    A row longer than `cutoff_len` loses the start of its instruction first, then of its judgment
    (the template's own text stays), down to a quarter of `cutoff_len`, then the response's start.
    """
    pair = example.contrast and example.judgment is not None
    prompts = [_Prompt(ids_in_pieces(tokenizer, template.pieces(
        example.instruction, judgment, example.given)))
        for judgment in ([example.judgment, None] if pair else [example.judgment])]
    response = response_ids(tokenizer, example.response)
    room = min(cutoff_len - prompt.least(cutoff_len) for prompt in prompts)
    if room < 1:
        frame = max(prompt.frame for prompt in prompts)
        raise InputError(f"--cutoff_len {cutoff_len} leaves no room for a response: template "
                         f"'{template.name}' alone has {frame} tokens, and a quarter is kept for "
                         "instruction and judgment; raise it")
    kept = response[-room:]
    excess = [max(0, len(prompt) + len(kept) - cutoff_len) for prompt in prompts]
    # Both rows of a pair lose the same part of the instruction: only the judgment tells them apart
    instruction = min(max(excess), len(prompts[0].pieces[1]))
    fitted = [prompt.without(max(lost, instruction))
              for prompt, lost in zip(prompts, excess, strict=True)]
    lost = sum(len(p) - len(f) for p, f in zip(prompts, fitted, strict=True))
    if not all(fitted):
        raise InputError(f"{example.record}: its prompt has no tokens for the response to follow; "
                         f"give template '{template.name}' some text, or raise --cutoff_len")
    rows = [Row(ids + kept, len(kept)) for ids in fitted]
    if train_on_inputs:
        rows[0] = replace(rows[0], supervised=len(rows[0].ids) - 1)
    return Rows(example.record, rows[0], rows[1] if len(rows) == 2 else None, len(kept),
                cut=lost + len(rows) * (len(response) - len(kept)))


def check_positions(examples: Sequence[Rows], limit: int | None) -> None:
    """Stop at a row with more tokens than the model has positions for."""
    for example in examples:
        if limit and example.width > limit:
            raise InputError(f"{example.record}: its row has {example.width} tokens, and the model "
                             f"positions for {limit}; set cutoff_len to {limit} or less")


def collate(examples: Sequence[Rows], pad_id: int) -> Batch:
    """Pad the rows of some examples on the right, the pairs' Misalign rows last.

    >>> pair = Rows("a", aligned=Row([5, 6, 7, 8], 2), misaligned=Row([5, 7, 8], 2), response=2)
    >>> good = Rows("b", aligned=Row([5, 9], 1), misaligned=None, response=1)
    >>> batch = collate([pair, good], pad_id=0)
    >>> batch.input_ids.tolist()
    [[5, 6, 7, 8], [5, 9, 0, 0], [5, 7, 8, 0]]
    >>> batch.loss_mask.int().tolist()
    [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]
    >>> batch.negative.tolist(), batch.response.tolist()
    ([True, False], [2, 1])
    """
    rows = [e.aligned for e in examples] + [e.misaligned for e in examples if e.misaligned]
    width = max(len(row.ids) for row in rows)
    return Batch(
        input_ids=torch.tensor([_pad(row.ids, width, pad_id) for row in rows]),
        loss_mask=torch.tensor([_pad(row.loss_mask, width, False) for row in rows]),
        lengths=torch.tensor([len(row.ids) for row in rows]),
        negative=torch.tensor([e.misaligned is not None for e in examples]),
        response=torch.tensor([e.response for e in examples]),
        weight=torch.tensor([e.weight for e in examples]),
        records=[e.record for e in examples],
    )


def within_budget(examples: Sequence[Rows], tokens: int,
                  padded: bool = True) -> list[list[Rows]]:
    """Groups that take at most `tokens` tokens, any padding included, or hold one example.

    Examples of like length come together, the longest first: if memory is short, it shows at once.
    """
    groups: list[list[Rows]] = []
    for example in sorted(examples, key=lambda example: example.width, reverse=True):
        together = [*(groups[-1] if groups else []), example]
        run = (together[0].width * sum(len(each.rows) for each in together) if padded else
               sum(each.tokens for each in together))
        if groups and run <= tokens:
            groups[-1] = together
        else:
            groups.append([example])
    return groups


@dataclass(frozen=True)
class _Prompt:
    """A prompt's ids in pieces: the template's own text and a field in turn."""

    pieces: list[list[int]]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def frame(self) -> int:
        """Tokens of the template's own text, special tokens included."""
        return sum(map(len, self.pieces[::2]))

    def least(self, cutoff_len: int) -> int:
        """Tokens that a response may not take away."""
        return min(len(self), self.frame + cutoff_len // 4)

    def without(self, lost: int) -> list[int]:
        """All but `lost` ids: the instruction loses its start, then the judgment."""
        ids = []
        for place, piece in enumerate(self.pieces):
            here = min(lost, len(piece)) if place % 2 else 0
            ids += piece[here:]
            lost -= here
        return ids


def _downsampled(positives: list[Example], negatives: int, ratio: float) -> list[Example]:
    wanted = int(negatives * ratio)
    if ratio == -1 or wanted >= len(positives):
        return positives
    return random.Random(DOWNSAMPLE_SEED).sample(positives, wanted)


def _pad(values: list, width: int, filler: object) -> list:
    return values + [filler] * (width - len(values))
