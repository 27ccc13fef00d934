"""Judge responses: outputs of scripts/generate.py in, records for finetune_unlikelihood.py out.

    python scripts/annotate.py --data_path runs/round1/responses.json \\
        --output_path runs/round1/train.json --judge server --model gpt-4 --max_cost 30
    python scripts/annotate.py ... --judge server --model M --base_url http://localhost:8000/v1
    python scripts/annotate.py ... --judge local --model runs/ai_judge/model  # train_ai_judge.sh
    python scripts/annotate.py ... --judge jsft --model runs/uf_jsft_pr \\
        --other_path runs/round1/second_samples.json             # generate.py with another --seed
    torchrun --nproc_per_node=8 scripts/annotate.py ...     # local, jsft: a share on each GPU
    python scripts/annotate.py ... --judge rules                     # records with `constraints`
    python scripts/annotate.py ... --judge human --sheet to_fill_in.csv

A record of the output is that of the input with `judgment`: null where nothing is wrong with the
response, else what is. Each judgment goes to OUTPUT.judgments.jsonl at once (of further processes,
to OUTPUT.judgments.process1.jsonl and so on), so that a stop, even a kill, costs only what was
under way; the same command goes on, with any number of processes. A judgment counts for its
response wherever that stands now: once records were added, removed or moved, only new ones are
judged. One that failed (error, refusal, no verdict) is told there and left out of the output, so
nothing can train on it; the same command asks for those again. OUTPUT.summary.json has counts and
cost.

Exit code: 0 all are judged (but for a share of --max_failed); 1 more have failed, and the others
are in the output; 2 nothing could be written (bad input, budget spent, server gone), which under
torchrun is 1 too.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import IO, TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.budget import noting_costs, told_last
from lm.cli import run
from lm.journal import append, by_content, digest, open_journal
from lm.models import load_model, load_tokenizer, precision, resolve_model
from lm.processes import (
    discard_parts,
    launched,
    merge_parts,
    part_of,
    read_parts,
    share,
    told_share,
    wait,
)
from lm.records import (
    InputError,
    Record,
    check_fields,
    join_input,
    read_records,
    write_json,
    write_lines,
)
from lm.rules import check_constraints
from lm.server import address, connect
from lm.stages import fingerprint
from lm.verdicts import JudgePrompt, load_judge_prompt
from self_judge.base import model_settings

if TYPE_CHECKING:
    from lm.judges import Judge
    from lm.server import Server

JUDGES = ("server", "local", "jsft", "rules", "human")
IN_PROCESS = ("local", "jsft")  # models, of which each process may have one
MODEL_IS = {"server": "the name by which the server knows it",
            "local": "a folder, or smollm2-135m-instruct", "jsft": "its folder"}
# Fields that speak of an earlier judgment.
OF_ANOTHER_JUDGMENT = ("judgment", "score", "reason", "i_ans", "ref")


def main(data_path: str, output_path: str, judge: str = "server", model: str = "",
         base_url: str = "", template: str = "", limit: int = 0, max_new_tokens: int = 1024,
         temperature: float = 0.0, seed: int = 0, max_failed: float = 0.0, sheet: str = "",
         concurrency: int = 8, requests_per_minute: float = 0.0, timeout: float = 120.0,
         attempts: int = 8, max_requests: int = 0, max_cost: float = 0.0, price_in: float = -1.0,
         price_out: float = -1.0, cache: str = "runs/cache", load_in: str = "auto",
         batch_tokens: int = 16384, overwrite: bool = False, other_path: str = "") -> None:
    """Judge each response once, resumable.

    Args:
        data_path: records with `instruction`, `output` and perhaps `input`; JSON or JSON Lines.
        output_path: file to write, .json or .jsonl.
        judge: server|local|jsft|rules|human. jsft is a model that JSFT trained with rationales
            (configs/uf_jsft_pr.yaml): the worse of two responses gets its rationale as judgment.
        model: what the server calls the model; or the folder of a local one.
        base_url: the OpenAI-compatible server; by default OPENAI_BASE_URL or api.openai.com. Its
            key is taken from OPENAI_API_KEY.
        template: judge prompt, by name in configs/templates or path; by default annotator for a
            server, ai_judge for a local model. For jsft a YAML file with the `templates` of its
            training, by default the config.yaml in its folder.
        limit: only the first so many responses; 0 is all.
        max_new_tokens: longest judgment; one that is cut has failed.
        temperature: 0 is greedy; below 0 it is left to the server.
        seed: of sampling, and of the rules' wording. 0 sends none; another one asks anew what is
            in the cache, as to see whether a judge agrees with itself.
        max_failed: share of failed judgments that is no reason for exit code 1.
        sheet: file that a human fills in (.csv or .jsonl), by default OUTPUT.sheet.csv.
        concurrency: requests under way at a time.
        requests_per_minute: send no more than that; 0 is no limit.
        timeout: seconds to wait for a reply before asking again.
        attempts: of each request, before it has failed.
        max_requests: stop after so many, earlier runs for this output included; 0 is no limit.
        max_cost: stop before so many dollars are exceeded, counted alike; 0 is no limit.
        price_in: dollars per million prompt tokens, where configs/prices.yaml does not know them.
        price_out: the same for new tokens.
        cache: folder that keeps replies for other runs; empty is none.
        load_in: precision of a local model; auto is the checkpoint's on CUDA, fp32 on the CPU.
        batch_tokens: tokens a batch of a local model may hold.
        overwrite: judge everything anew (what the cache knows is not asked again).
        other_path: for jsft, another response to each instruction, in the same order.
    """
    settings = SimpleNamespace(**locals())
    check(settings)
    records = load_responses(settings)
    output = Path(output_path)
    if output.resolve() == Path(data_path).resolve():
        raise InputError("--output_path is --data_path; choose another, so that both are kept")
    place, processes = launched(alone="" if judge in IN_PROCESS else f"--judge {judge}")
    journal, made_by = journal_file(output), identity(settings)
    start = functools.cache(lambda: make_judge(settings))
    if overwrite:
        start()  # before anything is lost: there may be no key, or no such model
        wait(processes)
        discard_parts(journal, place, processes)
    elif output.exists() and not journal.exists():
        raise InputError(f"{output}: is there already, and not known to be made by this script; "
                         "choose another --output_path, or --overwrite")
    contents = contents_of(judge, records)
    file, _ = open_journal(part_of(journal, place), made_by)
    with file:
        lines = read_parts(journal, made_by)
        done, _ = judged(lines, contents)
        if done and place == 0:
            print(f"{output}: {len(done)} of {len(records)} are judged already")
        mine = sorted(share([len(record["output"]) for record in records], place, processes))
        if left := [index for index in mine if index not in done]:
            annotate(start, {index: records[index] for index in left}, contents, lines, file,
                     {"total": len(mine), "initial": len(mine) - len(left), "disable": place > 0,
                      "desc": told_share(processes)})
        wait(processes)
        if place > 0:
            return
        merge_parts(file, made_by)
        failed = finish(output, made_by, records, contents)
    if failed > max_failed * len(records):
        sys.exit(1)


def check(settings: SimpleNamespace) -> None:
    """Stop at flags that cannot be meant; read the judge prompt."""
    kind = settings.judge
    if kind not in JUDGES:
        raise InputError(f"--judge {kind!r}: expected one of {', '.join(JUDGES)}")
    if not settings.output_path.endswith((".json", ".jsonl")):
        raise InputError(f"--output_path {settings.output_path!r}: expected a .json or .jsonl file")
    if settings.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens is {settings.max_new_tokens}; expected 1 or more")
    if settings.limit < 0 or not 0 <= settings.max_failed <= 1:
        raise InputError(f"--limit {settings.limit} must be 0 (all) or more, and --max_failed "
                         f"{settings.max_failed} a share between 0 and 1")
    if kind in MODEL_IS and not settings.model:
        raise InputError(f"--judge {kind} needs --model: {MODEL_IS[kind]}")
    if kind == "jsft":
        check_jsft(settings)
    if kind in ("server", "local"):
        settings.prompt = judge_prompt(kind, settings.template)
    if kind == "local":
        settings.model = resolve_model(settings.model)
    if kind == "human":
        settings.sheet = Path(settings.sheet or f"{settings.output_path}.sheet.csv")
        if settings.sheet.suffix not in (".csv", ".jsonl"):
            raise InputError(f"--sheet {settings.sheet}: expected a .csv or .jsonl file")


def judge_prompt(judge: str, template: str) -> JudgePrompt:
    """How a server or a local model is asked."""
    return load_judge_prompt(template or {"server": "annotator", "local": "ai_judge"}[judge])


def check_jsft(settings: SimpleNamespace) -> None:
    """Find the model, and the templates of its training."""
    from self_judge.base import find_base
    from self_judge.templates import load_templates

    if not settings.other_path:
        raise InputError("--judge jsft compares: it needs --other_path, another response to each "
                         "instruction, as scripts/generate.py writes them with another --seed")
    settings.base = find_base({"pretrained_model_name_or_path": settings.model})
    template = settings.template or str(Path(settings.model) / "config.yaml")
    if not Path(template).is_file():
        raise InputError(f"--judge jsft: no such file {template}; name the YAML that has the "
                         "`templates` of the model's training with --template")
    settings.templates = load_templates(template)
    if not settings.templates.rationale:
        raise InputError(f"{template}: has no decision_rationale.rationale, so the model was not "
                         "trained to say why; train one with configs/uf_jsft_pr.yaml")


def load_responses(settings: SimpleNamespace) -> list[Record]:
    """Records with instruction and output; the rules want constraints too, JSFT another output."""
    records = read_records(settings.data_path)
    required = {"constraints": (list,)} if settings.judge == "rules" else {}
    check_fields(records, settings.data_path, {"instruction": (str,), "output": (str,), **required},
                 {"input": (str, NoneType)})
    if settings.judge == "jsft":
        add_others(records, settings.other_path)
    records = records[:settings.limit or None]
    if settings.judge == "rules":
        check_constraints(records, settings.data_path)
    return records


def add_others(records: list[Record], path: str) -> None:
    """Put the outputs of another file beside those of the records, as `other`."""
    others = read_records(path)
    check_fields(others, path, {"instruction": (str,), "output": (str,)},
                 {"input": (str, NoneType)})
    for index, record in enumerate(records):
        if index >= len(others) or join_input(others[index]) != join_input(record):
            raise InputError(f"{path}: record {index}: is not a response to the instruction of "
                             f"record {index} of --data_path; give responses in the same order")
        record["other"] = others[index]["output"]


def contents_of(judge: str, records: list[Record]) -> list[str]:
    """What tells apart what the judge is asked; the rest of a record is no matter to it."""
    more = {"rules": "constraints", "jsft": "other"}.get(judge)
    return [digest([join_input(record), record["output"], record.get(more)]) for record in records]


def identity(settings: SimpleNamespace) -> dict:
    """What the judgments depend on; they are not mixed with those of another one."""
    found = {"judge": settings.judge, "seed": settings.seed}
    if settings.judge in ("server", "local"):
        found |= {"model": settings.model, "prompt": digest(vars(settings.prompt)),
                  "temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    if settings.judge == "jsft":
        found |= {**model_settings(settings.base), "load_in": settings.load_in,
                  "templates": digest(asdict(settings.templates)),
                  "temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    if settings.judge == "server":
        found["base_url"] = address(settings.base_url)
    if settings.judge == "local":
        found |= {"weights": fingerprint(Path(settings.model)), "load_in": settings.load_in}
    return found


def journal_file(output: Path) -> Path:
    """Every judgment, in the judge's own words too."""
    return output.with_name(output.name + ".judgments.jsonl")


