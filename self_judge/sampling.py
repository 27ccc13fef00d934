"""Query -> responses: the policy as it is now answers, through transformers or vLLM.

`generation={"engine": "hf", "token_budget": 16384}` is the default. What a prompt gets follows from
seed, step and the prompt's key, not from its batch, its process or a restart.

`{"engine": "vllm_server", "server_base_url": "http://host:8000"}` and `{"engine": "vllm_colocate",
"gpu_memory_utilization": 0.3}` (the default share of a card) sample with vLLM; the other keys are
those of trl's `VLLMGeneration`, which also brings the policy's weights there before each step; how
its server is started, trl's `vllm_client.py` says (`VLLM_SERVER_DEV_MODE=1 vllm serve MODEL
--weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs --max-logprobs
-1`). Its requests take no seed of their own, so its samples are not repeated by a run that is
continued. The server needs CUDA. tests/test_vllm.py runs the colocated engine where vLLM is
installed; CI tests what goes into it and what comes out.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl.import_utils import is_vllm_available
from trl.models.utils import unwrap_model_for_generation

from lm.generation import Response, check_sampling, generate, response_of, stop_ids
from lm.models import is_quantized
from lm.records import InputError
from self_judge.config import check_keys

ENGINES = ("hf", "vllm_server", "vllm_colocate")


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; checked when it is made."""

    max_new_tokens: int
    temperature: float
    top_p: float
    engine: str = "hf"
    token_budget: int = 16384  # of one batch of transformers' generate, prompts and new tokens
    vllm: dict = field(default_factory=dict)  # options of trl's VLLMGeneration

    def __post_init__(self):
        check_sampling(self.max_new_tokens, self.token_budget, self.temperature, self.top_p)
        if self.temperature == 0:
            raise InputError("temperature is 0: both responses to a query would be the same; "
                             "use more, 1.0 as published")
        if self.engine not in ENGINES:
            raise InputError(f"generation engine is {self.engine!r}; expected one of "
                             f"{', '.join(ENGINES)}")
        if self.engine == "hf" and self.vllm:
            raise InputError(f"generation: {', '.join(sorted(self.vllm))} unknown to engine hf, "
                             "which takes token_budget")
        if self.engine != "hf":
            check_keys(self.vllm, vllm_options(), "generation")
        if self.engine != "hf" and not is_vllm_available():
            raise InputError(f"generation engine {self.engine} needs vllm, which is not installed; "
                             "pip install 'trl[vllm]' on a CUDA machine, or use engine hf")


def vllm_options() -> set[str]:
    """What trl's `VLLMGeneration` can be told beside what the trainer tells it; needs no vllm."""
    from trl.generation import vllm_generation

    return set(inspect.signature(vllm_generation.VLLMGeneration).parameters) - {
        "model", "accelerator", "processing_class", "mode", "temperature", "top_p",
        "max_completion_length"}


def sampling_of(generation: Mapping | None, **common) -> Sampling:
    """The settings from the trainer's `generation` argument and its plain ones."""
    options = dict(generation or {})
    own = {name: options.pop(name) for name in ("engine", "token_budget") if name in options}
    return Sampling(**common, **own, vllm=options)


class HuggingFaceEngine:
    """transformers' generate. Weights that FSDP shards are gathered in each forward pass, so
    there every process runs one batch, until the last of all sequences ends; ZeRO-3's are gathered
    once, for the whole of it.
    """

    def __init__(self, trainer, settings: Sampling):
        self.trainer, self.settings = trainer, settings
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise InputError("sampling under FSDP needs fsdp_version: 2 in the accelerate config")

    def responses(self, prompts: Mapping[int, list[int]], seed: str) -> dict[int, Response]:
        """Responses by the prompts' keys."""
        trainer, settings = self.trainer, self.settings
        with (torch.no_grad(), trainer.accelerator.autocast(), unwrap_model_for_generation(
                trainer.model_wrapped, trainer.accelerator,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs) as model):
            return dict(generate(
                model, trainer.processing_class, prompts, seed=seed,
                max_new_tokens=settings.max_new_tokens, token_budget=settings.token_budget,
                temperature=settings.temperature, top_p=settings.top_p,
                synced_gpus=trainer.is_fsdp_enabled))


class VllmEngine:
    """trl's vLLM helper, with the policy's weights of this step."""

    def __init__(self, trainer, settings: Sampling, max_length: int):
        from trl.generation.vllm_generation import VLLMGeneration

        if is_quantized(trainer.model):
            raise InputError(f"generation engine {settings.engine} changes weights in 8 or 4 bits, "
                             "which are the frozen reference too, each time that the policy is "
                             "sent; load them in bf16, or use engine hf")
        folder = Path(trainer.model.name_or_path)
        if settings.engine == "vllm_colocate" and (folder / "adapter_config.json").is_file():
            raise InputError(f"generation engine vllm_colocate loads {folder}, which is an adapter "
                             f"without its base; write the merged model with `python merge.py "
                             f"--peft_model_path {folder}` and name that, or use vllm_server")
        # trl's 0.9 of the card would leave nothing to the weights that are there already
        beside_training = ({"gpu_memory_utilization": 0.3} if settings.engine == "vllm_colocate"
                           else {})
        self.trainer = trainer
        self.vllm = VLLMGeneration(
            trainer.model, trainer.accelerator, trainer.processing_class,
            mode=settings.engine.removeprefix("vllm_"), temperature=settings.temperature,
            top_p=settings.top_p, max_completion_length=settings.max_new_tokens,
            **{"max_model_length": max_length, **beside_training, **settings.vllm})

    def responses(self, prompts: Mapping[int, list[int]], seed: str) -> dict[int, Response]:
        """Responses by the prompts' keys; the two of a query stand next to each other."""
        tokenizer = self.trainer.processing_class
        with unchanged_base(self.trainer.model):
            self.vllm.sync_weights()
        _, completions, *_ = self.vllm.generate(list(prompts.values()), images=None,
                                                num_generations=2)
        stops = stop_ids(self.trainer.accelerator.unwrap_model(self.trainer.model), tokenizer)
        return {key: response_of(tokenizer, list(ids), stops)
                for key, ids in zip(prompts, completions, strict=True)}


@contextlib.contextmanager
def unchanged_base(model: torch.nn.Module) -> Iterator[None]:
    """Give the weights below an adapter back as they were.

    To send the policy, trl adds the adapter to them and takes it away again: in bf16 that rounds
    every time, and they are the frozen reference and judge.
    """
    weights = [parameter for name, parameter in model.named_parameters()
               if ".base_layer." in name]
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
