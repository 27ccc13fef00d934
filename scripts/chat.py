"""Chat with a model in the terminal: the library's server and its client, with our template.

    python scripts/chat.py --model runs/quickstart/model
    python scripts/chat.py --model smollm2-135m-instruct --template chat

`transformers chat` talks to `transformers serve`, which knows no template but the tokenizer's own.
So the server gets a folder that links to the model's files and has the template in the place of
the tokenizer's; it goes with the chat. To a server that you run yourself: `transformers chat NAME
http://localhost:8000/v1`.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.models import load_tokenizer, resolve_model
from lm.records import InputError
from lm.templates import prompt_ids
from scripts.generate_dialogues import template_text


def main(model: str, template: str = "alpaca", max_new_tokens: int = 512, generate: str = "",
         system: str = "", dtype: str = "auto") -> None:
    """Start a server for the model, chat with it, and stop it.

    Args:
        model: folder of a whole model, or smollm2-135m-instruct.
        template: prompt template, by name or path; `chat` is the model's own chat template, and
            a path that ends in .jinja another one.
        max_new_tokens: longest reply.
        generate: further settings of the replies, as "do_sample=False temperature=0.7".
        system: system message; with the Alpaca template it takes the header's place.
        dtype: auto is what the weights are stored in on CUDA, float32 on the CPU.
    """
    import torch

    for number in (signal.SIGHUP, signal.SIGTERM):  # a closed terminal stops the server too
        signal.signal(number, lambda *_: sys.exit(1))
    if not shutil.which("transformers", path=programs()):
        raise InputError("the transformers command is not installed here; pip install -r "
                         "requirements.txt")
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    with tempfile.TemporaryDirectory(prefix="chat-") as scratch:
        folder = Path(scratch) / Path(model).resolve().name
        make_folder(folder, Path(resolve_model(model)), template)
        with serving(folder, dtype) as url:
            command = ["transformers", "chat", folder.name, url, f"max_new_tokens={max_new_tokens}",
                       *generate.split(), *(["--system-prompt", system] if system else []),
                       "--save-folder", str(Path.cwd() / "chat_history")]
            # The client takes this server for the Hub, which HF_HUB_OFFLINE forbids.
            subprocess.run(command, cwd=folder.parent, env=environment(HF_HUB_OFFLINE="0"))


def make_folder(folder: Path, model: Path, template: str) -> None:
    """Links to the model's files, and the template as the tokenizer's."""
    if not model.is_dir():
        raise InputError(f"{model}: is on the Hub; download it first (hf download {model} "
                         "--local-dir FOLDER), and chat with that folder")
    folder.mkdir()
    for file in model.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file.resolve())
    tokenizer = load_tokenizer(str(model))
    text = template_text(template)
    if text == "chat":
        if tokenizer.chat_template is None:
            raise InputError("--template chat: this model's tokenizer has no chat template")
        return
    bos = tokenizer.bos_token_id
    if bos is not None and prompt_ids(tokenizer, "a")[0] == bos:  # as in training; serve adds none
        text = "{{- bos_token -}}" + text
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def serving(folder: Path, dtype: str) -> Iterator[str]:
    """The address of a server of the model in `folder`, which stops at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = folder.parent / "server.log"
    with open(log, "w", encoding="utf-8") as said:
        server = subprocess.Popen(
            ["transformers", "serve", folder.name, "--port", str(port), "--dtype", dtype],
            cwd=folder.parent, stdout=said, stderr=subprocess.STDOUT,
            env=environment(HF_HUB_OFFLINE="1"),
            start_new_session=True)  # Ctrl-C is for the chat
    try:
        print(f"loading {folder.name} ...", flush=True)
        while not answers(f"http://localhost:{port}/health"):
            if server.poll() is not None:
                last = (log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"])[-1]
                raise InputError(f"transformers serve stopped; the last it said: {last}")
            time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has stopped by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError):
        return urllib.request.urlopen(url, timeout=5).status == 200
    return False


def programs() -> str:
    """Where to look for programs: beside this Python first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def environment(**changed: str) -> dict[str, str]:
    return {**os.environ, "PATH": programs(), **changed}


if __name__ == "__main__":
    run(main)
