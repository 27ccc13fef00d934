"""What is learnt from a judged response: CUT, and the methods that the paper compares it with.

An objective turns the example of a record into those that are trained on. With x the instruction,
y the response, j its judgment and y^ a better response (arXiv 2312.14591, Section 3.2):

    cut           Align-P, or Align-N against Misalign (cut/loss.py)
    mle           x -> y, satisfactory responses only
    forward       x -> y, and x, y -> j: forward prediction
    hindsight     x -> y where y is satisfactory, else x, j -> y
    ilf_mle       x -> y where y is satisfactory, else x -> y^
    unlikelihood  x -> y where y is satisfactory, else the likelihood of all its tokens is lowered
    ilf_dpo       y^ is preferred to y
    dpo           of the responses to x, one of a higher score is preferred to one of a lower

All but the last two are rows of the CUT trainer, whose loss without a Misalign row is the mean
negative log-likelihood (MLE); those two are pairs for trl's DPOTrainer (`cut/dpo.py`). An ablation
leaves a part out of CUT (Table 4).
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from cut.data import Example, Row, Rows, rows_of
from lm.records import InputError, listed
from lm.templates import Template

# The rows of Table 4: what each leaves out.
PARTS = {"l1": "the contrast of Align-N and Misalign",
         "align_p": "Align-P in L2: those examples, so there are fewer steps",
         "align_n": "Align-N in L2",
         "detection": "the search for inappropriate tokens: unlikelihood on all of a response",
         "weight": "the weight p^gamma"}


@dataclass(frozen=True)
class Objective:
    """How an example is trained on, or two are compared."""

    learn: Callable[[Example], list[Example]]
    without: tuple[str, ...] = ()  # of PARTS
    contrasts: bool = False  # whether there must be negative examples
    compare: Callable[[Sequence[Example]], "list[Preference]"] | None = None  # of DPO


@dataclass(frozen=True)
class Preference:
    """Two responses to an instruction."""

    record: str
    instruction: str
    chosen: str
    rejected: str


def itself(example: Example) -> list[Example]:
    """As CUT learns from it."""
    return [example]


def if_satisfactory(example: Example) -> list[Example]:
    """x -> y of Align-P."""
    return [example] if example.judgment is None else []


def in_hindsight(example: Example) -> list[Example]:
    """x -> y or x, j -> y; no Misalign row."""
    return [replace(example, contrast=False)]


def then_its_judgment(example: Example) -> list[Example]:
    """x -> y, and x, y -> j where there is a judgment."""
    answer = replace(example, judgment=None)
    if example.judgment is None:
        return [answer]
    return [answer, replace(answer, response=example.judgment, given=example.response)]


def refined(example: Example) -> list[Example]:
    """x -> y of Align-P, x -> y^ of the others; none where the refinement is blank."""
    if example.judgment is None:
        return [example]
    better = refinement_of(example)
    return [replace(example, judgment=None, response=better)] if better else []


def refinement_of(example: Example) -> str:
    """y^, perhaps blank; an error where there never was one."""
    if example.refinement is None:
        raise InputError(f"{example.record}: field 'i_ans' is missing, the refined response that "
                         "this objective learns from; scripts/refine.py adds it")
    return example.refinement.strip()


def refinements_preferred(examples: Sequence[Example]) -> list[Preference]:
    """(y^, y) of each negative example; none where the refinement is blank or unchanged."""
    return [Preference(example.record, example.instruction, better, example.response)
            for example in examples if example.judgment is not None
            and (better := refinement_of(example)) and better != example.response.strip()]


def higher_scores_preferred(examples: Sequence[Example]) -> list[Preference]:
    """All pairs of responses to the same instruction with unequal scores (Section 5.3)."""
    by_instruction = defaultdict(list)
    for example in examples:
        if example.score is None:
            raise InputError(f"{example.record}: field 'score' is missing, the response's reward; "
                             "--objective dpo needs one for every response")
        by_instruction[example.instruction].append(example)
    return [Preference(better.record, better.instruction, better.response, worse.response)
            for responses in by_instruction.values() for pair in combinations(responses, 2)
            for worse, better in [sorted(pair, key=lambda example: example.score)]
            if worse.score < better.score and worse.response.strip() != better.response.strip()]


OBJECTIVES = {
    "cut": Objective(itself, contrasts=True),
    "mle": Objective(if_satisfactory),
    "forward": Objective(then_its_judgment),
    "hindsight": Objective(in_hindsight),
    "ilf_mle": Objective(refined),
    "unlikelihood": Objective(itself, without=("align_n", "detection", "weight"), contrasts=True),
    "ilf_dpo": Objective(itself, compare=refinements_preferred),
    "dpo": Objective(itself, compare=higher_scores_preferred),
}


def learnt(objective: Objective, examples: Sequence[Example],
           without: Sequence[str] = ()) -> list[Example]:
    """The examples that are trained on."""
    return [new for example in examples for new in objective.learn(example)
            if example.judgment is not None or "align_p" not in without]


def left_out(name: str, without: str | Sequence[str], gamma: float) -> list[str]:
    """The parts of CUT that an objective by this name, less those asked for, does not have."""
    if name not in OBJECTIVES:
        nearest = difflib.get_close_matches(str(name), OBJECTIVES, n=1, cutoff=0.0)
        raise InputError(f"--objective {name}: unknown; did you mean {nearest[0]}? (one of "
                         f"{', '.join(OBJECTIVES)})")
    asked = listed(without)
    if unknown := [part for part in asked if part not in PARTS]:
        raise InputError(f"--without {unknown[0]}: unknown; expected some of {', '.join(PARTS)}")
    if asked and name != "cut":
        raise InputError(f"--without leaves out parts of CUT, not of --objective {name}")
    if {"l1", "align_n"} <= {*asked}:
        raise InputError("--without l1,align_n leaves nothing to learn from negative records; "
                         "--objective mle learns from the others alone")
    if "weight" in asked and not gamma:
        raise InputError("--without weight: there is none at gamma 0, the default; compare it with "
                         "--gamma 1")
    return [*asked, *OBJECTIVES[name].without]


def preference_rows(preference: Preference, template: Template, tokenizer,
                    cutoff_len: int) -> Rows:
    """The chosen response as the first row, the rejected one as the second, after one prompt.

    Both are cut as any other row; the prompt is then that of the longer response.
    """
    one, other = (rows_of(Example(preference.record, preference.instruction, text, None), template,
                          tokenizer, cutoff_len)
                  for text in (preference.chosen, preference.rejected))
    prompt = min((rows.aligned.ids[:-rows.response] for rows in (one, other)), key=len)
    chosen, rejected = (Row(prompt + rows.aligned.ids[-rows.response:], rows.response)
                        for rows in (one, other))
    return Rows(preference.record, chosen, rejected, one.response, cut=one.cut + other.cut)
