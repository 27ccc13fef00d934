"""Preference records -> examples -> rows: the data of a run, as its config names it.

Unlike the released code: HH dialogues are split at the turn markers only; what is drawn follows
from the seed and the record alone; completions without a rating are left out; one principle's
missing ratings, rationales or system prompts are no error; and all that is left out is counted.
"""

import contextlib
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lm.processes import is_first
from lm.records import InputError
from self_judge.preferences import DEFAULT, Found, Pair, found_in
from self_judge.rows import row_of
from self_judge.sources import BadRecords, Counts, records_of, settings_of
from self_judge.templates import Templates, chat_text, load_templates

if TYPE_CHECKING:
    from datasets import Dataset

MAX_LENGTH = 2048
EVALUATION = re.compile(r"\{evaluation_[ab]\}")

Example = dict


# --- pairs -> examples ----------------------------------------------------------------------


def jsft_examples(found: Found, templates: Templates, sft_only: bool = False,
                  wanted: str = "all") -> list[Example]:
    """The SFT example of a record, then its judgments, each pair in both orders.

    `wanted` can leave out one kind: all, sft or judge.
    """
    examples = []
    if found.dialogue and wanted != "judge":
        examples.append({"kind": "sft", "messages": found.dialogue})
    if not sft_only and wanted != "sft":
        examples += [example for pair in found.pairs for example in judgments(pair, templates)]
    return examples


def judgments(pair: Pair, templates: Templates) -> list[Example]:
    """A pair in both orders: first the better answer as A, then as B."""
    texts, evaluations = (pair.chosen, pair.rejected), pair.evaluations
    examples = []
    for decision, step in (("A", 1), ("B", -1)):
        rationale = _rationale(templates, *evaluations[::step]) if evaluations else ""
        response_a, response_b = texts[::step]
        examples.append({"kind": "judgment", "principle": pair.principle, "context": pair.context,
                         "response_a": response_a, "response_b": response_b,
                         "decision": decision, "rationale": rationale})
    return examples


def _rationale(templates: Templates, evaluation_a: str, evaluation_b: str) -> str:
    fields = {"{evaluation_a}": evaluation_a, "{evaluation_b}": evaluation_b}
    return EVALUATION.sub(lambda match: fields[match[0]], templates.rationale)


def self_judge_example(pair: Pair, templates: Templates, tokenizer) -> Example:
    """What self-training takes: the prompt as the policy and as the judge read it, and the pair."""
    query = chat_text(templates, tokenizer, pair.prompt, add_generation_prompt=True)
    return {"query": query, "context": pair.context, "chosen": pair.chosen,
            "rejected": pair.rejected}


# --- a run's data ---------------------------------------------------------------------------


def jsft_rows(config, tokenizer, split: str = "train") -> "Dataset":
    """The rows of a JSFT run: input_ids, completion_mask and kind, in the order of the records."""
    from datasets import Dataset, Features, List, Value

    templates = load_templates(config.templates)
    counts, names, texts = Counts(), [], []
    wanted = config.jsft_args.get("examples", "all")
    principles = (DEFAULT,) if wanted == "sft" else None
    for name, sft_only, found in read(config, split, templates, counts, principles):
        for example in jsft_examples(found, templates, sft_only, wanted):
            counts.add(Counter(sft=example["kind"] == "sft"))
            names.append(name)
            texts.append(json.dumps(example))  # one column for all kinds
    _check_any(texts, split)
    examples = Dataset.from_dict({"record": names, "example": texts})
    processes = min(settings_of(config.dataset)["num_proc"], len(examples))
    rows = examples.map(
        _row, remove_columns=examples.column_names, num_proc=processes if processes > 1 else None,
        fn_kwargs={"templates": templates, "tokenizer": tokenizer,
                   "max_length": config.jsft_args.get("max_length", MAX_LENGTH)},
        features=Features({"input_ids": List(Value("int32")),
                           "completion_mask": List(Value("int8")),
                           "kind": Value("string"), "cut": Value("bool"),
                           "learnt": Value("bool")}), desc=f"tokenize {split}")
    learnt = [place for place, is_learnt in enumerate(rows["learnt"]) if is_learnt]
    counts.add(Counter(cut=sum(rows["cut"]), unlearnt=len(rows) - len(learnt)))
    _report(split, counts, len(learnt))
    return rows.select(learnt).select_columns(["input_ids", "completion_mask", "kind"])


def self_judge_rows(config, tokenizer, split: str = "train") -> "Dataset":
    """The rows of a self-training run: query, context, chosen and rejected, all texts."""
    from datasets import Dataset

    templates = load_templates(config.templates)
    counts, examples = Counts(), []
    for name, sft_only, found in read(config, split, templates, counts, (DEFAULT,)):
        with naming(name):
            examples += [self_judge_example(pair, templates, tokenizer) for pair in found.pairs
                         if not sft_only]
    _check_any(examples, split)
    _report(split, counts, len(examples))
    return Dataset.from_list(examples)


def judge_pairs_of(config, split: str = "eval") -> list[dict[str, str]]:
    """Pairs to measure a judge on: context, chosen, rejected, and the principle if there is one."""
    templates = load_templates(config.templates)
    return [{"context": pair.context, "chosen": pair.chosen, "rejected": pair.rejected}
            | ({} if pair.principle == DEFAULT else {"principle": pair.principle})
            for _, sft_only, found in read(config, split, templates, Counts())
            for pair in found.pairs if not sft_only]


def read(config, split: str, templates: Templates, counts: Counts,
         principles: Sequence[str] | None = None) -> Iterator[tuple[str, bool, Found]]:
    """Name, whether for SFT only, and contents of each record of a split; fills `counts`."""
    principles = tuple(templates.judge) if principles is None else principles
    bad = BadRecords(settings_of(config.dataset)["skip_bad"])
    known: set[str] = set()
    for source, index, record in records_of(config.dataset, split, config.seed, bad):
        name = f"{source}: record {index}"
        try:
            found = found_in(record, principles, rationales=bool(templates.rationale),
                             system=templates.system, seed=config.seed)
        except InputError as error:
            bad.skip(f"{name}: {error}")
            continue
        known |= found.principles
        counts.add(found.notes + Counter(records=1,
                                         pairs=0 if source.sft_only else len(found.pairs)))
        yield name, source.sft_only, found
    counts.add(Counter(bad=len(bad.messages)))
    for principle in sorted(set(principles) - known - {DEFAULT}):
        nearest = difflib.get_close_matches(principle, known, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise InputError(f"templates.judge names the principle {principle!r}, by which no record "
                         f"is annotated{hint}")


def _row(columns: Mapping[str, str], templates: Templates, tokenizer, max_length: int) -> dict:
    example = json.loads(columns["example"])
    with naming(columns["record"]):
        row = row_of(example, templates, tokenizer, max_length)
    return row | {"kind": example["kind"], "learnt": any(row["completion_mask"])}


@contextlib.contextmanager
def naming(record: str) -> Iterator[None]:
    """Errors tell the record in which they came up."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{record}: {error}") from error


def _check_any(examples: Sequence, split: str) -> None:
    if not examples:
        raise InputError(f"dataset: no record of the split {split!r} gives an example; "
                         "expected HH's or UltraFeedback's fields, with two unlike answers")


def _report(split: str, counts: Counts, rows: int) -> None:
    if is_first():
        print(f"{split} data: {counts}; {rows} rows")
