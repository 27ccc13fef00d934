"""Make data/sample/: the quickstart's judged responses and its prompts for tuning and for the test.

    python scripts/make_sample_data.py

1. prompts: topics x tasks x constraints, from data/sample/ingredients.yaml; the splits share no
   topic and no wording of a constraint
2. responses: several a train prompt, sampled from the embedded model
3. verdicts: IFEval's checkers decide, lm/rules.py says what is wrong
4. choice: first paragraphs that are decent answers, evenly over the kinds, good and bad ones of
   the same prompt where there are any
5. a table: how often the base model satisfies each kind, and what was chosen

Answers are kept in --work and not asked for again, so a stopped run continues. The same model,
seed and machine give the same files.
"""

import hashlib
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import Record, read_records, write_lines
from lm.rules import judge_by_rules, satisfied

# An answer about the exercise, in lists or in markup is not worth imitating.
NOT_DECENT = re.compile(
    r"[\n#*`<>\[\]{}_|]|[^\x00-\x7f‘’“”–—]|\b(answer|assist|assistant|commas?|describe|description|"
    r"example|help you|instructions?|note|prompt|please|questions?|remark|requests?|response|"
    r"sentences?|sure|task|text|tip|title|topic|welcome|words?)\b", re.IGNORECASE)

COMMON = {"the", "good", "old", "new", "first", "long", "making", "learning", "keeping"}


def main(base_model: str = "smollm2-135m-instruct", folder: str = "data/sample",
         work: str = "saved_models/sample_data", seed: int = 0, samples: int = 8,
         scale: int = 1) -> None:
    """Write train.jsonl, validation.jsonl, heldout.jsonl and instructions.jsonl.

    Args:
        base_model: The model that answers: a folder, a Hub id or the embedded model's name.
        folder: Holds ingredients.yaml; the files are written here.
        work: Where the model's answers are kept between runs.
        seed: Draws prompts, samples, phrasings and the choice.
        samples: Responses drawn for each train prompt.
        scale: So many times as many train prompts and records.
    """
    import yaml

    settings = yaml.safe_load((Path(folder) / "ingredients.yaml").read_text(encoding="utf-8"))
    settings["prompts_per_kind"]["train"] *= scale
    settings["records_per_kind"] = {sign: scale * count for sign, count
                                    in settings["records_per_kind"].items()}
    prompts = {split: make_prompts(settings, split, seed) for split in settings["topics"]}
    answerer = Answerer(base_model, Path(work), settings["max_new_tokens"], seed)
    sampled = answerer.sample(prompts["train"], samples, settings["temperature"],
                              settings["top_p"])
    pool = judge_pool(prompts["train"], sampled, settings, seed)
    chosen = choose(pool, settings["records_per_kind"], seed)
    write_lines(Path(work) / "pool.jsonl", pool)
    write_lines(Path(folder) / "train.jsonl", [train_record(entry) for entry in chosen])
    for split in ("validation", "heldout"):
        write_lines(Path(folder) / f"{split}.jsonl", prompts[split])
    write_lines(Path(folder) / "instructions.jsonl", make_instructions(settings, seed))
    greedy = {split: answerer.greedy(prompts[split]) for split in ("validation", "heldout")}
    report(pool, chosen, prompts, greedy, answerer.tokenizer())


def make_prompts(settings: dict, split: str, seed: int) -> list[Record]:
    """The prompts of a split: every kind equally often, topics and wordings in turn."""
    draw = random.Random(f"{seed} {split}")
    wordings, per_kind = settings["wordings"][split], settings["prompts_per_kind"][split]
    topics, tasks = in_turn(settings["topics"][split], draw), in_turn(settings["tasks"], draw)
    prompts = []
    for kind, texts in wordings.items():
        turn, numbers = in_turn(texts, draw), in_turn(settings["numbers"][split], draw)
        for number in range(per_kind):
            topic, likely, fitting = (part.strip() for part in next(topics).split("|"))
            fields = {"n": next(numbers), "w": fitting if "existence" in kind else likely}
            wording = next(turn)
            instruction = wording.format(task=next(tasks).format(topic=topic), **fields)
            prompts.append({"id": f"{split}-{kind.split(':')[1]}-{number:02}",
                            "instruction": instruction,
                            "constraints": [constraint(kind, **fields)]})
    return prompts


def make_instructions(settings: dict, seed: int) -> list[Record]:
    """More prompts of train's topics and wordings, for the online loop, which answers them anew."""
    prompts = make_prompts({**settings, "prompts_per_kind": settings["instructions_per_kind"]},
                           "train", seed + 2)
    distinct = {prompt["instruction"]: prompt for prompt in prompts}
    return [{**prompt, "id": prompt["id"].replace("train", "online", 1)}
            for prompt in distinct.values()]


