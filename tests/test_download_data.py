"""Downloads against a real local server: whole and verified, or not there and said why."""

import hashlib
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lm.records import InputError
from scripts import download_data
from scripts.download_data import DATA_SETS, DataFile, DataSet, fetch

BODY = b'{"question": "2 + 2?"}\n' * 20_000  # several chunks
DIGEST = hashlib.sha256(BODY).hexdigest()
HUB_PATH = "/datasets/Anthropic/hh-rlhf/resolve/"


class Handler(BaseHTTPRequestHandler):
    """/whole and the Hub's dataset files answer BODY, /half breaks off, the rest is 404."""

    def do_GET(self):
        self.server.seen.append(self.path)
        found = self.path in ("/whole", "/half") or self.path.startswith(HUB_PATH)
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(BODY) if found else 0))
        self.send_header("ETag", f'"{DIGEST}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(BODY[:len(BODY) // 2] if self.path == "/half" else BODY)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_verified_file_comes_once(server, tmp_path, capsys):
    file = DataFile("sub/a.jsonl", server.url + "/whole", None, DIGEST)
    fetch(file, tmp_path)
    assert (tmp_path / "sub/a.jsonl").read_bytes() == BODY
    assert files_in(tmp_path) == {"sub/a.jsonl"}
    assert capsys.readouterr().out.endswith("460,000 bytes, sha256 verified\n")
    fetch(file, tmp_path)
    assert capsys.readouterr().out.endswith("there already, sha256 verified\n")
    assert server.seen == ["/whole"]


def test_a_file_without_known_checksum_has_it_printed(server, tmp_path, capsys):
    file = DataFile("a.jsonl", server.url + "/whole")
    fetch(file, tmp_path)
    assert f"not verified, sha256 {DIGEST}" in capsys.readouterr().out
    fetch(file, tmp_path)
    assert f"there already, not verified, sha256 {DIGEST}" in capsys.readouterr().out
    assert server.seen == ["/whole"]


def test_a_damaged_file_is_fetched_again(server, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(BODY[:-1])
    fetch(DataFile("a.jsonl", server.url + "/whole", None, DIGEST), tmp_path)
    assert (tmp_path / "a.jsonl").read_bytes() == BODY
    assert "does not match its checksum" in capsys.readouterr().out


def test_rubbish_of_a_killed_download_does_no_harm(server, tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "whole").write_bytes(BODY + b"more")
    fetch(DataFile("a.jsonl", server.url + "/whole", None, DIGEST), tmp_path)
    assert (tmp_path / "a.jsonl").read_bytes() == BODY
    assert files_in(tmp_path) == {"a.jsonl"}


def test_a_wrong_checksum_is_not_kept(server, tmp_path):
    with pytest.raises(InputError, match=f"a.jsonl: not kept, .*{DIGEST}, expected {'0' * 64}"):
        fetch(DataFile("a.jsonl", server.url + "/whole", None, "0" * 64), tmp_path)
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize(("path", "reason"), [
    ("/missing", "the server says 404 Not Found"), ("/half", "the transfer broke off")])
@pytest.mark.parametrize("digest", [DIGEST, None])
def test_a_failed_transfer_says_what_to_do_by_hand(server, tmp_path, path, reason, digest):
    url = server.url + path
    with pytest.raises(InputError) as raised:
        fetch(DataFile("a.jsonl", url, None, digest), tmp_path)
    assert str(raised.value) == (f"a.jsonl: {reason}; fetch {url} by hand and put it at "
                                 f"{tmp_path / 'a.jsonl'}")
    assert not (tmp_path / "a.jsonl").exists()


def test_offline_is_one_line(server, tmp_path):
    with socket.socket() as closed:  # bound, never listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(InputError, match=f"no connection to {host}; fetch .* put it at"):
            fetch(DataFile("a.jsonl", f"http://{host}/whole"), tmp_path)


def test_the_hub_is_asked_through_its_own_client(server, tmp_path, run_cli):
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0",
                   "HF_HOME": str(tmp_path / "home")}
    done = run_cli("scripts/download_data.py", "hh", "--folder", tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "hh") == {
        f"helpful-{part}/{split}.jsonl.gz" for part in ("base", "online")
        for split in ("train", "test")}
    assert (tmp_path / "hh/helpful-base/test.jsonl.gz").read_bytes() == BODY
    assert done.stdout.count(f"not verified, sha256 {DIGEST}") == 4


def test_a_closed_hub_is_one_line(server, tmp_path, run_cli):
    server.server_close()
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    done = run_cli("scripts/download_data.py", "hh", "--folder", tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: helpful-base/train.jsonl.gz: no connection to {server.url}; fetch "
        "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/"
        f"train.jsonl.gz by hand and put it at {tmp_path}/hh/helpful-base/train.jsonl.gz\n")


def test_the_command_fetches_the_named_sets_only(server, tmp_path, monkeypatch):
    sets = tuple(DataSet(name, "", "", None, (DataFile(f"{name}.txt", server.url + "/whole"),), "")
                 for name in ("one", "two", "three"))
    monkeypatch.setattr(download_data, "DATA_SETS", sets)
    download_data.main("three", "one", folder=str(tmp_path))
    assert files_in(tmp_path) == {"one/one.txt", "three/three.txt"}


def test_without_a_name_the_sets_are_listed(run_cli):
    done = run_cli("scripts/download_data.py")
    assert done.returncode == 0
    for data_set in DATA_SETS:
        assert data_set.name in done.stdout
        assert all(file.name in done.stdout for file in data_set.files)


def test_an_unknown_set_names_the_nearest():
    with pytest.raises(InputError, match="no data set sheperd; did you mean shepherd"):
        download_data.main("shepherd", "sheperd")


def test_no_two_files_share_a_place_and_every_checksum_is_one():
    places = [(data_set.name, file.name) for data_set in DATA_SETS for file in data_set.files]
    assert len(places) == len(set(places))
    for file in (file for data_set in DATA_SETS for file in data_set.files):
        assert file.url.startswith("https://")
        assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32


def test_readme_is_what_the_table_gives(tmp_path, monkeypatch):
    committed = download_data.README.read_text(encoding="utf-8")
    monkeypatch.setattr(download_data, "README", tmp_path / "README.md")
    download_data.main(readme=True)
    assert committed == (tmp_path / "README.md").read_text(encoding="utf-8"), (
        "run: python scripts/download_data.py --readme")
