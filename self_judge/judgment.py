"""The judge: which of two responses is better, asked in both orders (papers.md 2.1).

    from self_judge.judgment import Pair, judge_pairs
    judgments = judge_pairs(model, tokenizer, [Pair(context, one, other)], judge_templates)
    judgments[0].winner, judgments[0].margin  # "A" is `one`; None is a tie

`judge_templates` is what `self_judge.templates.judge_templates` returns: whole prompt texts by
principle; one text or a list of texts will do too. The model is any causal LM, trained as a judge
or not, as it is: with peft the caller switches adapters. p is the probability over the whole
vocabulary of raw logits; no sampling setting touches it.

`get_batch_judgments` has the published arguments and result. What differs from the released code:
one forward pass instead of `generate`, no top-p or temperature before the softmax, and ties,
identical responses and cut prompts are told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lm.models import context_of
from lm.records import InputError
from lm.shares import Share, wilson
from self_judge.templates import check_judge_template, decision_ids, judge_prompt_ids

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

Templates = Mapping[str, str] | Sequence[str] | str


@dataclass(frozen=True)
class Pair:
    """Two responses to one context, as the judge reads them."""

    context: str
    response_a: str
    response_b: str


class Probabilities(NamedTuple):
    """What the judge says in each order: `A_ba` is p(A | b, a), where b stands first as A."""

    A_ab: float
    B_ab: float
    A_ba: float
    B_ba: float


@dataclass(frozen=True)
class Judgment:
    """All that the judge says of a pair; A and B are the pair's, whatever order it was shown in."""

    probabilities: dict[str, Probabilities]  # by principle
    score_a: float  # debiased, mean over the principles
    score_b: float
    winner: str | None  # "A", "B", or None: a tie on everything
    consistent: bool  # both orders choose the same response
    identical: bool  # one text twice
    cut: bool  # the judge could not read everything

    @property
    def margin(self) -> float:
        """score_a - score_b; with principles the vote may go the other way."""
        return self.score_a - self.score_b


def debias(probabilities: Probabilities) -> tuple[float, float]:
    """Scores of a and b, each the mean of being first and being second.

    score_a = (p(A | a,b) + p(B | b,a)) / 2,  score_b = (p(B | a,b) + p(A | b,a)) / 2

    >>> debias(Probabilities(A_ab=0.75, B_ab=0.25, A_ba=0.5, B_ba=0.5))
    (0.625, 0.375)
    """
    p = probabilities
    return (p.A_ab + p.B_ba) / 2, (p.B_ab + p.A_ba) / 2


def vote(scores: Sequence[tuple[float, float]]) -> str | None:
    """The response with the higher score under more than half of the principles.

    Where neither has that, the one with the higher mean score; None where that is equal too.

    >>> vote([(0.6, 0.4), (0.6, 0.4), (0.0, 1.0)]), vote([(0.6, 0.4), (0.1, 0.9)])
    ('A', 'B')
    """
    a_wins = sum(a > b for a, b in scores)
    b_wins = sum(b > a for a, b in scores)
    a_total, b_total = map(sum, zip(*scores, strict=True))
    if 2 * a_wins > len(scores):
        return "A"
    if 2 * b_wins > len(scores):
        return "B"
    return None if a_total == b_total else "A" if a_total > b_total else "B"


