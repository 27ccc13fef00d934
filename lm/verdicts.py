"""How a judge is asked about a response, and what its reply is taken for.

A judge prompt is a YAML file in configs/templates: either `system` and `user` messages for a chat
model, or one text, `prompt`, that a model continues. `verdict` says how the reply is read:

    perfect  a reply that begins with "perfect" (any case) is positive, any other is the judgment
    yes_no   the last line is Yes. or No.: whether the response is perfect; before it, the judgment

What a model thinks first (<think> ... </think>) is no part of its reply. One that was cut off, that
refuses, or that names no fault is no judgment but a failure.
"""

import re
from dataclasses import dataclass, replace

from lm.prompts import FIELD, fill, read_prompt
from lm.records import InputError, is_object

KEYS = {"perfect": {"verdict", "system", "user"},
        "yes_no": {"verdict", "prompt", "target", "positive"}}
PERFECT = re.compile(r"[\s\"'*_“‘]*perfect\b", re.IGNORECASE)
DECISION = re.compile(r"(.*\n)?\W*(yes|no)\W*", re.IGNORECASE | re.DOTALL)
# Some chat templates write the opening tag themselves; and a judgment may speak of such tags
THOUGHTS = re.compile(r"<think>.*?(</think>\s*|\Z)|(.*?\n)?[ \t]*</think>\s*|"
                      r".*?</think>[ \t]*\n\s*", re.IGNORECASE | re.DOTALL)
REFUSAL = re.compile(r"\W*(unfortunately\W+)?"
                     r"((i['’]m|i am) (very )?sorry|sorry|i apologi[sz]e|"
                     r"as an? (ai|(large )?language model)\b[^.!?\n]{0,60}?\bi\b|"
                     r"i (must )?decline|"
                     r"i (can ?not|can['’]t|won['’]t|will not|am (not able|unable))|"
                     r"i['’]m (not able|unable))", re.IGNORECASE)
# Not as it was asked to say it, so that nobody knows what was meant
NO_FAULT = re.compile(r"""\W*(
    ((the|this|your)\s)? (response|answer|output|it) (['’]s|\s(is|was|looks))? \W*
        ((very|completely|absolutely)\s)? (perfect|flawless|correct|fine|good) |
    correct | looks\sgood |
    (there\s(are|were)\s)? no\s([a-z]+\s)?(mistakes?|errors?|faults?|issues?|problems?)
        (\s(were\s)?found)? (\s(in|with)\s(the|this)\s(response|answer))? |
    none | n/?a | \$?error\$? | \{\s*['"]error['"].*\} )\W*""", re.IGNORECASE | re.VERBOSE)


@dataclass(frozen=True)
class Judgment:
    """What a judge said of a response. Where there is an `error`, there is no judgment."""

    text: str | None = None  # what is wrong with the response; None: nothing is
    error: str = ""
    raw: str = ""  # the judge's own words

    @property
    def status(self) -> str:
        """`ok` or `failed`."""
        return "failed" if self.error else "ok"


@dataclass(frozen=True)
class JudgePrompt:
    """A judge prompt; `user` is the text itself where there are no messages."""

    name: str
    verdict: str
    user: str
    system: str | None = None
    target: str = ""
    positive: str = ""

    def render(self, instruction: str, response: str) -> str | list[dict[str, str]]:
        """A text to continue or messages to answer; braces in the texts are safe."""
        text = fill(self.user, instruction=instruction, response=response)
        if self.verdict == "yes_no":
            return text
        return [{"role": "system", "content": self.system}, {"role": "user", "content": text}]

    def completion(self, judgment: str | None) -> str:
        """What a judge is trained to reply; `read` gives the judgment back."""
        said, decision = (self.positive, "Yes.") if judgment is None else (judgment.strip(), "No.")
        return fill(self.target, judgment=said, decision=decision)

    def read(self, reply: str, finish_reason: str = "stop") -> Judgment:
        """The judgment in a reply."""
        read = read_perfect if self.verdict == "perfect" else read_yes_no
        said = reply.strip()
        if thoughts := THOUGHTS.match(said):
            said = said[thoughts.end():]
        found = replace(read(said), raw=reply)
        ends = found.text is None or self.verdict == "yes_no"  # it tells that it is complete
        if finish_reason == "length" and (found.error or not ends):
            return Judgment(error="cut off before its end", raw=reply)
        return found


def read_perfect(reply: str, by_a_person: bool = False) -> Judgment:
    """
    >>> read_perfect("Perfect.").text, read_perfect("Too long.").text
    (None, 'Too long.')
    """
    if PERFECT.match(reply):
        return Judgment(raw=reply)
    return negative(reply, reply, by_a_person)


def read_yes_no(reply: str) -> Judgment:
    """
    >>> read_yes_no("Too long.\\nNo."), read_yes_no("Too long.").error
    (Judgment(text='Too long.', error='', raw='Too long.\\nNo.'), 'has no last line Yes. or No.')
    """
    match = DECISION.fullmatch(reply)
    if not match:
        return Judgment(error="has no last line Yes. or No.", raw=reply)
    if match[2].lower() == "yes":
        return Judgment(raw=reply)
    return negative((match[1] or "").strip(), reply)


def negative(text: str, raw: str, by_a_person: bool = False) -> Judgment:
    """The judgment that a text is, which says what is wrong; failed if it does not.

    People do not refuse: theirs may begin with "Sorry".
    """
    if not re.search(r"\w", text):
        return Judgment(error="says nothing", raw=raw)
    if NO_FAULT.fullmatch(text) or is_object(text):  # as servers put an error in a reply's place
        return Judgment(error="names no fault", raw=raw)
    if REFUSAL.match(text) and not by_a_person:
        return Judgment(error="refuses to judge", raw=raw)
    return Judgment(text, raw=raw)


def load_judge_prompt(name: str) -> JudgePrompt:
    """Read a judge prompt by name or path and check its fields."""
    path, texts = read_prompt(name)
    keys = KEYS.get(texts.get("verdict"))
    if keys is None or set(texts) != keys or not all(isinstance(texts[key], str) for key in keys):
        kinds = "; or ".join(", ".join(sorted(keys)) for keys in KEYS.values())
        raise InputError(f"{path}: expected these keys, all with texts: {kinds}; verdict is "
                         "perfect or yes_no")
    for key, fields in (("user", ["instruction", "response"]),
                        ("prompt", ["instruction", "response"]),
                        ("target", ["decision", "judgment"])):
        if key in texts and sorted(FIELD.findall(texts[key])) != fields:
            names = " and ".join(f"{{{field}}}" for field in fields)
            raise InputError(f"{path}: field '{key}' must hold {names} once each and no others")
    user = texts.get("user") or texts.get("prompt")
    return JudgePrompt(name, texts["verdict"], user, texts.get("system"),
                       texts.get("target", ""), texts.get("positive", ""))
