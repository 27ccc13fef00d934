"""MT-Bench: a judge scores each reply of a model's dialogues from 1 to 10.

    python scripts/evaluate_mt_bench.py --answers runs/cut/mt_bench.json --judge_model gpt-4
    python scripts/evaluate_mt_bench.py --answers runs/cut/mt_bench.json --judge_model NAME \\
        --base_url http://127.0.0.1:8000/v1

Answers are those of scripts/generate_dialogues.py. Where the questions have a `reference`, as those
of math, coding and reasoning do, the judge sees it. Its prompt (configs/templates/mt_bench.yaml) is
our own, so a score is comparable with others made here, and with published ones only roughly.

Requests go through lm/server.py: a stopped run goes on and asks nothing twice. A reply without one
score from 1 to 10 is a failure: left out of the means, counted, and asked again by the next run.
Results of other inputs, another server or another model are never replaced: they want another
--output_dir. Those of another --limit or temperature are, and those of the same model's answers
where the file has changed. Any port of this machine counts as the same server. The key comes from
OPENAI_API_KEY, the server from --base_url or OPENAI_BASE_URL. Only servers are asked: for a local
judge start `vllm serve` or `transformers serve` and give its address as --base_url.

Cost (estimates): 160 replies judged by gpt-4 $8, by gpt-4o $0.60; 5 minutes at 8 requests a time.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.dialogues import by_question, check_entries, read_dialogues
from lm.evaluations import ask, asking, refuse_other_inputs, report_failed
from lm.prompts import fill, load_prompt
from lm.records import (
    InputError,
    Record,
    check_fields,
    read_records,
    write_json,
)
from lm.server import check_judge
from lm.stages import locked
from lm.tables import paper_rows, table

SCORE = re.compile(r"^\W*score[\s:*_=]+(\d+(?:\.\d+)?)(?:\s*/\s*10)?[.*_\s]*$",
                   re.IGNORECASE | re.MULTILINE)
FIELDS = {"system": set(), "user": {"dialogue"}, "reference": {"turn", "reference"}}
DRAWS = 1000  # of the bootstrap


def main(answers: str, judge_model: str, base_url: str = "", output_dir: str = "",
         references: str = "", template: str = "mt_bench", max_new_tokens: int = 1024,
         temperature: float = 0.0, concurrency: int = 8, requests_per_minute: float = 0.0,
         timeout: float = 120.0, attempts: int = 8, max_requests: int = 0, max_cost: float = 0.0,
         price_in: float = -1.0, price_out: float = -1.0,
         dry_run: bool = False) -> None:
    """Print the mean score of each category and turn with 95 % intervals.

    Args:
        answers: dialogues as scripts/generate_dialogues.py writes them.
        judge_model: what the server calls the judge.
        base_url: server that speaks OpenAI's protocol; default OPENAI_BASE_URL, else OpenAI's.
        output_dir: default: ANSWERS without its suffix / judge model.
        references: file of references in the place of those that the answers bring, such as
            data/downloads/mt_bench/reference_answer/gpt-4.jsonl; by question_id, one text a turn.
        template: judge prompt, by name in configs/templates or path.
        max_new_tokens: longest reply of the judge; one that is cut has failed.
        temperature: of the judge; 0 is greedy, below 0 it is left to the server.
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
    flags = locals()  # before there are other names
    from lm.replies import Request

    if max_new_tokens < 1:
        raise InputError(f"--max_new_tokens is {max_new_tokens}; expected 1 or more")
    prompt = load_prompt(template, FIELDS)
    if dry_run:
        check_judge(judge_model, base_url, flags)
        return
    records = read_dialogues(answers)
    if references:
        records = with_references(records, references)
    known = sum(any(record.get("reference") or []) for record in records)
    print(f"{known} of {len(records)} questions have a reference")
    folder = Path(output_dir or Path(answers).with_suffix("") / judge_model.replace("/", "_"))
    inputs = {"benchmark": "mt_bench", "model": records[0]["generator"], "answers": answers,
              "references": references, "judge_model": judge_model, "template": template}
    turns = [(record, turn) for record in records for turn in range(len(record["turns"]))]
    # A second run waits, and finds all that the first has paid for in the cache
    with locked(folder), asking(folder, judge_model, base_url, flags) as (server, before):
        inputs["base_url"] = server.base_url
        refuse_other_inputs(folder, inputs)
        said = ask(server, [Request(question(prompt, *each), max_new_tokens, temperature)
                            for each in turns], read_score)
        judged = [{"question_id": record["question_id"], "category": record["category"],
                   "turn": turn + 1, "score": entry.pop("value"), **entry}
                  for (record, turn), entry in zip(turns, said, strict=True)]
        write_json(folder / "judgments.json", judged)
        failed = report_failed(judged, "score", folder)
        scores = means(judged)
        print(summary(scores, inputs["model"]))
        write_json(folder / "results.json", {
            **inputs, "cost_of_this_run": server.budget.cost - before, "failed": failed,
            "scores": scores})
        print(f"written: {folder}/results.json")