def constraint(kind: str, n: int, w: str) -> dict:
    """A constraint as IFEval's checkers take it."""
    kwargs = {"length_constraints:number_words": {"num_words": n + 1, "relation": "less than"},
              "punctuation:no_comma": {},
              "keywords:forbidden_words": {"forbidden_words": [w]},
              "keywords:existence": {"keywords": [w]}}
    return {"kind": kind, "kwargs": kwargs[kind]}


def in_turn(items: list, draw: random.Random):
    """Endless: all items in random order, then all in another order ..."""
    while True:
        yield from draw.sample(items, len(items))


class Answerer:
    """The base model's answers, each kept in a file as soon as it is there."""

    def __init__(self, base_model: str, work: Path, max_new_tokens: int, seed: int):
        self.base_model, self.work, self.seed = base_model, work, seed
        self.max_new_tokens, self._loaded = max_new_tokens, None

    def sample(self, prompts: list[Record], samples: int, temperature: float,
               top_p: float) -> list[list[dict]]:
        """`samples` answers to each prompt; asking for more later keeps those that are there."""
        answers = self._answers([prompt["instruction"] for prompt in prompts], samples,
                                temperature=temperature, top_p=top_p)
        return [answers[start::len(prompts)] for start in range(len(prompts))]

    def greedy(self, prompts: list[Record]) -> list[dict]:
        """The one answer to each prompt that decides the headline."""
        return self._answers([prompt["instruction"] for prompt in prompts], 1, temperature=0.0,
                             top_p=1.0)

    def tokenizer(self):
        """The base model's tokenizer."""
        from lm.models import load_tokenizer

        return load_tokenizer(self.base_model)

    def _answers(self, instructions: list[str], rounds: int, **sampling) -> list[dict]:
        """First one answer to every instruction, then a second one to every instruction ..."""
        from tqdm import tqdm

        total = rounds * len(instructions)
        file, known = self._known(instructions, sampling)
        with open(file, "a", encoding="utf-8") as out, \
                tqdm(total=total, initial=min(len(known), total), desc=file.stem) as progress:
            for start in range(0, total, len(instructions)):
                wanted = {index: instruction for index, instruction
                          in enumerate(instructions, start) if index not in known}
                for answer in self._generate(wanted, sampling):
                    known[answer["index"]] = answer
                    out.write(json.dumps(answer) + "\n")
                    out.flush()
                    progress.update()
        return [known[index] for index in range(total)]

    def _generate(self, instructions: dict[int, str], sampling: dict):
        from lm.generation import generate
        from lm.templates import load_template

        if not instructions:
            return
        render = load_template("alpaca").render
        answers = generate(self._model(), self.tokenizer(),
                           {index: render(text) for index, text in instructions.items()},
                           max_new_tokens=self.max_new_tokens, token_budget=8192,
                           seed=self.seed, **sampling)
        for index, answer in answers:
            yield {"index": index, "text": answer.text, "tokens": len(answer.token_ids),
                   "whole": answer.finish_reason == "stop"}

    def _known(self, instructions: list[str], sampling: dict) -> tuple[Path, dict[int, dict]]:
        """The file for exactly these questions and settings, and the answers in it."""
        settings = [Path(self.base_model).name, self.seed, self.max_new_tokens, sampling]
        question = json.dumps([instructions, settings], sort_keys=True).encode()
        name = "samples" if sampling["temperature"] else "greedy"
        file = self.work / f"{name}-{hashlib.sha256(question).hexdigest()[:12]}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.exists() and file.stat().st_size
        return file, {answer["index"]: answer for answer in read_records(file)} if there else {}

    def _model(self):
        from lm.models import load_model

        if self._loaded is None:
            self._loaded = load_model(self.base_model, load_in="fp32")
        return self._loaded


def judge_pool(prompts: list[Record], sampled: list[list[dict]], settings: dict,
               seed: int) -> list[dict]:
    """Every sampled answer with its judgment, and whether it is fit for training."""
    stems = stems_of(settings["topics"]["train"])
    pool = []
    for prompt, answers in zip(prompts, sampled, strict=True):
        topic = topic_of(prompt, stems)
        for number, answer in enumerate(answers):
            text = first_paragraph(answer["text"])
            ended = answer["whole"] or text != answer["text"].strip()
            pool.append({**prompt, "id": f"{prompt['id']}-{number}", "output": text,
                         "judgment": judge_by_rules(prompt, text, seed),
                         "sample_satisfies": all(satisfied(prompt["constraints"],
                                                           answer["text"])),
                         "decent": ended and is_decent(text, stems[topic])})
    return pool


def first_paragraph(text: str) -> str:
    """What stands before the first line break: the model seldom has more to say after it."""
    return text.strip().split("\n")[0].strip()


