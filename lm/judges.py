"""Who judges: a server, a model in this process, rules, or a person, behind one small protocol.

    judge = ServerJudge(server, load_judge_prompt("annotator"))
    for index, judgment in judge({0: question, 1: question}):
        judgment.text  # what is wrong; None: nothing; no judgment at all where judgment.error

A judge takes questions by index and yields judgments as they come, each once, in any order. A
server judge that has to stop (budget, refused key) raises after those it got.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lm.models import context_of
from lm.records import (
    InputError,
    Record,
    check_fields,
    join_input,
    read_records,
    write_lines,
    write_text,
)
from lm.rules import judge_by_rules
from lm.verdicts import JudgePrompt, Judgment, read_perfect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm.replies import Request
    from lm.server import Server

COLUMNS = ("key", "instruction", "response", "judgment")  # of a sheet
FORMULA = ("=", "+", "-", "@")  # what a spreadsheet would run


@dataclass(frozen=True)
class Question:
    """A response to judge, and the record that it belongs to."""

    instruction: str
    response: str
    record: Record = field(default_factory=dict)

    @classmethod
    def of(cls, record: Record) -> "Question":
        """The response in a record's `output` to its instruction and input."""
        return cls(join_input(record), record["output"], record)


class Judge(Protocol):
    """Anything that yields a judgment for each question."""

    def __call__(self, questions: Mapping[int, Question]) -> Iterator[tuple[int, Judgment]]:
        """Yield (index, judgment) as they come."""


@dataclass(frozen=True)
class RuleJudge:
    """The rules of lm/rules.py on a record's `constraints`; the seed varies the wording."""

    seed: int = 0

    def __call__(self, questions: Mapping[int, Question]) -> Iterator[tuple[int, Judgment]]:
        """Yield (index, judgment), in order."""
        for index, question in questions.items():
            yield index, Judgment(judge_by_rules(question.record, question.response, self.seed))


@dataclass(frozen=True)
class ServerJudge:
    """A model behind an OpenAI-compatible server. Seed 0 is left out of the requests."""

    server: "Server"
    prompt: JudgePrompt
    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0

    def requests(self, questions: Mapping[int, Question]) -> dict[int, "Request"]:
        """What is asked."""
        from lm.replies import Request

        return {index: Request(self.prompt.render(question.instruction, question.response),
                               self.max_new_tokens, self.temperature, seed=self.seed or None)
                for index, question in questions.items()}

    def __call__(self, questions: Mapping[int, Question]) -> Iterator[tuple[int, Judgment]]:
        """Yield (index, judgment) as replies come; useless ones do not stay in the cache."""
        requests = self.requests(questions)
        for index, reply in self.server.ask(requests):
            judgment = (Judgment(error=reply.error) if reply.error else
                        self.prompt.read(reply.text, reply.finish_reason))
            if judgment.error:
                self.server.forget(requests[index])
            yield index, judgment


@dataclass(frozen=True)
class LocalJudge:
    """A model in this process, such as the AI judge that scripts/train_ai_judge.sh trains."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    prompt: JudgePrompt
    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    batch_tokens: int = 16384

    def __call__(self, questions: Mapping[int, Question]) -> Iterator[tuple[int, Judgment]]:
        """Yield (index, judgment) batch by batch; prompts that do not fit have failed."""
        from lm.generation import generate, ids_of

        context = context_of(self.model)
        rows = {}
        for index, question in questions.items():
            ids = ids_of(self.tokenizer, self.prompt.render(question.instruction,
                                                            question.response))
            if context and len(ids) + self.max_new_tokens > context:
                yield index, Judgment(error=f"its prompt has {len(ids)} tokens, too many for the "
                                            f"judge's context of {context}")
            else:
                rows[index] = ids
        for index, response in generate(self.model, self.tokenizer, rows, seed=self.seed,
                                        max_new_tokens=self.max_new_tokens,
                                        temperature=self.temperature,
                                        token_budget=self.batch_tokens):
            yield index, self.prompt.read(response.text, response.finish_reason)


@dataclass(frozen=True)
class HumanJudge:
    """A person, by way of a file to fill in (.csv or .jsonl): "perfect", or what is wrong.

    What is not in the file yet is added to it; what is not filled in yet has failed.
    """

    sheet: Path

    def __call__(self, questions: Mapping[int, Question]) -> Iterator[tuple[int, Judgment]]:
        """Yield (index, judgment), in order."""
        rows = {row["key"]: row for row in read_sheet(self.sheet)} if self.sheet.exists() else {}
        keys = {index: _key(question) for index, question in questions.items()}
        new = {keys[index]: {"key": keys[index], "instruction": question.instruction,
                             "response": question.response, "judgment": ""}
               for index, question in questions.items() if keys[index] not in rows}
        if new:
            rows |= new
            write_sheet(self.sheet, list(rows.values()))
        for index, key in keys.items():
            said = (rows[key]["judgment"] or "").strip()
            yield index, (read_perfect(said, by_a_person=True) if said else
                          Judgment(error=f"not filled in yet, in {self.sheet}"))


def read_sheet(path: Path) -> list[Record]:
    """The rows of a sheet, whatever a spreadsheet program separated them by."""
    if path.suffix != ".csv":
        rows = read_records(path)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8 text; save it as CSV in UTF-8") from error
        separator = max(",;\t", key=text.split("\n")[0].count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    check_fields(rows, path, {"key": (str,), "judgment": (str, type(None))})
    return rows


def write_sheet(path: Path, rows: list[Record]) -> None:
    """The rows with an empty place for the judgment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".csv":
        return write_lines(path, rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        shown = {name: f"'{row[name]}" for name in ("instruction", "response")
                 if str(row.get(name)).startswith(FORMULA)}
        writer.writerow(row | shown)
    return write_text(path, "\ufeff" + text.getvalue())  # so that spreadsheets know the encoding


def _key(question: Question) -> str:
    """Tells a response to an instruction from all others; no spreadsheet takes it for a number."""
    content = json.dumps([question.instruction, question.response])
    return f"r{hashlib.sha256(content.encode()).hexdigest()[:12]}"
