"""How good a judge is a model? Accuracy and biases on pairs whose better response is known.

    python scripts/evaluate_judge.py --model runs/hh_jsft \\
        --pairs data/sample/preferences/heldout.jsonl
    python scripts/evaluate_judge.py --model Qwen/Qwen2.5-7B-Instruct --pairs pairs.jsonl \\
        --templates configs/templates/chat_judge.yaml --output audit.json

Any chat model can be asked, trained as a judge or not. Pairs are records `{context or instruction,
chosen, rejected, principle?}`, or preference records of HH's or UltraFeedback's schema. Each pair
is judged in both orders: no money; 1000 pairs by a 7B model, 5 minutes on one H100 (an estimate).
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.models import load_tokenizer, precision
from lm.records import InputError, Record, read_records, write_json, wrong_field
from lm.shares import Share
from lm.tables import table
from self_judge.templates import TEMPLATES

if TYPE_CHECKING:
    from self_judge.judgment import Judgment, Pair
    from self_judge.templates import Templates

MEANINGS = {
    "accuracy": "accuracy (a tie counts one half)",
    "consistency": "both orders choose the same response",
    "chose_first": "chose the response shown first (unbiased: 50)",
    "chose_longer": "chose the longer response",
    "longer_is_better": "the longer response is the better one",
    "accuracy_longer": "accuracy where the better one is longer",
    "accuracy_shorter": "accuracy where the better one is shorter",
    "ties": "ties",
    "identical": "pairs of one text twice",
    "cut": "pairs cut to fit",
}


def main(model: str, pairs: str, templates: str = TEMPLATES, peft_model_path: str = "",
         output: str = "", limit: int = 0, max_length: int = 2048, batch_tokens: int = 0,
         load_in: str = "auto", seed: int = 42) -> None:
    """Print a table of a judge's accuracy, consistency and biases, with 95 % intervals.

    Args:
        model: Folder, Hub id, or smollm2-135m-instruct; also an adapter's folder, which is merged
            into its base.
        pairs: JSON or JSON Lines file (.gz too), or a Hub dataset; or the YAML file of a run, for
            the pairs that it evaluates on.
        templates: YAML file of a `templates` section, or one of a run that has it.
        peft_model_path: Adapter to merge into the model.
        output: JSON file for the numbers and every judgment; none if empty.
        limit: Only the first so many pairs; 0 is all.
        max_length: Longest prompt in tokens; longer ones are cut, and counted.
        batch_tokens: Tokens of one forward pass; 0 is 512 on a CPU, 4096 on a GPU.
        load_in: 8bit|4bit|bf16|fp16|fp32|checkpoint; auto is checkpoint on CUDA, fp32 on the CPU.
        seed: Of the pairs that are drawn from UltraFeedback records, as in training.
    """
    from self_judge.base import find_base, load_base
    from self_judge.judgment import judge_preferences
    from self_judge.templates import asked_of, load_templates

    if limit < 0 or batch_tokens < 0:
        raise InputError(f"--limit {limit} and --batch_tokens {batch_tokens} must be 0 or more")
    section = load_templates(templates)
    preferences = read_pairs(pairs, section, seed)[:limit or None]
    for index, pair in enumerate(preferences):
        if pair.get("principle") not in (None, *section.judge):
            raise InputError(f"{pairs}: pair {index}: principle {pair['principle']!r} has no judge "
                             f"template in {templates}, which has {', '.join(section.judge)}; "
                             "give --templates that have it, or leave `principle` out")
    if output:
        check_writable(Path(output))
    base = find_base({"pretrained_model_name_or_path": model,
                      "peft_model_name_or_path": peft_model_path})
    tokenizer = load_tokenizer(base.model)
    asked = asked_of(section, tokenizer)
    judge = load_base(base, precision(load_in))
    judged = judge_preferences(judge, tokenizer, preferences, **asked, max_length=max_length,
                               token_budget=batch_tokens or None, progress=True)
    groups = grouped(preferences, *judged)
    print("\n".join(report(str(base), groups)))
    if output:
        write_json(output, results(str(base), pairs, preferences, judged[0], groups))
        print(f"\nwritten: {output}")


def check_writable(output: Path) -> None:
    """Stop before hours of judging whose result could not be kept."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror}); choose "
                         "another") from error
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; give a file's name")


