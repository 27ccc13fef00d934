"""AlpacaEval: how often a judge prefers a model's answers to text-davinci-003's.

    python scripts/evaluate_alpaca.py --model_outputs runs/cut/alpaca_eval.json  # gpt-4, as paper
    python scripts/evaluate_alpaca.py --model_outputs runs/cut/alpaca_eval.json --annotator local \\
        --base_url http://127.0.0.1:8000/v1 --judge_model NAME
    python scripts/evaluate_alpaca.py --annotations annotations.json                # count again

Prompts, the order of the two answers and the reading of replies are the alpaca_eval package's; an
annotator is one of its configurations by name (alpaca_eval_gpt4, weighted_alpaca_eval_gpt4_turbo,
weighted_alpaca_eval_gpt-4o-mini-2024-07-18 ...), one of configs/alpaca_eval (`local` for servers of
your own, `reasoning` for models that think first), or a folder of yours. Requests go through
lm/server.py, so a stopped run goes on and asks nothing twice. The key comes from OPENAI_API_KEY,
the server from --base_url or OPENAI_BASE_URL.

A draw counts one half. A pair whose judgment failed or cannot be read is undecided: left out,
counted, and asked again by the next run; with more of them than --max_undecided the exit code is
1. Results of other inputs, another server or another model are never replaced: they want another
--output_dir. Those of another --limit are, and those of the same model's answers where the file has
changed. Any port of this machine counts as the same server. The length-controlled win rate needs
files of the Hub and is not computed.

Cost: the published judgments of 805 answers by gpt-4 say that they cost $18.17 and took 15 minutes;
the annotators of 2024 cost a third and less (an estimate). alpaca-eval needs no environment of its
own: its pins agree with requirements.txt.
"""

import logging
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.evaluations import asking, refuse_other_inputs, replies
from lm.records import InputError, Record, check_fields, read_records, write_json
from lm.server import check_judge
from lm.stages import locked
from lm.tables import paper_rows, table

if TYPE_CHECKING:
    from alpaca_eval.annotators import PairwiseAnnotator

    from lm.replies import Reply
    from lm.server import Server

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "alpaca_eval"
SENT = {"max_tokens", "temperature", "top_p", "logprobs", "top_logprobs"}  # what lm/server.py sends


def main(model_outputs: str = "", annotations: str = "", reference_outputs: str = "",
         annotator: str = "alpaca_eval_gpt4", judge_model: str = "", base_url: str = "",
         output_dir: str = "", limit: int = 0, max_undecided: float = 0.1, concurrency: int = 8,
         requests_per_minute: float = 0.0, timeout: float = 120.0, attempts: int = 8,
         max_requests: int = 0, max_cost: float = 0.0, price_in: float = -1.0,
         price_out: float = -1.0, dry_run: bool = False) -> None:
    """Judge a model's answers against the reference's, or count judgments that are there.

    Args:
        model_outputs: answers as scripts/generate.py writes them.
        annotations: file of judgments to count instead; nothing is asked.
        reference_outputs: answers to compare with; by default text-davinci-003's, from the Hub. In
            a file of annotations, their output_1: so published ones bring their reference along.
        annotator: configuration of the alpaca_eval package, `local`, `reasoning`, or a folder with
            configs.yaml.
        judge_model: another model than the configuration names.
        base_url: server that speaks OpenAI's protocol; default OPENAI_BASE_URL, else OpenAI's.
        output_dir: default: MODEL_OUTPUTS without its suffix / annotator.
        limit: only the first so many answers or judgments; 0 is all.
        max_undecided: share of the pairs without a preference that is no reason for exit code 1.
        concurrency: requests under way at a time.
        requests_per_minute: send no more than that; 0 is no limit.
        timeout: seconds to wait for a reply before asking again.
        attempts: of each request, before it has failed.
        max_requests: stop before more requests than this, earlier runs for this output included; 0
            is no limit.
        max_cost: stop before more dollars than this, counted alike; 0 is no limit.
        price_in: dollars per million tokens of prompts, where configs/prices.yaml lacks the model.
        price_out: the same for the judge's tokens.
        dry_run: check the judge's settings, key and price before there are answers; ask nothing.
    """
    flags = locals()
    if not 0 <= max_undecided <= 1:
        raise InputError(f"--max_undecided is {max_undecided}; expected a share, 0 to 1")
    if limit < 0:
        raise InputError(f"--limit is {limit}; expected 0 (all) or more")
    if bool(model_outputs) == bool(annotations):
        raise InputError("give either --model_outputs, to have them judged, or --annotations")
    if find_spec("alpaca_eval") is None:
        raise InputError("alpaca-eval is not installed here; pip install -r requirements.txt")
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    if dry_run:
        check_judge(load_annotator(annotator, judge_model)[1], base_url, flags)
        return
    result = (of_annotations(annotations, output_dir, limit) if annotations else
              of_answers(SimpleNamespace(**flags)))
    if (share := undecided_share(result)) > max_undecided:
        pairs = result["n_total"] + result["n_undecided"]
        print(f"warning: {result['n_undecided']} of {pairs:.0f} pairs are undecided "
              f"({100 * share:.0f} %; --max_undecided allows {100 * max_undecided:g} %), so this "
              "win rate is one of the others alone", file=sys.stderr)
        sys.exit(1)