def judged(lines: Iterable[Record],
           contents: Sequence[str]) -> tuple[dict[int, Record], dict[int, Record]]:
    """A journal's judgments of the responses with these contents, by place, and its failures."""
    ok, failed = [], []
    for line in lines:
        if "status" in line:
            (ok if line["status"] == "ok" else failed).append(line)
    good = by_content(ok, contents)
    return good, {index: line for index, line in by_content(failed, contents).items()
                  if index not in good}


def annotate(start: Callable, records: Mapping[int, Record], contents: Sequence[str],
             lines: list[Record], file: IO[str], bar: dict) -> None:
    """Ask about these records; note each judgment in the journal at once.

    `start` makes the judge. `lines` are what the journal has so far; the budget goes on from them,
    and the new ones join them. `bar` are settings of tqdm's.
    """
    from tqdm import tqdm

    from lm.judges import Question

    questions = {index: Question.of(record) for index, record in records.items()}
    judge, server = start()
    spent = dict
    if server:
        server.budget.go_on_from(lines)
        print(server.estimate(judge.requests(questions)))
        spent = server.budget.spent
    progress = tqdm(judge(questions), unit="judgment", **bar)
    try:
        with noting_costs(file, server.budget if server else None):
            for index, judgment in progress:
                lines.append({
                    "index": index, "content": contents[index], "status": judgment.status,
                    "judgment": judgment.text, "error": judgment.error, "raw": judgment.raw,
                    **spent()})
                append(file, lines[-1])
                if server:
                    progress.set_postfix_str(f"${server.budget.cost:.2f}")
    except InputError as error:
        raise InputError(f"{error} ({told(count([*lines, spent()], contents))})") from error


