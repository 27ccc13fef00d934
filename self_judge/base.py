"""The model that a run starts from: a whole model, or one with adapters that are merged into it.

    base = find_base({"pretrained_model_name_or_path": "runs/hh_jsft"})
    print(base)  # meta-llama/Llama-2-7b-hf + runs/hh_jsft
    model = load_base(base, load_in="bf16")

The released code put a new adapter in the place of the one that it found in the folder, and so
lost what JSFT had learnt; here it becomes part of the weights first.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lm.models import (
    adapter_config,
    find_adapter,
    is_quantized,
    load_adapter,
    load_model,
    resolve_model,
)
from lm.records import InputError
from lm.stages import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Base:
    """A whole model, which brings the tokenizer, and the adapters to merge into it, in order."""

    model: str  # a folder, or a name on the Hub
    adapters: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return " + ".join([self.model, *map(str, self.adapters)])


def find_base(section: dict) -> Base:
    """What a config's `model` section names; either of its names may be an adapter's folder."""
    base = _below(section["pretrained_model_name_or_path"])
    extra = section.get("peft_model_name_or_path")
    return Base(base.model, (*base.adapters, find_adapter(extra))) if extra else base


def load_base(base: Base, load_in: str, attn_implementation: str = "auto") -> "PreTrainedModel":
    """The model in the given precision, adapters merged."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if base.adapters and (is_deepspeed_zero3_enabled() or load_in in ("8bit", "4bit")):
        raise InputError(f"{base.adapters[0]}: an adapter cannot be merged into weights that are "
                         "sharded by ZeRO-3 or held in 8 or 4 bits; write the merged model with "
                         f"`python merge.py --peft_model_path {base.adapters[0]}` and name that")
    model = load_model(base.model, load_in, attn_implementation)
    if base.adapters and is_quantized(model):
        raise InputError(f"{base.model}: is stored quantized, so no adapter can be merged into it")
    for folder in base.adapters:
        model = load_adapter(model, folder).merge_and_unload()
    if base.adapters:  # what a new adapter notes as its base
        model.name_or_path = model.config.name_or_path = str(base.adapters[-1].resolve())
    return model


def model_settings(base: Base) -> dict:
    """What tells one model from another."""
    folder = resolve_model(base.model)
    return {"model": folder, "adapters": list(map(str, base.adapters)),
            "weights": [fingerprint(Path(part)) for part in (folder, *base.adapters)]}


def _below(name: str) -> Base:
    """Follow an adapter, a folder or on the Hub, to its base, which may be an adapter itself."""
    note = adapter_config(name)
    if note is None:
        return Base(name)
    below = json.loads(note.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not below:
        raise InputError(f"{note}: base_model_name_or_path is missing; give the base as "
                         "model.pretrained_model_name_or_path and this adapter as "
                         "model.peft_model_name_or_path")
    base = _below(below)
    return Base(base.model, (*base.adapters, find_adapter(name)))
