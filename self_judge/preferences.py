"""Preference record -> what it holds: a dialogue to learn, pairs of answers, and what is left out.

A record is one of HH's `{chosen, rejected}` dialogues or one of UltraFeedback's `{instruction,
completions}`; the two are told apart by their fields. What is drawn follows from the seed and the
record alone, and whatever is left out is noted.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType

from lm.records import InputError, Record, wrong_field

DEFAULT = "default"  # the name of the judge template without a principle
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
SPEAKERS = {"user": "User", "assistant": "Assistant"}
# UltraFeedback's annotators saw four texts at once; a rationale that names one misleads a judge.
NAMES_A_TEXT = re.compile(r"\bTexts?(?![a-z])")

Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one known."""

    principle: str
    prompt: list[Message]
    context: str  # the prompt's turns as the judge reads them
    chosen: str
    rejected: str
    evaluations: tuple[str, str] | None = None  # of the chosen and of the rejected answer


@dataclass(frozen=True)
class Found:
    """What a record holds: a dialogue to learn, pairs, and what was left out."""

    dialogue: list[Message] | None = None
    pairs: list[Pair] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)  # what `Counts` counts
    principles: frozenset[str] = frozenset()  # that it has annotations for


def found_in(record: Record, principles: Sequence[str] = (DEFAULT,), *, rationales: bool = False,
             system: str = "", seed: int = 42) -> Found:
    """Read a record of either kind; an InputError names the field that is wrong."""
    if "completions" in record:
        return ultrafeedback(record, principles, rationales=rationales, system=system, seed=seed)
    if "chosen" in record or "rejected" in record:
        if list(principles) != [DEFAULT]:
            raise InputError("a record of two dialogues has no ratings by principle; in "
                             f"templates.judge leave only '{DEFAULT}'")
        return hh(record, system=system)
    raise InputError("has neither the fields 'chosen' and 'rejected' (HH) nor 'instruction' and "
                     "'completions' (UltraFeedback)")


def hh(record: Record, system: str = "") -> Found:
    """HH: learn the chosen dialogue; the pair is the last answers of the two dialogues."""
    _check(record, {"chosen": (str,), "rejected": (str,)})
    (chosen, joined), (rejected, also_joined) = (_dialogue(record[name], name)
                                                 for name in ("chosen", "rejected"))
    notes = Counter(joined=joined + also_joined)
    if not (_answers(chosen) and _answers(rejected)):
        return Found(notes=notes + Counter(turnless=1))
    if not chosen[-1]["content"]:
        return Found(notes=notes + Counter(empty=1))
    head = [{"role": "system", "content": system}] if system else []
    dialogue = head + chosen
    answers = chosen[-1]["content"], rejected[-1]["content"]
    for reason, holds in (("contexts", chosen[:-1] != rejected[:-1]), ("empty", not answers[1]),
                          ("same", answers[0] == answers[1])):
        if holds:
            return Found(dialogue, notes=notes + Counter([reason]))
    pair = Pair(DEFAULT, dialogue[:-1], context_text(chosen[:-1]), *answers)
    return Found(dialogue, [pair], notes)


def ultrafeedback(record: Record, principles: Sequence[str] = (DEFAULT,), *,
                  rationales: bool = False, system: str = "", seed: int = 42) -> Found:
    """UltraFeedback: learn the best completion; one pair over all ratings, or for each principle.

    A completion's score is the mean of its numeric ratings; the best one is the longest of those
    with the highest score. Its own system prompt goes before it.
    """
    _check(record, {"instruction": (str,), "completions": (list, NoneType)})
    ranked, notes = ranked_completions(record["completions"] or [])
    if not ranked:
        return Found(notes=notes + Counter(answerless=1))
    system = ranked[0].system or system
    head = [{"role": "system", "content": system}] if system else []
    prompt = [*head, {"role": "user", "content": record["instruction"]}]
    context = context_text(prompt)
    pairs = []
    for principle in principles:
        rng = random.Random(f"{seed} {principle} {record['instruction']}")
        if principle == DEFAULT:
            drawn = _overall(ranked, rng)
        else:
            drawn, dropped = _by_principle(ranked, principle, rationales, rng)
            notes += dropped
        if drawn is None:
            notes += Counter(["tied" if principle == DEFAULT else "incomparable"])
            continue
        evaluations = tuple(one.evaluations.get(principle, "") for one in drawn)
        pairs.append(Pair(principle, prompt, context, drawn[0].response, drawn[1].response,
                          evaluations if rationales and all(evaluations) else None))
    answer = {"role": "assistant", "content": ranked[0].response}
    return Found([*prompt, answer], pairs, notes,
                 frozenset(name for one in ranked for name in one.principles))


