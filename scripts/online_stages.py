"""The stages of a round of scripts/online.py: each runs scripts of this repository, once.

`settings` are the flags of online.py, and: `flags`, the texts of settings by command; `folder`, the
output folder; `lock`, its open lock file; `constrained`, whether constraints give the score.
"""

import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import finetune_unlikelihood
from cut.online import audit
from lm.journal import digest
from lm.models import resolve_model
from lm.records import InputError, Record, read_records, write_json, write_lines
from lm.runs import REPOSITORY
from lm.server import FLAGS, paid
from lm.stages import done_once
from lm.templates import load_template
from scripts import annotate

# Flags of these commands that may differ from one run to the next: they change no result.
FREE = {*finetune_unlikelihood.FREE_SETTINGS, *FLAGS, "batch_tokens", "max_undecided"}
SHARES = ("max_failed", "min_positive", "max_positive", "min_agreement")


def bound(flags: Mapping) -> dict:
    """Those flags that a result depends on."""
    return {name: value for name, value in flags.items() if name not in FREE}


def stage(settings: SimpleNamespace, number: int, name: str, inputs: Mapping, flags: Mapping,
          outputs: Mapping, work: Callable[[], dict]) -> Record:
    """A stage's manifest; `work` is done unless it is there."""
    if inputs.get("model") == settings.model:  # perhaps a name that stands for a folder
        inputs = {**inputs, "model": resolve_model(settings.model)}
    return done_once(folder_of(settings, number) / "manifests" / f"{name}.json", inputs,
                     bound(flags), outputs, work)


def folder_of(settings: SimpleNamespace, number: int) -> Path:
    return settings.folder / f"round{number}"


def template_of(name: str) -> str:
    """Changes when a prompt template does, though its name stays."""
    return name if name == "chat" else digest(asdict(load_template(name)))


def sample(settings: SimpleNamespace, number: int, pool: list[Record]) -> Record:
    """A round's instructions, each as often as there are to be samples of it."""
    path = folder_of(settings, number) / "instructions.jsonl"
    flags = {name: getattr(settings, name) for name in ("per_round", "samples", "seed")}

    def work() -> dict:
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = (number - 1) * settings.per_round
        drawn = pool[begin:begin + settings.per_round]
        write_lines(path, [record for record in drawn for _ in range(settings.samples)])
        return {"instructions": len(drawn), "pool": len(pool)}

    return stage(settings, number, "sample", {"pool": settings.instructions}, flags,
                 {"instructions": path}, work)


def respond(settings: SimpleNamespace, number: int, model: str | Path) -> Record:
    """The current model's responses; each depends on the seed and on its place in the file."""
    folder = folder_of(settings, number)
    instructions, responses = folder / "instructions.jsonl", folder / "responses.json"
    flags = {"template": settings.template, "max_new_tokens": settings.max_new_tokens,
             "temperature": settings.temperature, "seed": settings.seed + number,
             **settings.flags["generate"]}

    def work() -> dict:
        answer(settings, model, f"round{number - 1}", instructions, responses, flags)
        outputs = [record["output"] for record in read_records(responses)]
        return {"responses": len(outputs), "empty": outputs.count("")}

    return stage(settings, number, "generate",
                 {"model": model, "instructions": instructions},
                 {**flags, "template_text": template_of(settings.template)},
                 {"responses": responses}, work)


def answer(settings: SimpleNamespace, model: str | Path, name: str, prompts: str | Path,
           output: Path, flags: Mapping) -> None:
    """Have a model answer prompts, on all GPUs; vLLM takes one."""
    execute(settings, "scripts/generate.py",
            processes=1 if flags.get("engine") == "vllm" else settings.gpus,
            base_model_name_or_path=model, data_path=prompts, output_path=output, generator=name,
            **flags)


def judge(settings: SimpleNamespace, number: int) -> Record:
    """Judgments that have passed the audit."""
    folder = folder_of(settings, number)
    responses, judged = folder / "responses.json", folder / "judged.json"
    inputs = {"responses": responses}
    flags = {"judge": settings.judge, **settings.flags["judge"]}
    bound_to = {}  # templates keep their names when they change
    if settings.judge_model:
        flags["model"] = settings.judge_model
    if settings.judge in ("server", "local"):
        prompt = annotate.judge_prompt(settings.judge, flags.get("template", ""))
        bound_to["template_text"] = digest(vars(prompt))
    if settings.judge in annotate.IN_PROCESS:
        inputs["judge_weights"] = (resolve_model if settings.judge == "local" else str)(
            settings.judge_model)
    if settings.judge == "jsft":
        from self_judge.templates import load_templates

        templates = load_templates(flags.get("template") or f"{settings.judge_model}/config.yaml")
        bound_to["template_text"] = digest(asdict(templates))

    def work() -> dict:
        if settings.judge == "jsft":
            flags["other_path"] = write_others(responses, settings.samples)
        counts = ask(settings, responses, judged, flags)
        stop_if_bad(settings, number, counts)
        if settings.repeats and may_differ(settings):
            counts |= ask_again(settings, number, counts, judged, flags)
            stop_if_bad(settings, number, counts)
        return counts

    return stage(settings, number, "annotate", inputs, flags | bound_to,
                 {"judgments": judged}, work)


