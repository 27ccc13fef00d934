"""How many of the prompts' constraints do the models' answers satisfy?

    python scripts/evaluate_constraints.py --prompts data/sample/heldout.jsonl \
        --outputs base/heldout.json,cut/heldout.json --output results.json

Prompts are records with `instruction` (and `input`) and `constraints`; outputs are AlpacaEval
files as scripts/generate.py writes them, the baseline's first. IFEval's checkers give the verdicts:
no money, seconds on a CPU.
"""

import random
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from types import NoneType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import (
    InputError,
    Record,
    check_fields,
    join_input,
    listed,
    read_records,
    write_json,
)
from lm.rules import check_constraints, satisfied
from lm.shares import Share, wilson
from lm.tables import table


def main(prompts: str, outputs: str | tuple | list, output: str = "", show: int = 3) -> None:
    """Print a table of satisfied constraints by kind and model, and some answers side by side.

    Args:
        prompts: File of records with `instruction` (and `input`) and `constraints`.
        outputs: Files of answers, separated by commas; the first one is the baseline.
        output: JSON file for the numbers and every verdict; none if empty.
        show: Prompts whose answers are shown; those where the verdicts differ come first.
    """
    records = read_prompts(prompts)
    answers = named_answers(listed(outputs, "--outputs"), records)
    verdicts = {name: [satisfied(record["constraints"], text)
                       for record, text in zip(records, texts, strict=True)]
                for name, texts in answers.items()}
    shares = {name: shares_by_kind(records, held) for name, held in verdicts.items()}
    changes = {name: changed(verdicts, name) for name in list(verdicts)[1:]}
    print("\n".join(table_of(shares) + change_lines(shares, changes) + empty_lines(answers)))
    print("\n".join(side_by_side(records, answers, verdicts, show)))
    if output:
        write_json(output, results(prompts, records, answers, verdicts, shares, changes))
        print(f"\nwritten: {output}")


def read_prompts(path: str) -> list[Record]:
    """Records with an instruction, not twice the same, and at least one constraint.

    An `input` is joined to the instruction, as in the answers of scripts/generate.py.
    """
    records = read_records(path)
    check_fields(records, path, {"instruction": (str,), "constraints": (list,)},
                 {"input": (str, NoneType)})
    records = [{**record, "instruction": join_input(record)} for record in records]
    check_constraints(records, path)
    seen: set[str] = set()
    for index, record in enumerate(records):
        if record["instruction"] in seen:
            raise InputError(f"{path}: record {index}: field 'instruction' repeats that of an "
                             "earlier record; keep one of them")
        seen.add(record["instruction"])
    return records


def named_answers(paths: list[str], records: list[Record]) -> dict[str, list[str]]:
    """For each model the answers in the order of the prompts; its name is the file's generator."""
    named: dict[str, list[str]] = {}
    for path in paths:
        given = read_records(path)
        check_fields(given, path, {"instruction": (str,), "output": (str,)},
                     {"generator": (str,)})
        by_instruction = {answer["instruction"]: answer["output"] for answer in given}
        missing = [index for index, record in enumerate(records)
                   if record["instruction"] not in by_instruction]
        if missing:
            raise InputError(f"{path}: no answer to prompt {missing[0]} and {len(missing) - 1} "
                             "more; generate the answers to the same prompt file")
        name = Path(given[0].get("generator", path)).name
        name = path if name in named else name
        if name in named:
            raise InputError(f"--outputs names {path} twice; give each model's file once")
        named[name] = [by_instruction[record["instruction"]] for record in records]
    return named


def shares_by_kind(records: list[Record], verdicts: list[list[bool]]) -> dict[str, Share]:
    """Shares of satisfied constraints for each kind in the prompts' order, then `all`."""
    by_kind: dict[str, list[bool]] = {}
    for record, held in zip(records, verdicts, strict=True):
        for constraint, holds in zip(record["constraints"], held, strict=True):
            by_kind.setdefault(constraint["kind"], []).append(holds)
    by_kind["all"] = [holds for held in verdicts for holds in held]
    return {kind: wilson(sum(held), len(held)) for kind, held in by_kind.items()}


