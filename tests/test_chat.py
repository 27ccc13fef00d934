"""The folder that is served, and a chat with it from the first to the last line.

    python -m pytest tests/test_chat.py -n0
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm.models import load_tokenizer
from lm.records import InputError
from lm.templates import load_template
from scripts import chat
from scripts.chat import make_folder

ROOT = Path(__file__).resolve().parents[1]


def test_the_folder_is_the_model_with_the_template(tiny_llama, tmp_path):
    make_folder(tmp_path / "m", tiny_llama, "alpaca")
    assert (tmp_path / "m" / "model.safetensors").resolve() == (
        tiny_llama / "model.safetensors").resolve()
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Sing."}], tokenize=False)
    assert text == load_template("alpaca").render("Sing.")
    system = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."},
                                            {"role": "user", "content": "Sing."}], tokenize=False)
    assert system == "Be brief.\n\n### Instruction:\nSing.\n\n### Response:\n"
    assert not (tiny_llama / "chat_template.jinja").exists()


def test_the_tokenizers_own_bos_comes_first(tiny_llama, tmp_path):
    """As in training; a template that replaces the model's own leaves that one alone."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.bos_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 0)])
    tokenizer.chat_template = "{{ 'own' }}"
    model = Path(shutil.copytree(tiny_llama, tmp_path / "with_bos"))
    tokenizer.save_pretrained(model)
    make_folder(tmp_path / "m", model, "alpaca")
    served = load_tokenizer(str(tmp_path / "m"))
    ids = served.apply_chat_template([{"role": "user", "content": "Sing."}], return_dict=False)
    assert ids == tokenizer(load_template("alpaca").render("Sing."))["input_ids"]
    assert load_tokenizer(str(model)).chat_template == "{{ 'own' }}"
    make_folder(tmp_path / "chat", model, "chat")
    assert load_tokenizer(str(tmp_path / "chat")).chat_template == "{{ 'own' }}"


def test_what_cannot_be_served(tiny_llama, tmp_path):
    with pytest.raises(InputError, match="has no chat template"):
        make_folder(tmp_path / "m", tiny_llama, "chat")
    with pytest.raises(InputError, match="is on the Hub; download it first"):
        make_folder(tmp_path / "n", Path("org/name"), "alpaca")


def test_a_server_that_stops_by_itself_is_quoted(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "transformers"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no memory left\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(chat, "programs", lambda: str(program.parent))
    with (pytest.raises(InputError, match="stopped; the last it said: no memory left"),
          chat.serving(tmp_path / "m", "float32")):
        pass


def test_a_closed_terminal_stops_the_server(tiny_llama):
    words = [sys.executable, "scripts/chat.py", "--model", str(tiny_llama)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as chatting:
        assert chatting.stdout.readline().startswith("loading")
        children = Path(f"/proc/{chatting.pid}/task/{chatting.pid}/children").read_text().split()
        assert len(children) == 1
        chatting.send_signal(signal.SIGHUP)
        assert chatting.wait(timeout=60) == 1
    assert not Path(f"/proc/{children[0]}").exists()


def test_a_chat(tiny_llama):
    """A question, no to "go on?", and !exit. What a random model says is no matter."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    done = subprocess.run(
        [sys.executable, "scripts/chat.py", "--model", str(tiny_llama), "--max_new_tokens", "3",
         "--generate", "do_sample=False"], cwd=ROOT, input="Name a colour.\nn\n!exit\n", text=True,
        capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRANSFORMERS CHAT" in done.stdout and "3 tokens in" in done.stdout
