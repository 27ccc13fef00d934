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

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.journal import append, digest, open_journal, read_journal
from lm.models import load_tokenizer, precision, resolve_model
from lm.processes import discard_parts, launched, merge_parts, part_of, read_parts, share, wait
from lm.records import InputError, Record, write_json
from lm.tables import table
from scripts.evaluate_judge import TEMPLATES
from scripts.generate import ALPACA_EVAL, answers, fingerprint, load_prompts

if TYPE_CHECKING:
    from self_judge.base import Base
    from self_judge.judgment import Judgment
    from self_judge.preferences import Message
    from self_judge.templates import Templates
    from self_judge.tournament import Bracket, Game, Match

    Judge = Callable[[Sequence[Match]], list[Judgment]]

PART = 32  # matches judged together: what a kill costs, and still some full batches on a GPU


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
    from self_judge.base import find_base, load_base
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
    tokenizer = load_tokenizer(base.model)
    queries, contexts = rendered(messages_of(records, section), section, tokenizer)
    asked = judge_settings(section, tokenizer, max_length, num_samples)
    sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens,
                "seed": seed}
    settings = {
        **model_settings(base), "load_in": load_in, "prompts": digest(queries),
        "judge": digest(asked), "num_samples": num_samples, **sampling}
    load = functools.cache(lambda: load_base(base, precision(load_in)))  # if anything is left to do

    def play(which: Sequence[int], lines: Sequence[Record], file: IO[str], quiet: bool) -> tuple:
        samples = sampled(load, tokenizer, {place: queries[place] for place in which},
                          num_samples, lines, file, quiet, **sampling, token_budget=batch_tokens)
        responses = [[line["output"] for line in of_prompt] for of_prompt in samples]
        judge = referee(load, tokenizer, {place: contexts[place] for place in which}, responses,
                        lines, file, asked)
        return samples, responses, tournaments(responses, {num_samples, *sizes}, judge, quiet)

    found = shared_out(play, queries, outputs, journal_of(output), settings, overwrite)
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
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in nested.split(",") if nested]
    if not all(1 <= size <= num_samples for size in sizes):
        raise InputError(f"--nested is {nested!r}; expected numbers from 1 to num_samples "
                         f"({num_samples}), separated by commas")
    return sorted(set(sizes))


def check_paths(outputs: Sequence[Path], **others: str | Path) -> None:
    """Stop at an output that is another flag's file as well."""
    for path in outputs:
        for flag, other in others.items():
            if path.resolve() == Path(other).resolve():
                raise InputError(f"{path}: is to be written, and is --{flag}; choose another "
                                 "--output_path, so that both are kept")


def check_flags(num_samples: int, temperature: float, top_p: float, max_new_tokens: int,
                batch_tokens: int) -> None:
    """Stop at numbers that cannot be meant."""
    from lm.generation import check_sampling

    check_sampling(max_new_tokens, batch_tokens, temperature, top_p)
    if num_samples < 1:
        raise InputError(f"--num_samples is {num_samples}; expected 1 or more")
    if temperature == 0 and num_samples > 1:
        raise InputError(f"--temperature 0 makes all {num_samples} samples of a prompt the same; "
                         "use more, 1.0 as published, or --num_samples 1")


def messages_of(records: Sequence[Record], templates: "Templates") -> "list[list[Message]]":
    """The turns before the answer, of records with an instruction."""
    system = [{"role": "system", "content": templates.system}] if templates.system else []
    return [[*system, {"role": "user", "content": record["instruction"]}] for record in records]


def rendered(prompts: "Sequence[Sequence[Message]]", templates: "Templates",
             tokenizer: object) -> tuple[list[list[int]], list[str]]:
    """Each prompt's ids, as the model continues them, and its text, as the judge reads it.

    Both are what self-training makes of a record (preprocess.self_judge_example).
    """
    from lm.templates import prompt_ids
    from self_judge.preferences import context_text
    from self_judge.templates import chat_text

    queries, contexts = [], []
    for messages in prompts:
        query = chat_text(templates, tokenizer, messages, add_generation_prompt=True)
        queries.append(prompt_ids(tokenizer, query))
        contexts.append(context_text(messages))
    return queries, contexts


