"""Judgment -> pair -> row: which of two responses is chosen, and which pairs are left out.

A training step asks for as many rows as it has queries, on every process. So a pair that is left
out becomes `empty_row`: two tokens, none of them supervised. Its log-probabilities are 0 under
policy and reference, its loss is that of a margin of 0, and its gradient is exactly zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm.generation import Response

if TYPE_CHECKING:
    from self_judge.judgment import Judgment

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Comparison:
    """A query's two responses, and what the judge says of them."""

    query: str
    prompt_ids: list[int]
    query_cut: bool  # the query lost its start to max_length
    response_a: Response
    response_b: Response
    judgment: "Judgment"

    def winner(self, ties: str = "drop", cut: str = "keep") -> str | None:
        """ "A", "B", or None where there is no pair; identical responses never make one.

        `ties` keep takes B, as the released code does. `cut` drop leaves out pairs of which the
        judge could not see everything.
        """
        if self.judgment.identical or (self.judgment.cut and cut == "drop"):
            return None
        return self.judgment.winner or ("B" if ties == "keep" else None)

    def row(self, winner: str) -> Row:
        """The ids for trl's collator, as they were sampled."""
        chosen, rejected = self.ranked(winner)
        return {"prompt_ids": self.prompt_ids, "chosen_ids": list(chosen.token_ids),
                "rejected_ids": list(rejected.token_ids)}

    def ranked(self, winner: str) -> tuple[Response, Response]:
        """The chosen response and the rejected one."""
        pair = (self.response_a, self.response_b)
        return pair if winner == "A" else pair[::-1]


def empty_row(token_id: int) -> Row:
    """A row without a response: two tokens, as one would leave nothing to predict."""
    return {"prompt_ids": [token_id] * 2, "chosen_ids": [], "rejected_ids": []}


def keep_end(ids: Sequence[int], length: int, bos_token_id: int | None) -> list[int]:
    """The last `length` ids, the BOS before them where there was one.

    >>> keep_end([1, 5, 6, 7], 3, bos_token_id=1), keep_end([5, 6, 7], 2, bos_token_id=None)
    ([1, 6, 7], [6, 7])
    """
    if len(ids) <= length:
        return list(ids)
    head = [ids[0]] if ids[0] == bos_token_id and length > 1 else []
    return head + list(ids[len(ids) - length + len(head):])


def part_of(batch: Mapping[str, Tensor], pairs: Sequence[int | None]) -> dict[str, Tensor]:
    """Some pairs of a batch of [chosen; rejected] rows, no wider than they need.

    A place without a pair, None, holds an empty one, which is not `present`: it counts for nothing.
    """
    real = torch.tensor([pair for pair in pairs if pair is not None], dtype=torch.long)
    both = torch.cat([real, real + len(batch["present"])])
    width = max([2, *batch["attention_mask"][both].sum(1).tolist()])
    empty = torch.zeros(len(pairs) - len(real), width, dtype=torch.long)

    def filled(name: str, filler: Tensor) -> Tensor:
        chosen, rejected = batch[name][both, :width].chunk(2)
        filler = filler.to(chosen)
        return torch.cat([chosen, filler, rejected, filler])

    two_tokens = (torch.arange(width) < 2).expand_as(empty)
    return {"input_ids": filled("input_ids", empty + 1),
            "attention_mask": filled("attention_mask", two_tokens),
            "completion_mask": filled("completion_mask", empty),
            "present": torch.cat([batch["present"][real],
                                  batch["present"].new_zeros(len(empty))])}