def make_judge(settings: SimpleNamespace) -> tuple["Judge", "Server | None"]:
    """The judge, and the server behind it if there is one."""
    from lm import judges

    if settings.judge == "rules":
        return judges.RuleJudge(settings.seed), None
    if settings.judge == "human":
        return judges.HumanJudge(settings.sheet), None
    asked = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "seed")}
    if settings.judge == "jsft":
        from self_judge.annotator import JsftJudge
        from self_judge.base import load_base

        return JsftJudge(load_base(settings.base, precision(settings.load_in)),
                         load_tokenizer(settings.base.model), settings.templates,
                         batch_tokens=settings.batch_tokens, **asked), None
    asked["prompt"] = settings.prompt
    if settings.judge == "local":
        model = load_model(settings.model, precision(settings.load_in))
        tokenizer = load_tokenizer(settings.model)
        return judges.LocalJudge(model, tokenizer, batch_tokens=settings.batch_tokens,
                                 **asked), None
    server = connect(settings.model, settings.base_url, vars(settings))
    return judges.ServerJudge(server, **asked), server


def finish(output: Path, made_by: Mapping, records: list[Record],
           contents: Sequence[str]) -> int:
    """Write the output and its summary; how many judgments have failed."""
    lines = read_parts(journal_file(output), made_by)
    counts, (done, failed) = count(lines, contents), judged(lines, contents)
    print(f"{output}: {told(counts)}")
    for index, line in list(failed.items())[:3]:
        print(f"  record {index} failed: {line['error']}")
    if failed:
        print(f"  the same command asks for these {len(failed)} again; {journal_file(output)} has "
              "the judge's words")
    if done:
        write_records(output, [record_of(records[index], line) for index, line in done.items()])
    else:
        output.unlink(missing_ok=True)  # one that --overwrite was to replace
    write_json(output.with_name(output.name + ".summary.json"),
               {**counts, "settings": made_by})
    return len(failed)