def judge_settings(templates: "Templates", tokenizer: object, max_length: int,
                   num_samples: int) -> dict:
    """What `judge_pairs` is told; empty without matches. Checked before anything is sampled."""
    from self_judge.templates import decision_ids, judge_prompt_ids, judge_templates

    if num_samples == 1:
        return {}
    texts = judge_templates(templates, tokenizer)
    for text in texts.values():
        judge_prompt_ids(tokenizer, text, "", ".", ".", max_length)
    id_a, id_b = decision_ids(tokenizer, next(iter(texts.values())), templates.decision)
    return {"judge_templates": texts, "token_id_a": id_a, "token_id_b": id_b,
            "max_length": max_length}


def model_settings(base: "Base") -> dict:
    """What tells one model from another."""
    folder = resolve_model(base.model)
    return {"model": folder, "adapters": list(map(str, base.adapters)),
            "weights": [fingerprint(Path(part)) for part in (folder, *base.adapters)]}


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".samples.jsonl")


def shared_out(play: "Callable[[Sequence[int], Sequence[Record], IO[str], bool], object]",
               queries: Sequence[list[int]], outputs: Sequence[Path], journal: Path,
               settings: dict, overwrite: bool) -> object:
    """What `play` makes of all prompts; None in all processes but the first.

    Of several processes each plays with its share of the prompts, for the journal's sake; then the
    first one plays with all, and finds everything noted. The last of the outputs is the one that
    the others, and a journal of its own, are named after.
    """
    place, processes = launched()
    file, lines = open_samples(outputs, journal, settings, overwrite, place, processes)
    with file:
        if processes > 1:
            if mine := share(list(map(len, queries)), place, processes):
                play(mine, lines, file, place > 0)
            wait(processes)
            lines = read_parts(journal, settings)
        if place:
            return None
        found = play(range(len(queries)), lines, file, processes > 1)
        merge_parts(file, settings)
        if journal != journal_of(outputs[-1]):
            notes = [{"written": name_beside(journal, path)} for path in outputs]
            append(file, *(note for note in notes if note not in lines))
        return found


def open_samples(outputs: Sequence[Path], journal: Path, settings: dict, overwrite: bool,
                 place: int, processes: int) -> tuple[IO[str], list[Record]]:
    """This process's journal of samples and verdicts, and the lines of all processes' journals."""
    if overwrite:
        discard_parts(journal, place, processes)
    else:
        check_outputs(outputs, journal, settings)
    file, _ = open_journal(part_of(journal, place), settings)
    wait(processes)  # before another process adds to its own
    lines = read_parts(journal, settings)
    if lines and place == 0:
        drawn = sum("sample" in line for line in lines)
        judged = sum("probabilities" in line for line in lines)
        print(f"{journal}: going on after {drawn} samples and {judged} verdicts")
    return file, lines


def check_outputs(outputs: Sequence[Path], journal: Path, settings: dict) -> None:
    """Stop at an output that is there and not known to be ours.

    A journal that is named after it speaks for it; one that outputs may share notes each of them,
    before it is written.
    """
    there = [path for path in outputs if path.exists()]
    if there and not journal.exists():
        raise InputError(f"{there[0]}: is there already, and {journal.name} is not; choose another "
                         "--output_path, or --overwrite")
    if not there or journal == journal_of(outputs[-1]):
        return
    noted = [line.get("written") for line in read_journal(journal, settings)]
    for path in there:
        if name_beside(journal, path) not in noted:
            raise InputError(f"{path}: is there already, and {journal} does not note that it was "
                             "made of its samples; move it, or choose another --output_path")


def name_beside(journal: Path, output: Path) -> str:
    """An output's name as a journal notes it, the same when both are moved."""
    return os.path.relpath(output, journal.parent)


