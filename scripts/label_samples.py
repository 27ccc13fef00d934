"""Off-policy data: a model's own samples, judged by itself, of which some are learnt from.

    python scripts/label_samples.py --model runs/jsft --select rso --output_path runs/rso.jsonl \\
        --templates configs/templates/judge_sample.yaml --max_new_tokens 48 \\
        --data_path data/sample/preferences/train.jsonl
    python train_self_judge.py --config=configs/sample_self_judge.yaml dataset=runs/rso.jsonl \\
        model.pretrained_model_name_or_path=runs/jsft self_judge_args.pairs=given
    torchrun --nproc_per_node=8 scripts/label_samples.py ...  # a share of the prompts on each GPU

The methods, their rewards and what these cost are told in self_judge/off_policy.py. `--select rso`
writes preference pairs for `self_judge_args.pairs=given`, `raft` and `rest` write demonstrations
for `train_jsft.py ... jsft_args.examples=sft`. The records have the schema of the prompts', HH's or
UltraFeedback's, so that training reads the same prompts. (In a dialogue of several turns it learns
the earlier answers of a demonstration too, as JSFT does.)

Each sample and each verdict goes to a journal at once (--samples_path; further processes have their
own); after a stop, even a kill, the same command goes on where it was, with any number of
processes, and another --select asks for nothing twice.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import IO, TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.processes import is_first
from lm.records import (
    InputError,
    Record,
    join_input,
    listed,
    read_records,
    write_lines,
    wrong_field,
)
from self_judge.judged_samples import (
    check_flags,
    check_paths,
    in_parts,
    journal_of,
    messages_of,
    shared_out,
)
from self_judge.templates import TEMPLATES

if TYPE_CHECKING:
    from self_judge.judged_samples import Judge
    from self_judge.judgment import Judgment
    from self_judge.off_policy import Kept
    from self_judge.preferences import Message
    from self_judge.sources import BadRecords
    from self_judge.templates import Templates
    from self_judge.tournament import Match

SELECT = ("rso", "raft", "rest")
SPEAKERS = {"user": "Human", "assistant": "Assistant"}  # as HH writes them


def main(model: str, data_path: str, output_path: str, select: str, templates: str = TEMPLATES,
         num_samples: int = 8, opponents: int = 0, num_accepted: int = 0, beta: float = 0.125,
         thresholds: str = "0.6", samples_path: str = "", peft_model_path: str = "",
         temperature: float = 1.0, top_p: float = 0.9, max_new_tokens: int = 768,
         max_length: int = 2048, seed: int = 0, limit: int = 0, batch_tokens: int = 16384,
         load_in: str = "auto", overwrite: bool = False) -> None:
    """Sample, judge, and write what is learnt from: pairs (rso) or demonstrations (raft, rest).

    Args:
        model: Folder, Hub id, or smollm2-135m-instruct; also an adapter's folder, which is merged
            into its base.
        data_path: The prompts: JSON or JSON Lines file (.gz too), or a Hub dataset, of HH's or
            UltraFeedback's records, or with `instruction` (and `input`); or the YAML file of a
            run, for the records that it trains on.
        output_path: JSON Lines file to write.
        select: rso (statistical rejection sampling, then pairs), raft (best of num_samples by a
            tournament), or rest (every sample whose reward exceeds a threshold).
        templates: YAML file of a `templates` section, or one of a run that has it; that of the
            model's training.
        num_samples: Responses to each prompt.
        opponents: A sample's reward is the mean over its matches against so many of the prompt's
            samples, the first ones; 0 is all.
        num_accepted: Samples of a prompt that rso accepts, 0 is half of them; half as many are
            its pairs.
        beta: Of rso, in the rewards' unit, 0 to 1: small takes the best samples, large takes any.
        thresholds: Of rest, 0 to 1; 75% is the reward that at most a quarter of the samples
            exceeds.
            Several, rising, such as 0.5,0.6,0.7, are those of successive improve steps:
            OUTPUT.improve1, OUTPUT.improve2 ..., the last one in OUTPUT itself.
        samples_path: Journal of samples and verdicts, by default OUTPUT.samples.jsonl; several
            outputs may share one. It notes them, and no other file is replaced.
        peft_model_path: Adapter to merge into the model.
        temperature: Of the samples.
        top_p: Sample from the most probable tokens that hold this much probability.
        max_new_tokens: Longest response.
        max_length: Longest judge prompt in tokens; longer ones are cut, and counted.
        seed: Of the samples, and of what rso accepts and pairs.
        limit: Only the first so many prompts; 0 is all.
        batch_tokens: Tokens that a batch of samples may hold; lower it if memory is short.
        load_in: 8bit|4bit|bf16|fp16|fp32|checkpoint; auto is checkpoint on CUDA, fp32 on the CPU.
        overwrite: Start again even if there are samples.
    """
    from self_judge.base import find_base
    from self_judge.judged_samples import JudgedSamples
    from self_judge.off_policy import above, accepted_pairs, best_of, quantile, rewards_of
    from self_judge.templates import load_templates

    output = Path(output_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_flags(num_samples, temperature, top_p, max_new_tokens, batch_tokens)
    check_selection(select, num_samples, opponents, num_accepted, beta)
    levels, in_percent = levels_of(thresholds)
    outputs = improve_files(output, len(levels)) if select == "rest" else [output]
    journal = Path(samples_path) if samples_path else journal_of(output)
    check_paths(outputs, data_path=data_path, samples_path=journal)
    section = load_templates(templates)
    records, prompts = read_prompts(data_path, section, limit)
    base = find_base({"pretrained_model_name_or_path": model,
                      "peft_model_name_or_path": peft_model_path})
    source = JudgedSamples(
        base, load_in, prompts, section, num_samples=num_samples, max_length=max_length,
        batch_tokens=batch_tokens, temperature=temperature, top_p=top_p,
        max_new_tokens=max_new_tokens, seed=seed)

    def label(which: Sequence[int], lines: Sequence[Record], file: IO[str], quiet: bool) -> tuple:
        samples, responses, judge = source.of(which, lines, file, quiet)
        judged: dict[Match, Judgment] = {}
        judge = noting(judge, judged, quiet)
        if select == "raft":
            found = {output: (best_of(responses, judge), Counter())}
        else:
            scores = rewards_of(responses, opponents, judge)
            accepted = num_accepted or max(2, num_samples // 2)
            found = ({output: accepted_pairs(responses, scores, judge, accepted, beta,
                                             [f"{seed} rso {place}" for place in which])}
                     if select == "rso" else
                     {path: (above(scores, quantile(scores, level) if in_percent else level),
                             Counter()) for path, level in zip(outputs, levels, strict=True)})
        return samples, judged, found

    labelled = shared_out(label, source, outputs, journal, overwrite)
    if labelled is None:
        return
    samples, judged, found = labelled
    print("\n".join(summary(samples, judged)))
    for path, (kept, dropped) in found.items():
        rows = list(written(records, prompts, samples, kept, section.system, dropped))
        told = ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number)
        if not rows:
            raise InputError(f"{path}: nothing is left to learn from ({told or 'no reward is high'}"
                             "); try other --thresholds, --beta or --max_new_tokens, or more "
                             "--num_samples")
        write_lines(path, rows)
        print(f"{path}: {len(rows)} {'pairs' if select == 'rso' else 'demonstrations'}"
              f"{f'; left out: {told}' if told else ''}")


def check_selection(select: str, num_samples: int, opponents: int, num_accepted: int,
                    beta: float) -> None:
    """Stop at what cannot be meant."""
    if select not in SELECT:
        raise InputError(f"--select is {select!r}; expected one of {', '.join(SELECT)}")
    if num_samples < 2:
        raise InputError(f"--num_samples is {num_samples}; expected 2 or more, to compare them")
    if not 0 <= opponents <= num_samples:
        raise InputError(f"--opponents is {opponents}; expected 0 (all) to num_samples "
                         f"({num_samples})")
    if num_accepted and not 2 <= num_accepted <= num_samples:
        raise InputError(f"--num_accepted is {num_accepted}; expected 2 to num_samples "
                         f"({num_samples}), or 0 for half of them")
    if not beta > 0:
        raise InputError(f"--beta is {beta}; expected more than 0")


def levels_of(thresholds: str) -> tuple[list[float], bool]:
    """The thresholds of ReST as numbers, and whether they are per cent.

    >>> levels_of("0.5,0.6"), levels_of("50%,75%")
    (([0.5, 0.6], False), ([50.0, 75.0], True))
    """
    words = listed(thresholds)
    in_percent = all(word.endswith("%") for word in words)
    try:
        levels = [float(word.removesuffix("%") if in_percent else word) for word in words]
    except ValueError:
        levels = []
    most = 100 if in_percent else 1
    if not levels or levels != sorted(set(levels)) or not 0 <= levels[0] <= levels[-1] < most:
        raise InputError(f"--thresholds is {thresholds!r}; expected numbers from 0 to below 1, or "
                         "all in per cent such as 75%, rising, separated by commas")
    return levels, in_percent


def read_prompts(source: str, templates: "Templates",
                 limit: int) -> "tuple[list[Record], list[list[Message]]]":
    """Records and their turns before the answer, as self-training reads them.

    Those of which it would make no pair are left out, and told.
    """
    from self_judge.preferences import found_in

    if limit < 0:
        raise InputError(f"--limit is {limit}; expected 0 (all) or more")
    records, prompts, left_out = [], [], 0
    named, bad = read_source(source)
    for name, record in named:
        try:
            if {"completions", "chosen", "rejected"} & record.keys():
                pairs = found_in(record, system=templates.system).pairs
                prompt = pairs[0].prompt if pairs else None
            elif wrong := wrong_field(record, {"instruction": (str,)}, {"input": (str, NoneType)}):
                raise InputError(wrong)
            else:
                (prompt,) = messages_of([{"instruction": join_input(record)}], templates)
        except InputError as error:
            bad.skip(f"{name}: {error}")
            continue
        if prompt is None:
            left_out += 1
            continue
        records.append(record)
        prompts.append(prompt)
    for number, what in ((left_out, "records without a pair"),
                         (len(bad.messages), "bad records")):
        if number and is_first():
            print(f"{source}: {number} {what} left out, as in training")
    if not records:
        raise InputError(f"{source}: holds no prompt; expected HH's or UltraFeedback's fields, or "
                         "'instruction'")
    return records[:limit or None], prompts[:limit or None]


def read_source(source: str) -> "tuple[list[tuple[str, Record]], BadRecords]":
    """Name and contents of each record of a file, or of those that a run trains on.

    Of a run as many may be bad as its `skip_bad` says, of a file none.
    """
    from self_judge.config import load_config
    from self_judge.sources import BadRecords, records_of, settings_of

    if Path(source).suffix not in (".yaml", ".yml"):
        return [(f"{source}: record {index}", record)
                for index, record in enumerate(read_records(source))], BadRecords(0)
    config = load_config(source)
    bad = BadRecords(settings_of(config.dataset)["skip_bad"])
    return [(f"{origin}: record {index}", record)
            for origin, index, record in records_of(config.dataset, "train", config.seed, bad)
            if not origin.sft_only], bad


def noting(judge: "Judge", judged: "dict[Match, Judgment]", quiet: bool) -> "Judge":
    """The same judge under a progress bar; its verdicts are gathered in `judged`."""
    def judge_and_note(matches: "Sequence[Match]") -> "list[Judgment]":
        found = in_parts(judge, 0 if quiet else len(matches), False)(matches)
        judged.update(zip(matches, found, strict=True))
        return found

    return judge_and_note


def improve_files(output: Path, steps: int) -> list[Path]:
    """rest.jsonl -> rest.improve1.jsonl, rest.improve2.jsonl, rest.jsonl"""
    return [*(output.with_name(f"{output.stem}.improve{step}{output.suffix}")
              for step in range(1, steps)), output]


def written(records: Sequence[Record], prompts: "Sequence[Sequence[Message]]",
            samples: Sequence[Sequence[Record]], kept: "Sequence[Kept]", system: str,
            dropped: Counter) -> Iterator[Record]:
    """Records for training; counts in `dropped` what cannot be one.

    That is an answer that was cut, since training would teach to end where it was, and one that
    its record would not give back: an empty one, or one with HH's turn markers in it.
    """
    for place, learnt, *other in kept:
        of_prompt = samples[place]
        if of_prompt[learnt]["finish_reason"] == "length":
            dropped["cut at max_new_tokens"] += 1
            continue
        texts = [of_prompt[number]["output"] for number in (learnt, *other)]
        record = record_of(records[place], prompts[place], texts)
        if is_read_back(record, prompts[place], texts, system):
            yield record
        else:
            dropped["empty or with turn markers"] += 1


def record_of(record: Record, prompt: "Sequence[Message]", texts: Sequence[str]) -> Record:
    """A pair (two texts, the better one first) or a demonstration in the schema of its prompt."""
    named = {"id": record["id"]} if "id" in record else {}
    if "chosen" in record:
        start = "".join(f"\n\n{SPEAKERS[turn['role']]}: {turn['content']}" for turn in prompt
                        if turn["role"] in SPEAKERS) + "\n\nAssistant: "
        return named | {"chosen": start + texts[0], "rejected": start + texts[-1]}
    system = prompt[0]["content"] if prompt[0]["role"] == "system" else ""
    return named | {"instruction": prompt[-1]["content"], "completions": [
        {"response": text, "custom_system_prompt": system,
         "annotations": {"self_judgment": {"Rating": str(rating)}}}
        for text, rating in zip(texts, (1, 0), strict=False)]}


def is_read_back(record: Mapping, prompt: "Sequence[Message]", texts: Sequence[str],
                 system: str) -> bool:
    """Whether training finds the prompt and the answers in the record."""
    from self_judge.preferences import found_in

    found = found_in(record, system=system)
    pairs = [(list(prompt), *texts)] if len(texts) == 2 else []
    return (found.dialogue == [*prompt, {"role": "assistant", "content": texts[0]}]
            and [(pair.prompt, pair.chosen, pair.rejected) for pair in found.pairs] == pairs)


def summary(samples: Sequence[Sequence[Record]],
            judged: "Mapping[Match, Judgment]") -> Iterator[str]:
    """What was sampled and judged."""
    cut = sum(line["finish_reason"] == "length" for of_prompt in samples for line in of_prompt)
    yield (f"{len(samples)} prompts, {sum(map(len, samples))} samples, {cut} of them cut at "
           "max_new_tokens")
    yield (f"{len(judged)} matches judged: "
           f"{sum(one.winner is None for one in judged.values())} ties, "
           f"{sum(not one.consistent for one in judged.values())} whose two orders disagree, "
           f"{sum(one.cut for one in judged.values())} cut to fit max_length")


if __name__ == "__main__":
    run(main)