def is_decent(text: str, stems: set[str]) -> bool:
    """A plain sentence or more, on the topic, that does not talk about the exercise."""
    words = re.findall(r"[a-z']+", text.lower())
    return (len(words) >= 6 and text[0].isupper() and text[-1] in ".!"
            and not NOT_DECENT.search(text) and len(set(words)) > 0.6 * len(words)
            and any(word[:4] in stems for word in words))


def stems_of(topics: list[str]) -> dict[str, set[str]]:
    """The lines of topics -> for each topic's name the beginnings of its words."""
    return {topic.split("|")[0].strip(): _stems(topic) for topic in topics}


def topic_of(prompt: Record, topics: Iterable[str]) -> str:
    """The name of the topic that a prompt is about."""
    return max((topic for topic in topics if topic in prompt["instruction"]), key=len)


def _stems(topic: str) -> set[str]:
    """Beginnings of the words of a topic's line; an answer with none of them is off the topic."""
    return {word[:4] for word in re.findall(r"[a-z]+", topic.lower())
            if len(word) > 2 and word not in COMMON}


def choose(pool: list[dict], per_kind: dict[str, int], seed: int) -> list[dict]:
    """Positives and negatives of each kind: prompts in turn, those that have both first."""
    draw = random.Random(seed)
    kinds = defaultdict(lambda: defaultdict(lambda: {"positive": [], "negative": []}))
    for entry in pool:
        if entry["decent"]:
            sign = "positive" if entry["judgment"] is None else "negative"
            of_prompt = kinds[entry["constraints"][0]["kind"]][entry["instruction"]][sign]
            if entry["output"] not in (other["output"] for other in of_prompt):
                of_prompt.append(entry)
    chosen = []
    for prompts in kinds.values():
        for sign, other in (("positive", "negative"), ("negative", "positive")):
            order = sorted(prompts.values(),
                           key=lambda answers: (not answers[other], draw.random()))
            most = max(len(answers[sign]) for answers in order)
            rounds = [answers[sign][turn] for turn in range(most) for answers in order
                      if turn < len(answers[sign])]
            chosen += rounds[:per_kind[sign]]
    draw.shuffle(chosen)
    return chosen


def train_record(entry: dict) -> Record:
    """A record as finetune_unlikelihood.py reads it, with the constraints beside it."""
    return {"id": entry["id"], "instruction": entry["instruction"], "input": "",
            "output": entry["output"], "judgment": entry["judgment"],
            "constraints": entry["constraints"]}


def report(pool: list[dict], chosen: list[dict], prompts: dict, greedy: dict,
           tokenizer) -> None:
    """Print what the base model satisfies and what was chosen."""
    rows = defaultdict(Counter)
    for entry in pool:
        for kind in (entry["constraints"][0]["kind"], "all"):
            rows[kind].update(samples=1, satisfied=entry["sample_satisfies"],
                              decent=entry["decent"])
    for entry in chosen:
        for kind in (entry["constraints"][0]["kind"], "all"):
            rows[kind]["negative" if entry["judgment"] else "positive"] += 1
    for split, answers in greedy.items():
        for prompt, answer in zip(prompts[split], answers, strict=True):
            for kind in (prompt["constraints"][0]["kind"], "all"):
                rows[kind][f"{split} prompts"] += 1
                rows[kind][split] += judge_by_rules(prompt, answer["text"]) is None
    print(f"{'kind':34}{'base, samples':>14}{'decent':>9}{'positives':>11}{'negatives':>11}"
          f"{'base, greedy: validation':>26}{'heldout':>12}")
    for kind, row in sorted(rows.items(), key=lambda item: item[0] == "all"):  # `all` comes last
        print(f"{kind:34}{_share(row['satisfied'], row['samples']):>14}"
              f"{_share(row['decent'], row['samples']):>9}{row['positive']:11}{row['negative']:11}"
              f"{_share(row['validation'], row['validation prompts']):>26}"
              f"{_share(row['heldout'], row['heldout prompts']):>12}")
    lengths = row_lengths(chosen, tokenizer)
    print(f"train: {len(chosen)} records, {len(lengths)} rows, {sum(lengths)} tokens, "
          f"{sum(lengths) / len(lengths):.0f} a row")


def row_lengths(chosen: list[dict], tokenizer) -> list[int]:
    """Tokens of every row that training makes of the records: two of a negative one."""
    from lm.templates import load_template, prompt_ids, response_ids

    template = load_template("alpaca")
    return [len(prompt_ids(tokenizer, template.render(entry["instruction"], judgment)))
            + len(response_ids(tokenizer, entry["output"]))
            for entry in chosen for judgment in {None, entry["judgment"]}]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


if __name__ == "__main__":
    run(main)
