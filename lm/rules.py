"""The rule judge: what is wrong with a response, where code can tell.

The rule judge knows a record's `constraints`, a list of {"kind", "kwargs"} in the manner of IFEval
(`punctuation:no_comma`, `length_constraints:number_words` ...). lm-eval's IFEval checkers decide
whether they are satisfied; the words of the judgment, which say what is wrong and where, are ours.
"""

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

from lm.records import InputError, Record

Constraint = Mapping[str, object]
WORD = re.compile(r"\w+")  # what IFEval counts as a word


def satisfied(constraints: Sequence[Constraint], response: str) -> list[bool]:
    """Whether each constraint holds of the response; an empty response satisfies none."""
    return [bool(response.strip()) and bool(_checker(constraint).check_following(response))
            for constraint in constraints]


def check_constraints(records: Sequence[Record], path: str) -> None:
    """Stop unless each record has constraints, at least one, and IFEval can check all of them."""
    for index, record in enumerate(records):
        where = f"{path}: record {index}: field 'constraints'"
        if not record["constraints"] or not isinstance(record["constraints"], list) or not all(
                isinstance(entry, dict) and isinstance(entry.get("kind"), str)
                and isinstance(entry.get("kwargs"), dict) for entry in record["constraints"]):
            raise InputError(f"{where} must be a list of {{\"kind\": text, \"kwargs\": object}}, "
                             "at least one")
        try:
            satisfied(record["constraints"], "Any words.")
        except (InputError, TypeError, ValueError, LookupError, AttributeError,
                re.error) as error:
            raise InputError(f"{where}: {error}; correct it") from error


def judge_by_rules(record: Record, response: str, seed: int = 0) -> str | None:
    """What is wrong with a response to the record's instruction; None where nothing is.

    The phrasing varies with the seed, the instruction and the response, and with nothing else.
    """
    failed = [constraint for constraint, holds
              in zip(record["constraints"], satisfied(record["constraints"], response), strict=True)
              if not holds]
    if not failed:
        return None
    choose = random.Random(f"{seed} {record['instruction']} {response}").choice
    if not response.strip():
        return choose(["The response is empty.", "Nothing was answered."])
    return " ".join(choose(_phrasings(constraint, response)) for constraint in failed)


def _checker(constraint: Constraint) -> object:
    kind, kwargs = constraint["kind"], constraint["kwargs"]
    known = _ifeval_instructions()
    if kind not in known:
        raise InputError(f"unknown constraint kind {kind!r}; use one of {', '.join(sorted(known))}")
    checker = known[kind](kind)
    expected = checker.get_instruction_args_keys()
    if set(kwargs) != set(expected):  # IFEval would draw what is missing at random
        raise InputError(f"constraint {kind} has the kwargs {sorted(kwargs)}; "
                         f"expected {sorted(expected)}")
    checker.build_description(**kwargs)
    return checker


@functools.cache
def _ifeval_instructions() -> dict[str, type]:
    # The import would download a model that splits sentences; kinds that need it are left out.
    with mock.patch("nltk.data.find"):
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    sentence_kinds = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
    return {kind: checker for kind, checker in INSTRUCTION_DICT.items()
            if kind not in sentence_kinds}


def _phrasings(constraint: Constraint, response: str) -> list[str]:
    """Several ways to say how the response fails the constraint."""
    phrase = PHRASES.get(constraint["kind"])
    if phrase:
        return phrase(response, **constraint["kwargs"])
    demand = _checker(constraint).build_description(**constraint["kwargs"])
    return [f"The response does not follow this: {demand}"]


def _wrong_length(response: str, num_words: int, relation: str) -> list[str]:
    words = list(WORD.finditer(response))
    count = len(words)
    if relation == "at least":
        return [f"The response has {count} words, but at least {num_words} were asked for.",
                f"Too short: {count} words where {num_words} or more are needed."]
    limit = num_words - 1
    last = _quote(response[words[max(limit - 3, 0)].start():words[limit - 1].end()])
    return [f"The response has {count} words, but at most {limit} were asked for; "
            f"it should have ended by {last}.",
            f"Too long: {count} words where {limit} are allowed. All that follows {last} "
            "is too much.",
            f"It is {count - limit} over the limit of {limit} words, which was reached at {last}.",
            f"With {count} words it breaks the limit of {limit}; it had to stop after {last}."]


def _commas(response: str) -> list[str]:
    count = response.count(",")
    commas = "one comma" if count == 1 else f"{count} commas"
    near = _quote(re.search(r"\w*\W*?,\W*\w*", response)[0])
    return [f"The response has {commas}, the first in {near}, but none was allowed.",
            f"There must be no comma, yet there is one in {near}.",
            f"It uses {commas} although commas were ruled out: see {near}.",
            f"Wrong punctuation: {near} contains a comma. Without commas was the demand."]


def _forbidden(response: str, forbidden_words: Sequence[str]) -> list[str]:
    hits = {word: re.search(rf"([\w'’]+\W+)?\b{word}\b", response, re.IGNORECASE)
            for word in forbidden_words}
    word, hit = next((word, hit) for word, hit in hits.items() if hit)
    return [f"The response uses the forbidden word \"{word}\" in {_quote(hit[0])}.",
            f"The word \"{word}\" was not allowed, but {_quote(hit[0])} contains it.",
            f"It says {_quote(hit[0])} although \"{word}\" had to be avoided.",
            f"Forbidden word: \"{word}\" occurs, as in {_quote(hit[0])}."]


def _missing(response: str, keywords: Sequence[str]) -> list[str]:
    missing = [word for word in keywords if not re.search(word, response, re.IGNORECASE)]
    words = " and ".join(f"\"{word}\"" for word in missing)
    return [f"The response lacks {words}, which was asked for.",
            f"Nowhere does it say {words}, though the instruction demands it.",
            f"It had to contain {words} but does not.",
            f"A required word is missing: {words}."]


def _wrong_frequency(response: str, keyword: str, frequency: int, relation: str) -> list[str]:
    hits = re.findall(keyword, response, re.IGNORECASE)
    word = keyword.replace(r"\b", "")
    if relation == "at least":
        return [f"The word \"{word}\" occurs {_times(len(hits))}, but at least "
                f"{_times(frequency)} was asked for.",
                f"\"{word}\" is needed {_times(frequency)} or more; "
                f"it is there {_times(len(hits))}."]
    allowed = _times(frequency - 1)
    again = list(re.finditer(rf"{keyword}(\W+\w+)?", response, re.IGNORECASE))[frequency - 1]
    return [f"The word \"{word}\" occurs {_times(len(hits))}, but at most {allowed} was "
            f"asked for; {_quote(again[0])} is too much.",
            f"It uses \"{word}\" {_times(len(hits))} where {allowed} is allowed: "
            f"see {_quote(again[0])}.",
            f"Too many: \"{word}\" is there {_times(len(hits))}, again in {_quote(again[0])}.",
            f"\"{word}\" may appear {allowed}, yet it comes again in {_quote(again[0])}."]


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _quote(text: str) -> str:
    return f"\"{' '.join(text.split())}\""


PHRASES: dict[str, Callable[..., list[str]]] = {
    "length_constraints:number_words": _wrong_length,
    "punctuation:no_comma": _commas,
    "keywords:forbidden_words": _forbidden,
    "keywords:existence": _missing,
    "keywords:frequency": _wrong_frequency,
}
