"""Online CUT (paper, Table 6): round after round a model learns from judgments of its responses.

    python scripts/online.py --model meta-llama/Llama-2-13b-chat-hf --gpus 8 \\
        --instructions data/downloads/alpaca/alpaca_data.json --output_dir runs/online \\
        --judge server --judge_model gpt-4 --annotator alpaca_eval_gpt4
    CONFIG=configs/cut_online_small.env bash scripts/cut_online.sh  # the same on two CPU cores

A round: `sample` instructions that no earlier round had, `generate` the current model's responses,
`annotate` them, `train` with CUT, `merge`, `evaluate`; the next one goes on from its model. All but
the first are the repository's scripts, run by the commands that are printed.

OUTPUT_DIR/roundN/manifests/STAGE.json says what a stage was made of (settings, sha256 of inputs),
what it made, its counts, seconds (of the run that finished it) and dollars. It is written last,
and a stage that has one is not run again; so after a stop, even a kill, the same command goes on
and ends with the same files. Changed settings, inputs or outputs are an error: a folder holds one
run. Free to change are --rounds, --gpus, the audit's flags, --train_settings until a first training
has ended (delete round1/adapter if one has begun), and what changes no result (max_cost, which is
for a round's judgments, those that are asked for twice included ...). A model may be deleted when
the next round has its own.

The audit stops a round before training if too many judgments failed, if nearly all or nearly none
are positive, or if the judge, asked again with another seed, often says the opposite (where it
could say something else); and it stops at a win rate of which too many pairs are undecided
(max_undecided of evaluate_alpaca.py).
"""

import contextlib
import difflib
import inspect
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import finetune_unlikelihood
from cut.online import in_order
from lm.cli import run, typed
from lm.models import resolve_model
from lm.records import (
    InputError,
    Record,
    check_fields,
    looks_like_hub_id,
    read_records,
    write_json,
)
from lm.rules import check_constraints
from lm.runs import describe_run
from lm.server import check_judge
from lm.stages import locked, refuse_changes
from scripts import annotate, evaluate_alpaca, generate, online_stages, plot_online
from scripts.online_stages import SHARES, bound

PAPER = ("batch_size=8 micro_batch_size=1 learning_rate=4e-4 cutoff_len=2048 warmup_steps=100 "
         "threshold=1.1 weight_unlike=1 downsample=0.25 gradient_checkpointing=True")
# For each text of settings: the command whose flags they are, and the flags that are not for it.
COMMANDS = {
    "generate": (generate.main, {"base_model_name_or_path", "template", "data_path", "output_path",
                                 "peft_model_path", "generator", "max_new_tokens", "temperature",
                                 "seed", "limit", "overwrite", "base_url", "max_failed"}),
    "judge": (annotate.main, {"data_path", "output_path", "other_path", "judge", "model", "limit",
                              "max_failed", "overwrite"}),
    "train": (finetune_unlikelihood.main, {"base_model", "data_path", "output_dir", "debug",
                                           "prompt_template_name", "full_finetune", "dry_run",
                                           "resume_from_checkpoint", "visualize"}),
    "evaluate": (evaluate_alpaca.main, {"model_outputs", "annotations", "annotator", "output_dir",
                                        "limit", "dry_run"})}
BOUND = ("model", "per_round", "samples", "temperature", "max_new_tokens", "template", "judge",
         "judge_model", "eval_prompts", "annotator", "seed")
LEAST = {"rounds": 1, "per_round": 1, "samples": 1, "gpus": 1, "repeats": 0, "temperature": 0,
         "max_new_tokens": 1}


