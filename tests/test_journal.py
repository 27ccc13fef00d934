"""Journals: what is finished stays, what is not does not. Run: pytest tests/test_journal.py -n0"""

import pytest

from lm.journal import append, open_journal, read_journal
from lm.records import InputError


def write(path, *lines, settings=None) -> None:
    file, _ = open_journal(path, settings or {"seed": 1})
    with file:
        for line in lines:
            append(file, line)


def test_a_line_that_a_kill_broke_off_is_cut_and_the_others_stay(tmp_path):
    path = tmp_path / "new" / "j.jsonl"
    write(path, {"index": 0}, {"index": 1})
    with open(path, "a") as file:
        file.write('{"index": 2, "te')
    assert read_journal(path, {"seed": 1}) == [{"index": 0}, {"index": 1}]
    assert path.read_text().endswith("te")  # a reader changes nothing: it may be under way
    write(path, {"index": 2, "text": "whole"})
    assert read_journal(path, {"seed": 1})[2:] == [{"index": 2, "text": "whole"}]


def test_other_settings_bind_only_where_something_is_finished(tmp_path):
    path = tmp_path / "j.jsonl"
    write(path)
    write(path, {"index": 0}, settings={"seed": 2})
    with pytest.raises(InputError, match="seed was 2, is 1"):
        open_journal(path, {"seed": 1})
    assert read_journal(path, {"seed": 2}) == [{"index": 0}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    write(path, {"index": 0})
    with open(path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(InputError, match=r"j\.jsonl: line 3: broken JSON .*delete that line"):
        open_journal(path, {"seed": 1})