def judge_pairs(model: "Module", tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Pair],
                judge_templates: Templates, *, token_id_a: int | None = None,
                token_id_b: int | None = None, max_length: int = 2048,
                judge_batch_size: int | None = None, token_budget: int | None = None,
                progress: bool = False) -> list[Judgment]:
    """Judge each pair in both orders under every principle.

    Args:
        model: bare or wrapped; in evaluation mode meanwhile. Where its weights are sharded over
            processes, every process must call this (with as few pairs as it likes).
        token_id_a, token_id_b: the decisions' ids, by default those of " A" and " B" as they
            follow the template.
        max_length: longest prompt with its decision; the model's own context if that is less.
        judge_batch_size: if given, a forward pass holds no more tokens than so many pairs of
            `max_length` have, in both orders.
        token_budget: tokens of one forward pass; by default 512 on a CPU and 4096 on a GPU.
    """
    from self_judge.next_token import next_token_probabilities, usual_budget

    prompts = named(judge_templates)
    letters = {name: _letters(tokenizer, text, token_id_a, token_id_b)
               for name, text in prompts.items()}
    context = context_of(model)
    max_length = min(max_length, context or max_length)
    if judge_batch_size is not None:
        if judge_batch_size < 1:
            raise InputError(f"judge_batch_size is {judge_batch_size}; expected 1 or more")
        token_budget = min(token_budget or usual_budget(model), 2 * judge_batch_size * max_length)
    rows: dict[tuple, int] = {}  # each distinct prompt is run once
    places, cuts = [], []
    for pair in pairs:
        where, cut = {}, False
        for name, text in prompts.items():
            for order in (pair, Pair(pair.context, pair.response_b, pair.response_a)):
                ids, was_cut = judge_prompt_ids(
                    tokenizer, text, order.context, order.response_a, order.response_b, max_length)
                cut = cut or was_cut
                row = rows.setdefault((tuple(ids), letters[name]), len(rows))
                where.setdefault(name, []).append(row)
        places.append(where)
        cuts.append(cut)
    found = next_token_probabilities(
        model, [ids for ids, _ in rows], [both for _, both in rows],
        token_budget=token_budget, progress=progress)
    return [judgment_of(pair, {name: Probabilities(*found[ab], *found[ba])
                               for name, (ab, ba) in where.items()}, cut)
            for pair, where, cut in zip(pairs, places, cuts, strict=True)]


def judgment_of(pair: Pair, probabilities: Mapping[str, Probabilities],
                cut: bool = False) -> Judgment:
    """Scores and verdict from the probabilities of all principles and orders."""
    scores = [debias(p) for p in probabilities.values()]
    score_a, score_b = (sum(column) / len(scores) for column in zip(*scores, strict=True))
    first_order = vote([(p.A_ab, p.B_ab) for p in probabilities.values()])
    second_order = vote([(p.B_ba, p.A_ba) for p in probabilities.values()])
    return Judgment(dict(probabilities), score_a, score_b, winner=vote(scores),
                    consistent=first_order == second_order,
                    identical=pair.response_a == pair.response_b, cut=cut)


def judge_preferences(model: "Module", tokenizer: "PreTrainedTokenizerBase",
                      preferences: Sequence[Mapping[str, str]], judge_templates: Templates,
                      **settings) -> tuple[list[Judgment], list[Pair]]:
    """Judge records {context, chosen, rejected, principle?}; in the pairs A is the chosen response.

    A record's `principle` is the template it is judged by; without one, all of them vote. The
    `settings` are those of `judge_pairs`.
    """
    prompts = named(judge_templates)
    for index, record in enumerate(preferences):
        if record.get("principle") not in (None, *prompts):
            raise InputError(f"pair {index}: principle {record['principle']!r} has no judge "
                             f"template; there are {', '.join(prompts)}")
    pairs = [Pair(record["context"], record["chosen"], record["rejected"])
             for record in preferences]
    judgments: dict[int, Judgment] = {}
    for principle in (None, *prompts):  # as many calls on every process, whatever its records
        group = [index for index, record in enumerate(preferences)
                 if record.get("principle") == principle]
        texts = prompts if principle is None else {principle: prompts[principle]}
        judged = judge_pairs(model, tokenizer, [pairs[index] for index in group], texts, **settings)
        judgments.update(zip(group, judged, strict=True))
    return [judgments[index] for index in range(len(pairs))], pairs


def get_batch_judgments(model: "Module", tokenizer: "PreTrainedTokenizerBase",
                        contexts: Sequence[str], responses_a: Sequence[str],
                        responses_b: Sequence[str], judge_templates: Templates,
                        token_id_a: int | None = None, token_id_b: int | None = None,
                        judge_batch_size: int = 1, max_length: int = 2048,
                        ties: str = "keep", cut: str = "keep") -> list[str | None]:
    """The better response of each pair, "A" or "B".

    Of a tie, as identical responses are, B is taken, as the released code does; with `ties="drop"`
    it is None, and with `cut="drop"` it is None for a pair that the judge could not read whole. The
    result does not depend on `judge_batch_size`, of which `judge_pairs` tells.
    """
    for name, value in (("ties", ties), ("cut", cut)):
        if value not in ("keep", "drop"):
            raise InputError(f"{name} is {value!r}; expected keep or drop")
    for name, texts in (("contexts", contexts), ("responses_a", responses_a),
                        ("responses_b", responses_b)):
        check_texts(name, texts)
    if not len(contexts) == len(responses_a) == len(responses_b):
        raise InputError(f"{len(contexts)} contexts, {len(responses_a)} responses_a and "
                         f"{len(responses_b)} responses_b; expected as many of each")
    judgments = judge_pairs(
        model, tokenizer, list(map(Pair, contexts, responses_a, responses_b)), judge_templates,
        token_id_a=token_id_a, token_id_b=token_id_b, max_length=max_length,
        judge_batch_size=judge_batch_size)
    return [None if judgment.cut and cut == "drop" else
            judgment.winner or ("B" if ties == "keep" else None) for judgment in judgments]


