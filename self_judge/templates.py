"""What the model reads: chat frames, judge prompts and decisions, from the `templates:` section.

    templates = load_templates("configs/templates/judge_hh.yaml")
    prompts = judge_templates(templates, tokenizer)  # {"default": whole prompt with three fields}
    ids, cut = judge_prompt_ids(tokenizer, prompts["default"], context, one, other, max_length=2048)
    id_a, id_b = decision_ids(tokenizer, prompts["default"])

A judge prompt is the chat frame around `system` and `user`, then what the judge's turn begins with
(`assistant`); the decision, ` A` or ` B`, is its next token. It becomes ids in one way, here, in
training and at judgment. Special tokens at the start are the tokenizer's own rule; a BOS that the
chat template writes too stays single.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.records import InputError
from lm.templates import ids_in_pieces, prompt_ids
from self_judge.config import check_keys

TEMPLATES = "configs/templates/judge_hh.yaml"  # of scripts, where no others are named
ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("context", "response_a", "response_b")
FIELD = re.compile(r"\{(context|response_a|response_b)\}")
BRACED = re.compile(r"\{(\w+)\}")
PATH = re.compile(r"[^\n{}]*\.(ya?ml|jinja2?|txt|md)")  # a text that is one is the path of a file
DECISION = " {decision}"
RATIONALE = "\n{evaluation_a}\n{evaluation_b}"
KEYS = ("skip_first_token", "chat", "system", "user", "assistant", "judge", "decision_rationale")


@dataclass(frozen=True)
class JudgeTemplate:
    """One judge prompt: the system and user messages, and how the judge's own turn begins."""

    system: str
    user: str
    assistant: str


@dataclass(frozen=True)
class Templates:
    """The `templates:` section; `rationale` is empty where judgments are the decision alone."""

    judge: dict[str, JudgeTemplate]  # by principle; {"default": ...} without principles
    chat: str | None = None  # Jinja; None is the tokenizer's own
    system: str = ""  # the system message of dialogues that bring none
    user: str = ""  # markers of the turns, for `get_conditional_labels` only
    assistant: str = ""
    skip_first_token: bool = False  # of the markers' ids
    decision: str = DECISION
    rationale: str = ""


def load_templates(section: Mapping | str | Path) -> Templates:
    """Check the section, or the YAML file that it is; texts may be the paths of files too."""
    section = read_section(section)
    check_keys(section, KEYS, "templates")
    judge = section.get("judge")
    if not isinstance(judge, Mapping) or not judge:
        raise InputError("templates.judge is missing; expected {principle: {system, user, "
                         "assistant}}, with the one key 'default' where there are no principles")
    decision, rationale = _decision_rationale(section.get("decision_rationale"))
    return Templates(
        judge={str(name): _judge(template, f"templates.judge.{name}")
               for name, template in judge.items()},
        chat=_text(section, "chat", "templates") or None,
        system=_text(section, "system", "templates"), user=_text(section, "user", "templates"),
        assistant=_text(section, "assistant", "templates"),
        skip_first_token=bool(section.get("skip_first_token")),
        decision=decision, rationale=rationale)


def read_section(section: Mapping | str | Path) -> dict:
    """The section as a dict; a file that it is, or names as `file`, gives what it leaves open."""
    if isinstance(section, str | Path):
        section = {"file": str(section)}
    if not isinstance(section, Mapping):
        raise InputError("templates is missing; give a section, or the path of a YAML file such as "
                         "configs/templates/judge_hh.yaml")
    own = dict(section)
    name = own.pop("file", None)
    return own if name is None else _yaml(name) | own


def chat_text(templates: Templates, tokenizer, messages: Sequence[Mapping[str, str]],
              add_generation_prompt: bool) -> str:
    """Messages `{role, content}` as the chat template writes them."""
    import jinja2

    if templates.chat is None and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; set templates.chat, for example to "
                         "configs/templates/chat.jinja")
    try:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=templates.chat, tokenize=False,
            add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"the chat template cannot write the turns {roles} ({error}); leave the "
                         "system text empty if it takes none, or set templates.chat") from error