def of_annotations(path: str, output_dir: str, limit: int) -> dict:
    """The result that judgments make, written if there is a folder for it."""
    judged = read_annotations(path)[:limit or None]
    about = {"benchmark": "alpaca_eval", "model": judged[0].get("generator_2") or "the model",
             "annotations": path}
    if not output_dir:
        return finish(about, judged)
    folder = Path(output_dir)
    with locked(folder):
        refuse_other_inputs(folder, about)
        return finish(about, judged, folder)


def of_answers(flags: SimpleNamespace) -> dict:
    """The result of answers, judged by a server and written."""
    references, answers = read_pairs(flags.model_outputs, flags.reference_outputs, flags.limit)
    folder = Path(flags.output_dir or Path(flags.model_outputs).with_suffix("") / "-".join(
        filter(None, (Path(flags.annotator).name, flags.judge_model.replace("/", "_")))))
    judge, model = load_annotator(flags.annotator, flags.judge_model)
    about = {"benchmark": "alpaca_eval", "model": answers[0]["generator"],
             "model_outputs": flags.model_outputs, "annotator": flags.annotator,
             "judge_model": model, "reference_outputs": flags.reference_outputs or "the Hub's"}
    # A second run waits, and finds all that the first has paid for in the cache
    with locked(folder), asking(folder, model, flags.base_url, vars(flags)) as (server, before):
        about["base_url"] = server.base_url
        refuse_other_inputs(folder, about)
        judged = annotate_into(folder, judge, server, references, answers)
        about["cost_of_this_run"] = server.budget.cost - before
        return finish(about, judged, folder)


def finish(about: dict, judged: list[Record], folder: Path | None = None) -> dict:
    """The judgments counted and shown, and written if there is a folder for it."""
    result = {**about, **count(judged)}
    print(summary(result))
    if folder:
        write_json(folder / "results.json", result)
        print(f"written: {folder}/results.json")
    return result


def read_annotations(path: str) -> list[Record]:
    """Judged pairs; a preference is 1 .. 2 (2: the model's answer), 0 for a draw, or null."""
    judged = read_records(path)
    check_fields(judged, path, {"preference": (int, float, type(None))})
    for index, record in enumerate(judged):
        value = record["preference"]
        if not (value is None or math.isnan(value) or value == 0 or 1 <= value <= 2):
            raise InputError(f"{path}: record {index}: field 'preference' is {value}; expected 1 "
                             "to 2, 0 for a draw, or null")
    return judged


def read_pairs(model_outputs: str, reference: str, limit: int) -> tuple[list[Record], list[Record]]:
    """The reference's and the model's answers to the same instructions, in the same order."""
    from scripts.generate import download_alpaca_eval

    answers = read_answers(model_outputs)[:limit or None]
    reference = reference or download_alpaca_eval("--reference_outputs")
    of_reference = {record["instruction"]: record for record in read_reference(reference)}
    for index, answer in enumerate(answers):
        if answer["instruction"] not in of_reference:
            raise InputError(f"{model_outputs}: record {index}: the reference has no answer to "
                             "this instruction; give --reference_outputs for the same prompts")
    if len(answers) < len(of_reference):
        print(f"note: {len(answers)} of the reference's {len(of_reference)} instructions")
    return [of_reference[answer["instruction"]] for answer in answers], answers


def read_reference(path: str) -> list[Record]:
    """The reference's answers, those of a file of judgments too."""
    return checked_answers([{"output": record.get("output_1"), **record,
                             "generator": record.get("generator") or record.get("generator_1")}
                            for record in read_records(path)], path)


def read_answers(path: str) -> list[Record]:
    """The model's answers; judgments hold two models' answers, and are counted instead."""
    records = read_records(path)
    if any("output" not in record and "output_1" in record for record in records):
        raise InputError(f"{path}: holds judgments, not a model's answers; give it as "
                         "--annotations to count them")
    return checked_answers(records, path)


def checked_answers(records: list[Record], path: str) -> list[Record]:
    """Instruction, output and generator of each answer, no instruction twice."""
    check_fields(records, path, {"instruction": (str,), "output": (str,)})
    (text, times), = Counter(record["instruction"] for record in records).most_common(1)
    if times > 1:
        raise InputError(f"{path}: holds {times} answers to the instruction {text[:60]!r}; keep "
                         "one of them")
    return [{"instruction": record["instruction"], "output": record["output"],
             "generator": record.get("generator") or Path(path).stem} for record in records]


