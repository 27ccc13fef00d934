"""Answered questions of MT-Bench and VicunaEval, as scripts/generate_dialogues.py writes them."""

from types import NoneType

from lm.records import InputError, Record, check_fields, read_records, wrong_field


def read_dialogues(path: str) -> list[Record]:
    """Answered questions, no number twice, with as many outputs as turns, at least one."""
    records = read_records(path)
    check_fields(records, path, {"question_id": (int, str), "category": (str,), "turns": (list,),
                                 "outputs": (list,), "generator": (str,)}, {"reference": (list,)})
    for index, record in enumerate(records):
        if not record["turns"] or len(record["turns"]) != len(record["outputs"]):
            raise InputError(f"{path}: record {index}: has {len(record['turns'])} turns and "
                             f"{len(record['outputs'])} outputs; make the answers with "
                             "scripts/generate_dialogues.py")
        for field in ("turns", "outputs"):
            check_entries(f"{path}: record {index}", field, record[field], str)
        check_entries(f"{path}: record {index}", "reference", record.get("reference", []),
                      str, NoneType)
    by_question(records, path)
    return records


def check_entries(where: str, field: str, entries: object, *kinds: type) -> None:
    """Stop unless a field is a list of entries of these kinds."""
    wrong = wrong_field({field: entries}, {field: (list,)})
    if not wrong:
        numbered = {f"{field}[{place}]": entry for place, entry in enumerate(entries)}
        wrong = wrong_field(numbered, dict.fromkeys(numbered, kinds))
    if wrong:
        raise InputError(f"{where}: {wrong}")


def by_question(records: list[Record], path: str) -> dict[str, Record]:
    """The records by their question's number or name as text, so that 1 is "1"; none twice."""
    found: dict[str, Record] = {}
    for index, record in enumerate(records):
        name = str(record["question_id"])
        if name in found:
            raise InputError(f"{path}: record {index}: field 'question_id' repeats that of an "
                             "earlier record; keep one of them")
        found[name] = record
    return found
