"""Load a language model and its tokenizer, quantize it, add LoRA.

A base model is named by a folder, a Hub id, or `smollm2-135m-instruct`: the embedded default, small
enough for two CPU cores, which `python scripts/get_model.py` puts under saved_models/.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm.memory import keep_freed_memory
from lm.records import InputError, first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2-135m-instruct"
SAVED_MODELS = Path(__file__).resolve().parents[1] / "saved_models"
# bitsandbytes warns once a layer, and of CPU kernels that it does without; peft imports it too.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
PRECISIONS = ("auto", "8bit", "4bit", "bf16", "fp16", "fp32", "checkpoint")


def resolve_model(name: str) -> str:
    """The folder or Hub id that a model's name stands for."""
    path = Path(name).expanduser()
    if name and path.is_dir() and (name != DEFAULT_MODEL or _holds_weights(path)):
        return _checked_folder(path)
    if name == DEFAULT_MODEL:  # a folder of that name here may hold its answers
        path = SAVED_MODELS / name
        if not path.is_dir():
            raise InputError(f"{name}: not here yet; get it with "
                             f"`python scripts/get_model.py {name}`")
        return str(path)
    if not name or _looks_local(name):
        raise InputError(f"{name!r}: no such model folder; give a folder, a Hub id as org/name, "
                         f"or {DEFAULT_MODEL}")
    return name


def load_tokenizer(base_model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer as its authors made it; it must have an EOS, which ends every response."""
    from transformers import AutoTokenizer

    path = resolve_model(base_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{base_model}: cannot load the tokenizer "
                         f"({first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{base_model}: the tokenizer has no EOS token, so responses cannot end; "
                         "set eos_token in its tokenizer_config.json")
    return tokenizer


def load_model(base_model: str, load_in: str = "auto", attn_implementation: str = "auto",
               device: str = "auto") -> "PreTrainedModel":
    """The model on this process's GPU, or on the CPU where there is none, or on `device`.

    `load_in` auto is 8bit on CUDA (the released setting: 8-bit linear layers, the rest fp16) and
    fp32 on the CPU, where half precision is 4 to 25 times slower; `checkpoint` is the precision
    that the weights are stored in. `attn_implementation` auto is flash_attention_2 where it is
    installed and can run (not with `checkpoint`, which is for use after training), else
    transformers' choice (sdpa if the architecture has it).
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = resolve_model(base_model)
    if not torch.cuda.is_available():
        keep_freed_memory()
    dtype, quantization = _precision(load_in)
    if attn_implementation == "auto":
        attn_implementation = _fastest_attention(dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, quantization_config=quantization,
            attn_implementation=attn_implementation, device_map=_device_map(quantization, device))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{base_model}: cannot load the model ({first_line(error)})") from error
    except RuntimeError as error:
        if quantization is None or "out of memory" in str(error):
            raise
        raise InputError(f"--load_in {load_in} does not work on this machine "
                         f"({first_line(error)}); use --load_in bf16 or fp32") from error
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):  # as trl leaves a mixture of experts:
        config.output_router_logits = False  # its balance cannot be had where a cache is used
    return model


def training_precision(load_in: str, every_weight: bool) -> str:
    """What auto means where an adapter or every weight is trained by CUT.

    8bit on a GPU, the released setting; fp32 for weights that are trained, since they add up small
    changes, and on a CPU.
    """
    import torch

    if load_in != "auto":
        return load_in
    return "fp32" if every_weight or not torch.cuda.is_available() else "8bit"


def precision(load_in: str) -> str:
    """What auto means where nothing is trained: the checkpoint's own on a GPU, fp32 on a CPU."""
    import torch

    return load_in if load_in != "auto" else "checkpoint" if torch.cuda.is_available() else "fp32"


