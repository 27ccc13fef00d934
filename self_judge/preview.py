"""A row as people look at it: its text, with the tokens marked that are learnt."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from lm.terminal import printable

COLOUR, PLAIN = ("\x1b[1;4m", "\x1b[0m"), ("⟦", "⟧")


def marked(row: Mapping[str, Sequence[int]], tokenizer, colour: bool) -> str:
    """The row's text, its learnt parts bold and underlined, or in brackets without colours."""
    before, after = COLOUR if colour else PLAIN
    parts, place = [], 0
    for learnt, run in groupby(row["completion_mask"]):
        start, place = place, place + len(list(run))
        text = printable(_decoded(tokenizer, row["input_ids"], start, place))
        parts.append(before + text + after if learnt else text)
    return "".join(parts)


def _decoded(tokenizer, ids: Sequence[int], start: int, stop: int) -> str:
    """The text of some ids as it follows that of those before them, special tokens included."""
    head, whole = (tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
                   for end in (start, stop))
    if whole.startswith(head):
        return whole[len(head):]
    return tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
