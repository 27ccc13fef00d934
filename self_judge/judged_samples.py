"""A model's samples and its verdicts on them, each noted in a journal as soon as it is there.

scripts/self_reject.py and scripts/label_samples.py are made of these. The journal names prompts and
samples by their places; after a stop, even a kill, nothing is sampled or judged twice.
"""

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lm.journal import append, digest, open_journal, read_journal
from lm.models import load_tokenizer, precision
from lm.processes import discard_parts, launched, merge_parts, part_of, read_parts, share, wait
from lm.records import InputError, Record
from self_judge.base import Base, model_settings

if TYPE_CHECKING:
    from self_judge.judgment import Judgment
    from self_judge.preferences import Message
    from self_judge.templates import Templates
    from self_judge.tournament import Match

    Judge = Callable[[Sequence[Match]], list[Judgment]]

PART = 32  # matches judged together: what a kill costs, and still some full batches on a GPU


class JudgedSamples:
    """A model that answers each prompt `num_samples` times and judges its answers."""

    def __init__(self, base: Base, load_in: str, prompts: "Sequence[Sequence[Message]]",
                 templates: "Templates", *, num_samples: int, max_length: int, batch_tokens: int,
                 **sampling):
        from self_judge.base import load_base

        self.tokenizer = load_tokenizer(base.model)
        self.queries, self.contexts = rendered(prompts, templates, self.tokenizer)
        self.asked = judge_settings(templates, self.tokenizer, max_length, num_samples)
        self.num_samples, self.batch_tokens, self.sampling = num_samples, batch_tokens, sampling
        self.settings = {
            **model_settings(base), "load_in": load_in, "prompts": digest(self.queries),
            "judge": digest(self.asked), "num_samples": num_samples, **sampling}
        # Only if anything is left to do
        self.load = functools.cache(lambda: load_base(base, precision(load_in)))

    def of(self, which: Sequence[int], lines: Sequence[Record], file: IO[str],
           quiet: bool) -> "tuple[list[list[Record]], list[list[str]], Judge]":
        """Samples of some prompts, their texts, and the judge of these.

        `lines` are what a journal holds, `file` is it, open for what is new.
        """
        queries = {place: self.queries[place] for place in which}
        contexts = {place: self.contexts[place] for place in which}
        samples = sampled(self.load, self.tokenizer, queries, self.num_samples, lines, file, quiet,
                          **self.sampling, token_budget=self.batch_tokens)
        responses = [[line["output"] for line in of_prompt] for of_prompt in samples]
        return samples, responses, referee(self.load, self.tokenizer, contexts, responses, lines,
                                           file, self.asked)


# Prompts


def messages_of(records: Sequence[Record], templates: "Templates") -> "list[list[Message]]":
    """The turns before the answer, of records with an instruction."""
    system = [{"role": "system", "content": templates.system}] if templates.system else []
    return [[*system, {"role": "user", "content": record["instruction"]}] for record in records]


def rendered(prompts: "Sequence[Sequence[Message]]", templates: "Templates",
             tokenizer: object) -> tuple[list[list[int]], list[str]]:
    """Each prompt's ids, as the model continues them, and its text, as the judge reads it.

    Both are what self-training makes of a record (self_judge.data.self_judge_example).
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
    from self_judge.templates import asked_of, judge_prompt_ids

    if num_samples == 1:
        return {}
    asked = asked_of(templates, tokenizer)
    for text in asked["judge_templates"].values():
        judge_prompt_ids(tokenizer, text, "", ".", ".", max_length)
    return {**asked, "max_length": max_length}


# The journal, and the outputs made of it


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".samples.jsonl")


def check_paths(outputs: Sequence[Path], **others: str | Path) -> None:
    """Stop at an output that is another flag's file as well."""
    for path in outputs:
        for flag, other in others.items():
            if path.resolve() == Path(other).resolve():
                raise InputError(f"{path}: is to be written, and is --{flag}; choose another "
                                 "--output_path, so that both are kept")


def shared_out(play: "Callable[[Sequence[int], Sequence[Record], IO[str], bool], object]",
               judged: JudgedSamples, outputs: Sequence[Path], journal: Path,
               overwrite: bool) -> object:
    """What `play` makes of all prompts; None in all processes but the first.

    Of several processes each plays with its share of the prompts, for the journal's sake; then the
    first one plays with all, and finds everything noted. The last of the outputs is the one that
    the others, and a journal of its own, are named after.
    """
    queries, settings = judged.queries, judged.settings
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


# Samples and verdicts


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
