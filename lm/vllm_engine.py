"""vLLM in this process: `lm.generation.generate` with another engine, for CUDA.

    for index, response in generate_with_vllm("runs/cut/model", tokenizer, prompts,
                                              max_new_tokens=256):
        ...

vLLM pins versions of torch and transformers of its own: install it into an environment of its own
(`pip install vllm fire`) and run scripts/generate.py there, or start `vllm serve` and ask it as a
server. No test runs vLLM: what is tested is what goes into it and what comes out.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lm.generation import Prompt, Response, ids_of
from lm.server import sample_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_A_TIME = 256  # prompts; more would keep the GPU busier, and a kill would cost more


def generate_with_vllm(model: str, tokenizer: "PreTrainedTokenizerBase",
                       prompts: Mapping[int, Prompt], *, max_new_tokens: int,
                       temperature: float = 0.0, top_p: float = 1.0,
                       seed: int | str = 0) -> Iterator[tuple[int, Response]]:
    """Yield (index, response) for each prompt; `model` is a folder or a Hub id.

    A sample's seed follows from `seed` and the prompt's index, but vLLM's numbers depend on what
    else is in a batch, so a near tie can fall otherwise when a run is continued.
    """
    from vllm import LLM, SamplingParams

    rows = {index: ids_of(tokenizer, prompt) for index, prompt in prompts.items()}
    engine = LLM(model=model)
    order = sorted(rows, key=lambda index: len(rows[index]), reverse=True)
    for start in range(0, len(order), AT_A_TIME):
        some = order[start:start + AT_A_TIME]
        found = engine.generate(
            [{"prompt_token_ids": rows[index]} for index in some],
            [SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                            seed=sample_seed(seed, index)) for index in some])
        for index, outputs in zip(some, found, strict=True):
            said = outputs.outputs[0]
            yield index, Response(said.text, tuple(said.token_ids), said.finish_reason)
