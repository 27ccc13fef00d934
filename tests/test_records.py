"""Reading records, checking them, and writing files whole or not at all.

    python -m pytest tests/test_records.py
"""

import errno
import gzip
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from lm.records import (
    InputError,
    check_fields,
    listed,
    read_records,
    sha256,
    whole_folder,
    write_json,
    write_text,
)

RECORDS = [{"instruction": "Sing: é 😀\u2028", "n": 1}, {"instruction": "a\nb", "n": None}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


@pytest.mark.parametrize(("name", "text"), [
    ("list.json", json.dumps(RECORDS, indent=2)), ("list.json.gz", json.dumps(RECORDS)),
    ("lines.jsonl", LINES), ("lines.json", LINES), ("lines.jsonl.gz", LINES),
    ("blank.jsonl", "\n" + LINES.replace("\n", "\n\n")), ("no_end.jsonl", LINES.rstrip()),
    ("windows.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),
])
def test_lists_and_lines_plain_and_compressed(name, text, tmp_path):
    path = tmp_path / name
    content = text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_records(path) == RECORDS
    assert read_records(str(path)) == RECORDS


@pytest.mark.parametrize(("content", "message"), [
    ("", "holds no records"), ("\n \n", "holds no records"), ("[]", "holds no records"),
    ('{"a": 1}\n\n{"a": }\n', "line 3: broken JSON"),
    ('[{"a": 1},\n {"a": 2}\n {"a": 3}]', "line 3: broken JSON"),
    ('[{"a": 1}', "line 1: broken JSON"),
    ('{"a": 1}\n7\n', "record 1: is a number; expected a JSON object"),
    ('[{"a": 1}, null]', "record 1: is null; expected a JSON object"),
    ('"text"', "record 0: is text; expected a JSON object"),
    (json.dumps({"data": RECORDS}, indent=2), "is one JSON object; expected a list of objects, or"),
    ('{"data": [\n}', "line 1: broken JSON"),
    ('{"a": "\\ud83d\\ude00"}\n{"a": "", "b": ["\\ud83d"]}\n',
     "record 1: field 'b' has half of a surrogate pair"),
])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz"])
def test_bad_content_is_one_line(content, message, suffix, tmp_path):
    path = tmp_path / f"my{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    assert_one_line(path, f"my{suffix}: {message}")


@pytest.mark.parametrize("content", [
    b"\xff\xfe{", gzip.compress(b'{"a": 1}' * 99)[:-9], b"not gzip",
    gzip.compress(b"")[:10] + b"\xff" * 50,
], ids=["not UTF-8", "cut short", "not gzip", "damaged"])
def test_unreadable_bytes_are_one_line(content, tmp_path):
    path = tmp_path / ("my.json" if content.startswith(b"\xff") else "my.jsonl.gz")
    path.write_bytes(content)
    assert_one_line(path, f"{path.name}: cannot be read as UTF-8 text")


@pytest.mark.parametrize("source", ["none.json", "./none", "/none/x", "a/none.jsonl", "a/b/c", "",
                                    "../none", "a/none.jsonl.gz", "none"])
def test_missing_file_is_one_line(source):
    assert_one_line(source, f"^{source}: no such file")


def test_folder_is_one_line(tmp_path, monkeypatch):
    """Even one that could be the name of a Hub dataset: `datasets` would take all of its files."""
    (tmp_path / "data/sample").mkdir(parents=True)
    write_text(tmp_path / "data/sample/train.jsonl", LINES)
    monkeypatch.chdir(tmp_path)
    for source in ("data/sample", tmp_path, "."):
        assert_one_line(source, "is a folder; give one of its .json, .jsonl or .gz files")


@pytest.mark.parametrize("source", ["org/none", "org/none-v1.5"])
def test_hub_id_that_cannot_be_read_is_one_line(source):
    assert_one_line(source, f"^{source}: not a file here, and the Hub dataset cannot be read")


def test_hub_dataset_is_read_and_silent_errors_have_a_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(RECORDS)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"test": made}[split])
    assert read_records("org/name", split="test") == RECORDS

    def fail(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert_one_line("org/name", r"cannot be read \(ConnectionError\)")


def assert_one_line(source, message):
    with pytest.raises(InputError, match=message) as error:
        read_records(source)
    assert "\n" not in str(error.value)


def test_fields_and_types():
    required, optional = {"a": (str,)}, {"b": (int, float, type(None))}
    for good in ({"a": ""}, {"a": "x", "b": 1.5}, {"a": "x", "b": None, "c": []}):
        check_fields([good], "f", required, optional)
    for bad, message in (({}, "field 'a' is missing; expected text"),
                         ({"a": None}, "field 'a' is null; expected text"),
                         ({"a": "", "b": True}, "'b' is true or false; expected a number or null"),
                         ({"a": "", "b": "1"}, "'b' is text; expected a number or null")):
        with pytest.raises(InputError, match=f"^f: record 1: .*{message}$"):
            check_fields([{"a": ""}, bad], "f", required, optional)


def test_flags_that_must_list_something_say_so():
    assert listed(" a,b,", "--outputs") == ["a", "b"] and listed("") == []
    for value in ("", " , ", ()):
        with pytest.raises(InputError, match="--outputs is empty; name at least one"):
            listed(value, "--outputs")


def test_written_json_is_read_back_and_public(tmp_path):
    path = tmp_path / "new" / "folder" / "out.json"
    write_json(path, RECORDS)
    assert read_records(path) == RECORDS
    assert "é 😀" in path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o777 == 0o644
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    write_json(path, ["old"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, ["new"])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert json.loads(path.read_text()) == ["old"]
    assert os.listdir(tmp_path) == ["out.json"]


def test_whole_folder_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "model"
    with whole_folder(path) as scratch:
        (scratch / "a.txt").write_text("new")
        assert not path.exists()
    assert (path / "a.txt").read_text() == "new" and os.listdir(path.parent) == ["model"]
    assert path.stat().st_mode & 0o777 == 0o755
    with whole_folder(path) as scratch:
        (scratch / "b.txt").write_text("newer")
    assert os.listdir(path) == ["b.txt"] and os.listdir(path.parent) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whole_folder_vanishes_when_its_block_fails(error, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(error), whole_folder(path) as scratch:
        (scratch / "half.txt").write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["model"] and os.listdir(path) == ["old.txt"]


@pytest.mark.parametrize("finished", [True, False])
def test_whole_folder_clears_away_what_kills_left(finished, tmp_path):
    """All but the scratch folder of a run under way, and an old one while no new one is there."""
    path = tmp_path / "model"
    names = [".model.k1lled_x", ".model.k1lled_y.old", ".model.mine", ".models.k1lled_x"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("many")
    if finished:
        path.mkdir()
    with whole_folder(path) as under_way, whole_folder(path):
        left = {folder.name for folder in tmp_path.glob(".*")}
        assert under_way.is_dir() and under_way.name in left
        assert left.intersection(names) == {*names[2:], *([] if finished else names[1:2])}


def test_whole_folders_of_one_path_at_the_same_time(tmp_path):
    """Each is there whole at some moment; none clears another's away, and none stumbles over it."""
    def write(number: int) -> None:
        for _ in range(50):
            with whole_folder(tmp_path / "model") as scratch:
                (scratch / "weights").write_text(str(number))

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(write, number) for number in range(3)]:
            done.result()
    assert (tmp_path / "model" / "weights").read_text() in "012"
    assert [folder.name for folder in tmp_path.iterdir()] == ["model"]


def test_where_folders_cannot_be_locked_nothing_is_cleared_away(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")  # NFS locks what is open for writing

    monkeypatch.setattr("lm.records.fcntl.flock", refuse)
    (tmp_path / ".model.k1lled_x").mkdir()
    with whole_folder(tmp_path / "model"):
        assert len(list(tmp_path.iterdir())) == 2
    assert {folder.name for folder in tmp_path.iterdir()} == {".model.k1lled_x", "model"}
