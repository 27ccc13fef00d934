"""VicunaEval: how often a judge prefers a model's answers to a baseline's.

    python scripts/evaluate_vicuna.py --answers runs/cut/vicuna.json \\
        --baseline runs/sft/vicuna.json --judge_model gpt-4

Both files are scripts/generate_dialogues.py's; of a dialogue, the first turn counts. The judge sees
each pair twice, the answers in either order. A model wins a question if it wins both times, and
loses it likewise; all else is a tie. The win rate counts a tie one half. The judge's prompt
(configs/templates/vicuna.yaml) and this rule are our choice: the papers state neither.

Requests go through lm/server.py: a stopped run goes on and asks nothing twice. A reply without one
verdict is a failure: its question is left out, counted, and asked again by the next run. Results of
other inputs, another server or other models are never replaced: they want another --output_dir.
Those of another temperature are, and those of the same models' answers where a file has changed.
Any port of this machine counts as the same server. The key comes from OPENAI_API_KEY, the server
from --base_url or OPENAI_BASE_URL. Only servers are asked: for a local judge start `vllm serve` or
`transformers serve` and give its address as --base_url.

Cost (estimates): 80 questions judged twice by gpt-4 $8, by gpt-4o $0.60; 5 minutes at 8 requests a
time.
"""

import re
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.dialogues import by_question, read_dialogues
from lm.evaluations import ask, asking, refuse_other_inputs, report_failed
from lm.prompts import fill, load_prompt
from lm.records import InputError, Record, write_json
from lm.server import check_judge
from lm.shares import Share, wilson
from lm.stages import locked
from lm.tables import paper_rows, table

VERDICT = re.compile(r"^\W*verdict[\s:*_=]+(A|B|tie)[.*_\s]*$", re.IGNORECASE | re.MULTILINE)
FIELDS = {"system": set(), "user": {"question", "first", "second"}}
MEANINGS = {"win": "wins", "tie": "ties", "loss": "losses",
            "win_rate": "win rate (a tie counts one half)",
            "consistency": "same verdict in both orders",
            "chose_first": "chose the answer shown first (unbiased: 50)"}


