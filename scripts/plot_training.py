"""Draw the training curves of a run, as report.py does.

    python scripts/plot_training.py --run_dir runs/quickstart/adapter
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.figures import draw_training
from lm.records import InputError


def main(run_dir: str, output: str = "") -> None:
    """Plot the loss, what it is made of, and the other figures of the log over the steps.

    Args:
        run_dir: a folder that a training script wrote.
        output: the picture, by default RUN_DIR/loss.png.
    """
    path = Path(run_dir) / "trainer_state.json"
    if not path.is_file():
        raise InputError(f"{path}: not there; give the --output_dir of a finished run")
    picture = output or str(Path(run_dir) / "loss.png")
    if not draw_training(json.loads(path.read_text(encoding="utf-8"))["log_history"], picture):
        raise InputError(f"{path}: its log has nothing to draw; give the --output_dir of a run of "
                         "at least one step")
    print(f"training curves: {picture}")


if __name__ == "__main__":
    run(main)
