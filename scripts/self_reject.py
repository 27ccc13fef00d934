"""Self-rejection: sample N responses to each prompt, keep the one that the model judges best.

    python scripts/self_reject.py --model runs/hh_self_judge --output_path runs/hh/winners.json
    python scripts/self_reject.py --model runs/jsft --output_path runs/winners.json \\
        --templates configs/templates/judge_sample.yaml --data_path data/sample/heldout.jsonl \\
        --num_samples 8 --nested 1,2,4 --max_new_tokens 48

The responses of a prompt meet in a knock-out (self_judge/tournament.py) that the model itself
judges; the winners are written in AlpacaEval's format. The model reads the prompts as the templates
of its training write them, so `--num_samples 1 --temperature 0` is how it answers greedily.

    torchrun --nproc_per_node=8 scripts/self_reject.py ...  # a share of the prompts on each GPU

Each sample and each verdict goes to OUTPUT.samples.jsonl at once (of further processes, to
OUTPUT.samples.process1.jsonl and so on); after a stop, even a kill, the same command goes on where
it was, with any number of processes. The file stays: more `--nested` sizes cost what is new in
them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.models import resolve_model
from lm.records import InputError, Record, listed, write_json
from lm.tables import table
from scripts.generate import ALPACA_EVAL, answers, load_prompts
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
    from self_judge.tournament import Bracket, Game


def main(model: str, output_path: str, templates: str = TEMPLATES, data_path: str = ALPACA_EVAL,
         peft_model_path: str = "", num_samples: int = 16, nested: str = "",
         temperature: float = 1.0, top_p: float = 0.9, max_new_tokens: int = 768,
         max_length: int = 2048, seed: int = 0, limit: int = 0, batch_tokens: int = 16384,
         load_in: str = "auto", generator: str = "", brackets: str = "",
         overwrite: bool = False) -> None:
    """Write the winners of a tournament among each prompt's samples.

    Args:
        model: Folder, Hub id, or smollm2-135m-instruct; also an adapter's folder, which is merged
            into its base.
        output_path: JSON file of the winners, one record a prompt.
        templates: YAML file of a `templates` section, or one of a run that has it; that of the
            model's training.
        data_path: JSON or JSON Lines file with `instruction` (and `input`), or a Hub dataset.
        peft_model_path: Adapter to merge into the model.
        num_samples: Responses to each prompt; so many less one are the matches.
        nested: Sizes such as 1,2,4,8: also write the winners among the first so many samples, to
            OUTPUT.n1.json, OUTPUT.n2.json ... Where these and num_samples are powers of two, they
            need no further match.
        temperature: Of the samples; 0, with one sample, is greedy.
        top_p: Sample from the most probable tokens that hold this much probability.
        max_new_tokens: Longest response.
        max_length: Longest judge prompt in tokens; longer ones are cut, and counted.
        seed: Of the samples, which do not depend on batches, stops or num_samples.
        limit: Only the first so many prompts; 0 is all.
        batch_tokens: Tokens that a batch of samples may hold; lower it if memory is short.
        load_in: 8bit|4bit|bf16|fp16|fp32|checkpoint; auto is checkpoint on CUDA, fp32 on the CPU.
        generator: Name of the model in the output, by default its folder's; nested files add
            their size to it.
        brackets: JSON file for every sample, and every match with its margin; none if empty.
        overwrite: Start again even if there are samples.
    """
    from self_judge.base import find_base
    from self_judge.judged_samples import JudgedSamples
    from self_judge.templates import load_templates

    output = Path(output_path)
    sizes = sizes_of(nested, num_samples)
    outputs = [*(nested_file(output, size) for size in sizes), output]
    check_paths(outputs, data_path=data_path)
    check_flags(num_samples, temperature, top_p, max_new_tokens, batch_tokens)
    section = load_templates(templates)
    records = load_prompts(data_path, limit)
    base = find_base({"pretrained_model_name_or_path": model,
                      "peft_model_name_or_path": peft_model_path})
    judged = JudgedSamples(
        base, load_in, messages_of(records, section), section, num_samples=num_samples,
        max_length=max_length, batch_tokens=batch_tokens, temperature=temperature, top_p=top_p,
        max_new_tokens=max_new_tokens, seed=seed)

    def play(which: Sequence[int], lines: Sequence[Record], file: IO[str], quiet: bool) -> tuple:
        samples, responses, judge = judged.of(which, lines, file, quiet)
        return samples, responses, tournaments(responses, {num_samples, *sizes}, judge, quiet)

    found = shared_out(play, judged, outputs, journal_of(output), overwrite)
    if found is None:
        return
    samples, responses, played = found
    name = generator or Path((base.adapters or [resolve_model(base.model)])[-1]).resolve().name
    written = list(zip((*sizes, num_samples), outputs,
                       (*(f"{name}-n{size}" for size in sizes), name), strict=True))
    for size, path, label in written:
        write_json(path, answers(records, winners(responses, played[size]), label))
    if brackets:
        write_json(brackets, list(told(records, responses, played[num_samples])))
    print("\n".join(summary(samples, responses, played, written)))


def sizes_of(nested: str, num_samples: int) -> list[int]:
    """The tournaments' sizes that --nested lists."""
    sizes = [int(size) if size.isdecimal() else 0 for size in listed(nested)]
    if not all(1 <= size <= num_samples for size in sizes):
        raise InputError(f"--nested is {nested!r}; expected numbers from 1 to num_samples "
                         f"({num_samples}), separated by commas")
    return sorted(set(sizes))


