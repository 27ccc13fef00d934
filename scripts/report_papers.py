"""The papers' tables of scripts/report.py, with ours beside their figures."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.records import Record
from lm.results import read_result
from lm.tables import PAPER_TABLES
from scripts.report_results import escaped, figure, markdown_table, part


@dataclass(frozen=True)
class Measure:
    """A column of a paper's table: where ours lies below {run}'s folder, and what puts it there."""

    name: str
    file: str  # {run} as the table has it; {name} without its slashes
    key: tuple[str, ...]  # within the file; * is the last of several
    command: str  # empty where the row's recipe is enough
    scale: float = 1
    answers: str = "."  # of the recipe, where the command only scores them


def _ranking(name: str, task: str) -> Measure:
    return Measure(name, "ranking/{name}.json", ("results", task, "score"),
                   "python scripts/evaluate_ranking.py --base_model_name_or_path {model} "
                   "--name {name} --output_dir {folder}/ranking")


def _rouge(name: str, kind: str) -> Measure:
    return Measure(name, "{run}/rouge.json", ("models", "*", kind, "mean"),
                   "python scripts/evaluate_summarization.py --data_path data/summary-test.json "
                   "--base_model_name_or_path {model} --output {folder}/{run}/rouge.json")


def _scored(name: str, answers: str) -> Measure:
    file = f"{{folder}}/{{run}}/{answers}.json"
    return Measure(name, f"{{run}}/{answers}/alpaca_eval_gpt4/results.json", ("win_rate",),
                   f"python scripts/evaluate_alpaca.py --model_outputs {file}", answers=file)


def _tournament(samples: int) -> Measure:
    name = "tournament" if samples == 16 else f"tournament.n{samples}"
    return _scored(f"N = {samples}", name)


MT_BENCH = ("TEMPLATE=configs/templates/chat.jinja OUT={folder}/{run} "
            "bash scripts/evaluate_dialogues.sh {model}")
VICUNA = "SFT={folder}/sft/model " + MT_BENCH  # the recipe does both then
MEASURES = {
    "arc": _ranking("ARC, 25-shot", "arc_challenge:25:acc_norm"),
    "hellaswag": _ranking("HellaSwag, 10-shot", "hellaswag:10:acc_norm"),
    "mmlu": _ranking("MMLU, 5-shot", "mmlu:5:acc"),
    "truthfulqa": _ranking("TruthfulQA, 0-shot", "truthfulqa_mc2:0:acc"),
    "alpaca": Measure(
        "AlpacaEval", "{run}/alpaca_eval/alpaca_eval_gpt4/results.json", ("win_rate",),
        "{generate}OUTPUTS={folder}/{run}/alpaca_eval.json bash scripts/evaluate_alpaca.sh "
        "{model}"),
    "alpaca_greedy": _scored("AlpacaEval", "greedy"),
    "rouge1": _rouge("ROUGE-1", "rouge1"),
    "rouge2": _rouge("ROUGE-2", "rouge2"),
    "rougeL": _rouge("ROUGE-L", "rougeL"),
    "rougeLsum": _rouge("ROUGE-Lsum", "rougeLsum"),
    "mt_bench": Measure("MT-Bench", "{run}/mt_bench/gpt-4/results.json",
                        ("scores", "all", "all", "mean"), MT_BENCH),
    "vicuna": Measure("VicunaEval", "{run}/vicuna/gpt-4/results.json",
                      ("shares", "win_rate", "share"), VICUNA, 100),
    "judge": Measure("accuracy", "{run}/judge.json", ("metrics", "all", "accuracy", "share"), "",
                     100),
    **{f"tournament{samples}": _tournament(samples) for samples in (1, 2, 4, 8, 16)},
}


def paper_tables(root: Path) -> Iterator[str]:
    """Each table with ours beside the paper's figures, then the commands that make what lacks."""
    import yaml

    for listed in yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))["tables"]:
        measures = [MEASURES[name] for name in listed["measures"]]
        rows, commands, without = [], [], []
        for row in listed["rows"]:
            ours = [our_figure(root, row, measure) for measure in measures]
            if "run" not in row:
                without.append(row["name"])
            elif None in ours:
                commands += commands_for(root, row, measures, ours)
            rows.append([row["name"], *(cell for theirs, mine in zip(row["figures"], ours,
                                                                     strict=True)
                                        for cell in (figure(theirs), mine or "missing"))])
        yield from (f"### {escaped(listed['title'])}", "")
        yield from markdown_table(["", *(cell for measure in measures
                                         for cell in (measure.name, "here"))], rows)
        if commands:
            yield from ("Missing numbers come from:", "", "```bash", *dict.fromkeys(commands),
                        "```", "")
        if without:
            yield from (f"No recipe here yet: {escaped('; '.join(without))}.", "")


def our_figure(root: Path, row: Record, measure: Measure) -> str | None:
    """Our number for a row, None where it is missing; one of a part of the questions says so."""
    if "run" not in row:
        return None
    path = root / measure.file.format(run=row["run"], name=row["run"].replace("/", "-"))
    if not path.is_file():
        return None
    result = value = read_result(path)
    for key in measure.key:
        value = (list(value.values())[-1] if key == "*" and value else
                 value.get(key) if isinstance(value, Mapping) else None)
    return None if value is None else f"{measure.scale * value:.2f}{part(result)}"


def commands_for(root: Path, row: Record, measures: Sequence[Measure],
                 ours: Sequence[str | None]) -> Iterator[str]:
    """The recipe, unless what it makes is there, and what measures each missing number."""
    folder = shlex.quote(str(root))
    model = below(root, row.get("model", f"runs/{row['run']}/model"))
    names = {"folder": folder, "model": model, "run": row["run"],
             "name": row["run"].replace("/", "-"),
             "generate": f"GENERATE='{row['generate']}' " if "generate" in row else ""}
    missing = [measure for measure, mine in zip(measures, ours, strict=True) if mine is None]
    made = [any(Path(*shlex.split(model)).glob("*.safetensors")), *(
        bool(measure.command) and Path(*shlex.split(measure.answers.format(**names))).exists()
        for measure in missing)]
    if "recipe" in row and not all(made):
        yield recipe_below(root, row)
    commands = [measure.command.format(**names) for measure in missing if measure.command]
    commands = [command for command in commands if f"SFT={model} " not in command]  # with itself
    yield from (command for command in commands  # one may do what another does, and more
                if not any(other.endswith(f" {command}") for other in commands))


def recipe_below(root: Path, row: Record) -> str:
    """The row's recipe; where the report's folder is not runs, with that one for its outputs.

    A recipe that names no folder of its own writes to runs/RUN by default.
    """
    recipe = below(root, row["recipe"])
    if root == Path("runs") or re.search("OUT=|ROUNDS=runs/", row["recipe"]):
        return recipe
    of_rounds = "cut_online_iter.sh" in recipe  # it writes to ROUNDS/round1, as row['run'] says
    variable, run = ("ROUNDS", Path(row["run"]).parent) if of_rounds else ("OUT", row["run"])
    return f"{variable}={below(root, f'runs/{run}')} {recipe}"


def below(root: Path, text: str) -> str:
    """A command or a path with the report's folder, ready to be typed, in the place of runs/."""
    return re.sub(r"(?<![\w/.-])runs/", lambda _: f"{shlex.quote(str(root))}/", text)
