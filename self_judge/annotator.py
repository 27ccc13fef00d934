"""A JSFT model as the judge that CUT learns from, so that none from outside is needed.

    templates = load_templates("configs/templates/judge_uf_principles.yaml")
    judge = JsftJudge(model, tokenizer, templates)
    for index, judgment in judge({0: question}):  # question.record["other"] is another response
        judgment.text

JSFT with rationales (configs/uf_jsft_pr.yaml) teaches to compare two responses and then to evaluate
each, not to rate one alone. So a response is compared with another one to the same instruction,
such as a second sample of the same model, in both orders (judgment.py):

- It wins: nothing is wrong with it. That is, it is the better one; it need not be perfect.
- It loses: the model writes its rationale, and what this says of the response is the judgment. The
  decision that the rationale explains is given: the verdict of both orders, under the principle by
  which the response loses most clearly. The response stands where it is evaluated first.
- Neither wins, the two are one text, they do not fit into the prompt, or the rationale is not of
  the trained form: the judgment has failed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm.generation import generate
from lm.judges import Question
from lm.models import context_of
from lm.verdicts import Judgment, negative
from self_judge.judgment import Judgment as Verdict
from self_judge.judgment import Pair, debias, judge_pairs
from self_judge.preferences import context_text
from self_judge.templates import (
    Templates,
    asked_of,
    decision_ids,
    judge_prompt_ids,
    judge_templates,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_A_TIME = 64  # responses: what a kill costs, and still some full batches on a GPU
EVALUATION = re.compile(r"\{evaluation_([ab])\}")
MAX_LENGTH = 4096  # of models that state no limit


@dataclass(frozen=True)
class JsftJudge:
    """A judge in the sense of lm/judges.py; records have another response in `other`."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    templates: Templates
    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    batch_tokens: int = 16384

    def __call__(self, questions: Mapping[int, Question]) -> Iterator[tuple[int, Judgment]]:
        """Yield (index, judgment), a few dozen at a time."""
        indices = list(questions)
        for start in range(0, len(indices), AT_A_TIME):
            yield from self._judge({index: questions[index]
                                    for index in indices[start:start + AT_A_TIME]})

    def _judge(self, questions: Mapping[int, Question]) -> Iterator[tuple[int, Judgment]]:
        pairs = {index: Pair(context_text([{"role": "user", "content": question.instruction}]),
                             question.response, question.record["other"])
                 for index, question in questions.items()}
        lost = {}
        for (index, pair), verdict in zip(pairs.items(), self._compare(pairs), strict=True):
            if verdict.identical or verdict.cut or verdict.winner is None:
                yield index, Judgment(error=_why_none(verdict))
            elif verdict.winner == "A":
                yield index, Judgment()
            else:
                lost[index] = self._prompt(pair, verdict)
        for index, response in generate(self.model, self.tokenizer, lost, seed=self.seed,
                                        max_new_tokens=self.max_new_tokens,
                                        temperature=self.temperature,
                                        token_budget=self.batch_tokens):
            yield index, read_evaluation(response.text, self.templates.rationale)

    def _compare(self, pairs: Mapping[int, Pair]) -> list[Verdict]:
        """The debiased verdicts; A is the response that is judged."""
        return judge_pairs(self.model, self.tokenizer, list(pairs.values()),
                           **asked_of(self.templates, self.tokenizer),
                           max_length=self._max_length())

    def _prompt(self, pair: Pair, verdict: Verdict) -> list[int]:
        """Ids of the prompt and of the decision against the pair's first response."""
        text = judge_templates(self.templates, self.tokenizer)[clearest(verdict)]
        ids = decision_ids(self.tokenizer, text, self.templates.decision)
        loser, winner = pair.response_a, pair.response_b
        first_is_a = EVALUATION.search(self.templates.rationale)[1] == "a"
        shown = (loser, winner) if first_is_a else (winner, loser)
        prompt, _ = judge_prompt_ids(self.tokenizer, text, pair.context, *shown, self._max_length())
        return [*prompt, ids[1] if first_is_a else ids[0]]

    def _max_length(self) -> int:
        """Of a prompt with its decision, so that the rationale fits in behind it."""
        context = context_of(self.model)
        return (context or MAX_LENGTH) - self.max_new_tokens


def clearest(verdict: Verdict) -> str:
    """The principle by which the first response falls behind most."""
    margins = {}
    for name, probabilities in verdict.probabilities.items():
        score_a, score_b = debias(probabilities)
        margins[name] = score_a - score_b
    return min(margins, key=margins.get)


def read_evaluation(said: str, rationale: str) -> Judgment:
    """The evaluation that comes first, and once, in what follows a decision; the second ends it.

    >>> read_evaluation("A: Too long. B: Fine.", "A: {evaluation_a} B: {evaluation_b}").text
    'Too long.'
    """
    before, _, between, *_ = map(re.escape, map(str.strip, EVALUATION.split(rationale)))
    found = re.match(f"{before}(.*?)(?:{between or chr(10)})", said.strip(), re.DOTALL)
    if not found or (before and re.search(f"^{before}", found[1], re.MULTILINE)):
        return Judgment(error="writes no evaluation of the trained form", raw=said)
    return negative(found[1].strip(), said)


def _why_none(verdict: Verdict) -> str:
    if verdict.identical:
        return "both responses are the same text"
    return "the prompt is too long for the judge" if verdict.cut else "finds neither better"