def read_pairs(source: str, templates: "Templates", seed: int = 42) -> list[Record]:
    """Records {context, chosen, rejected, principle?} from a file of any of the three schemas."""
    from self_judge.preferences import DEFAULT, context_text, found_in

    if Path(source).suffix in (".yaml", ".yml"):
        from self_judge.config import load_config
        from self_judge.data import judge_pairs_of

        return judge_pairs_of(load_config(source))
    records = read_records(source)
    pairs, left_out = [], 0
    for index, record in enumerate(records):
        if "completions" not in record and ("context" in record or "instruction" in record):
            text = "context" if "context" in record else "instruction"
            if wrong := wrong_field(record, {text: (str,), "chosen": (str,), "rejected": (str,)},
                                    {"principle": (str, NoneType)}):
                raise InputError(f"{source}: record {index}: {wrong}")
            context = record[text] if text == "context" else context_text(
                [{"role": "user", "content": record[text]}])
            pairs.append({"context": context, **{
                name: record[name] for name in ("chosen", "rejected", "principle")
                if record.get(name) is not None}})
            continue
        rated = "completions" in record  # by principle; of two dialogues all principles vote
        try:
            found = found_in(record, tuple(templates.judge) if rated else (DEFAULT,),
                             system=templates.system, seed=seed)
        except InputError as error:
            raise InputError(f"{source}: record {index}: {error}") from error
        left_out += not found.pairs
        pairs += [{"context": pair.context, "chosen": pair.chosen, "rejected": pair.rejected}
                  | ({} if pair.principle == DEFAULT else {"principle": pair.principle})
                  for pair in found.pairs]
    if left_out:
        print(f"{source}: {left_out} of {len(records)} records hold no pair")
    if not pairs:
        raise InputError(f"{source}: holds no pair; expected 'chosen' and 'rejected' with "
                         "'context' or 'instruction', or HH's or UltraFeedback's fields")
    return pairs


def grouped(preferences: Sequence[Record], judgments: Sequence["Judgment"],
            pairs: Sequence["Pair"]) -> dict[str, dict[str, Share]]:
    """The shares of all pairs, then those of each principle, if pairs have one."""
    from self_judge.judgment import judge_metrics

    found = {"all": judge_metrics(judgments, pairs)}
    for principle in sorted({record["principle"] for record in preferences
                             if "principle" in record}):
        of_it = [place for place, record in enumerate(preferences)
                 if record.get("principle") == principle]
        found[principle] = judge_metrics([judgments[place] for place in of_it],
                                         [pairs[place] for place in of_it])
    return found


def report(model: str, groups: dict[str, dict[str, Share]]) -> list[str]:
    """What is printed."""
    shares = groups["all"]
    lines = [f"{model}, {shares['accuracy'].total} pairs", "",
             table(["", "of", "share, %", "95 % interval"], [
                 [MEANINGS[name], str(share.total), f"{100 * share.share:.1f}",
                  f"{100 * share.low:.1f} to {100 * share.high:.1f}"]
                 for name, share in shares.items()])]
    if len(groups) > 1:
        lines += ["", table(["accuracy by principle", "of", "share, %", "95 % interval"], [
            [name, str(share.total), f"{100 * share.share:.1f}",
             f"{100 * share.low:.1f} to {100 * share.high:.1f}"]
            for name, shares in groups.items() if name != "all"
            for share in [shares["accuracy"]]])]
    return lines


def results(model: str, source: str, preferences: Sequence[Record],
            judgments: Sequence["Judgment"], groups: dict[str, dict[str, Share]]) -> dict:
    """All that was printed and every judgment, for other programs."""
    return {
        "benchmark": "judge", "model": model, "pairs": source,
        "verdicts": Counter({"A": "chosen", "B": "rejected", None: "tie"}[judgment.winner]
                            for judgment in judgments),
        "metrics": {name: {metric: asdict(share) for metric, share in shares.items()}
                    for name, shares in groups.items()},
        "judgments": [{**record, **asdict(judgment), "margin": judgment.margin,
                       "probabilities": {name: found._asdict() for name, found
                                         in judgment.probabilities.items()}}
                      for record, judgment in zip(preferences, judgments, strict=True)],
    }


if __name__ == "__main__":
    run(main)
