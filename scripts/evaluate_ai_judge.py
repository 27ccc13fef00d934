"""Does a judge agree with judgments that are known? Readable ones, and decisions that are right.

    python scripts/annotate.py --data_path known.json --output_path judged.json --judge local \\
        --model runs/ai_judge/model --max_failed 1
    python scripts/evaluate_ai_judge.py --truth known.json --judged judged.json

A decision is whether anything is wrong with a response; a judgment that cannot be read decides
nothing, and counts as wrong. What the judgments say is shown, not counted. Any judge of
scripts/annotate.py can be measured. Cost: no money, a second on a CPU.
"""

import random
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.journal import finished_lines
from lm.records import InputError, Record, check_fields, join_input, read_records, write_json
from lm.shares import Share, wilson
from lm.tables import table
from scripts.annotate import contents_of, journal_file
from scripts.annotate import judged as judged_in

MEANINGS = {
    "readable": "judgments that could be read",
    "right": "right about whether there is a fault (unreadable is wrong)",
    "right_perfect": "... of responses without a fault",
    "right_faulty": "... of responses with one",
    "majority": "right, had it always said what is more frequent",
}


def main(truth: str, judged: str, output: str = "", show: int = 3) -> None:
    """Print shares with 95 % intervals, and some judgments beside the known ones.

    Args:
        truth: records with `judgment`, null where nothing is wrong: the --data_path of annotate.py.
        judged: the --output_path of annotate.py; what it wrote beside that is read.
        output: JSON file for the numbers; none if empty.
        show: so many responses are shown with both judgments.
    """
    records, settings, lines = read_known(truth, Path(judged))
    verdicts = agreement(records, lines)
    shares = {name: wilson(sum(hits), len(hits)) for name, hits in verdicts.items()}
    name = settings.get("model", settings["judge"])
    print("\n".join([f"{name}, {len(records)} known judgments", "", *report(shares)]))
    print("\n".join(side_by_side(records, lines, show)))
    if output:
        write_json(output, {"benchmark": "ai_judge", "model": name, "truth": truth,
                            "metrics": {key: asdict(share) for key, share in shares.items()},
                            "verdicts": verdicts})
        print(f"\nwritten: {output}")


def read_known(truth: str, judged: Path) -> tuple[list[Record], Record, list[Record]]:
    """The records whose judgment is known, the settings of the judge, and what it said of each."""
    from cut.data import FIELDS, judgment_of

    records = read_records(truth)
    check_fields(records, truth, **FIELDS)
    settings, lines = read_judgments(judged, truth, records)
    known = [record | {"judgment": judgment_of(record)} for record in records]
    pairs = [(record, line) for record, line in zip(known, lines, strict=True)
             if record["judgment"] != ""]
    if failed := len(records) - len(pairs):
        print(f"{truth}: {failed} failed judgments left out")
    if not pairs:
        raise InputError(f"{truth}: no record has a judgment; nothing is known to compare with")
    return [record for record, _ in pairs], settings, [line for _, line in pairs]


def read_judgments(judged: Path, truth: str, records: list[Record]) -> tuple[Record, list[Record]]:
    """The settings of annotate.py, and what it wrote about each record, a failure if nothing else.

    Its journal may hold more judgments, of other records.
    """
    journal = journal_file(judged)
    if not journal.is_file():
        raise InputError(f"{journal}: no such file; run annotate.py on {truth} with --output_path "
                         f"{judged}")
    settings, *lines = finished_lines(journal) or [{}]
    if not lines:
        raise InputError(f"{journal}: holds no judgments; run annotate.py on {truth}, to its end")
    contents = contents_of(settings["judge"], records)
    good, failed = judged_in(lines, contents)
    last = good | failed
    if missing := [index for index in range(len(records)) if index not in last]:
        raise InputError(f"{judged}: record {missing[0]} of {truth} and {len(missing) - 1} more "
                         "are not judged there; run annotate.py on that file, to its end")
    return settings, [last[index] for index in range(len(records))]


def agreement(records: list[Record], lines: list[Record]) -> dict[str, list[bool]]:
    """The verdicts that the shares of MEANINGS are of; those of nothing are left out."""
    perfect = [record["judgment"] is None for record in records]
    right = [line["status"] == "ok" and (line["judgment"] is None) == known
             for known, line in zip(perfect, lines, strict=True)]
    counted = {
        "readable": [line["status"] == "ok" for line in lines],
        "right": right,
        "right_perfect": [hit for hit, known in zip(right, perfect, strict=True) if known],
        "right_faulty": [hit for hit, known in zip(right, perfect, strict=True) if not known],
        "majority": [known == (2 * sum(perfect) >= len(perfect)) for known in perfect],
    }
    return {name: hits for name, hits in counted.items() if hits}


def report(shares: dict[str, Share]) -> Iterator[str]:
    """What is printed."""
    yield table(["", "of", "share, %", "95 % interval"], [
        [MEANINGS[name], str(share.total), f"{100 * share.share:.1f}",
         f"{100 * share.low:.1f} to {100 * share.high:.1f}"] for name, share in shares.items()])


def side_by_side(records: list[Record], lines: list[Record], count: int) -> Iterator[str]:
    """Some responses with the known judgment and the judge's, a fixed draw."""
    order = random.Random(0).sample(range(len(records)), len(records))
    for index in order[:count]:
        record, line = records[index], lines[index]
        said = line["judgment"] if line["status"] == "ok" else f"({line['error']}) {line['raw']}"
        yield ""
        for head, text in (("instruction", join_input(record)), ("response", record["output"]),
                           ("known", record["judgment"]), ("judge", said)):
            short = textwrap.shorten("(nothing is wrong)" if text is None else text, 300)
            yield from textwrap.wrap(short, 100, initial_indent=f"{head:>11}  ",
                                     subsequent_indent=" " * 13)


if __name__ == "__main__":
    run(main)
