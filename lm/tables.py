"""Plain tables for the terminal, and the papers' figures to stand in them."""

from collections.abc import Sequence
from pathlib import Path

PAPER_TABLES = Path(__file__).resolve().parents[1] / "configs" / "paper_tables.yaml"


def paper_rows(*measures: str) -> dict[str, tuple[float, ...]]:
    """The figures of the papers' rows with a `label` that have all these measures."""
    import yaml

    tables = yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))["tables"]
    return {f"paper: {row['label']}": tuple(row["figures"][listed["measures"].index(measure)]
                                            for measure in measures)
            for listed in tables if set(measures) <= set(listed["measures"])
            for row in listed["rows"] if "label" in row}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text aligned in columns, the first to the left and the others to the right.

    >>> print(table(["model", "score"], [["base", "7.5"], ["after", "81.09"]]))
    model  score
    ------------
    base     7.5
    after  81.09
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]),
                        *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:],
                                                                   strict=True))])
             for row in (head, *rows)]
    return "\n".join([lines[0].rstrip(), "-" * max(map(len, lines)),
                      *(line.rstrip() for line in lines[1:])])
