"""Make data/sample/preferences/: rated answers whose true winner is known, for the judge.

    python scripts/make_preference_data.py

1. answers: as for data/sample, several to each prompt, sampled from the embedded model
2. pools: the decent ones by topic, whatever the constraint they were sampled under
3. exercises: new prompts, topics x tasks x constraints, to which a topic's pool holds answers that
   satisfy the constraint and answers that do not
4. ratings: IFEval's checkers decide on instruction_following, what a program can see of the answer
   on helpfulness; the rest is N/A
5. files: SPLIT.jsonl in UltraFeedback's schema, hh_SPLIT.jsonl in HH's, a pair a line

Answers are kept in --work and not asked for again, so a stopped run continues. The same model,
seed and machine give the same files.
"""

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import Record, write_lines
from lm.rules import WORD, judge_by_rules, satisfied
from scripts.make_sample_data import (
    NOT_DECENT,
    Answerer,
    first_paragraph,
    in_turn,
    is_decent,
    make_prompts,
    stems_of,
    topic_of,
)

WORDS = "length_constraints:number_words"
COMMA = "punctuation:no_comma"


def main(base_model: str = "smollm2-135m-instruct", folder: str = "data/sample",
         work: str = "saved_models/preference_data", seed: int = 1) -> None:
    """Write preferences/{train,validation,heldout}.jsonl and the same with hh_ before.

    Args:
        base_model: The model that answers: a folder, a Hub id or the embedded model's name.
        folder: Holds ingredients.yaml; the files are written to its folder preferences/.
        work: Where the model's answers are kept between runs.
        seed: Draws prompts, samples, phrasings and the choice.
    """
    import yaml

    settings = yaml.safe_load((Path(folder) / "ingredients.yaml").read_text(encoding="utf-8"))
    choice, output = settings["preferences"], Path(folder) / "preferences"
    output.mkdir(exist_ok=True)
    answerer = Answerer(base_model, Path(work), settings["max_new_tokens"], seed)
    print(f"{'split':12}{'kind':12}{'prompts':>8}{'pairs':>7}{'completions':>13}{'satisfy':>9}")
    for split, topics in settings["topics"].items():
        prompts = make_prompts({**settings, "prompts_per_kind": choice["sampled_per_kind"]},
                               split, seed)
        answers = answerer.sample(prompts, choice["samples"], settings["temperature"],
                                  settings["top_p"])
        pools = pools_by_topic(prompts, answers, stems_of(topics))
        exercises = make_exercises(settings, split, pools, seed)
        records = [uf_record(exercise, stems_of(topics), seed) for exercise in exercises]
        pairs = [pair for exercise in exercises for pair in hh_records(exercise)]
        random.Random(f"{seed} {split}").shuffle(pairs)
        write_lines(output / f"{split}.jsonl", records)
        write_lines(output / f"hh_{split}.jsonl", pairs)
        report(split, exercises, pairs)


def pools_by_topic(prompts: list[Record], answers: list[list[dict]],
                   stems: dict[str, set[str]]) -> dict[str, list[str]]:
    """For each topic its decent answers, each once, whatever they were asked to look like."""
    pools: dict[str, dict[str, None]] = defaultdict(dict)
    for prompt, given in zip(prompts, answers, strict=True):
        topic = topic_of(prompt, stems)
        for answer in given:
            text = first_paragraph(answer["text"])
            ended = answer["whole"] or text != answer["text"].strip()
            if ended and is_decent(text, stems[topic]):
                pools[topic][text] = None
    return {topic: list(pool) for topic, pool in pools.items()}


def make_exercises(settings: dict, split: str, pools: dict[str, list[str]],
                   seed: int) -> list[dict]:
    """Prompts with good and bad answers from the pool: every kind equally often, topics in turn."""
    draw = random.Random(f"exercises {seed} {split}")
    choice, made = settings["preferences"], {}
    for kind in choice["wordings"][split]:
        of_kind = _exercises(kind, settings, split, pools, draw)
        number = 0
        while number < choice["exercises_per_kind"][split]:
            exercise = next(of_kind)
            if exercise["instruction"] not in made:
                made[exercise["instruction"]] = {"id": f"{split}-{kind}-{number:02}", **exercise}
                number += 1
    exercises = list(made.values())
    draw.shuffle(exercises)
    return exercises


