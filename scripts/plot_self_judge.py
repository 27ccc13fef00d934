"""Show how scripts/self_judge_quickstart.sh went: a table and a figure.

    python scripts/plot_self_judge.py --run_dir runs/self_judge_quickstart
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.figures import panels
from lm.records import InputError
from lm.shares import Share
from lm.tables import table

JUDGES = {"judge_base.json": "before", "judge_jsft.json": "after JSFT"}
POLICIES = {"jsft": "JSFT, greedy", "self-judge": "SELF-JUDGE, greedy"}
SIZES = {"best-of-n1": 1, "best-of-n2": 2, "best-of-n4": 4, "best-of": 8}


def main(run_dir: str, output: str = "") -> None:
    """Print a line a measurement and draw the figure.

    Args:
        run_dir: the OUT folder of scripts/self_judge_quickstart.sh.
        output: the picture, by default RUN_DIR/self_judge.png.
    """
    folder = Path(run_dir)
    metrics = {label: read(folder / name)["metrics"]["all"] for name, label in JUDGES.items()}
    models = read(folder / "results.json")["models"]
    shares = {name: Share(**kinds["all"]) for name, kinds in models.items()}
    print(table(["judge, on held-out pairs", "accuracy", "orders agree"], [
        [label, *(str(Share(**found[name])) for name in ("accuracy", "consistency"))]
        for label, found in metrics.items()]))
    labels = POLICIES | {name: f"JSFT, best of {size} samples" for name, size in SIZES.items()}
    print("\n" + table(["policy, on held-out prompts", "constraints satisfied"], [
        [label, str(shares[name])] for name, label in labels.items()]))
    picture = output or str(folder / "self_judge.png")
    draw({label: Share(**found["accuracy"]) for label, found in metrics.items()}, shares, picture)
    print(f"figure: {picture}")


def read(path: Path) -> dict:
    """A result of an earlier step."""
    if not path.is_file():
        raise InputError(f"{path}: not there; run scripts/self_judge_quickstart.sh to its end")
    return json.loads(path.read_text(encoding="utf-8"))


def draw(judges: dict[str, Share], shares: dict[str, Share], picture: str) -> None:
    """Three panels with 95 % intervals: the judge, the policy, the tournament by its size."""
    found = [shares[name] for name in SIZES]
    with panels(picture, 1, 3, (11, 3.4)) as axes:
        judge, policy, tournament = axes
        bars(judge, judges, "tab:blue")
        judge.axhline(50, color="tab:gray", linestyle=":")
        judge.set(title="Judge: accuracy, %")
        bars(policy, {label: shares[name] for name, label in POLICIES.items()}, "tab:green")
        policy.set(title="Policy: constraints satisfied, %")
        tournament.errorbar(range(len(found)), [100 * share.share for share in found],
                            spans(found), marker="o", capsize=3)
        tournament.set(title="Tournament: constraints satisfied, %", xlabel="samples",
                       xticks=range(len(found)), xticklabels=SIZES.values())
        for axis in axes:
            axis.set_ylim(0, 104)  # a full marker at 100


def bars(axis, shares: dict[str, Share], colour: str) -> None:
    """A bar a share, with its interval."""
    axis.bar(list(shares), [100 * share.share for share in shares.values()], color=colour,
             yerr=spans(list(shares.values())), capsize=3, width=0.6)


def spans(shares: list[Share]) -> list[list[float]]:
    """How far the intervals reach below and above their shares, in per cent."""
    return [[100 * (share.share - share.low) for share in shares],
            [100 * (share.high - share.share) for share in shares]]


if __name__ == "__main__":
    run(main)