def with_references(records: list[Record], path: str) -> list[Record]:
    """The records with the references of a file, by question; none where it has none."""
    known = read_records(path)
    check_fields(known, path, {"question_id": (int, str)})
    texts = {name: reference_of(record, f"{path}: record {index}")
             for index, (name, record) in enumerate(by_question(known, path).items())}
    found = [texts.get(str(record["question_id"]), []) for record in records]
    if not any(map(any, found)):
        raise InputError(f"{path}: has no reference to any of these questions (there 'question_id' "
                         f"{next(iter(texts))!r} ..., here {str(records[0]['question_id'])!r} "
                         "...); give theirs, or leave --references out (REFERENCES= in the "
                         "recipe)")
    return [{**record, "reference": entries}
            for record, entries in zip(records, found, strict=True)]


def reference_of(record: Record, where: str) -> list[str | None]:
    """A reference a turn: `reference`, or the first of MT-Bench's `choices`."""
    if "reference" in record:
        field, entries = "reference", record["reference"]
    else:
        try:
            field, entries = "choices[0].turns", record["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{where}: expected 'reference', a list of texts, or 'choices', as "
                             "MT-Bench has them") from error
    check_entries(where, field, entries, str, NoneType)
    return entries


def question(prompt: Mapping[str, str], record: Record, turn: int) -> list[dict[str, str]]:
    """What the judge is asked about the reply to a turn: the dialogue so far, and references."""
    dialogue = "\n\n".join(
        f"### User, message {place + 1}:\n{record['turns'][place]}\n\n"
        f"### Assistant, reply {place + 1}:\n{record['outputs'][place]}"
        for place in range(turn + 1))
    known = (record.get("reference") or [])[:turn + 1]
    parts = [fill(prompt["user"], dialogue=dialogue),
             *(fill(prompt["reference"], turn=str(place), reference=text)
               for place, text in enumerate(known, start=1) if text)]
    return [{"role": "system", "content": prompt["system"]},
            {"role": "user", "content": "\n\n".join(parts)}]


def read_score(text: str) -> float | None:
    """The score, if the reply gives one and no other.

    >>> read_score("Right and short.\\nScore: 9"), read_score("Score: 9\\nScore: 2")
    (9.0, None)
    """
    found = {float(score) for score in SCORE.findall(text)}
    return found.pop() if len(found) == 1 and 1 <= min(found) <= 10 else None


def means(judged: list[Record]) -> dict[str, dict[str, dict]]:
    """Mean, interval and count by category (`all` last) and turn (`all` of them last)."""
    categories = [*dict.fromkeys(entry["category"] for entry in judged), "all"]
    turns = sorted({entry["turn"] for entry in judged})
    return {category: {str(turn): mean([
        entry for entry in judged if entry["score"] is not None
        and category in (entry["category"], "all") and turn in (entry["turn"], "all")])
        for turn in [*turns, "all"]} for category in categories}


def mean(scored: list[Record]) -> dict:
    """Mean of the scores with its bootstrap interval; questions are drawn, with all their turns."""
    import numpy

    if not scored:
        return {"mean": None, "low": None, "high": None, "count": 0}
    questions: dict[int | str, list[float]] = {}
    for entry in scored:
        questions.setdefault(entry["question_id"], []).append(entry["score"])
    sums = numpy.array([[sum(scores), len(scores)] for scores in questions.values()])  # (Q, 2)
    draws = numpy.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    drawn = sums[draws].sum(1)  # (DRAWS, 2)
    low, high = numpy.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return {"mean": float(sums[:, 0].sum() / sums[:, 1].sum()), "low": float(low),
            "high": float(high), "count": len(scored)}


def summary(scores: dict[str, dict[str, dict]], model: str) -> str:
    """A row a category, a column a turn, and the papers' means."""
    turns = list(scores["all"])
    rows = [[category, *(cell(by_turn[turn]) for turn in turns)]
            for category, by_turn in scores.items()]
    blank = " " * len(" [0.00, 00.00]")
    rows += [[name, *[""] * (len(turns) - 1), f"{figure:.2f}{blank}     "]
             for name, (figure,) in paper_rows("mt_bench").items()]
    heads = [f"turn {turn}" if turn != "all" else "all turns" for turn in turns]
    return "\n".join([table([model, *heads], rows), "mean [95 % bootstrap interval] of so many"])


def cell(found: dict) -> str:
    if not found["count"]:
        return "-"
    return (f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:5.2f}] {found['count']:4}")


if __name__ == "__main__":
    run(main)