def context_text(messages: Sequence[Message]) -> str:
    """The turns as the judge reads them, the system message left out.

    >>> context_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
    'User: Hi\\n\\nAssistant: Yes?'
    """
    return "\n\n".join(f"{SPEAKERS[message['role']]}: {message['content']}"
                       for message in messages if message["role"] in SPEAKERS)


def _dialogue(text: str, name: str) -> tuple[list[Message], bool]:
    """The turns up to the last answer, and whether some of one speaker were joined."""
    start, *parts = TURN.split(text.strip())
    if start:
        raise InputError(f"field '{name}' begins with {start[:20]!r}; expected a dialogue that "
                         "begins with '\\n\\nHuman:'")
    turns: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = ROLES[speaker], content.strip()
        if turns and turns[-1]["role"] == role:  # most chat templates want the speakers in turn
            content = f"{turns.pop()['content']}\n\n{content}".strip()
        turns.append({"role": role, "content": content})
    joined = len(turns) < len(parts) // 2
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    return turns, joined


def _answers(turns: Sequence[Message]) -> bool:
    return {"user", "assistant"} <= {turn["role"] for turn in turns}


@dataclass(frozen=True)
class _Completion:
    response: str
    system: str
    principles: frozenset[str]
    ratings: dict[str, float]  # of the principles that have a numeric one
    evaluations: dict[str, str]  # rationales that can be learnt

    @property
    def score(self) -> float:
        return sum(self.ratings.values()) / len(self.ratings)


def ranked_completions(completions: Sequence[object]) -> tuple[list[_Completion], Counter]:
    """The rated completions, best first: by score, then by length; and what was left out."""
    notes: Counter = Counter()
    usable = []
    for place, given in enumerate(completions):
        completion = _completion(given, f"completions[{place}]")
        if not completion.response.strip():
            notes["empty"] += 1
        elif not completion.ratings:
            notes["unrated"] += 1
        else:
            usable.append(completion)
    return sorted(usable, key=lambda one: (-one.score, -len(one.response))), notes


def _completion(given: object, where: str) -> _Completion:
    if not isinstance(given, dict):
        raise InputError(f"field '{where}' is {given!r:.20}; expected an object")
    _check(given, {"response": (str,)}, {"custom_system_prompt": (str, NoneType),
                                         "annotations": (dict, NoneType)}, f"{where}.")
    annotations = given.get("annotations") or {}
    ratings, evaluations = {}, {}
    for principle, annotation in annotations.items():
        if annotation is None:
            continue
        if not isinstance(annotation, dict):
            raise InputError(f"field '{where}.annotations.{principle}' is {annotation!r:.20}; "
                             "expected an object with a 'Rating'")
        _check(annotation, {}, dict.fromkeys(("Rationale", "Rationale For Rating"),
                                             (str, NoneType)), f"{where}.annotations.{principle}.")
        rating = _number(annotation.get("Rating"))
        if rating is not None:
            ratings[principle] = rating
        # Where there are both, "Rationale" is about the kind of fault, not about the rating.
        said = annotation.get("Rationale For Rating") or annotation.get("Rationale") or ""
        if said.strip() and not NAMES_A_TEXT.search(said):
            evaluations[principle] = said.strip()
    return _Completion(given["response"], given.get("custom_system_prompt") or "",
                       frozenset(annotations), ratings, evaluations)


def _number(rating: object) -> float | None:
    """ "4" -> 4.0; None for "N/A" and whatever else is no number."""
    try:
        value = float(rating)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _overall(ranked: Sequence[_Completion],
             rng: random.Random) -> tuple[_Completion, _Completion] | None:
    """The best completion and one drawn among those with a lower score."""
    best = ranked[0]
    lower = [one for one in ranked if one.score < best.score and one.response != best.response]
    return (best, rng.choice(lower)) if lower else None


def _by_principle(ranked: Sequence[_Completion], principle: str, rationales: bool,
                  rng: random.Random) -> tuple[tuple[_Completion, _Completion] | None, Counter]:
    """The better and the worse of a comparison on one principle.

    It is drawn among those of the first completion in rank order that has any: with another
    completion of unequal rating, and both with a rationale where these are learnt.
    """
    rated = [one for one in ranked if principle in one.ratings]
    usable = [one for one in rated if not rationales or principle in one.evaluations]
    notes = Counter(rationales=len(rated) - len(usable))
    for target in usable:
        others = [one for one in usable if one.ratings[principle] != target.ratings[principle]
                  and one.response != target.response]
        if others:
            other = rng.choice(others)
            if other.ratings[principle] < target.ratings[principle]:
                return (target, other), notes
            return (other, target), notes + Counter(losers=1)
    return None, notes


def _check(record: Record, required: Mapping[str, tuple],
           optional: Mapping[str, tuple] | None = None, within: str = "") -> None:
    if wrong := wrong_field(record, required, optional, within):
        raise InputError(wrong)
