"""lm/vllm_engine.py without vLLM: what goes into it and what comes out. See test_vllm.py too.

    python -m pytest tests/test_vllm_engine.py -n0
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from lm import vllm_engine
from lm.generation import Response
from lm.models import load_tokenizer
from lm.records import InputError
from lm.templates import prompt_ids


@pytest.fixture
def calls(monkeypatch) -> list[list]:
    """A vLLM that says a prompt's ids again; the (prompt, settings) of each call."""
    calls = []

    class LLM:
        def __init__(self, model: str, dtype: str):
            self.model = f"{model} {dtype}"
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))

        def generate(self, prompts: list[dict], settings: list[SimpleNamespace]) -> list:
            calls.append(list(zip([p["prompt_token_ids"] for p in prompts], settings, strict=True)))
            return [SimpleNamespace(outputs=[SimpleNamespace(
                text=f"{self.model} {len(p['prompt_token_ids'])}", finish_reason="length",
                token_ids=p["prompt_token_ids"])]) for p in prompts]

    stub = ModuleType("vllm")
    stub.LLM, stub.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", stub)
    return calls


def test_each_prompt_gets_its_own_response_in_parts_of_like_length(tiny_llama, calls, monkeypatch):
    monkeypatch.setattr(vllm_engine, "AT_A_TIME", 2)
    tokenizer = load_tokenizer(str(tiny_llama))
    prompts = {3: "the cat", 5: [1, 2, 3], 9: "a longer text than the others, by far"}
    found = dict(vllm_engine.generate_with_vllm("m", tokenizer, prompts, max_new_tokens=7,
                                                temperature=0.5, top_p=0.9, seed=4))
    ids = {3: prompt_ids(tokenizer, "the cat"), 5: [1, 2, 3],
           9: prompt_ids(tokenizer, prompts[9])}
    assert found == {index: Response(f"m float32 {len(row)}", tuple(row), "length")
                     for index, row in ids.items()}
    assert [len(call) for call in calls] == [2, 1] and calls[0][0][0] == ids[9]
    settings = [each for call in calls for _, each in call]
    assert {(s.max_tokens, s.temperature, s.top_p) for s in settings} == {(7, 0.5, 0.9)}
    assert len({s.seed for s in settings}) == 3


def test_samples_do_not_depend_on_what_is_left(tiny_llama, calls):
    tokenizer = load_tokenizer(str(tiny_llama))
    for prompts in ({0: [1], 1: [2]}, {1: [2]}):
        dict(vllm_engine.generate_with_vllm("m", tokenizer, prompts, max_new_tokens=7,
                                            temperature=1.0))
    assert calls[0][1][1].seed == calls[1][0][1].seed != calls[0][0][1].seed


@pytest.mark.parametrize(("load_in", "on_gpu", "dtype"), [
    ("auto", False, "float32"), ("auto", True, "auto"), ("checkpoint", False, "auto"),
    ("bf16", False, "bfloat16"), ("fp32", True, "float32")])
def test_precision(tiny_llama, calls, monkeypatch, load_in, on_gpu, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    (found,) = vllm_engine.generate_with_vllm("m", load_tokenizer(str(tiny_llama)), {0: [1]},
                                              max_new_tokens=7, load_in=load_in)
    assert found[1].text == f"m {dtype} 1"


def test_a_prompt_that_does_not_fit_is_named(tiny_llama, calls):
    """vLLM would only answer it in fewer tokens."""
    with pytest.raises(InputError, match=r"prompt 4: 60 tokens .* exceed .* context of 64"):
        dict(vllm_engine.generate_with_vllm("m", load_tokenizer(str(tiny_llama)), {4: [1] * 60},
                                            max_new_tokens=5))