def judge_templates(templates: Templates, tokenizer) -> dict[str, str]:
    """Per principle the whole judge prompt as text, with its three fields still in it."""
    return {name: judge_text(templates, tokenizer, name) for name in templates.judge}


def judge_text(templates: Templates, tokenizer, principle: str) -> str:
    """One principle's whole judge prompt."""
    template = templates.judge[principle]
    system = [{"role": "system", "content": template.system}] if template.system else []
    messages = [*system, {"role": "user", "content": template.user}]
    text = chat_text(templates, tokenizer, messages, add_generation_prompt=True)
    check_judge_template(text, f"templates.judge.{principle}, in the chat frame,")
    return text + template.assistant


def check_judge_template(text: str, name: str = "judge template") -> None:
    """Stop unless {context}, {response_a} and {response_b} are in the text once each."""
    if not isinstance(text, str):
        raise InputError(f"{name} is of type {type(text).__name__}; expected a text with "
                         f"{', '.join(f'{{{field}}}' for field in FIELDS)}")
    found = FIELD.findall(text)
    for field in FIELDS:
        if found.count(field) == 1:
            continue
        near = difflib.get_close_matches(field, set(BRACED.findall(text)) - set(FIELDS), n=1)
        hint = f"; did you mean it by {{{near[0]}}}?" if near else ""
        raise InputError(f"{name} has {{{field}}} {found.count(field)} times; expected each of "
                         f"{', '.join(f'{{{field}}}' for field in FIELDS)} once{hint}")


def fill(text: str, *, context: str, response_a: str, response_b: str) -> str:
    """The prompt for a pair; braces in the texts are safe."""
    return "".join(_pieces(text, context, response_a, response_b))


def judge_prompt_ids(tokenizer, text: str, context: str, response_a: str, response_b: str,
                     max_length: int) -> tuple[list[int], bool]:
    """Ids of a judge prompt, and whether something was cut to leave room for the decision.

    With the decision it has at most `max_length` tokens: the context loses its start, then the
    longer response its end, until both are of one length and lose theirs together. The template's
    own text always stays.
    """
    texts = _pieces(text, context, response_a, response_b)
    ids = prompt_ids(tokenizer, "".join(texts))
    excess = len(ids) + 1 - max_length
    if excess <= 0:
        return ids, False
    pieces = ids_in_pieces(tokenizer, texts)
    places = {field: 2 * place + 1 for place, field in enumerate(FIELD.findall(text))}
    at = places["context"]
    lost = min(excess, len(pieces[at]))
    pieces[at] = pieces[at][lost:]
    if excess > lost:
        a, b = places["response_a"], places["response_b"]
        room = len(pieces[a]) + len(pieces[b]) - (excess - lost)
        if room < 2:
            frame = sum(map(len, pieces[::2]))
            raise InputError(f"max_length {max_length} leaves no room for the responses: the "
                             f"judge template alone has {frame} tokens; raise it")
        pieces[a], pieces[b] = _shortened(pieces[a], pieces[b], room)
    return [token for piece in pieces for token in piece], True


def decision_ids(tokenizer, text: str, decision: str = DECISION) -> tuple[int, int]:
    """Ids of A and B as they follow the judge prompt `text`, one token each."""
    end = FIELD.split(text)[-1] or "."
    head = tokenizer(end, add_special_tokens=False)["input_ids"]
    found = []
    for letter in "AB":
        said = decision.replace("{decision}", letter)
        whole = tokenizer(end + said, add_special_tokens=False)["input_ids"]
        if whole[:len(head)] != head or len(whole) != len(head) + 1:
            raise InputError(f"the decision {said!r} is not one token of its own after "
                             f"{end[-20:]!r}; change decision_rationale.decision or the end of "
                             "the judge's assistant text (no space at its end)")
        found.append(whole[-1])
    if found[0] == found[1]:
        raise InputError(f"the tokenizer has the same token for both decisions, {decision!r} with "
                         "A and with B; choose another decision_rationale.decision")
    return found[0], found[1]