def changed(verdicts: dict[str, list[list[bool]]], name: str) -> dict[str, int]:
    """Constraints that this model satisfies and the baseline does not, and the other way round."""
    pairs = [pair for before, after in zip(next(iter(verdicts.values())), verdicts[name],
                                           strict=True)
             for pair in zip(before, after, strict=True)]
    return {"gained": pairs.count((False, True)), "lost": pairs.count((True, False))}


def table_of(shares: dict[str, dict[str, Share]]) -> list[str]:
    """Lines: a row a kind, a column a model, and the difference to the baseline in points."""
    names = list(shares)
    base = shares[names[0]]
    heads = ["satisfied", names[0]]
    for name in names[1:]:
        heads += [name, "points"]
    rows = []
    for kind in base:
        row = [kind, str(base[kind])]
        for name in names[1:]:
            row += [str(shares[name][kind]), _points(base[kind], shares[name][kind])]
        rows.append(row)
    head, rule, *lines, last = table(heads, rows).split("\n")
    return [head, rule, *lines, rule, last, "[ , ]: 95 % interval (Wilson), in per cent"]


def change_lines(shares: dict[str, dict[str, Share]], changes: dict[str, dict]) -> list[str]:
    """One sentence for each model after the first."""
    base = next(iter(shares))
    return [f"{name} against {base}: {_points(shares[base]['all'], shares[name]['all'])} points; "
            f"{change['gained']} constraints gained, {change['lost']} lost"
            for name, change in changes.items()]


def empty_lines(answers: dict[str, list[str]]) -> list[str]:
    """One sentence for each model that leaves answers empty; they satisfy no constraint."""
    counts = {name: sum(not text.strip() for text in texts) for name, texts in answers.items()}
    return [f"{name}: {count} of {len(answers[name])} answers are empty and satisfy nothing"
            for name, count in counts.items() if count]


def _points(before: Share, after: Share) -> str:
    return f"{100 * (after.share - before.share):+.1f}"


def side_by_side(records: list[Record], answers: dict[str, list[str]],
                 verdicts: dict[str, list[list[bool]]], count: int) -> list[str]:
    """Some prompts and all models' answers, a fixed draw, differing verdicts first."""
    order = random.Random(0).sample(range(len(records)), len(records))
    order.sort(key=lambda index: len({tuple(held[index]) for held in verdicts.values()}) == 1)
    width = max(map(len, answers))
    lines = []
    for index in order[:count]:
        lines += ["", *textwrap.wrap(records[index]["instruction"], 100)]
        for name, texts in answers.items():
            verdict = "keeps " if all(verdicts[name][index]) else "breaks"
            head = f"  {name:{width}} {verdict}  "
            text = " ".join(texts[index].split()) or "(nothing)"
            lines += textwrap.wrap(textwrap.shorten(text, 400), 100, initial_indent=head,
                                   subsequent_indent=" " * len(head))
    return lines


def results(prompts: str, records: list[Record], answers: dict[str, list[str]],
            verdicts: dict[str, list[list[bool]]], shares: dict[str, dict[str, Share]],
            changes: dict[str, dict]) -> dict:
    """All that was printed and every verdict, for other programs."""
    return {
        "benchmark": "constraints", "prompts": prompts,
        "models": {name: {kind: asdict(share) for kind, share in kinds.items()}
                   for name, kinds in shares.items()},
        "against_baseline": changes,
        "answers": [{"instruction": record["instruction"], "constraints": record["constraints"],
                     "outputs": {name: {"output": texts[index],
                                        "satisfied": verdicts[name][index]}
                                 for name, texts in answers.items()}}
                    for index, record in enumerate(records)],
    }


if __name__ == "__main__":
    run(main)
