"""Example -> row: token ids and, built together with them, the mask of what is learnt.

SFT: each assistant turn and its EOS. Judgment: the decision token alone, or, with a rationale,
decision, rationale and EOS. Nothing is searched for in the ids, so a text that quotes the markers
of a chat template misleads nothing.
"""

import functools
from collections.abc import Mapping, Sequence

from lm.records import InputError
from lm.templates import continuation_ids, prompt_ids, response_ids
from self_judge.templates import Templates, chat_text, decision_ids, judge_prompt_ids, judge_text

PROBE = "\u2042"  # an answer that no template writes by itself
Span = tuple[list[int], bool]  # ids, and whether they are learnt
_decision_ids = functools.lru_cache(maxsize=64)(decision_ids)


def row_of(example: Mapping, templates: Templates, tokenizer, max_length: int) -> dict:
    """`input_ids`, `completion_mask` (1 where a token is learnt), and whether it was `cut`.

    A judge prompt is cut as at judgment (`judge_prompt_ids`). What is still too long loses its
    end, and with it the EOS: an answer that was cut does not teach where to stop.
    """
    spans, cut = ((_sft_spans(example, templates, tokenizer), False) if example["kind"] == "sft"
                  else _judgment_spans(example, templates, tokenizer, max_length))
    ids = [token for span, _ in spans for token in span]
    mask = [int(learnt) for span, learnt in spans for _ in span]
    return {"input_ids": ids[:max_length], "completion_mask": mask[:max_length],
            "cut": cut or len(ids) > max_length}


def _sft_spans(example: Mapping, templates: Templates, tokenizer) -> list[Span]:
    spans: list[Span] = []
    pieces = sft_pieces(example["messages"], templates, tokenizer)
    for place, (text, learnt) in enumerate(pieces):
        to_ids = continuation_ids
        if place == 0:
            to_ids = prompt_ids
        elif place == len(pieces) - 1:
            to_ids = response_ids  # the last answer ends in EOS whatever the template writes
        spans.append((to_ids(tokenizer, text), learnt))
    return spans


def _judgment_spans(example: Mapping, templates: Templates, tokenizer,
                    max_length: int) -> tuple[list[Span], bool]:
    text = judge_text(templates, tokenizer, example["principle"])
    prompt, cut = judge_prompt_ids(tokenizer, text, example["context"], example["response_a"],
                                   example["response_b"], max_length)
    id_a, id_b = _decision_ids(tokenizer, text, templates.decision)
    said = [id_a if example["decision"] == "A" else id_b]
    if example["rationale"]:
        said += response_ids(tokenizer, example["rationale"])
    return [(prompt, False), (said, True)], cut


def sft_pieces(messages: Sequence[Mapping[str, str]], templates: Templates,
               tokenizer) -> list[tuple[str, bool]]:
    """A dialogue as the chat template writes it, in texts that are not learnt and learnt in turn.

    Before each assistant turn stands what asks for it (the generation prompt); what the template
    adds to make it a turn is learnt up to its EOS, what follows the EOS is not.
    """
    after_answer = _after_answer(messages, templates, tokenizer)
    learnt_end, rest = _through(after_answer, tokenizer.eos_token)
    pieces, written, pending = [], "", ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = chat_text(templates, tokenizer, messages[:place], add_generation_prompt=True)
        whole = chat_text(templates, tokenizer, messages[:place + 1], add_generation_prompt=False)
        turn = whole[len(prompt):]
        if not (prompt.startswith(written) and whole.startswith(prompt)
                and turn.endswith(after_answer)):
            raise InputError("the chat template writes a turn in another way once others follow, "
                             "so it cannot be told what is learnt; set templates.chat, for example "
                             "to configs/templates/chat.jinja")
        answer = turn.removesuffix(after_answer) + learnt_end
        pieces += [(pending + prompt[len(written):], False), (answer, True)]
        written, pending = whole, rest
    return pieces


def _after_answer(messages: Sequence[Mapping[str, str]], templates: Templates, tokenizer) -> str:
    """What the template writes after an answer, told by one whose words are known."""
    first = next(place for place, message in enumerate(messages)
                 if message["role"] == "assistant")
    probed = [*messages[:first], {"role": "assistant", "content": PROBE}]
    return chat_text(templates, tokenizer, probed, add_generation_prompt=False).rpartition(PROBE)[2]


def _through(text: str, end: str) -> tuple[str, str]:
    """The text up to and with `end`, and what follows; nothing of it where `end` is not there.

    >>> _through("</s>!", "</s>"), _through("<|end|>!", "</s>")
    (('</s>', '!'), ('', '<|end|>!'))
    """
    before, found, after = text.partition(end)
    return (before + found, after) if found else ("", text)
