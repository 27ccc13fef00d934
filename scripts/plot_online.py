"""Show how the rounds of scripts/online.py went: a table, and a figure of the score per round.

    python scripts/plot_online.py --run_dir runs/online

The loop does this at its end; before that it shows the rounds so far.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.figures import panels
from lm.records import InputError, Record
from lm.tables import table

HEAD = ["responses", "failed", "positive", "alike", "steps", "minutes", "dollars"]


def main(run_dir: str, output: str = "") -> None:
    """Print the table of the rounds and draw the figure.

    Args:
        run_dir: the --output_dir of scripts/online.py.
        output: the picture, by default RUN_DIR/online.png.
    """
    path = Path(run_dir) / "online.json"
    if not path.is_file():
        raise InputError(f"{path}: not there; give the --output_dir of scripts/online.py")
    rounds = json.loads(path.read_text(encoding="utf-8")).get("rounds")
    if not rounds:
        raise InputError(f"{path}: no round is finished yet")
    picture = output or str(Path(run_dir) / "online.png")
    print(summary(rounds))
    draw(rounds, picture)
    print(f"figure: {picture}")


def summary(rounds: list[Record]) -> str:
    """A row a round: score with its 95 % interval, judgments, steps, time and money."""
    rows = [[str(entry["round"]), score(entry), *judgments(entry["stages"]),
             f"{entry['seconds'] / 60:.1f}", f"{entry['cost']:.2f}"] for entry in rounds]
    whole = {key: sum(entry[key] for entry in rounds) for key in ("seconds", "cost")}
    rows.append(["all", *[""] * 6, f"{whole['seconds'] / 60:.1f}", f"{whole['cost']:.2f}"])
    return table(["round", rounds[0]["measure"], *HEAD], rows)


def score(entry: Record) -> str:
    """As `61.7 [49, 73]`; a dash where nobody gave one."""
    if entry["score"] is None:
        return "-"
    return f"{entry['score']:.1f} [{entry['low']:.0f}, {entry['high']:.0f}]"


def judgments(stages: Record) -> list[str]:
    """The cells of a round's judgments and steps; none for the model as it was."""
    if "annotate" not in stages:
        return [""] * 5
    counts = stages["annotate"]["counts"]
    return [str(counts["responses"]), str(counts["failed"]), f"{positive(counts):.0f} %",
            f"{counts['alike']} of {counts['repeats']}" if counts.get("repeats") else "-",
            str(stages["train"]["counts"]["steps"])]


def positive(counts: Record) -> float:
    """Positive judgments in per cent of those that did not fail."""
    return 100 * counts["positive"] / (counts["positive"] + counts["negative"])


def draw(rounds: list[Record], picture: str) -> None:
    """Two panels over the rounds: the score with its interval, and the positive judgments."""
    scored = [entry for entry in rounds if entry["score"] is not None]
    shares = [positive(entry["stages"]["annotate"]["counts"]) for entry in rounds[1:]]
    with panels(picture, 1, 2, (9, 3.4)) as axes:
        scores, judgments = axes
        if scored:
            number, middle, low, high = zip(*((entry["round"], entry["score"], entry["low"],
                                               entry["high"]) for entry in scored), strict=True)
            errors = [[m - edge for m, edge in zip(middle, low, strict=True)],
                      [edge - m for m, edge in zip(middle, high, strict=True)]]
            scores.errorbar(number, middle, errors, marker="o", capsize=3)
        scores.set(title=f"After each round: {rounds[0]['measure']}")
        judgments.plot(range(1, len(rounds)), shares, marker="o", color="tab:green")
        judgments.set(title="Positive judgments of a round's responses, %", ylim=(0, 100))
        for axis in axes:
            axis.set(xlabel="round", xticks=range(len(rounds)), xlim=(-0.2, len(rounds) - 0.8))


if __name__ == "__main__":
    run(main)
