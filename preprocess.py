"""Preference records -> examples -> rows, for JSFT and for self-training.

    python preprocess.py --config configs/uf_jsft_pr.yaml --show 3 \\
        model.pretrained_model_name_or_path=smollm2-135m-instruct dataset=records.jsonl

prints what the data came to, or with `--show` rendered examples of each kind, the tokens that are
learnt marked. A record is one of HH's `{chosen, rejected}` dialogues or one of UltraFeedback's
`{instruction, completions}`; the two are told apart by their fields.

The work is done by functions of `self_judge/data.py`, which can be imported from here too.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from lm.cli import run
from lm.models import load_tokenizer
from lm.terminal import printable, wants_colour
from self_judge.data import (
    MAX_LENGTH,
    jsft_examples,
    jsft_rows,
    judge_pairs_of,
    judgments,
    naming,
    read,
    self_judge_example,
    self_judge_rows,
)
from self_judge.preferences import DEFAULT, Found, Pair, found_in
from self_judge.preview import marked
from self_judge.rows import row_of
from self_judge.sources import Counts, has_split
from self_judge.templates import Templates, fill, judge_templates, load_templates

__all__ = ["found_in", "jsft_examples", "jsft_rows", "judge_pairs_of", "judgments",
           "self_judge_example", "self_judge_rows"]


def show_examples(config, tokenizer, number: int) -> None:
    """Print `number` examples of each kind, from the first records that have them."""
    templates = load_templates(config.templates)
    is_jsft = config.kind == "jsft"
    kinds = 2 if config.jsft_args.get("examples", "all") == "all" else 1
    judges = is_jsft and config.jsft_args.get("examples") != "sft"
    records = read(config, "train", templates, Counts(), None if judges else (DEFAULT,))
    shown: Counter = Counter()
    for name, sft_only, found in records:
        if is_jsft:
            samples = _jsft_samples(found, templates, tokenizer, config, sft_only, shown)
        else:
            samples = _self_judge_samples([] if sft_only else found.pairs, templates, tokenizer)
        with naming(name):
            for kind, title, text in samples:
                if shown[kind] < number:
                    shown[kind] += 1
                    print(f"--- {printable(f'{kind}, {name}{title}')}\n{text}\n")
        if shown and min(shown.values()) >= number and (not is_jsft or len(shown) == kinds):
            return


def _jsft_samples(found: Found, templates: Templates, tokenizer, config, sft_only: bool,
                  shown: Counter) -> Iterator[tuple[str, str, str]]:
    """Kind, title and text of the record's dialogue and of one of its judgments."""
    examples = jsft_examples(found, templates, sft_only, config.jsft_args.get("examples", "all"))
    judged = [example for example in examples if example["kind"] == "judgment"]
    # Three further each time: another order, and another principle where there are four
    turn = 3 * shown["judgment"] % len(judged) if judged else 0
    for example in examples[:len(examples) - len(judged)] + judged[turn:turn + 1]:
        row = row_of(example, templates, tokenizer, config.jsft_args.get("max_length", MAX_LENGTH))
        title = (f" ({example.get('principle', 'dialogue')}): {len(row['input_ids'])} tokens, "
                 f"{sum(row['completion_mask'])} learnt{', cut' if row['cut'] else ''}")
        yield example["kind"], title, marked(row, tokenizer, wants_colour())


def _self_judge_samples(pairs: Sequence[Pair], templates: Templates,
                        tokenizer) -> Iterator[tuple[str, str, str]]:
    """Kind, title and text of what the policy continues, of the pair, of what the judge reads."""
    for pair in pairs:
        example = self_judge_example(pair, templates, tokenizer)
        yield "query", ": what the policy continues", printable(example["query"])
        for key in ("chosen", "rejected"):
            yield key, ": for evaluation", printable(example[key])
        for principle, text in judge_templates(templates, tokenizer).items():
            prompt = fill(text, context=example["context"], response_a=example["chosen"],
                          response_b=example["rejected"])
            yield f"judge ({principle})", ": what the judge reads", printable(prompt)


def main(*overrides, config: str = "", show: int = 0, skip_bad: int = 0) -> None:
    """Show what a run's data comes to; dotted overrides of the config may follow.

    Args:
        overrides: Such as model.pretrained_model_name_or_path=smollm2-135m-instruct.
        config: The YAML of a JSFT or self-training run. Required.
        show: Print so many examples of each kind, the learnt tokens marked, instead of counts.
        skip_bad: Bad records that are left out and counted; one more is an error.
    """
    from self_judge.config import load_config

    settings = load_config(config, list(overrides))
    if skip_bad:
        given = settings.dataset
        settings.dataset = {**({"path": given} if isinstance(given, str) else given),
                            "skip_bad": skip_bad}
    tokenizer = load_tokenizer(settings.model["pretrained_model_name_or_path"])
    if show:
        return show_examples(settings, tokenizer, show)
    rows_of = jsft_rows if settings.kind == "jsft" else self_judge_rows
    for split in ("train", "eval"):
        if has_split(settings.dataset, split):
            rows = rows_of(settings, tokenizer, split)
            if settings.kind == "jsft" and len(rows):
                lengths = sorted(map(len, rows["input_ids"]))
                print(f"  {sum(lengths)} tokens; the middle row has {lengths[len(lengths) // 2]}, "
                      f"the longest {lengths[-1]}")


if __name__ == "__main__":
    run(main)