def _exercises(kind: str, settings: dict, split: str, pools: dict[str, list[str]],
               draw: random.Random) -> Iterator[dict]:
    """Endless: a prompt of this kind, and the pool's answers that satisfy it or do not."""
    choice = settings["preferences"]
    tasks, wordings = (in_turn(settings["tasks"], draw),
                       in_turn(choice["wordings"][split][kind], draw))
    numbers = choice["numbers"][split] if kind == "at_most" else [0]
    most = choice["completions_per_sign"]
    for topic in in_turn(sorted(pools), draw):
        for n in draw.sample(numbers, len(numbers)):
            constraints = [constraint(kind, n)]
            signs = [all(satisfied(constraints, text)) for text in pools[topic]]
            good, bad = ([text for text, sign in zip(pools[topic], signs, strict=True)
                          if sign == wanted] for wanted in (True, False))
            if good and bad:
                task = next(tasks).format(topic=topic)
                yield {"instruction": next(wordings).format(task=task, n=n),
                       "constraints": constraints,
                       "good": draw.sample(good, min(most, len(good))),
                       "bad": draw.sample(bad, min(most, len(bad)))}
                break


def constraint(kind: str, n: int) -> dict:
    """A constraint as IFEval's checkers take it; their "less than" is strict."""
    if kind == "no_comma":
        return {"kind": COMMA, "kwargs": {}}
    return {"kind": WORDS, "kwargs": {"num_words": n + 1, "relation": "less than"}}


def uf_record(exercise: dict, stems: dict[str, set[str]], seed: int) -> Record:
    """UltraFeedback's schema, with the constraints beside it."""
    topic = topic_of(exercise, stems)
    texts = exercise["good"] + exercise["bad"]
    random.Random(f"{seed} {exercise['instruction']}").shuffle(texts)
    return {"id": exercise["id"], "instruction": exercise["instruction"],
            "completions": [{"response": text, "custom_system_prompt": "",
                             "annotations": annotations(exercise, text, stems[topic], seed)}
                            for text in texts],
            "constraints": exercise["constraints"]}


def annotations(exercise: Record, text: str, stems: set[str], seed: int) -> dict[str, dict]:
    """A rating and its rationale by principle, as far as a program can tell."""
    fault = judge_by_rules(exercise, text, seed)
    rating, why = helpfulness(text, stems)
    return {"instruction_following": {"Rating": "1" if fault else "5",
                                      "Rationale For Rating": fault
                                      or praise(exercise, text, seed)},
            "helpfulness": {"Rating": str(rating), "Rationale For Rating": why},
            "truthfulness": {"Rating": "N/A"}}


def helpfulness(text: str, stems: set[str]) -> tuple[int, str]:
    """1 to 5: by what the answer says of the topic, its length and whether it comes to an end."""
    words = [word.lower() for word in WORD.findall(text)]
    about = sum(word[:4] in stems for word in words)
    faults = [said for said, holds in (
        ("It says nothing about the topic.", not about),
        ("It talks about the exercise.", NOT_DECENT.search(text)),
        ("It breaks off.", text[-1] not in ".!?"),
        ("It says little.", len(words) < 10)) if holds]
    return max(1, 5 - len(faults)), " ".join(faults) or "A whole answer about the topic."


def praise(exercise: Record, text: str, seed: int) -> str:
    """How the answer satisfies the constraint, in words that vary with seed and texts alone."""
    (given,) = exercise["constraints"]
    count = len(WORD.findall(text))
    if given["kind"] == COMMA:
        said = ["It has no comma, as was asked.", "No comma anywhere, as demanded."]
    else:
        limit = given["kwargs"]["num_words"] - 1
        said = [f"It has {count} words, within the limit of {limit}.",
                f"Short enough: {count} words of {limit}."]
    return random.Random(f"{seed} {exercise['instruction']} {text}").choice(said)


def hh_records(exercise: dict) -> list[Record]:
    """HH's schema: each good and each bad answer in a pair, and none in more pairs than needed."""
    start = f"\n\nHuman: {exercise['instruction']}\n\nAssistant: "
    good, bad = exercise["good"], exercise["bad"]
    return [{"id": f"{exercise['id']}-{number}",
             "chosen": start + good[number % len(good)], "rejected": start + bad[number % len(bad)]}
            for number in range(max(len(good), len(bad)))]


def report(split: str, exercises: list[dict], pairs: list[Record]) -> None:
    """Print a line a kind: prompts, pairs, and how many of the completions satisfy theirs."""
    rows: dict[str, Counter] = defaultdict(Counter)
    for exercise in exercises:
        for kind in (exercise["id"].split("-")[1], "all"):
            rows[kind].update(prompts=1, good=len(exercise["good"]), bad=len(exercise["bad"]))
    for pair in pairs:
        for kind in (pair["id"].split("-")[1], "all"):
            rows[kind]["pairs"] += 1
    for kind, row in sorted(rows.items(), key=lambda item: item[0] == "all"):
        total = row["good"] + row["bad"]
        print(f"{split:12}{kind:12}{row['prompts']:8}{row['pairs']:7}{total:13}"
              f"{100 * row['good'] / total:7.0f} %")


if __name__ == "__main__":
    run(main)