def write_others(responses: Path, samples: int) -> Path:
    """For each response the next one to the same instruction, after the last the first."""
    records = read_records(responses)
    groups = [records[begin:begin + samples] for begin in range(0, len(records), samples)]
    path = responses.with_name("others.json")
    write_json(path, [record for group in groups for record in group[1:] + group[:1]])
    return path


def ask(settings: SimpleNamespace, responses: Path, output: Path, flags: Mapping) -> dict:
    """Have responses judged; the counts."""
    summary = output.with_name(output.name + ".summary.json")
    summary.unlink(missing_ok=True)  # an earlier one tells nothing of this run
    processes = settings.gpus if settings.judge in annotate.IN_PROCESS else 1
    execute(settings, "scripts/annotate.py", processes, data_path=responses, output_path=output,
            max_failed=settings.max_failed, may_fail=True, **flags)  # failures are audited
    if not summary.exists():  # torchrun's exit code is always 1
        raise InputError("scripts/annotate.py stopped; what it said stands above. Once that is "
                         "mended, the same command goes on here")
    told = json.loads(summary.read_text(encoding="utf-8"))
    return {key: value for key, value in told.items() if key != "settings"}


def may_differ(settings: SimpleNamespace) -> bool:
    """Whether the judge, asked with another seed, could say something else.

    Greedy text and rules could not; and a person is not asked twice.
    """
    if settings.judge == "local":
        return float(settings.flags["judge"].get("temperature", 0)) > 0
    return settings.judge == "server"


def ask_again(settings: SimpleNamespace, number: int, counts: Mapping, judged: Path,
              flags: Mapping) -> dict:
    """Have some responses judged a second time, with another seed: how many came out alike."""
    records = read_records(judged)
    drawn = random.Random(f"repeats {settings.seed} {number}").sample(
        range(len(records)), min(settings.repeats, len(records)))
    responses, output = judged.with_name("repeats.json"), judged.with_name("repeats_judged.json")
    write_json(responses, [{**records[index], "repeats": index} for index in sorted(drawn)])
    again = ask(settings, responses, output, {**flags, "seed": int(flags.get("seed", 0)) + 1,
                                              **left_over(flags, counts)})
    signs = read_records(output) if again["positive"] + again["negative"] else []
    alike = sum((record["judgment"] is None) == (records[record["repeats"]]["judgment"] is None)
                for record in signs)
    return {"repeats": len(drawn), "alike": alike, "cost": counts["cost"] + again["cost"]}


def left_over(flags: Mapping, spent: Mapping) -> dict[str, float]:
    """What is left of a round's limits, which hold for all its judgments together."""
    left = {}
    for name, kind, used in (("max_requests", int, spent["requests"]),
                             ("max_cost", float, spent["cost"])):
        if limit := kind(flags.get(name, 0)):
            left[name] = round(limit - used, 6)
            if left[name] <= 0:
                raise InputError(f"--judge_settings: {name}={limit} is spent, and some judgments "
                                 "are to be asked for twice; the same command with more goes on, "
                                 "or with --repeats 0")
    return left


def stop_if_bad(settings: SimpleNamespace, number: int, counts: Mapping) -> None:
    """The audit, with what can be done."""
    if bad := audit(counts, **{name: getattr(settings, name) for name in SHARES}):
        raise InputError(f"round {number}: stopped before training, since these judgments look "
                         f"bad: {'; '.join(bad)}. The same command asks again for those that "
                         "failed; with other bounds it goes on; another judge needs another "
                         "--output_dir")


