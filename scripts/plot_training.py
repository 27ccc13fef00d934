"""Draw the training curves of a CUT run.

    python scripts/plot_training.py --run_dir runs/quickstart/adapter
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import InputError


def main(run_dir: str, output: str = "") -> None:
    """Plot loss, its two parts and the share of flagged tokens over the steps.

    Args:
        run_dir: a folder that finetune_unlikelihood.py wrote.
        output: the picture, by default RUN_DIR/loss.png.
    """
    path = Path(run_dir) / "trainer_state.json"
    if not path.is_file():
        raise InputError(f"{path}: not there; give the --output_dir of a finished run")
    log = [entry for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
    picture = output or str(Path(run_dir) / "loss.png")
    draw(log, picture)
    print(f"training curves: {picture}")


def draw(log: list[dict], picture: str) -> None:
    """Three panels over the optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [entry["step"] for entry in log]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for name, label in (("loss", "loss"), ("mle", "likelihood (L2)"),
                        ("unlikelihood", "contrast (L1)")):
        axes[0].plot(steps, [entry[name] for entry in log], label=label)
    axes[0].set(title="Loss, nats per token", xlabel="step")
    axes[0].legend(frameon=False)
    axes[1].plot(steps, [100 * entry["inappropriate_share"] for entry in log], color="tab:red")
    axes[1].set(title="Tokens flagged by the judgments, %", xlabel="step", ylim=(0, None))
    axes[2].plot(steps, [entry["learning_rate"] for entry in log], color="tab:gray")
    axes[2].set(title="Learning rate", xlabel="step", ylim=(0, None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    run(main)