def tournaments(responses: Sequence[Sequence[str]], sizes: set[int], judge: "Judge",
                quiet: bool = False) -> "dict[int, list[Bracket]]":
    """By its size, the tournament of the first so many responses to each prompt, in their order."""
    from self_judge.tournament import knockout

    return {size: knockout([texts[:size] for texts in responses],
                           in_parts(judge, 0 if quiet else len(responses) * (size - 1),
                                    size == max(sizes)),
                           seed=None)
            for size in sorted(sizes, reverse=True)}


def nested_file(output: Path, size: int) -> Path:
    """winners.json -> winners.n4.json"""
    return output.with_name(f"{output.stem}.n{size}{output.suffix}")


def winners(responses: Sequence[Sequence[str]], played: Sequence["Bracket"]) -> list[str]:
    return [texts[bracket.winner] for texts, bracket in zip(responses, played, strict=True)]


def games(played: Sequence["Bracket"]) -> "list[Game]":
    return [game for bracket in played for games in bracket.rounds for game in games]


def told(records: Sequence[Record], responses: Sequence[Sequence[str]],
         played: Sequence["Bracket"]) -> Iterator[Record]:
    """Each prompt's samples and matches; these name the samples by their places."""
    for record, texts, bracket in zip(records, responses, played, strict=True):
        yield {"instruction": record["instruction"], "samples": texts, "winner": bracket.winner,
               "rounds": [[{"a": game.a, "b": game.b, "winner": game.winner,
                            "margin": game.judgment.margin, "tie": game.judgment.winner is None,
                            "consistent": game.judgment.consistent} for game in games]
                          for games in bracket.rounds]}


def summary(samples: Sequence[Sequence[Record]], responses: Sequence[Sequence[str]],
            played: Mapping[int, Sequence["Bracket"]],
            written: Sequence[tuple[int, Path, str]]) -> Iterator[str]:
    """What is printed at the end."""
    lines = [line for of_prompt in samples for line in of_prompt]
    cut = sum(line["finish_reason"] == "length" for line in lines)
    yield f"{len(samples)} prompts, {len(lines)} samples, {cut} of them cut at max_new_tokens"
    judgments = [game.judgment for game in games(played[max(played)])]
    if judgments:
        yield (f"{len(judgments)} matches: "
               f"{sum(one.winner is None for one in judgments)} ties, "
               f"{sum(not one.consistent for one in judgments)} whose two orders disagree, "
               f"{sum(one.cut for one in judgments)} cut to fit max_length")
    rows = []
    for size, path, _ in written:
        lengths = list(map(len, winners(responses, played[size])))
        rows.append([f"best of {size}", f"{sum(lengths) / len(lengths):.0f}", str(path)])
    yield table(["winners", "mean characters", "file"], rows)


if __name__ == "__main__":
    run(main)