def judge_metrics(judgments: Sequence[Judgment], pairs: Sequence[Pair]) -> dict[str, Share]:
    """How good the judge is, as shares with intervals; in `pairs` A is the truly better response.

    accuracy              of all pairs; a tie counts one half, as a coin would
    consistency           of all pairs: both orders choose the same response
    chose_first           of all single verdicts: for the response shown first (unbiased: 1/2)
    chose_longer          of decided pairs of two lengths (characters): for the longer response
    longer_is_better      of the same pairs: it truly is; what chose_longer should be
    accuracy_longer       accuracy where the better response is the longer one
    accuracy_shorter      ... and where it is the shorter one
    ties, identical, cut  of all pairs

    A share of nothing is left out. The intervals take verdicts for independent of each other.
    """
    points = [{"A": 1.0, "B": 0.0, None: 0.5}[judgment.winner] for judgment in judgments]
    longer = [len(pair.response_a) - len(pair.response_b) for pair in pairs]
    uneven = [(point, gap > 0) for point, gap in zip(points, longer, strict=True)
              if gap and point != 0.5]
    counted = {
        "accuracy": points,
        "consistency": [judgment.consistent for judgment in judgments],
        "chose_first": [a > b for judgment in judgments for p in judgment.probabilities.values()
                        for a, b in (p[:2], p[2:]) if a != b],
        "chose_longer": [(point == 1) == a_longer for point, a_longer in uneven],
        "longer_is_better": [a_longer for _, a_longer in uneven],
        "accuracy_longer": [p for p, gap in zip(points, longer, strict=True) if gap > 0],
        "accuracy_shorter": [p for p, gap in zip(points, longer, strict=True) if gap < 0],
        "ties": [judgment.winner is None for judgment in judgments],
        "identical": [judgment.identical for judgment in judgments],
        "cut": [judgment.cut for judgment in judgments],
    }
    return {name: wilson(sum(hits), len(hits)) for name, hits in counted.items() if hits}


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Stop unless it is a list of texts; a text alone would be taken for its characters."""
    if isinstance(texts, str):
        raise InputError(f"{name} is a text; expected a list of texts")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name}: row {row} is {text!r}; expected a text")


def named(judge_templates: Templates) -> dict[str, str]:
    """Checked prompt texts by principle."""
    if isinstance(judge_templates, str):
        judge_templates = {"default": judge_templates}
    elif isinstance(judge_templates, Sequence):
        judge_templates = {str(number): text for number, text in enumerate(judge_templates)}
    elif not isinstance(judge_templates, Mapping):
        raise InputError(f"judge_templates is of type {type(judge_templates).__name__}; expected "
                         "what self_judge.templates.judge_templates returns, a text, or a list")
    if not judge_templates:
        raise InputError("judge_templates is empty; give at least one template")
    for name, text in judge_templates.items():
        check_judge_template(text, f"judge template {name!r}")
    return dict(judge_templates)


def _letters(tokenizer: "PreTrainedTokenizerBase", text: str, token_id_a: int | None,
             token_id_b: int | None) -> tuple[int, int]:
    if token_id_a is None and token_id_b is None:
        return decision_ids(tokenizer, text)
    known = range(len(tokenizer))
    if token_id_a not in known or token_id_b not in known or token_id_a == token_id_b:
        raise InputError(f"token_id_a is {token_id_a} and token_id_b is {token_id_b}; expected two "
                         f"different ids, or neither, of the tokenizer's {len(known)}")
    return token_id_a, token_id_b