def sampled(load: Callable[[], object], tokenizer: object, queries: Mapping[int, list[int]],
            num_samples: int, lines: Sequence[Record], file: IO[str], quiet: bool = False,
            **sampling) -> list[list[Record]]:
    """Every sample of each prompt; those that the journal lacks are drawn and noted there.

    The journal names prompts and samples by their places among all.
    """
    from tqdm import tqdm

    from lm.generation import generate

    every = list(itertools.product(queries, range(num_samples)))
    noted = {(line["prompt"], line["sample"]): line for line in lines if "sample" in line}
    done = {key: noted[key] for key in every if key in noted}
    left = {key: queries[key[0]] for key in every if key not in done}
    if left:
        found = generate(load(), tokenizer, left, **sampling)
        for key, response in tqdm(found, "sampling", len(every), initial=len(done),
                                  unit="response", disable=quiet):
            done[key] = {"prompt": key[0], "sample": key[1], "output": response.text.strip(),
                         "finish_reason": response.finish_reason}
            append(file, done[key])
    return [[done[prompt, number] for number in range(num_samples)] for prompt in queries]


def referee(load: Callable[[], object], tokenizer: object, contexts: Mapping[int, str],
            responses: Sequence[Sequence[str]], lines: Sequence[Record], file: IO[str],
            asked: Mapping) -> "Judge":
    """The model as the judge of matches; it judges each once, and notes it in the journal.

    A match names its context by the place among these, as `responses` do; the journal among all.
    """
    from self_judge.judgment import Pair, Probabilities, judge_pairs, judgment_of
    from self_judge.tournament import Match, remember

    prompts = list(contexts)
    places = {prompt: place for place, prompt in enumerate(prompts)}

    def pair_of(match: Match) -> Pair:
        return Pair(contexts[prompts[match.context]], match.response_a, match.response_b)

    def note_of(match: Match, judgment: "Judgment") -> Record:
        texts = responses[match.context]
        return {"prompt": prompts[match.context],
                "a": texts.index(match.response_a), "b": texts.index(match.response_b),
                "probabilities": judgment.probabilities, "cut": judgment.cut}

    def judge(matches: Sequence[Match]) -> "list[Judgment]":
        judgments = judge_pairs(load(), tokenizer, list(map(pair_of, matches)), **asked)
        append(file, *map(note_of, matches, judgments))
        return judgments

    known = {}
    for line in lines:
        if "probabilities" in line and line["prompt"] in places:
            texts = responses[places[line["prompt"]]]
            match = Match(places[line["prompt"]], texts[line["a"]], texts[line["b"]])
            found = {name: Probabilities(*p) for name, p in line["probabilities"].items()}
            known[match] = judgment_of(pair_of(match), found, line["cut"])
    return remember(judge, known)


def tournaments(responses: Sequence[Sequence[str]], sizes: set[int], judge: "Judge",
                quiet: bool = False) -> "dict[int, list[Bracket]]":
    """By its size, the tournament of the first so many responses to each prompt, in their order."""
    from self_judge.tournament import knockout

    return {size: knockout([texts[:size] for texts in responses],
                           in_parts(judge, 0 if quiet else len(responses) * (size - 1),
                                    size == max(sizes)),
                           seed=None)
            for size in sorted(sizes, reverse=True)}


def in_parts(judge: "Judge", total: int, is_largest: bool) -> "Judge":
    """The same judge, asked about some matches at a time; of a total there is a progress bar."""
    from tqdm import tqdm

    bar = tqdm(desc="judging", total=total, unit="match", disable=not total, leave=is_largest)

    def judge_in_parts(matches: "Sequence[Match]") -> "list[Judgment]":
        judgments = []
        for start in range(0, len(matches), PART):
            judgments += judge(matches[start:start + PART])
            bar.update(len(judgments) - start)
        return judgments

    return judge_in_parts


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