def add_lora(model: "PreTrainedModel", r: int, alpha: int, dropout: float,
             target_modules: str | Sequence[str],
             gradient_checkpointing: bool = False) -> "PeftModel":
    """The model, frozen, with trainable low-rank updates on the layers named in `target_modules`.

    `target_modules` is a list of layer names or the text `all-linear`.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers.pytorch_utils import Conv1D

    from lm.dropout import with_cheap_dropout

    targets = _lora_targets(model, target_modules)
    not_reentrant = {"use_reentrant": False}  # the kind that works with frozen embeddings and DDP
    if is_quantized(model):
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs=not_reentrant)
    elif gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=not_reentrant)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's layers
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets,
                        bias="none", fan_in_fan_out=transposed, task_type="CAUSAL_LM")
    try:
        return with_cheap_dropout(get_peft_model(model, config))
    except ValueError as error:  # a mixture's experts with dropout, some layers of Mamba's
        remedy = ("--lora_dropout 0" if "lora_dropout" in str(error) else
                  "other --lora_target_modules")
        raise InputError(f"{type(model).__name__} cannot have LoRA there ({first_line(error)}); "
                         f"use {remedy}") from error


def find_adapter(name: str) -> Path:
    """The folder of a saved adapter, given the folder or its Hub id."""
    folder = Path(name).expanduser()
    if name and not folder.is_dir() and not _looks_local(name):
        folder = _download_adapter(name)
    if not name or not folder.is_dir():
        raise InputError(f"{name!r}: no such adapter folder")
    if not (folder / "adapter_config.json").is_file() or not any(folder.glob("adapter_model.*")):
        raise InputError(f"{name}: is not an adapter (it lacks adapter_config.json or "
                         "adapter_model.safetensors)")
    return folder


def adapter_config(name: str) -> Path | None:
    """The adapter_config.json of a name that is an adapter's, a folder or a name on the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        note = folder / "adapter_config.json"
        return note if note.is_file() else None
    return None if name == DEFAULT_MODEL or _looks_local(name) else _adapter_config_on_hub(name)


@functools.cache
def _adapter_config_on_hub(name: str) -> Path | None:
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name)
    except OSError:  # whoever loads it says why it cannot be had
        return None
    return Path(found) if found else None


def refuse_adapter(model: "PreTrainedModel", name: str) -> None:
    """Stop where transformers has put an adapter on its base, which training would replace."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{name}: holds an adapter, which a new one would replace; write the "
                         f"merged model with `python merge.py --peft_model_path {name}` and name "
                         "that")


def load_adapter(model: "PreTrainedModel", folder: Path) -> "PeftModel":
    """The model with a saved adapter on it, not trainable."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{folder}: the adapter does not fit {model.config.name_or_path} "
                         f"({first_line(error)})") from error


def is_quantized(model: "PreTrainedModel") -> bool:
    """Whether the weights are held in 8 or 4 bits."""
    return getattr(model, "is_quantized", False)  # transformers sets it on quantized models only


def shards_weights() -> bool:
    """Whether accelerate was launched to shard the weights themselves, by FSDP or ZeRO-3."""
    def told(name: str) -> str:
        return os.environ.get(f"ACCELERATE_{name}", "").lower()

    return told("USE_FSDP") == "true" or (told("USE_DEEPSPEED") == "true"
                                          and told("DEEPSPEED_ZERO_STAGE") == "3")


def note_on_bf16(load_in: str) -> str:
    """A line for the user whose weights are trained in bf16 themselves; empty for others.

    bf16 keeps 8 bits of a number, so a step below 1/256 of a weight is lost; DeepSpeed steps on
    fp32 copies.
    """
    if load_in != "bf16" or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return ""
    return ("note: the trained weights are bf16 themselves, in which small steps are lost; fp32 "
            "keeps them, and a GPU computes in bf16 all the same")


def output_head(model: "Module") -> "Module":
    """The module that turns hidden states into logits, through any wrappers."""
    return unwrapped(model).get_output_embeddings()


def without_adapter(model: "Module") -> "Module":
    """The Hugging Face model, whose layers hold the LoRA weights, without peft's wrapper."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def context_of(model: "Module | str") -> int | None:
    """The longest input in tokens of a model, or of one by name; some architectures state none."""
    from transformers import AutoConfig

    config = (AutoConfig.from_pretrained(model) if isinstance(model, str)
              else unwrapped(model).config).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit or getattr(config, "max_seq_len", None)  # MPT's name for it


def positions_of(model: "Module") -> int | None:
    """The longest input that the model has positions for; rotary ones go on beyond its context."""
    config = unwrapped(model).config.get_text_config()
    return None if getattr(config, "rope_parameters", None) else context_of(model)


@contextlib.contextmanager
def evaluating(model: "Module") -> Iterator[None]:
    """Evaluation mode; each module gets its own back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def unwrapped(model: "Module") -> "Module":
    """The Hugging Face model inside DDP and DeepSpeed wrappers (peft and compile forward calls).

    DeepSpeed forwards some too, but its `config` is its own.
    """
    while "module" in model._modules:
        model = model._modules["module"]
    return model