def count(lines: Sequence[Record], contents: Sequence[str]) -> dict[str, float]:
    """Judgments by kind, and what all took, those of records that are no longer there included."""
    done, failed = judged(lines, contents)
    positive = sum(line["judgment"] is None for line in done.values())
    return {"responses": len(contents), "positive": positive, "negative": len(done) - positive,
            "failed": len(failed),
            **told_last(lines)}


def told(counts: Mapping[str, float]) -> str:
    """The counts in a line."""
    left = counts["responses"] - sum(counts[name] for name in ("positive", "negative", "failed"))
    return (f"{counts['responses']} responses: {counts['positive']} positive, "
            f"{counts['negative']} negative, {counts['failed']} failed"
            + (f", {left} not judged yet" if left else "")
            + (f"; {counts['requests']} requests, ${counts['cost']:.4f}" if counts["requests"]
               else ""))


def record_of(record: Record, line: Record) -> Record:
    """The record with this judgment in the place of an earlier one."""
    kept = {key: value for key, value in record.items() if key not in OF_ANOTHER_JUDGMENT}
    return {**kept, "input": record.get("input") or "", "judgment": line["judgment"]}


def write_records(output: Path, records: list[Record]) -> None:
    """A JSON list or JSON Lines, whole."""
    if output.suffix == ".json":
        write_json(output, records)
    else:
        write_lines(output, records)


if __name__ == "__main__":
    run(main)