def main(model: str, instructions: str, output_dir: str, rounds: int = 5, per_round: int = 1000,
         samples: int = 1, temperature: float = 0.0, max_new_tokens: int = 2048,
         template: str = "alpaca", judge: str = "server", judge_model: str = "", gpus: int = 1,
         eval_prompts: str = generate.ALPACA_EVAL, annotator: str = "", max_failed: float = 0.1,
         min_positive: float = 0.05, max_positive: float = 0.95, repeats: int = 20,
         min_agreement: float = 0.8, generate_settings: str = "", judge_settings: str = "",
         train_settings: str = "", evaluate_settings: str = "", seed: int = 0) -> None:
    """Run the rounds that are not done yet; ends with a table, a figure and online.json.

    The settings of a stage are flags of its script in one text, without their dashes:
    --train_settings "learning_rate=2e-3 warmup_steps=3". All defaults are the paper's.

    Args:
        model: what the first round begins with: a folder, a Hub id, or smollm2-135m-instruct.
        instructions: records with `instruction` (and `input`) to draw from; JSON or JSON Lines.
            The rule judge wants `constraints` too.
        output_dir: a folder for each round goes here; round0 is the model as it was.
        rounds: how many there are to be.
        per_round: instructions of a round.
        samples: responses to each of them; more than one needs a temperature.
        temperature: of the responses; 0 is greedy, as in the paper. Evaluation always is.
        max_new_tokens: longest response, in evaluation too.
        template: prompt template of responses, training and evaluation.
        judge: server|local|jsft|rules|human, as in scripts/annotate.py. jsft compares each
            response with the next one to the same instruction, so it needs two --samples or more.
        judge_model: what the server calls the judge; or the folder of a local or JSFT one.
        gpus: processes that generate, judge where the judge is local, and train, by torchrun if
            there is more than one.
        eval_prompts: prompts to evaluate on, by default AlpacaEval's. With `constraints` the score
            is the share of these that the answers satisfy.
        annotator: who scores answers to prompts without `constraints`, as in
            scripts/evaluate_alpaca.py, for example alpaca_eval_gpt4; none: no score.
        max_failed: largest share of failed judgments.
        min_positive: smallest share of positive ones among the others.
        max_positive: largest share of positive ones.
        repeats: so many judgments of a round are asked for twice; 0 is none. Not of a human or of
            jsft, nor where all would come out alike: of the rules, and of a local judge at
            temperature 0.
        min_agreement: smallest share of them that must come out alike, positive or negative.
        generate_settings: further flags of scripts/generate.py.
        judge_settings: further flags of scripts/annotate.py.
        train_settings: flags of finetune_unlikelihood.py, over the paper's: batch_size=8
            micro_batch_size=1 learning_rate=4e-4 cutoff_len=2048 warmup_steps=100 threshold=1.1
            weight_unlike=1 downsample=0.25 gradient_checkpointing=True.
        evaluate_settings: further flags of scripts/evaluate_alpaca.py.
        seed: draws the instructions, the samples, and the judgments that are asked for twice.
    """
    settings = SimpleNamespace(**locals())
    settings.folder = Path(output_dir)
    check(settings)
    pool = load_pool(settings)
    if not is_done(settings, "evaluate"):
        check_training(settings)
        check_judging(settings)
    with locked(settings.folder) as settings.lock:
        record = open_record(settings)
        done: list[Record] = []
        for number in range(rounds + 1):
            stages = one_round(settings, number, model, pool) if number else {}
            if number:
                model = online_stages.folder_of(settings, number) / "model"
            stages["evaluate"] = online_stages.evaluate(settings, number, model)
            done.append(row(number, stages))
            write_json(settings.folder / "online.json", {**record, "rounds": done})
        write_json(settings.folder / "online.json",
                   {**record, "status": "finished", "rounds": done})
    print()
    plot_online.main(output_dir)
    print(f"model: {model}; all numbers: {settings.folder}/online.json")


def one_round(settings: SimpleNamespace, number: int, model: str | Path,
              pool: list[Record]) -> dict[str, Record]:
    """The manifests of a round's stages, from its instructions to its model."""
    return {"sample": online_stages.sample(settings, number, pool),
            "generate": online_stages.respond(settings, number, model),
            "annotate": online_stages.judge(settings, number),
            "train": online_stages.train(settings, number, model),
            "merge": online_stages.merge(settings, number, model)}


def row(number: int, stages: Mapping[str, Record]) -> Record:
    """What online.json tells of a round."""
    return {"round": number, **stages["evaluate"]["counts"],
            **{key: sum(stage[key] for stage in stages.values()) for key in ("seconds", "cost")},
            "stages": {name: {key: stage[key] for key in ("counts", "seconds", "cost")}
                       for name, stage in stages.items()}}


def check(settings: SimpleNamespace) -> None:
    """Stop at flags that cannot be meant; read the texts of settings."""
    for name, least in LEAST.items():
        if getattr(settings, name) < least:
            raise InputError(f"--{name} is {getattr(settings, name)}; expected {least} or more")
    for name in SHARES:
        if not 0 <= getattr(settings, name) <= 1:
            raise InputError(f"--{name} is {getattr(settings, name)}; expected a share, 0 to 1")
    if settings.samples > 1 and not settings.temperature:
        raise InputError(f"--samples {settings.samples} with --temperature 0 would all be the "
                         "same; give a --temperature, such as 0.7")
    if settings.judge not in annotate.JUDGES:
        raise InputError(f"--judge {settings.judge!r}: expected one of "
                         f"{', '.join(annotate.JUDGES)}")
    if settings.judge in annotate.MODEL_IS and not settings.judge_model:
        raise InputError(f"--judge {settings.judge} needs --judge_model")
    if settings.judge == "jsft" and settings.samples < 2:
        raise InputError("--judge jsft compares two responses to an instruction; give --samples 2")
    resolve_model(settings.model)
    settings.flags = {name: read_settings(name, getattr(settings, f"{name}_settings"))
                      for name in COMMANDS}
    settings.flags["train"] = read_settings("train", PAPER) | settings.flags["train"]