def load_annotator(name: str, judge_model: str) -> tuple["PairwiseAnnotator", str]:
    """The package's annotator and the model that it asks."""
    import yaml
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

    logging.getLogger().setLevel(logging.CRITICAL)  # tracebacks of replies that cannot be read
    known = {path.parent.name: path.parent for folder in (EVALUATORS_CONFIG_DIR, CONFIGS)
             for path in sorted(folder.glob("*/configs.yaml"))}
    folder = known.get(name) or Path(name)
    if not (folder / "configs.yaml").is_file():
        nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise InputError(f"--annotator: no configuration {name}; did you mean {nearest}? (or give "
                         "a folder with configs.yaml)")
    (config, *more) = yaml.safe_load((folder / "configs.yaml").read_text("utf-8")).values()
    options = config.get("completions_kwargs", {})
    if more or config.get("batch_size", 1) > 1 or set(options) - SENT - {"model_name"} or (
            config.get("fn_completions", "openai_completions") != "openai_completions"):
        raise InputError(f"--annotator: {name} is not a plain question to an OpenAI-compatible "
                         "server; use the alpaca_eval command itself for it")
    model = judge_model or options.get("model_name")
    if not model:
        raise InputError(f"--judge_model is missing; annotator {name} leaves the model open")
    # No cache of the package's: it would write beside its own code, 128 judgments at a time.
    return PairwiseAnnotator(annotators_config=folder.resolve(), caching_path=None), model


def annotate_into(folder: Path, annotator: "PairwiseAnnotator", server: "Server",
                  references: list[Record], answers: list[Record]) -> list[Record]:
    """The judged pairs; they and what is undecided are written to the folder."""
    judged, undecided = annotate(annotator, server, references, answers)
    write_json(folder / "annotations.json", judged)
    write_json(folder / "undecided.json", undecided)
    if undecided:
        print(f"{len(undecided)} undecided (the last: {undecided[-1]['error']}), listed in "
              f"{folder}/undecided.json; the same command asks for them again")
    return judged


def annotate(annotator: "PairwiseAnnotator", server: "Server", references: list[Record],
             answers: list[Record]) -> tuple[list[Record], list[dict]]:
    """The judged pairs, and what was asked and said where that gave no preference."""
    (single,) = annotator.annotators.values()
    undecided: list[dict] = []
    single.fn_completions = asker(server, single, undecided)
    judged = annotator.annotate_head2head(references, answers, chunksize=None)
    return [{key: None if isinstance(value, float) and math.isnan(value) else value
             for key, value in record.items()} for record in judged], undecided


def asker(server: "Server", single: object, undecided: list[dict]) -> Callable[..., dict]:
    """What the package calls to have its prompts completed."""
    from alpaca_eval.utils import prompt_to_chatml

    from lm.replies import Request

    def ask(prompts: list[str], model_name: str, max_tokens: int, temperature: float = 0.7,
            top_p: float = 1.0, **extra: object) -> dict:  # the package's defaults
        requests = {}
        for index, prompt in enumerate(map(str.strip, prompts)):
            chat = prompt.startswith("<|im_start|>")
            requests[index] = Request(prompt_to_chatml(prompt) if chat else prompt, max_tokens,
                                      temperature, top_p, extra=extra)
        said = dict(replies(server, requests))
        completions = [completion_of(single, said[index]) for index in requests]
        for index, completion in enumerate(completions):
            if not readable(single, completion):
                server.forget(requests[index])
                undecided.append({"asked": requests[index].text, "said": said[index].text,
                                  "error": said[index].error or "cannot be read"})
        return {"completions": completions, "completions_all": completions,
                "price_per_example": [said[index].cost for index in requests]}

    return ask


def completion_of(single: object, reply: "Reply") -> str | dict:
    """What the annotator's parser reads: a text, or the choice with its log-probabilities."""
    text = "" if reply.error else reply.text.strip()
    if single.completion_key == "completions":
        return text
    return {"text": text, "logprobs": reply.logprobs}


def readable(single: object, completion: str | dict) -> bool:
    """Whether the annotator's parser finds one preference in it; it raises many kinds of errors."""
    try:
        values = list(single.fn_completion_parser(completion))
        return len(values) == 1 and not math.isnan(values[0])
    except Exception:
        return False


def count(judged: list[Record]) -> dict:
    """The package's win rate and standard error in per cent, over the decided pairs."""
    from alpaca_eval.metrics import get_winrate

    decided = [record for record in judged if record["preference"] is not None
               and not math.isnan(record["preference"])]
    if not decided:
        raise InputError(f"none of {len(judged)} judgments could be read, so there is no win rate; "
                         "see undecided.json, and choose another judge")
    result = {key: float(value) for key, value in get_winrate(
        [{"preference": float(record["preference"])} for record in decided]).items()}
    return {**result, "n_undecided": len(judged) - len(decided)}


def undecided_share(result: Record) -> float:
    return result["n_undecided"] / (result["n_total"] + result["n_undecided"])


def summary(result: dict) -> str:
    row = [result["model"], f"{result['win_rate']:.2f}", f"{result['standard_error']:.2f}",
           *(f"{result[key]:.0f}" for key in ("n_wins", "n_draws", "n_wins_base")),
           f"{result['n_undecided']} ({100 * undecided_share(result):.1f} %)"]
    rows = [[model, f"{figure:.2f}", *[""] * 5] for measure in ("alpaca", "alpaca_greedy")
            for model, (figure,) in paper_rows(measure).items()]
    return table(["model", "win rate", "± error", "wins", "draws", "losses", "undecided"],
                 [row, *rows])


if __name__ == "__main__":
    run(main)
