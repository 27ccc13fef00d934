"""The data of scripts/tables.py: one folder holds what all its rows train on and are measured on.

    python scripts/tables_data.py --output_dir runs/tables/cpu/data/once

From data/sample (its README says how that was made), or from a larger set of the same kind:

- train.jsonl: judged responses, with the constraints that each satisfies as `score`
- validation.jsonl, heldout.jsonl: prompts; no other split has their topics and their wordings
- rated.jsonl: the completions of preferences/train.jsonl, each judged by rules and with a score;
  rated_half.jsonl and rated_quarter.jsonl are the same of fewer instructions
- preferences/: pairs and rated completions, as in data/sample/preferences

Cost: no money, seconds on a CPU; with --scale the model's answers, so minutes on a GPU.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import InputError, Record, read_records, write_lines
from lm.rules import judge_by_rules, satisfied
from scripts import make_sample_data
from scripts.make_sample_data import make_prompts

PARTS = {"rated": 1, "rated_half": 2, "rated_quarter": 4}


def main(output_dir: str, source: str = "data/sample", records: int = 0, prompts_per_kind: int = 15,
         heldout_per_kind: int = 30, preferences: int = 0, scale: int = 1,
         base_model: str = "smollm2-135m-instruct", seed: int = 0) -> None:
    """Write the files.

    Args:
        output_dir: Folder to write to.
        source: Folder laid out like data/sample.
        records: Train on only so many judged responses, to few instructions; 0 is all.
        prompts_per_kind: Validation prompts of each kind of constraint.
        heldout_per_kind: Held-out prompts of each kind.
        preferences: Only the first so many lines of each file of preferences; 0 is all.
        scale: Have the model make so many times as many judged responses; 1 takes those of source.
        base_model: The model that answers then.
        seed: Draws the prompts.
    """
    import yaml

    if min(prompts_per_kind, heldout_per_kind, scale) < 1 or min(records, preferences) < 0:
        raise InputError("--prompts_per_kind, --heldout_per_kind and --scale must be 1 or more, "
                         "--records and --preferences 0 (all) or more")
    folder, base = Path(output_dir), Path(source)
    (folder / "preferences").mkdir(parents=True, exist_ok=True)
    train = base / "train.jsonl"
    if scale > 1:
        train = scaled(base, folder / "scaled", base_model, scale)
    judged = read_records(train)
    if records:
        judged = by_instruction(judged)[:records]
    write_lines(folder / "train.jsonl", [scored(record) for record in judged])
    settings = yaml.safe_load((base / "ingredients.yaml").read_text(encoding="utf-8"))
    settings["prompts_per_kind"] = {"validation": prompts_per_kind, "heldout": heldout_per_kind}
    for split in settings["prompts_per_kind"]:
        drawn = {prompt["instruction"]: prompt for prompt in make_prompts(settings, split, seed)}
        write_lines(folder / f"{split}.jsonl", list(drawn.values()))
    for path in sorted((base / "preferences").glob("*.jsonl")):
        write_lines(folder / "preferences" / path.name, read_records(path)[:preferences or None])
    exercises = read_records(folder / "preferences" / "train.jsonl")
    for name, part in PARTS.items():
        write_lines(folder / f"{name}.jsonl", [record for exercise in exercises[::part]
                                               for record in rated(exercise, seed)])
    for path in sorted(folder.glob("*.jsonl")):
        print(f"{path}: {len(read_records(path))} records")


def scaled(source: Path, folder: Path, base_model: str, scale: int) -> Path:
    """A larger train.jsonl, made as that of data/sample was."""
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "ingredients.yaml", folder)
    make_sample_data.main(base_model, str(folder), str(folder / "work"), scale=scale)
    return folder / "train.jsonl"


def by_instruction(records: list[Record]) -> list[Record]:
    """All responses to an instruction together, as DPO compares them with each other."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record["instruction"], []).append(record)
    return [record for responses in grouped.values() for record in responses]


def scored(record: Record) -> Record:
    """The record with the number of constraints that its response satisfies."""
    return {**record, "score": sum(satisfied(record["constraints"], record["output"]))}


def rated(exercise: Record, seed: int) -> list[Record]:
    """A record for each completion of an instruction: what is wrong with it, and its score."""
    texts = [completion["response"] for completion in exercise["completions"]]
    return [scored({"id": f"{exercise['id']}-{number}", "instruction": exercise["instruction"],
                    "input": "", "output": text, "judgment": judge_by_rules(exercise, text, seed),
                    "constraints": exercise["constraints"]})
            for number, text in enumerate(texts)]


if __name__ == "__main__":
    run(main)