def main(answers: str, baseline: str, judge_model: str, base_url: str = "", output_dir: str = "",
         template: str = "vicuna", max_new_tokens: int = 1024, temperature: float = 0.0,
         concurrency: int = 8, requests_per_minute: float = 0.0, timeout: float = 120.0,
         attempts: int = 8, max_requests: int = 0, max_cost: float = 0.0, price_in: float = -1.0,
         price_out: float = -1.0, dry_run: bool = False) -> None:
    """Print the shares of wins, ties and losses, and the win rate, with 95 % intervals.

    Args:
        answers: the model's answers, as scripts/generate_dialogues.py writes them.
        baseline: another model's answers to the same questions; in the paper the SFT model's.
        judge_model: what the server calls the judge.
        base_url: server that speaks OpenAI's protocol; default OPENAI_BASE_URL, else OpenAI's.
        output_dir: default: ANSWERS without its suffix / judge model.
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
    pairs = read_pairs(answers, baseline)
    folder = Path(output_dir or Path(answers).with_suffix("") / judge_model.replace("/", "_"))
    names = [pairs[0][side]["generator"] for side in (0, 1)]
    inputs = {"benchmark": "vicuna", "model": names[0], "baseline": names[1], "answers": answers,
              "baseline_answers": baseline, "judge_model": judge_model, "template": template}
    orders = [(pair, shown_first) for pair in pairs for shown_first in ("model", "baseline")]
    # A second run waits, and finds all that the first has paid for in the cache
    with locked(folder), asking(folder, judge_model, base_url, flags) as (server, before):
        inputs["base_url"] = server.base_url
        refuse_other_inputs(folder, inputs)
        said = ask(server, [Request(question(prompt, *order), max_new_tokens, temperature)
                            for order in orders], read_verdict)
        judged = [{"question_id": mine["question_id"], "category": mine["category"],
                   "shown_first": shown_first, "verdict": outcome(entry.pop("value"), shown_first),
                   **entry} for ((mine, _), shown_first), entry in zip(orders, said, strict=True)]
        write_json(folder / "judgments.json", judged)
        failed = report_failed(judged, "verdict", folder)
        shares, undecided = count(judged)
        print(summary(shares, *names, undecided))
        write_json(folder / "results.json", {
            **inputs, "cost_of_this_run": server.budget.cost - before, "failed": failed,
            "undecided": undecided,
            "shares": {name: asdict(share) for name, share in shares.items()}})
        print(f"written: {folder}/results.json")


def read_pairs(answers: str, baseline: str) -> list[tuple[Record, Record]]:
    """The model's and the baseline's answer to each question of the model."""
    theirs = by_question(read_dialogues(baseline), baseline)
    pairs = []
    for index, mine in enumerate(read_dialogues(answers)):
        other = theirs.get(str(mine["question_id"]), {"turns": [None]})
        if other["turns"][0] != mine["turns"][0]:
            raise InputError(f"{answers}: record {index}: {baseline} has no answer to this "
                             "question; generate both from the same file")
        pairs.append((mine, other))
    return pairs


def question(prompt: dict[str, str], pair: tuple[Record, Record],
             shown_first: str) -> list[dict[str, str]]:
    """The pair in one order, as the judge is asked about it."""
    shown = pair if shown_first == "model" else pair[::-1]
    first, second = (record["outputs"][0] for record in shown)
    return [{"role": "system", "content": prompt["system"]},
            {"role": "user", "content": fill(prompt["user"], question=pair[0]["turns"][0],
                                             first=first, second=second)}]


def read_verdict(text: str) -> str | None:
    """`a`, `b` or `tie`, if the reply gives one of them and no other.

    >>> read_verdict("B is wrong.\\n**Verdict: A**"), read_verdict("Verdict: A or B")
    ('a', None)
    """
    found = {verdict.lower() for verdict in VERDICT.findall(text)}
    return found.pop() if len(found) == 1 else None


def outcome(verdict: str | None, shown_first: str) -> str | None:
    """What a verdict means for the model: win, tie or loss."""
    won = {"model": "a", "baseline": "b"}[shown_first]
    return verdict if verdict in (None, "tie") else "win" if verdict == won else "loss"


def count(judged: list[Record]) -> tuple[dict[str, Share], int]:
    """The shares, and the number of questions without two verdicts."""
    both = [(one["verdict"], other["verdict"])
            for one, other in zip(judged[::2], judged[1::2], strict=True)]
    decided = [pair for pair in both if None not in pair]
    if not decided:
        raise InputError("no question has a verdict in both orders; choose another judge")
    total = len(decided)
    outcomes = [one if one == other else "tie" for one, other in decided]
    hits = {name: outcomes.count(name) for name in ("win", "tie", "loss")}
    hits |= {"win_rate": hits["win"] + hits["tie"] / 2,
             "consistency": sum(one == other for one, other in decided)}
    shares = {name: wilson(number, total) for name, number in hits.items()}
    chosen = [(entry["verdict"] == "win") == (entry["shown_first"] == "model")
              for entry in judged if entry["verdict"] in ("win", "loss")]
    if chosen:
        shares["chose_first"] = wilson(sum(chosen), len(chosen))
    return shares, len(both) - total


def summary(shares: dict[str, Share], model: str, baseline: str, undecided: int) -> str:
    """The shares, and the papers' win rates."""
    rows = [[MEANINGS[name], str(share.total), f"{100 * share.share:.2f}",
             f"{100 * share.low:.1f} to {100 * share.high:.1f}"] for name, share in shares.items()]
    rows += [[f"win rate in {name}, against SFT", "", f"{figure:.2f}", ""]
             for name, (figure,) in paper_rows("vicuna").items()]
    heads = [f"{model} against {baseline}", "of", "share, %", "95 % interval"]
    return f"{table(heads, rows)}\n{undecided} questions undecided, left out"


if __name__ == "__main__":
    run(main)
