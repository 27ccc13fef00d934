"""Journals: what is finished stays, what is not does not. Run: pytest tests/test_journal.py -n0"""

import errno

import pytest

import lm.journal
from lm.journal import append, by_content, discard, merge, open_journal, read_journal
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
    with pytest.raises(InputError, match=r"seed was 2, is 1\); go on with those, write elsewhere"):
        open_journal(path, {"seed": 1})
    assert read_journal(path, {"seed": 2}) == [{"index": 0}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    write(path, {"index": 0})
    with open(path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(InputError, match=r"j\.jsonl: line 3: broken JSON .*delete that line"):
        open_journal(path, {"seed": 1})


def test_lines_are_brought_to_the_disk_together(tmp_path, monkeypatch):
    """A file system takes milliseconds for each fsync, and a merge has a million lines."""
    other = tmp_path / "other.jsonl"
    write(other, *({"index": index} for index in range(9)))
    file, _ = open_journal(tmp_path / "j.jsonl", {"seed": 1})
    brought = []
    monkeypatch.setattr(lm.journal.os, "fsync", brought.append)
    with file:
        append(file, {"index": 10}, {"index": 11})
        assert len(brought) == 1
        merge(file, [other], {"seed": 1})
        assert len(brought) == 2
    assert [line["index"] for line in read_journal(tmp_path / "j.jsonl", {"seed": 1})] == [
        10, 11, *range(9)]


def test_a_merge_that_was_killed_goes_on_without_doubles(tmp_path):
    path, others = tmp_path / "j.jsonl", [tmp_path / f"{place}.jsonl" for place in (1, 2)]
    write(path, {"index": 0}, {"index": 1})
    write(others[0], {"index": 1}, {"index": 2})  # of which the kill left the second unmoved
    write(others[1], {"index": 3})
    file, _ = open_journal(path, {"seed": 1})
    with file:
        merge(file, others, {"seed": 1})
    assert [line["index"] for line in read_journal(path, {"seed": 1})] == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "j.jsonl"
    discard(path)  # there is none
    file, _ = open_journal(path, {"seed": 1})
    with file:
        append(file, {"index": 0})
        for other in (lambda: open_journal(path, {"seed": 1}), lambda: discard(path)):
            with pytest.raises(InputError, match=r"j\.jsonl: another run is writing it"):
                other()
    write(path, {"index": 1})
    assert read_journal(path, {"seed": 1}) == [{"index": 0}, {"index": 1}]
    with pytest.raises(InputError, match="seed was 1, is 2"):
        open_journal(path, {"seed": 2})
    discard(path)  # what was refused holds no lock
    assert not path.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_keeps_nobody_out(code, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(lm.journal.fcntl, "flock", flock)
    write(tmp_path / "j.jsonl", {"index": 0})
    assert read_journal(tmp_path / "j.jsonl", {"seed": 1}) == [{"index": 0}]
    discard(tmp_path / "j.jsonl")
    assert not (tmp_path / "j.jsonl").exists()


def lines(*found: tuple[str, int]) -> list[dict]:
    return [{"content": content, "index": index} for content, index in found]


def test_lines_count_for_their_content_wherever_it_stands():
    found = by_content(lines(("a", 0), ("b", 1), ("a", 2)), ["c", "a", "b"])
    assert found == {1: {"content": "a", "index": 0}, 2: {"content": "b", "index": 1}}


def test_of_two_lines_about_the_same_place_the_later_counts():
    assert by_content([*lines(("a", 0)), {"content": "a", "index": 0, "output": "later"}],
                      ["a", "a"]) == {0: {"content": "a", "index": 0, "output": "later"}}


def test_no_place_is_left_to_ask_for_a_sample_that_is_there_already():
    """Samples follow from places: the line of place 2 stays there, and place 0 is asked for."""
    assert by_content(lines(("a", 2)), ["a", "b", "a"]) == {2: {"content": "a", "index": 2}}
    kept = lines(("a", 5), ("a", 1))
    found = by_content(kept, ["a"] * 4)
    assert found == {0: kept[0], 1: kept[1]}  # 2 and 3 are drawn by no line