def asked_of(templates: Templates, tokenizer) -> dict:
    """What `judge_pairs` is told of templates: `judge_templates`, `token_id_a`, `token_id_b`."""
    texts = judge_templates(templates, tokenizer)
    id_a, id_b = decision_ids(tokenizer, next(iter(texts.values())), templates.decision)
    return {"judge_templates": texts, "token_id_a": id_a, "token_id_b": id_b}


def _shortened(a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both cut at their ends to at most one common length, so that swapping them changes nothing.

    >>> _shortened([1, 2, 3, 4, 5], [6, 7], room=5)
    ([1, 2, 3], [6, 7])
    >>> _shortened([1, 2, 3], [4, 5, 6], room=5)
    ([1, 2], [4, 5])
    """
    limit = max(room // 2, room - min(len(a), len(b)))
    return a[:limit], b[:limit]


def _pieces(text: str, context: str, response_a: str, response_b: str) -> list[str]:
    """The prompt in pieces: own text and a field in turn, own text first and last."""
    fields = {"context": context, "response_a": response_a, "response_b": response_b}
    return [piece if place % 2 == 0 else fields[piece]
            for place, piece in enumerate(FIELD.split(text))]


def _judge(section: object, where: str) -> JudgeTemplate:
    if not isinstance(section, Mapping):
        raise InputError(f"{where} must have the keys system, user and assistant")
    check_keys(section, ("system", "user", "assistant"), where)
    template = JudgeTemplate(*(_text(section, key, where)
                               for key in ("system", "user", "assistant")))
    check_judge_template(template.user, f"{where}.user")
    for key in ("system", "assistant"):
        if FIELD.search(getattr(template, key)):
            raise InputError(f"{where}.{key} has a field; the fields belong into {where}.user")
    return template


def _decision_rationale(section: object) -> tuple[str, str]:
    """Left out, judgments are the decision alone; so they are with an empty rationale."""
    where = "templates.decision_rationale"
    if section is None:
        return DECISION, ""
    if not isinstance(section, Mapping):
        raise InputError(f"{where} must have the keys decision and rationale")
    check_keys(section, ("decision", "rationale"), where)
    decision = _text(section, "decision", where) or DECISION
    rationale = _text(section, "rationale", where) if "rationale" in section else RATIONALE
    for text, key, fields in ((decision, "decision", ["decision"]),
                              (rationale, "rationale", ["evaluation_a", "evaluation_b"])):
        if text and sorted(BRACED.findall(text)) != fields:
            names = " and ".join(f"{{{field}}}" for field in fields)
            raise InputError(f"{where}.{key} is {text!r}; expected a text with {names}, once each")
    return decision, rationale


def _yaml(name: str) -> dict:
    import yaml

    try:
        section = yaml.safe_load(_read(name, "templates"))
    except yaml.YAMLError as error:
        raise InputError(f"{name}: broken YAML ({' '.join(str(error).split())})") from error
    if isinstance(section, Mapping) and "templates" in section:  # a run's config, whole
        return read_section(section["templates"])
    if not isinstance(section, Mapping):
        raise InputError(f"{name}: holds no keys; expected {', '.join(KEYS)}")
    return dict(section)


def _text(section: Mapping, key: str, where: str) -> str:
    value = section.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}.{key} is {value!r}; expected a text, or the path of one")
    return _read(value, f"{where}.{key}") if PATH.fullmatch(value) else value


def _read(name: str, where: str) -> str:
    """A file's text; relative paths start here, or else in the repository."""
    for path in (Path(name).expanduser(), ROOT / name):
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: is not UTF-8 text") from error
            return text.removesuffix("\n")  # the one with which editors end a file
    raise InputError(f"{where}: no such file {name}")
