"""A `python` for recipes whose processes begin with the libraries imported: seconds less for each.

    VENV=warm_environment() bash scripts/quickstart.sh

One process imports them and waits; what is started as `python` or `torchrun` in the environment
asks it for a copy of itself (fork), which gets the arguments, folder, variables and open files of
the one that asked. All of the repository's own code is loaded anew by each.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

PROGRAM = """\
#!{python} -IS
import json, os, socket, sys
words = sys.argv[1:]
if os.path.basename(sys.argv[0]) == "torchrun":
    words = ["-m", "torch.distributed.run", *words]
if words[:1] == ["-u"]:
    words = words[1:]
if words[:1] != ["-m"] and (not words or words[0].startswith("-")):
    os.execv("{python}", ["{python}", *words])
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect("{address}")
    request = json.dumps({{"words": words, "folder": os.getcwd(), "variables": dict(os.environ),
                          "python": os.path.join(os.path.dirname(sys.argv[0]), "python")}})
    socket.send_fds(asked, [request.encode() + b"\\n"], [0, 1, 2])
    code = asked.recv(16)
if not code:  # it was killed
    os.kill(os.getpid(), 9)
sys.exit(int(code))
"""


@functools.cache
def warm_environment() -> Path:
    """A folder that scripts/environment.sh takes for an environment with all requirements."""
    venv = Path(tempfile.mkdtemp(prefix="warm-"))  # a socket's name must be short
    atexit.register(shutil.rmtree, venv)
    for stamp in Path(sys.prefix).glob(".installed-*"):
        (venv / stamp.name).touch()
    (venv / "bin").mkdir()
    for name in ("python", "torchrun"):
        program = venv / "bin" / name
        program.write_text(PROGRAM.format(python=sys.executable, address=venv / "socket"))
        program.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(venv / "socket")],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(server.kill)
    assert server.stdout.readline() == b"ready\n"
    return venv


def serve(address: str) -> None:
    """Fork for each that asks, as long as standard input is open; a copy is its own process."""
    import_libraries()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            return run_as_asked(connection)
        connection.close()


def import_libraries() -> None:
    """What most of the scripts need, none of which starts a thread."""
    for name in ("matplotlib.pyplot", "peft", "torch.distributed.run", "datasets"):
        importlib.import_module(name)
    for name in ("AutoModelForCausalLM", "Trainer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(importlib.import_module("transformers"), name)  # imports it
    for name in ("DPOTrainer", "SFTTrainer"):
        getattr(importlib.import_module("trl"), name)
    gc.freeze()  # else a collection in a copy would touch, and so copy, all of it


def run_as_asked(connection: socket.socket) -> None:
    """Become the process that asked, and tell it the exit code at the very end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    asked = json.loads(message)
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["variables"])
    sys.executable = asked["python"]
    threading.Thread(target=die_with, args=[connection], daemon=True).start()
    code = 1

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(str(code).encode())
        os._exit(code)  # to take all modules apart takes a second

    atexit.register(end)  # the first that is registered is called last
    try:
        run(asked["words"])
        code = 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            code = stop.code or 0
        else:
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()


def die_with(connection: socket.socket) -> None:
    """Until the process that asked is killed."""
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def run(words: list[str]) -> None:
    """What `python WORDS` does: a script, or a module after -m."""
    if folders := os.environ.get("PYTHONPATH"):
        sys.path[1:1] = folders.split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ImportError):  # of the machine; training_runs.py has its own
            importlib.import_module("sitecustomize")
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
