"""Judgment records -> what the AI judge learns, and records held out to measure it on.

    python scripts/make_judge_data.py --data_path data/sample/train.jsonl \\
        --output_dir runs/ai_judge/data --held_out 40

A record `{instruction, input, output, judgment}` becomes one whose instruction is the whole judge
prompt and whose output is the judgment and the decision, Yes. or No.: what
`finetune_unlikelihood.py --prompt_template_name plain --weight_unlike 0` trains on, and
`annotate.py --judge local` reads back. Writes train.json of such records and held_out.json of
unchanged ones. Failed judgments (blank, or $ERROR$) are left out and counted.

Cost: no money, seconds on a CPU.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import InputError, Record, listed, read_records, write_json
from lm.verdicts import JudgePrompt, load_judge_prompt

if TYPE_CHECKING:
    from cut.data import Example


def main(data_path: str, output_dir: str, held_out: int = 100, limit: int = 0,
         template: str = "ai_judge", split: str = "heldout", seed: int = 42) -> None:
    """Write train.json and held_out.json.

    Args:
        data_path: files of judgment records, separated by commas; JSON or JSON Lines.
        output_dir: folder to write to.
        held_out: so many responses are kept for measuring, or a few more: all responses to an
            instruction are on one side.
        limit: train on only so many; fewer are part of more, and held_out.json stays. 0 is all,
            which is also what a larger number than that gives.
        template: judge prompt with a `target`, by name in configs/templates or path.
        split: heldout|validation. validation: held_out.json has as many of the other responses,
            to choose settings on, and those held out otherwise are in neither file.
        seed: of the draw.
    """
    from cut.data import examples_of

    if limit < 0 or held_out < 1:
        raise InputError(f"--limit {limit} must be 0 (all) or more, and --held_out {held_out} 1 or "
                         "more")
    if split not in ("heldout", "validation"):
        raise InputError(f"--split {split}: expected heldout or validation")
    prompt = load_judge_prompt(template)
    if not prompt.target:
        raise InputError(f"--template {template}: has no target to learn; use ai_judge or one of "
                         "its kind")
    examples = []
    for path in listed(data_path, "--data_path"):
        found, counts = examples_of(read_records(path), path)
        print(f"{path}: {counts.negatives} judgments, {counts.positives} responses without fault; "
              f"{counts.dropped} failed judgments left out")
        examples += found
    train, apart = hold_out(examples, held_out, seed)
    if split == "validation":
        train, apart = hold_out(train, held_out, seed)
    if limit > len(train):
        print(f"note: --limit {limit}, but only {len(train)} are left")
    train = train[:limit or None]
    folder = Path(output_dir)
    write_json(folder / "train.json", [learnt(prompt, example) for example in train])
    write_json(folder / "held_out.json", [
        {"instruction": example.instruction, "input": "", "output": example.response,
         "judgment": example.judgment} for example in apart])
    print(f"{folder}: {len(train)} to train on, {len(apart)} held out")


def hold_out(examples: "Sequence[Example]", held_out: int,
             seed: int) -> "tuple[list[Example], list[Example]]":
    """In a drawn order, those to train on and those held out, no instruction on both sides."""
    by_instruction: dict[str, list[Example]] = {}
    for example in examples:
        by_instruction.setdefault(example.instruction, []).append(example)
    order = list(by_instruction)
    random.Random(seed).shuffle(order)
    apart: list[Example] = []
    while order and len(apart) < held_out:
        apart += by_instruction[order.pop()]
    if not order:
        raise InputError(f"--held_out {held_out} leaves nothing of {len(examples)} responses to "
                         "train on; lower it")
    return [example for instruction in order for example in by_instruction[instruction]], apart


def learnt(prompt: JudgePrompt, example: "Example") -> Record:
    """The record of which finetune_unlikelihood.py learns the output, without a judgment on it."""
    return {"instruction": prompt.render(example.instruction, example.response), "input": "",
            "output": prompt.completion(example.judgment), "judgment": None}


if __name__ == "__main__":
    run(main)
