"""Rows -> batch, for JSFT (ids) and for self-training (texts).

    collator = JudgeAugmentedSFTCollator(tokenizer)
    transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()

(`remove_unused_columns=False` in the arguments: the rows' `completion_mask` is no model input.)
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lm.records import InputError

IGNORED = -100  # a label without a loss


class JudgeAugmentedSFTCollator:
    """Pads rows of SFT and judgment examples on the right; labels are the ids that are supervised.

    `max_length` cuts the ends of longer rows. Padding is told by the rows' lengths, never by the
    pad id, which often is the EOS.

    >>> from types import SimpleNamespace
    >>> collate = JudgeAugmentedSFTCollator(SimpleNamespace(pad_token_id=0, eos_token_id=2))
    >>> batch = collate([{"input_ids": [5, 6, 7, 2], "completion_mask": [0, 0, 1, 1]},
    ...                  {"input_ids": [5, 8], "completion_mask": [0, 1]}])
    >>> batch["input_ids"].tolist()
    [[5, 6, 7, 2], [5, 8, 0, 0]]
    >>> batch["attention_mask"].tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0]]
    >>> batch["labels"].tolist()
    [[-100, -100, 7, 2], [-100, 8, -100, -100]]
    """

    def __init__(self, tokenizer, max_length: int | None = None,
                 pad_to_multiple_of: int | None = None):
        # Models without a pad token are common, and what stands in padding is never looked at.
        self.pad_id = (tokenizer.eos_token_id if tokenizer.pad_token_id is None
                       else tokenizer.pad_token_id)
        self.max_length = max_length
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Rows with `input_ids` and `completion_mask` -> ids, attention mask and labels (B, T)."""
        if any("completion_mask" not in row for row in rows):
            raise InputError("rows for the collator lack 'completion_mask'; make them by "
                             "preprocess.jsft_rows, and set remove_unused_columns=False in the "
                             "training arguments, or Trainer takes the mask away")
        ids = [list(row["input_ids"])[:self.max_length] for row in rows]
        masks = [list(row["completion_mask"])[:self.max_length] for row in rows]
        labels = [[token if learnt else IGNORED for token, learnt in zip(*row, strict=True)]
                  for row in zip(ids, masks, strict=True)]
        width = -(-max(map(len, ids)) // self.multiple) * self.multiple
        return {"input_ids": _padded(ids, width, self.pad_id),
                "attention_mask": _padded([[1] * len(row) for row in ids], width, 0),
                "labels": _padded(labels, width, IGNORED)}


class SelfJudgeCollator:
    """Keeps the texts of self-training rows; they are sampled, judged and tokenized in the step.

    `index` tells the rows apart, whatever batch they come in; the sampled responses follow from it.

    >>> batch = SelfJudgeCollator()([{"query": "Hi", "context": "User: Hi", "index": 7}])
    >>> batch["queries"], batch["contexts"], batch["index"].tolist()
    (['Hi'], ['User: Hi'], [7])
    """

    def __init__(self, tokenizer=None, **unused: object):
        """The tokenizer and its settings are accepted for compatibility; nothing needs them."""

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """Rows with `query`, `context` and, if given, `index`, `chosen` and `rejected`."""
        for field in ("query", "context"):
            missing = [row.get("index", place) for place, row in enumerate(rows)
                       if not isinstance(row.get(field), str)]
            if missing:
                raise InputError(f"row {missing[0]}: field '{field}' is missing; "
                                 "expected text")
        batch: dict[str, object] = {
            "queries": [row["query"] for row in rows],
            "contexts": [row["context"] for row in rows],
            "index": torch.tensor([row.get("index", place) for place, row in enumerate(rows)]),
        }
        for field in ("chosen", "rejected"):
            if all(field in row for row in rows):
                batch[field] = [row[field] for row in rows]
        return batch


def get_conditional_labels(input_ids: Sequence[int] | Tensor, assistant_ids: Sequence[int],
                           user_ids: Sequence[int] | None = None,
                           ignore_index: int = IGNORED) -> list[int]:
    """Labels found by searching for the markers of turns: from each assistant marker to the next
    user marker, or to the end.

    Kept for compatibility. A text that quotes a marker misleads it; `self_judge.rows.row_of` builds
    ids and mask together instead.

    >>> get_conditional_labels([1, 7, 5, 8, 6, 2, 7, 4, 8, 3], assistant_ids=[8], user_ids=[7])
    [-100, -100, -100, -100, 6, 2, -100, -100, -100, 3]
    """
    ids = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    if any(isinstance(token, Sequence) for token in ids):
        raise InputError("input_ids: expected the ids of one row, not of several")
    labels, learnt, place = [], False, 0
    while place < len(ids):
        markers = ((assistant_ids, True), (user_ids or [], False))
        found = next(((len(marker), turn) for marker, turn in markers
                      if len(marker) and ids[place:place + len(marker)] == list(marker)), None)
        if found:
            labels += [ignore_index] * found[0]
            place, learnt = place + found[0], found[1]
        else:
            labels.append(ids[place] if learnt else ignore_index)
            place += 1
    return labels


def _padded(rows: list[list[int]], width: int, filler: int) -> Tensor:
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])