def _checked_folder(path: Path) -> str:
    if (path / "config.json").is_file():
        return str(path)
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path}: is an adapter, not a whole model; merge it first with "
                         f"`python merge.py --peft_model_path {path}`")
    hidden = "; rename it if you mean the Hub's model" if _could_be_on_hub(str(path)) else ""
    raise InputError(f"{path}: not a model folder (it has no config.json){hidden}")


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _download_adapter(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["adapter_*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"{name}: no adapter folder here, and not reachable on the Hub "
                         f"({first_line(error)})") from error


def _looks_local(name: str) -> bool:
    """Whether a name that is no folder here was meant as one: anything but `name` or `org/name`."""
    first, slash, _ = name.partition("/")
    return not _could_be_on_hub(name) or (bool(slash) and Path(first).is_dir())


def _could_be_on_hub(name: str) -> bool:
    first, *rest = name.split("/")
    return first not in ("", ".", "..", "~") and len(rest) < 2 and rest != [""]


def _precision(load_in: str) -> tuple["object", "BitsAndBytesConfig | None"]:
    """The dtype of the plain weights, and how the linear layers are quantized if they are."""
    import torch

    on_gpu = torch.cuda.is_available()
    if load_in not in PRECISIONS:
        raise InputError(f"--load_in is {load_in!r}; expected one of {', '.join(PRECISIONS)}")
    if load_in == "auto":
        load_in = "8bit" if on_gpu else "fp32"
    if load_in in ("8bit", "4bit"):
        return _quantization(load_in, on_gpu)
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
            "checkpoint": "auto"}[load_in], None


def _quantization(load_in: str, on_gpu: bool) -> tuple["object", "BitsAndBytesConfig"]:
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    from lm.quantized import forget_inputs

    if not is_bitsandbytes_available():
        raise InputError(f"--load_in {load_in} needs bitsandbytes, which is missing or broken here;"
                         " pip install bitsandbytes, or use --load_in bf16 or fp32")
    if load_in == "8bit":
        forget_inputs()
        return (torch.float16 if on_gpu else torch.float32), BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.float32
    if on_gpu:
        emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.float16 if emulated else torch.bfloat16
    return dtype, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                     bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def _fastest_attention(dtype: object) -> str | None:
    import torch
    from transformers.utils import is_flash_attn_2_available

    half = dtype in (torch.float16, torch.bfloat16)
    can_flash = half and torch.cuda.is_available() and is_flash_attn_2_available()
    return "flash_attention_2" if can_flash else None


def _device_map(quantization: "BitsAndBytesConfig | None", device: str) -> dict | None:
    import torch

    if device != "auto":
        if device not in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)):
            raise InputError(f"--device is {device!r}; expected auto, cpu, or cuda where it is")
        return {"": device}
    if not torch.cuda.is_available():
        return None if quantization is None else {"": "cpu"}
    # DeepSpeed and FSDP place the (unquantized) weights themselves, a shard on each GPU.
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
                  for name in ("DEEPSPEED", "FSDP"))
    if sharded and quantization is None:
        return None
    return {"": int(os.environ.get("LOCAL_RANK", "0"))}


def _lora_targets(model: "PreTrainedModel",
                  target_modules: str | Sequence[str]) -> str | list[str]:
    """The wanted layer names, each of them checked to exist in this architecture."""
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if wanted == ["all-linear"]:
        return "all-linear"
    layers = _linear_layers(model)
    missing = [name for name in wanted
               if not any(layer == name or layer.endswith(f".{name}") for layer in layers)]
    if missing or not wanted:
        there = sorted({layer.rpartition(".")[2] for layer in layers})
        raise InputError(f"--lora_target_modules: {type(model).__name__} has no layer "
                         f"{', '.join(missing) or 'to train'}; it has {', '.join(there)} "
                         "(`--lora_target_modules all-linear` works for most)")
    return wanted


def _linear_layers(model: "PreTrainedModel") -> list[str]:
    """Names of the layers that LoRA can update, the output head left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head]
