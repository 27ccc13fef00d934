"""ARC, HellaSwag, MMLU and TruthfulQA by lm-evaluation-harness, beside the paper's Table 2.

    python scripts/evaluate_ranking.py --base_model_name_or_path saved_models/cut-13b
    python scripts/evaluate_ranking.py --base_model_name_or_path meta-llama/Llama-2-13b-hf \\
        --peft_model_path runs/cut-offline/adapter --gpus 8
    python scripts/evaluate_ranking.py                     # the table of all models measured so far

Each benchmark is one `lm_eval run`, with the number of examples in the prompt that the paper
states. A finished one is kept in OUTPUT_DIR/<name>.json and not run again; its command and all that
it said are in OUTPUT_DIR/<name>/. Runs with different --tasks of one model may go on side by side,
each on a GPU. No chat template, as is usual for these figures.

Cost (an estimate, not measured): a 13B model scores about 55 million tokens, three quarters of them
HellaSwag's: 1 hour on one H100, 3 on one A100; --gpus 8 divides it by about 7. lm-eval needs no
environment of its own: its pins agree with requirements.txt.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.models import find_adapter, resolve_model
from lm.records import InputError, changes, listed, write_json
from lm.results import read_result
from lm.stages import fingerprint, locked
from lm.tables import paper_rows, table
from scripts.report_results import kind_of

PAPER_TASKS = "arc_challenge:25:acc_norm,hellaswag:10:acc_norm,mmlu:5:acc,truthfulqa_mc2:0:acc"
PAPER_MEASURES = ("arc", "hellaswag", "mmlu", "truthfulqa")  # in the same order


@dataclass(frozen=True)
class Task:
    """A task of the harness, the examples in its prompt, and the metric that is reported."""

    name: str
    shots: int
    metric: str

    def __str__(self) -> str:
        return f"{self.name}:{self.shots}:{self.metric}"


def main(base_model_name_or_path: str = "", peft_model_path: str = "", name: str = "",
         output_dir: str = "runs/ranking", tasks: str | tuple | list = PAPER_TASKS,
         include_path: str = "", limit: int = 0, batch_size: int | str = 8, dtype: str = "auto",
         model_args: str = "", gpus: int = 1, overwrite: bool = False) -> None:
    """Run the benchmarks that this model still lacks, then print the table of all models.

    Args:
        base_model_name_or_path: model folder, Hub id, or smollm2-135m-instruct; none: only print.
        peft_model_path: adapter to put on the base model.
        name: the model's name in the table, by default its (adapter's) folder.
        output_dir: one JSON file a model goes here.
        tasks: task:shots:metric of the harness, several with commas; default is the paper's four.
        include_path: folder of task files of your own.
        limit: only the first so many questions of each task, to try things out; 0 is all.
        batch_size: questions a batch, or auto to let the harness try.
        dtype: auto is what the weights are stored in on CUDA, float32 on the CPU.
        model_args: more for the harness's model, for example parallelize=True (a model on 2 GPUs).
        gpus: processes, each with the whole model on a GPU and its share of the questions.
        overwrite: run again what is there already.
    """
    wanted = read_tasks(tasks)
    if base_model_name_or_path:
        if find_spec("lm_eval") is None:
            raise InputError("lm-eval is not installed here; pip install -r requirements.txt")
        adapter = find_adapter(peft_model_path) if peft_model_path else None
        model = resolve_model(base_model_name_or_path)
        path = Path(output_dir) / f"{name or (adapter or Path(model)).resolve().name}.json"
        settings = {"model": model, "weights": fingerprint(Path(model)),
                    "adapter": str(adapter or ""), "adapter_weights": fingerprint(adapter),
                    "limit": limit, "dtype": dtype, "model_args": model_args}
        options = harness_options(settings, include_path, batch_size)
        for task in wanted:
            there = read_measured(path, settings, overwrite)["results"]
            if str(task) in there and not overwrite:
                print(f"{task.name}: measured already")
            else:
                add(path, settings, overwrite,
                    {str(task): measure(task, options, gpus, path.with_suffix(""))})
    print("\n".join(summary(Path(output_dir), wanted)))


def read_tasks(tasks: str | tuple | list) -> list[Task]:
    """--tasks, task by task."""
    parsed = []
    for word in listed(tasks, "--tasks"):
        parts = word.split(":")
        if len(parts) != 3 or not parts[1].isdecimal() or not all(parts):
            raise InputError(f"--tasks: {word!r} is not task:shots:metric, for example "
                             f"{PAPER_TASKS.split(',')[0]}")
        parsed.append(Task(parts[0], int(parts[1]), parts[2]))
    return parsed


def read_measured(path: Path, settings: dict, overwrite: bool) -> dict:
    """What the model's file holds; numbers of other settings are an error, never a mixture."""
    fresh = {"benchmark": "ranking", "settings": settings, "results": {}}
    if not path.is_file():
        return fresh
    if kind_of(path) != "ranking":
        raise InputError(f"{path}: is no result of this script; give another --name or "
                         "--output_dir")
    measured = read_result(path)
    changed = changes(measured["settings"], settings)
    if changed and not overwrite:
        raise InputError(f"{path}: was measured with other settings ({'; '.join(changed)}); give "
                         "another --name or --output_dir, or --overwrite")
    return fresh if changed else measured