def is_done(settings: SimpleNamespace, stage: str) -> bool:
    """Whether a stage has been done in the last round, and so in all."""
    last = online_stages.folder_of(settings, settings.rounds)
    return (last / "manifests" / f"{stage}.json").exists()


def check_training(settings: SimpleNamespace) -> None:
    """Stop at what no round could be trained with, before its judgments are paid for."""
    from cut import finetune

    with told_of("train"):
        finetune.check(all_flags(settings, "train", base_model=settings.model,
                                 data_path="judged.json", output_dir="adapter"), settings.gpus)


def check_judging(settings: SimpleNamespace) -> None:
    """Stop at a judge or an annotator that cannot be asked, before a GPU has answered for it."""
    if not is_done(settings, "annotate"):
        flags = all_flags(settings, "judge", data_path="responses.json", output_path="judged.json",
                          other_path="others.json", judge=settings.judge,
                          model=settings.judge_model)
        annotate.check(SimpleNamespace(**flags))
        if settings.judge == "server":
            check_judge(settings.judge_model, flags["base_url"], flags | {"cache": ""})
    if settings.annotator and not settings.constrained:
        evaluate_alpaca.main(**all_flags(settings, "evaluate", model_outputs="answers.json",
                                         annotator=settings.annotator, dry_run=True))


def all_flags(settings: SimpleNamespace, name: str, **given: object) -> dict[str, object]:
    """What a command of COMMANDS would get: its defaults, the text of settings, what is given."""
    command, _ = COMMANDS[name]
    defaults = {flag.name: flag.default for flag in inspect.signature(command).parameters.values()}
    return defaults | typed(command, settings.flags[name]) | given


@contextlib.contextmanager
def told_of(name: str) -> Iterator[None]:
    """Errors begin with the flag whose text is wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--{name}_settings: {error}") from error


def read_settings(name: str, text: str) -> dict[str, str]:
    """NAME=VALUE words -> flags of a command, as texts of the right types."""
    command, others = COMMANDS[name]
    known = [flag for flag in inspect.signature(command).parameters if flag not in others]
    found = {}
    for word in shlex.split(text):
        flag, equals, value = word.partition("=")
        if not equals or flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)[0]
            raise InputError(f"--{name}_settings: {word!r} cannot be set there; expected words "
                             f"like {nearest}=VALUE")
        found[flag] = value
    with told_of(name):
        typed(command, found)
    return found


def load_pool(settings: SimpleNamespace) -> list[Record]:
    """The instructions of all rounds, in order; notes whether constraints give the score."""
    records = read_records(settings.instructions)
    constrained = {"constraints": (list,)} if settings.judge == "rules" else {}
    check_fields(records, settings.instructions, {"instruction": (str,), **constrained},
                 {"input": (str, NoneType)})
    prompts = []
    if not looks_like_hub_id(settings.eval_prompts):
        prompts = read_records(settings.eval_prompts)
        check_fields(prompts, settings.eval_prompts, {"instruction": (str,)},
                     {"input": (str, NoneType)})
    settings.constrained = bool(prompts) and all("constraints" in record for record in prompts)
    if settings.constrained:
        check_constraints(prompts, settings.eval_prompts)
    if settings.judge == "rules":
        check_constraints(records, settings.instructions)
    pool = in_order(records, prompts, settings.seed)
    wanted = settings.rounds * settings.per_round
    if len(pool) < wanted:
        raise InputError(f"{settings.instructions}: has {len(pool)} different instructions that "
                         f"are not evaluated on, but {settings.rounds} rounds of "
                         f"{settings.per_round} need {wanted}; give a larger file, or lower "
                         "--rounds or --per_round")
    return pool


def open_record(settings: SimpleNamespace) -> Record:
    """What online.json begins with; stops where it belongs to a run with other settings."""
    record = describe_run({**{name: getattr(settings, name) for name in BOUND},
                           **{f"{name}_settings": bound(flags)
                              for name, flags in settings.flags.items()}}, settings.instructions)
    path = settings.folder / "online.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        trained = any(settings.folder.glob("round*/manifests/train.json"))
        refuse_changes(path, identity(found, trained), identity(record, trained))
    write_json(path, record)
    return record


def identity(run: Record, trained: bool) -> Record:
    """What all runs in a folder have in common; how to train is open until one has done it."""
    found = {**run["settings"],
             "instructions": run["data"]["sha256"] or run["data"]["path"]}  # a Hub id has no hash
    if not trained:
        del found["train_settings"]
    return found


if __name__ == "__main__":
    run(main)
