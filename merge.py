"""Merge an adapter into its base model: an ordinary checkpoint that any program loads.

    python merge.py --base_model_name_or_path smollm2-135m-instruct \\
        --peft_model_path runs/cut --output_dir saved_models/cut

The base is loaded in the precision that it is stored in, also when the adapter was trained on a
quantized base. In the end the folder is loaded as a plain model, and its logits must be those of
base and adapter; otherwise nothing is left behind.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lm.cli import run
from lm.models import (
    find_adapter,
    is_quantized,
    load_adapter,
    load_model,
    load_tokenizer,
    resolve_model,
)
from lm.records import InputError, sha256, whole_folder, write_json
from lm.stages import content_hash

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Largest norm of the logits' difference, as a share of their norm. Merged weights are rounded once
# more than base and adapter apart; measured on SmolLM2-135M: 1.5e-6, 0.003, 0.022, whatever the
# adapter.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
TEXT = "The quick brown fox jumps over the lazy dog. In 1969, two people walked on the Moon:"


def main(base_model_name_or_path: str, peft_model_path: str, output_dir: str,
         device: str = "auto", overwrite: bool = False) -> None:
    """Merge a LoRA adapter into its base model and check the result.

    Args:
        base_model_name_or_path: model folder, Hub id, or smollm2-135m-instruct.
        peft_model_path: folder (or Hub id) of the adapter.
        output_dir: folder to write; its weights are safetensors.
        device: auto (CUDA if it is there), cuda or cpu.
        overwrite: replace a model that is in output_dir already.
    """
    adapter = find_adapter(peft_model_path)
    base = resolve_model(base_model_name_or_path)
    if others := other_base(base, adapter):
        print(f"note: {adapter} was trained on {others}, not on {base}")
    output = Path(output_dir).expanduser()
    weights = next(adapter.glob("adapter_model.*"))
    origin = {"base_model": base, "base_sha256": content_hash(base), "adapter": str(adapter),
              "adapter_sha256": sha256(weights)}
    if is_merged(output, origin, overwrite):
        print(f"{output}: already merged from this adapter")
        return
    with whole_folder(output) as unfinished:
        origin |= merge(base, adapter, unfinished, device)
        write_json(unfinished / "merge.json", origin)
    print(f"{output}: done")


def other_base(base: str, adapter: Path) -> str | None:
    """The base that an adapter says it was trained on, if that seems to be another one.

    Folders move, so where only one of the two is here, its name must do.
    """
    try:
        note = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:  # load_adapter tells of it
        return None
    noted = note.get("base_model_name_or_path")
    if not noted or (Path(noted).name == Path(base).name
                     and not (Path(noted).is_dir() and Path(base).is_dir())):
        return None
    return noted if Path(noted).resolve() != Path(base).resolve() else None


def is_merged(output: Path, origin: dict, overwrite: bool) -> bool:
    """Whether this very merge is in the folder already; nothing else is lost unasked."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    for source in (Path(origin["base_model"]), Path(origin["adapter"])):
        if source.resolve().is_relative_to(output.resolve()):
            raise InputError(f"{output}: holds the model or adapter to merge; "
                             "choose another --output_dir")
    if not (output / "config.json").is_file():
        raise InputError(f"{output}: holds something that is no model; choose another --output_dir")
    if overwrite:
        return False
    note = output / "merge.json"
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    found.setdefault("base_sha256", origin["base_sha256"])  # older notes lack it
    if all(found.get(key) == origin[key] for key in ("base_model", "base_sha256",
                                                     "adapter_sha256")):
        return True
    raise InputError(f"{output}: holds a model of another origin; choose another --output_dir, "
                     "or --overwrite")


def merge(base: str, adapter: Path, folder: Path, device: str) -> dict:
    """Write the merged model and check it; returns its precision and how exact it is."""
    tokenizer = load_tokenizer(base)
    model = load_model(base, "checkpoint", device=device)
    if is_quantized(model):
        raise InputError(f"{base}: is itself stored quantized; give the full-precision checkpoint")
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"merging {adapter} into {base} ({dtype}, on {model.device.type}) ...", flush=True)
    model = load_adapter(model, adapter)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    expected = logits(model, ids)
    with model.disable_adapter():
        unadapted = logits(model, ids)
    save(model.merge_and_unload(), folder)
    tokenizer.save_pretrained(folder)
    del model  # two 13B models would not fit
    merged = logits(load_model(str(folder), "checkpoint", device=device), ids)
    return {"dtype": dtype, **check(merged, expected, unadapted, TOLERANCE[dtype])}


def save(model: "PreTrainedModel", folder: Path) -> None:
    """As safetensors; sampling values that greedy decoding ignores would be refused, so they go."""
    settings = model.generation_config
    if not settings.do_sample:
        settings.update(**dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p")))
    model.save_pretrained(folder)


def check(merged: "Tensor", expected: "Tensor", unadapted: "Tensor", tolerance: float) -> dict:
    """The logits (1, T, V) of the merged model must be the adapter model's, not the base's."""
    largest = (merged - expected).abs().max().item()
    share = ((merged - expected).norm() / expected.norm()).item()
    print(f"largest difference of logits: {largest:.2g}; norm of the difference: {share:.2g} of "
          f"the logits' (allowed: {tolerance:g})")
    if not share <= tolerance:  # also when it is not a number
        raise InputError(f"the merged model's logits differ by {share:.3g} of their norm from those"
                         f" of base and adapter, more than {tolerance:g}; nothing was written")
    if merged.equal(unadapted) and not expected.equal(unadapted):
        raise InputError("the merged model is the base without the adapter; nothing was written")
    return {"largest_logit_difference": largest, "relative_logit_difference": share}


def logits(model: "PreTrainedModel", ids: "Tensor") -> "Tensor":
    """Logits (1, T, V) in fp32, on the CPU."""
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=ids.to(model.device)).logits.float().cpu()


if __name__ == "__main__":
    run(main)
