"""Prompt templates, and the one way text becomes token ids.

A template is a JSON file with two texts, `prompt` (uses `{instruction}`) and
`prompt_with_judgment` (uses `{instruction}` and `{judgment}`). `load_template` takes a name
(`alpaca` is `configs/templates/alpaca.json`) or a path.

Prompt and response are tokenized apart, so the boundary between them is exact: a model that
answers the prompt at inference sees the same prompt ids as in training, and both halves of a CUT
pair hold the same response ids whatever their prompts end with. Special tokens at the start are
the tokenizer's own rule (Llama-2 and Llama-3 put a BOS, SmolLM2 does not); EOS ends a response.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.records import InputError

TEMPLATES = Path(__file__).resolve().parents[1] / "configs" / "templates"
FIELD = re.compile(r"\{(instruction|judgment)\}")
# Texts after which a response is tokenized: it never merges with all of them. A newline first,
# as Alpaca prompts end with one; a letter for responses that begin with newlines.
ANCHORS = ("\n", "a", "0", ".")


@dataclass(frozen=True)
class Template:
    """Two prompt texts with fields; `name` is how the user asked for it."""

    name: str
    prompt: str
    prompt_with_judgment: str

    def render(self, instruction: str, judgment: str | None = None) -> str:
        """The prompt for an instruction, with the judgment if there is one; braces are safe."""
        return "".join(self.pieces(instruction, judgment))

    def pieces(self, instruction: str, judgment: str | None = None,
               response: str | None = None) -> list[str]:
        """The prompt in pieces: own text and a field in turn, own text first and last.

        With a `response` the prompt asks for its judgment.
        """
        text = self.prompt if judgment is None else self.prompt_with_judgment
        fields = {"instruction": instruction, "judgment": judgment}
        pieces = [piece if place % 2 == 0 else fields[piece]
                  for place, piece in enumerate(FIELD.split(text))]
        return pieces if response is None else [*pieces, response, "\n\n### Judgment:\n"]

    @property
    def fixed_judgment(self) -> str:
        """What `prompt`, as alpaca_positive's, has where the other one has its judgment; or ""."""
        head, _, rest = self.prompt_with_judgment.partition("{judgment}")
        is_like_it = self.prompt.startswith(head) and self.prompt.endswith(rest)
        return self.prompt[len(head):len(self.prompt) - len(rest)] if is_like_it else ""

    def chat_template(self) -> str:
        """Jinja that writes a dialogue: the prompt without a judgment, turn after turn.

        Later turns, and those after a system message, leave out what stands before the paragraph
        of the instruction, such as Alpaca's header. Responses end with EOS, as in training: where
        they do not, a model goes on and writes the next instruction itself.
        """
        head, field, rest = self.prompt.partition("{instruction}")
        later = head.rpartition("\n\n")[2] + field + rest
        return ("{%- for message in messages -%}{%- if message.role == 'user' -%}"
                f"{{{{- ({self.prompt!r} if loop.first else {later!r})"
                " | replace('{instruction}', message.content) -}}"
                "{%- else -%}{{- message.content -}}{%- if message.role == 'assistant' -%}"
                "{{- eos_token -}}{%- endif -%}{{- '\n\n' -}}{%- endif -%}{%- endfor -%}")


def load_template(name: str) -> Template:
    """Read a template by name or path and check its fields."""
    path = Path(name) if Path(name).suffix == ".json" else TEMPLATES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.json")))
        raise InputError(f"{name}: unknown template; use one of {known}, or the path of a .json")
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: broken JSON ({error.msg})") from error
    texts = texts if isinstance(texts, dict) else {}
    for key, fields in (("prompt", {"instruction"}),
                        ("prompt_with_judgment", {"instruction", "judgment"})):
        if not isinstance(texts.get(key), str) or set(FIELD.findall(texts[key])) != fields:
            names = " and ".join(f"{{{field}}}" for field in sorted(fields))
            raise InputError(f"{path}: field '{key}' must be a text with {names}")
    return Template(str(name), texts["prompt"], texts["prompt_with_judgment"])


def prompt_ids(tokenizer, text: str) -> list[int]:
    """Ids of a prompt with the tokenizer's own special tokens before it and none after it.

    A chat template may write the BOS that the tokenizer adds as well; it stays single.
    """
    ids = tokenizer(text)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def response_ids(tokenizer, text: str) -> list[int]:
    """Ids of a response as it continues a prompt, EOS included."""
    ids = continuation_ids(tokenizer, text)
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def continuation_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text as it continues another.

    Tokenizing the text alone would be wrong for SentencePiece, which puts a space before it.
    """
    for anchor in ANCHORS:
        head = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        whole = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        if whole[:len(head)] == head:
            return whole[len(head):]
    raise InputError(f"the tokenizer merges {text[:20]!r} with every text before it")


def ids_in_pieces(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of a prompt that is made of several texts, split into those of each text.

    The whole prompt is tokenized, then found from its end which ids spell which text.
    """
    left = prompt_ids(tokenizer, "".join(texts))
    pieces: list[list[int]] = []
    for place in range(len(texts) - 1, 0, -1):
        known = sum(map(len, pieces))
        after = tokenizer("".join(texts[place:]), add_special_tokens=False)["input_ids"]
        whole = left + [token for piece in pieces for token in piece]
        size = max(common_start(whole[::-1], after[::-1]) - known, 0)
        pieces.insert(0, left[len(left) - size:])
        left = left[:len(left) - size]
    return [left, *pieces]


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
