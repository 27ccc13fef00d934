"""Turn published critiques into CUT records (instruction, input, output, judgment, score, i_ans).

    python scripts/convert2alpaca.py --output data/shepherd.json \\
        --shepherd_model data/downloads/shepherd/human_data_for_model.jsonl \\
        --shepherd_raw data/downloads/shepherd/human_data_raw.jsonl
    python scripts/convert2alpaca.py --output data/summary-train.json \\
        --critiques data/downloads/critiques/train.jsonl.gz
    python scripts/convert2alpaca.py --output data/ultrafeedback-1000.json \\
        --ultrafeedback data/downloads/ultrafeedback --limit 1000

`scripts/download_data.py` fetches the inputs. `i_ans` is the corrected answer; CUT does not train
on it, the ILF baselines do. A record without a correction has no `i_ans`.

UltraFeedback: every rated response to some instructions, its `score` the mean of its ratings (1 to
5), without judgments: what DPO on rewards learns from, and annotate.py judges for CUT.

Shepherd: line k of both files is about the same answer, and both texts they share must be equal.

Summarization critiques (Saunders et al. 2022). The files were not at hand when this was written;
it assumes, and stops with the record's number where it finds otherwise:

    line      {"id": ?, "passage": {"text": ...} or text, "questions": [question, ...]},
              or one question with its "passage" beside it
    question  {"question": text, "answers": [answer, ...], "rankings": [number per answer]}
    answer    {"answer": text, "skip": ?, "critiques": [critique, ...] or null}
    critique  {"text": text, "refinement": text, null or absent}

where `rankings` and `skip` may also stand in a `feedback` object of their owner, each answer may
carry its own ranking instead, and a lone answer needs none.
"""

import random
import sys
from collections import Counter
from pathlib import Path
from types import NoneType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import (
    TYPE_NAMES,
    InputError,
    Record,
    check_fields,
    read_records,
    write_json,
    wrong_field,
)

POSITIVE_SCORE = 7  # the rating of answers nobody criticised, and CUT's mark of a positive record
NEGATIVE_SCORE = 1
DRAW_SEED = 42


def main(shepherd_model: str = "", shepherd_raw: str = "", critiques: str = "",
         ultrafeedback: str = "", limit: int = 0, output: str = "") -> None:
    """Write CUT records made from Shepherd (two files), summarization critiques or UltraFeedback.

    Args:
        shepherd_model: Shepherd's human_data_for_model.jsonl (.gz too).
        shepherd_raw: Shepherd's human_data_raw.jsonl, parallel to it (.gz too).
        critiques: a summarization critiques file, .jsonl or .jsonl.gz.
        ultrafeedback: the folder of UltraFeedback's files, or one of them.
        limit: of UltraFeedback, only so many instructions, drawn from all; 0 is all.
        output: the JSON file to write.
    """
    if not output:
        raise InputError("--output is missing; name the JSON file to write")
    if limit and not ultrafeedback:
        raise InputError("--limit is for --ultrafeedback alone; leave it out")
    skipped = Counter()
    shepherd = bool(shepherd_model or shepherd_raw)
    if critiques and not (shepherd or ultrafeedback):
        records, skipped = from_critiques(critiques)
    elif ultrafeedback and not (shepherd or critiques):
        records, skipped = from_ultrafeedback(ultrafeedback, limit)
    elif shepherd_model and shepherd_raw and not (critiques or ultrafeedback):
        records = from_shepherd(shepherd_model, shepherd_raw)
    else:
        raise InputError("give either --critiques, or both --shepherd_model and --shepherd_raw, or "
                         "--ultrafeedback")
    if not records:
        raise InputError(f"{critiques or ultrafeedback}: every question was skipped "
                         f"({_reasons(skipped)}); nothing to write")
    write_json(output, records)
    positives = sum(record["judgment"] is None for record in records)
    told = ("rated, not judged" if ultrafeedback
            else f"{positives} positive, {len(records) - positives} negative")
    print(f"{output}: {len(records)} records ({told}); skipped: {_reasons(skipped) or 'none'}")


def from_shepherd(model_file: str, raw_file: str) -> list[Record]:
    """One negative record a line; the corrected answer is known to the raw file only."""
    lines, raw_lines = read_records(model_file), read_records(raw_file)
    if len(lines) != len(raw_lines):
        raise InputError(f"{model_file} has {len(lines)} records and {raw_file} {len(raw_lines)}; "
                         "they must be parallel: take both from the same download")
    check_fields(lines, model_file, {"question": (str,), "answer": (str,), "feedback": (str,)})
    check_fields(raw_lines, raw_file, {"metadata": (dict,)})
    metadata = [{f"metadata.{field}": value for field, value in line["metadata"].items()}
                for line in raw_lines]
    check_fields(metadata, raw_file, {f"metadata.{field}": (str,) for field in
                                      ("context", "output_candidate", "output_correct")})
    records = []
    for index, (line, raw) in enumerate(zip(lines, metadata, strict=True)):
        for field, raw_field in (("question", "metadata.context"),
                                 ("answer", "metadata.output_candidate")):
            if line[field] != raw[raw_field]:
                raise InputError(f"{model_file}: record {index}: field '{field}' differs from "
                                 f"'{raw_field}' of the same record in {raw_file}; "
                                 "take both files from the same download")
        records.append({"id": line.get("id", index), "instruction": line["question"], "input": "",
                        "output": line["answer"], "judgment": line["feedback"],
                        "score": NEGATIVE_SCORE, "i_ans": raw["metadata.output_correct"]})
    return records


