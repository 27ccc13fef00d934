"""Figures of one look, drawn without a display."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm.records import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Title, what of the log is drawn, and times what.
TRAINING_PANELS = (
    ("Loss", ("loss", "mle", "unlikelihood", "sft_loss", "judgment_loss", "eval_loss"), 1),
    ("Tokens flagged by the judgments, %", ("inappropriate_share",), 100),
    ("Judge on held-out pairs, %", ("eval_judge_accuracy", "eval_judge_consistency"), 100),
    ("Judge in training, %", ("judge/consistency", "judge/tie_rate", "judge/pairs"), 100),
    ("Rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins"), 1),
    ("Response length, tokens", ("response_length/chosen", "response_length/rejected"), 1),
    ("Learning rate", ("learning_rate",), 1))


@contextlib.contextmanager
def panels(picture: str | Path, rows: int, columns: int, size: tuple[float, float],
           dpi: int = 120) -> Iterator[list["Axes"]]:
    """Panels to draw in, row by row; the picture, a PNG by default, is written at the end.

    `size` is the figure's, in inches. The same PNG has the same bytes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    kind = Path(picture).suffix[1:].lower() or "png"
    figure.savefig(content, dpi=dpi, format=kind,
                   metadata={"Software": None} if kind == "png" else None)
    write_bytes(picture, content.getvalue())


def draw_training(log: Sequence[Mapping], picture: str | Path) -> bool:
    """The curves of a training's log, three panels a row; whether there is any."""
    found = [(title, lines) for title, names, scale in TRAINING_PANELS
             if (lines := lines_of(log, names, scale))]
    if not found:
        return False
    rows = -(-len(found) // 3)
    with panels(picture, rows, 3, (12, 3.2 * rows), dpi=100) as axes:
        for axis in axes[len(found):]:
            axis.remove()
        for axis, (title, lines) in zip(axes, found, strict=False):
            for name, points in lines.items():
                axis.plot(*zip(*points, strict=True), label=name,
                          marker="." if len(points) < 9 else "")
            axis.set(title=title, xlabel="step")
            if len(lines) > 1:
                axis.legend(frameon=False)
    return True


def lines_of(log: Sequence[Mapping], names: Sequence[str], scale: float) -> dict[str, list[tuple]]:
    """(step, value) wherever the log has one, for the names that it has."""
    lines = {name: [(entry["step"], scale * entry[name]) for entry in log
                    if entry.get(name) is not None] for name in names}
    return {name: points for name, points in lines.items() if points}