def add(path: Path, settings: dict, overwrite: bool, results: dict[str, dict]) -> None:
    """Put results into the model's file, beside what other runs have put there meanwhile."""
    with locked(path.with_suffix("")):
        measured = read_measured(path, settings, overwrite)
        write_json(path, {**measured, "results": measured["results"] | results})


def harness_options(settings: dict, include_path: str, batch_size: int | str) -> list[str]:
    """The options of `lm_eval run` that all benchmarks share."""
    import torch

    on_gpu = torch.cuda.is_available()
    dtype = "float32" if settings["dtype"] == "auto" and not on_gpu else settings["dtype"]
    arguments = [f"pretrained={settings['model']}", f"dtype={dtype}"]
    arguments += [f"peft={settings['adapter']}"] if settings["adapter"] else []
    arguments += [settings["model_args"]] if settings["model_args"] else []
    return ["--model", "hf", "--model_args", ",".join(arguments),
            "--batch_size", str(batch_size),
            *([] if on_gpu else ["--device", "cpu"]),
            *(["--limit", str(settings["limit"])] if settings["limit"] else []),
            *(["--include_path", include_path] if include_path else [])]


def measure(task: Task, options: list[str], gpus: int, folder: Path) -> dict:
    """Run one benchmark; its score in per cent with the harness's standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{task.name}.log"
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(gpus)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, *(launcher if gpus > 1 else []), "-m", "lm_eval", "run",
                   *options, "--tasks", task.name, "--num_fewshot", str(task.shots),
                   "--output_path", str(Path(scratch) / "results.json")]
        print(f"{task.name}: {shlex.join(command)}\n{' ' * len(task.name)}  what it says: {log}",
              flush=True)
        with open(log, "w", encoding="utf-8") as said:
            said.write(shlex.join(command) + "\n")
            said.flush()
            done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT,
                                  env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        written = list(Path(scratch).glob("results_*.json"))
        if done.returncode or not written:
            raise InputError(f"{task.name}: lm_eval stopped with exit code {done.returncode} "
                             f"({last_line(log)}); all it said is in {log}")
        return read_score(json.loads(written[0].read_text(encoding="utf-8")), task)


def read_score(report: dict, task: Task) -> dict:
    scores = report["results"][task.name]
    key = f"{task.metric},none"
    if key not in scores:
        there = sorted(key.removesuffix(",none") for key in scores if key.endswith(",none"))
        raise InputError(f"{task.name}: has no metric {task.metric}; it has {', '.join(there)}")
    error = scores.get(f"{task.metric}_stderr,none")
    return {**asdict(task), "score": 100 * scores[key],
            "standard_error": 100 * error if isinstance(error, float) else None,
            "seconds": float(report["total_evaluation_time_seconds"]),
            "lm_eval": report["lm_eval_version"]}


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def summary(folder: Path, tasks: list[Task]) -> list[str]:
    """A row for each model in the folder, then the paper's; what is not measured is `missing`."""
    rows, limited = [], []
    for path in sorted(folder.glob("*.json")):
        if kind_of(path) != "ranking":
            continue
        measured = read_result(path)
        limit = measured["settings"]["limit"]
        limited += [f"{path.stem}: only the first {limit} questions of each task"] if limit else []
        rows.append([path.stem, *(cell(measured["results"].get(str(task))) for task in tasks)])
    places = {text: place for place, text in enumerate(PAPER_TASKS.split(","))}
    for model, figures in paper_rows(*PAPER_MEASURES).items():
        rows.append([model, *(f"{figures[places[str(task)]]:.2f}       " if str(task) in places
                              else "-" for task in tasks)])
    return [table(["model", *(f"{task.name} {task.shots}-shot" for task in tasks)], rows),
            "per cent, ± one standard error", *limited]


def cell(result: dict | None) -> str:
    if result is None:
        return "missing       "
    error = result["standard_error"]
    return f"{result['score']:.2f} " + (f"± {error:4.2f}" if error is not None else "      ")


if __name__ == "__main__":
    run(main)