def from_critiques(file: str) -> tuple[list[Record], Counter]:
    """One record a question, and how many questions were skipped for which reason."""
    records, skipped = [], Counter()
    for index, line in enumerate(read_records(file)):
        where = f"{file}: record {index}"
        passage = _field(line, "passage", (str, dict), where)
        if isinstance(passage, dict):
            passage = _field(passage, "text", (str,), f"{where}: passage")
        nested = "questions" in line
        questions = _objects(line, "questions", where) if nested else [line]
        for number, question in enumerate(questions):
            place = f"{where}: question {number}" if nested else where
            record, reason = _from_question(passage, question, place)
            if record is None:
                skipped[reason] += 1
            else:
                name = line.get("id", index)
                records.append({"id": f"{name}-{number}" if nested else name, **record})
    return records, skipped


def from_ultrafeedback(path: str, limit: int) -> tuple[list[Record], Counter]:
    """A record for each rated response to the drawn instructions, and what was left out."""
    from self_judge.preferences import ranked_completions

    files = sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [path]
    if not files:
        raise InputError(f"{path}: holds no .jsonl file")
    lines = []
    for file in files:
        found = read_records(file)
        check_fields(found, str(file), {"instruction": (str,), "completions": (list, NoneType)})
        lines += [(f"{file}: record {index}", line) for index, line in enumerate(found)]
    if not 0 <= limit <= len(lines):
        raise InputError(f"--limit is {limit}; {path} has {len(lines)} instructions")
    records, skipped = [], Counter()
    for where, line in random.Random(DRAW_SEED).sample(lines, limit or len(lines)):
        try:
            completions, left_out = ranked_completions(line["completions"] or [])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        skipped.update(left_out)
        records += [{"instruction": line["instruction"], "input": "", "output": one.response,
                     "judgment": None, "score": one.score} for one in completions]
    return records, skipped


def _from_question(passage: str, question: Record, where: str) -> tuple[Record | None, str]:
    """The record of the question's best answer, or None and why there is none."""
    answers = _objects(question, "answers", where)
    if not answers:
        return None, "no answer"
    rankings = _rankings(question, answers, where)
    best = rankings.index(max(rankings))  # the first of equals
    answer, where = answers[best], f"{where}: answer {best}"
    if _label(answer, "skip", where):
        return None, "marked skip"
    text = _field(answer, "answer", (str, NoneType), where)
    if not text or not text.strip():
        return None, "empty answer"
    asked = _field(question, "question", (str,), where)
    record = {"instruction": f"{passage}\n{asked}", "input": "", "output": text}
    critiques = _objects(answer, "critiques", where)
    if not critiques:
        return {**record, "judgment": None, "score": POSITIVE_SCORE}, ""
    judgment = " ".join(_field(critique, "text", (str,), f"{where}: critique {number}")
                        for number, critique in enumerate(critiques))
    last = {"refinement": None, **critiques[-1]}
    refinement = _field(last, "refinement", (str, NoneType), f"{where}: last critique")
    if not refinement or not refinement.strip():
        return None, "empty refinement"
    return {**record, "judgment": judgment, "score": NEGATIVE_SCORE, "i_ans": refinement}, ""


def _rankings(question: Record, answers: list[Record], where: str) -> list[float]:
    """One number an answer, the highest for the best."""
    if len(answers) == 1:
        return [0]
    rankings = _label(question, "rankings", where)
    if rankings is None:
        rankings = [_label(answer, "rankings", f"{where}: answer {number}")
                    for number, answer in enumerate(answers)]
    if not (isinstance(rankings, list) and len(rankings) == len(answers)
            and all(type(rank) in (int, float) for rank in rankings)):
        raise InputError(f"{where}: field 'rankings' must be a list with a number for each of "
                         f"its {len(answers)} answers")
    return rankings


def _label(owner: Record, field: str, where: str) -> object:
    """What the labeller said of `owner`: in the object itself or in its `feedback`, else None."""
    if field in owner or owner.get("feedback") is None:
        return owner.get(field)
    return _field(owner, "feedback", (dict,), where).get(field)


def _field(owner: Record, field: str, types: tuple[type, ...], where: str) -> object:
    if wrong := wrong_field(owner, {field: types}):
        raise InputError(f"{where}: {wrong}")
    return owner[field]


def _objects(owner: Record, field: str, where: str) -> list[Record]:
    """The list of objects in that field; null is an empty list, a missing field is not."""
    values = _field(owner, field, (list, NoneType), where) or []
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(f"{where}: field '{field}' holds {TYPE_NAMES[type(value)]} at "
                             f"position {number}; expected objects")
    return values


def _reasons(skipped: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())


if __name__ == "__main__":
    run(main)