def train(settings: SimpleNamespace, number: int, model: str | Path) -> Record:
    """The round's adapter; the training script down-samples the positives."""
    folder = folder_of(settings, number)
    judged, adapter = folder / "judged.json", folder / "adapter"
    flags = {"prompt_template_name": settings.template, **settings.flags["train"]}

    def work() -> dict:
        execute(settings, "finetune_unlikelihood.py", base_model=model, data_path=judged,
                output_dir=adapter, processes=settings.gpus, **flags)
        told = json.loads((adapter / "run.json").read_text(encoding="utf-8"))
        return {**told["counts"], **{key: told[key] for key in ("steps", "first_loss",
                                                                "last_loss")}}

    return stage(settings, number, "train",
                 {"model": model, "judgments": judged},
                 {**flags, "template_text": template_of(settings.template)},
                 {"adapter": adapter}, work)


def merge(settings: SimpleNamespace, number: int, model: str | Path) -> Record:
    """The round's model, a plain checkpoint."""
    folder = folder_of(settings, number)
    adapter, merged = folder / "adapter", folder / "model"

    def work() -> dict:
        execute(settings, "merge.py", base_model_name_or_path=model, peft_model_path=adapter,
                output_dir=merged)
        told = json.loads((merged / "merge.json").read_text(encoding="utf-8"))
        return {key: told[key] for key in ("dtype", "relative_logit_difference")}

    return stage(settings, number, "merge", {"model": model, "adapter": adapter}, {},
                 {"model": merged}, work)


def evaluate(settings: SimpleNamespace, number: int, model: str | Path) -> Record:
    """The model's greedy answers, and their score where something or somebody can give one."""
    answers = folder_of(settings, number) / "answers.json"
    flags = {"template": settings.template, "max_new_tokens": settings.max_new_tokens,
             **settings.flags["generate"]}

    def work() -> dict:
        answer(settings, model, f"round{number}", settings.eval_prompts, answers, flags)
        if settings.constrained:
            return by_constraints(settings, number, answers)
        if settings.annotator:
            return by_comparison(settings, answers)
        return {"measure": "no --annotator", "score": None}

    inputs = {"model": model, "prompts": settings.eval_prompts}
    if reference := settings.flags["evaluate"].get("reference_outputs"):
        inputs["reference"] = reference
    return stage(settings, number, "evaluate", inputs,
                 {**flags, "template_text": template_of(settings.template),
                  "annotator": settings.annotator, **settings.flags["evaluate"]},
                 {"answers": answers}, work)


def by_constraints(settings: SimpleNamespace, number: int, answers: Path) -> dict:
    """The share of the prompts' constraints that is satisfied."""
    before, results = folder_of(settings, 0) / "answers.json", answers.with_name("results.json")
    execute(settings, "scripts/evaluate_constraints.py", prompts=settings.eval_prompts,
            outputs=f"{before},{answers}" if number else answers, output=results)
    told = json.loads(results.read_text(encoding="utf-8"))["models"][f"round{number}"]["all"]
    return {"measure": "constraints satisfied, %", "score": 100 * told["share"],
            "low": 100 * told["low"], "high": 100 * told["high"]}


def by_comparison(settings: SimpleNamespace, answers: Path) -> dict:
    """AlpacaEval's win rate with its 95 % interval, and what all runs paid for it."""
    folder = answers.with_name("alpaca_eval")
    _, before = paid(folder / "cache")  # by a run that was stopped
    execute(settings, "scripts/evaluate_alpaca.py", model_outputs=answers, output_dir=folder,
            annotator=settings.annotator, **settings.flags["evaluate"])
    told = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rate, margin = told["win_rate"], 1.96 * told["standard_error"]
    return {"measure": "AlpacaEval win rate, %", "score": rate, "low": rate - margin,
            "high": rate + margin, "undecided": told["n_undecided"],
            "cost": before + told["cost_of_this_run"]}


def execute(settings: SimpleNamespace, script: str, processes: int = 1, may_fail: bool = False,
            **flags: object) -> None:
    """Print a script's command and run it; exit code 1 passes where it `may_fail`."""
    command = ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    command += [os.path.relpath(REPOSITORY / script)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    print(f"$ {shlex.join(command)}", flush=True)
    code = call(command, settings.lock)
    if code and not (may_fail and code == 1):
        how = f"stopped with exit code {code}" if code > 0 else f"was killed by signal {-code}"
        raise InputError(f"{script} {how}; what it said stands above. Once that is mended, the "
                         "same command goes on here")


def call(command: list[str], lock: IO) -> int:
    """Run python or torchrun of this environment; while it lives, it holds the lock."""
    programs = {"python": [sys.executable],
                "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return subprocess.run([*programs[command[0]], *command[1:]],
                          pass_fds=(lock.fileno(),)).returncode
