"""The YAML of a JSFT or self-judge run: read, overridden from the command line, checked.

    config = load_config("configs/hh_jsft.yaml", ["training_args.max_steps=10"], kind="jsft")

Sections: `training_args` (trl's SFTConfig or DPOConfig; names that older transformers had are
translated), `jsft_args` or `self_judge_args`, `peft_config` (left out or null: full fine-tuning),
`model`, `templates`, `dataset`. A key that nothing reads is an error that names the nearest one.
"""

import difflib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from lm.records import InputError, fits

KINDS = ("jsft", "self_judge")
TEXT, NUMBER, OPTIONAL = (str, type(None)), (int, float), (int, type(None))
SECTIONS = ("training_args", "peft_config", "model", "templates", "dataset", "seed")
# What each key of our own sections may be.
JSFT_ARGS = {"max_length": (int,), "token_id_a": OPTIONAL, "token_id_b": OPTIONAL,
             "eval_judge_pairs": OPTIONAL, "examples": (str,)}
SELF_JUDGE_ARGS = {
    "token_id_a": OPTIONAL, "token_id_b": OPTIONAL, "disable_dropout": (bool,),
    "max_length": (int,), "max_new_tokens": (int,), "judge_batch_size": (int,), "top_p": NUMBER,
    "temperature": NUMBER, "loss_type": (str,), "beta": NUMBER, "average_log_prob": (bool,),
    "ties": (str,), "cut": (str,), "judge": (str,), "generation": (dict, type(None)),
    "pairs": (str,), "show_every": (int,),
    "round": (int,)}  # which of `--rounds` this is; the training's seed is seed + round - 1
MODEL = {"pretrained_model_name_or_path": (str,), "attn_implementation": TEXT,
         "peft_model_name_or_path": TEXT, "load_in": (str,)}
# What is trained on, and how self-training makes its pairs; the first is the default.
CHOICES = {"examples": ("all", "sft", "judge"), "pairs": ("sampled", "given"),
           "ties": ("drop", "keep"), "cut": ("keep", "drop"), "judge": ("reference", "policy")}
OURS = {"jsft_args": JSFT_ARGS, "self_judge_args": SELF_JUDGE_ARGS, "model": MODEL}
REQUIRED = ("training_args.output_dir", "model.pretrained_model_name_or_path", "templates",
            "dataset")
BY_ITSELF = {"dataset": "path", "templates": "file"}  # what a text is that stands for the section

# training_args of older transformers: what they are called today ...
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "warmup_ratio": "warmup_steps",  # which today is a share of the steps if below 1
}
# ... or what they say today ...
SWITCHES = {"group_by_length": ("train_sampling_strategy", "group_by_length"),
            "adafactor": ("optim", "adafactor")}
# ... or that there is nothing left that they could do.
GONE = ("overwrite_output_dir", "save_safetensors", "logging_dir", "fp16_backend",
        "half_precision_backend", "fp16_opt_level", "jit_mode_eval", "use_ipex", "use_mps_device",
        "tpu_num_cores", "past_index", "ray_scope", "mp_parameters", "include_tokens_per_second",
        "torchdynamo", "dispatch_batches", "split_batches")


@dataclass
class Config:
    """A run's settings, section by section; the sections are plain data."""

    kind: str  # one of KINDS
    path: str
    training_args: dict
    model: dict
    templates: dict | str
    dataset: dict | str
    jsft_args: dict = field(default_factory=dict)
    self_judge_args: dict = field(default_factory=dict)
    peft_config: dict | None = None  # None trains every weight
    notes: list[str] = field(default_factory=list)  # what the reader did on its own

    @property
    def seed(self) -> int:
        """Of the draws from the data, the shuffle, the LoRA weights, dropout and sampling."""
        return self.training_args.get("seed", 42)

    def resolved(self) -> dict:
        """The sections as they are used, for the copy beside the weights."""
        left_out = {"kind", "path", "notes", *(f"{kind}_args" for kind in KINDS
                                               if kind != self.kind)}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def save(self, folder: str | Path) -> None:
        """Write the resolved sections as `config.yaml`, which can be run again."""
        import yaml

        from lm.records import write_text

        text = yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)
        write_text(Path(folder) / "config.yaml", f"# made from {self.path}\n{text}")


def load_config(path: str, overrides: Sequence[str] = (), kind: str | None = None) -> Config:
    """Read a YAML file, with `section.key=value` overrides; every mistake in it is an InputError.

    `kind` left out is told by the section `jsft_args` or `self_judge_args`.
    """
    raw = _read(path, overrides)
    kind = kind or _kind(path, raw)
    check_keys(raw, (*SECTIONS, f"{kind}_args"), path)
    seed = raw.pop("seed", None)
    for name in ("training_args", f"{kind}_args", "model"):
        raw[name] = raw.get(name) or {}
    for name in ("training_args", f"{kind}_args", "model", "peft_config"):
        if not isinstance(raw.get(name), dict | None):
            raise InputError(f"{path}: section {name} is {raw[name]!r}; expected keys with values")
    raw["training_args"], notes = _translated(raw["training_args"], path)
    if seed is not None:
        raw["training_args"].setdefault("seed", seed)
    _check_sections(raw, kind, path)
    _check_required(raw, path)
    return Config(kind=kind, path=str(path), notes=notes, **raw)


def check_keys(given: Mapping, known: Collection[str], where: str) -> None:
    """Stop at a key that nothing reads, and name the nearest that is read."""
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)
            raise InputError(f"{where}: unknown key '{key}'; did you mean '{nearest[0]}'?")


def _read(path: str, overrides: Sequence[str]) -> dict:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path or not Path(path).is_file():
        raise InputError(f"--config {str(path)!r}: no such file; give a YAML file such as "
                         "configs/hh_jsft.yaml")
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or not name or name.startswith("-"):
            raise InputError(f"{override!r}: not an override; write section.key=value, "
                             "such as training_args.max_steps=10")
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise InputError(f"{path}: expected sections with keys, such as training_args")
        for name, override in _in_order(overrides):
            section, dot, _ = name.partition(".")
            if dot and section in BY_ITSELF and isinstance(config.get(section), str):
                config[section] = {BY_ITSELF[section]: config[section]}
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as YAML with these overrides ("
                         f"{' '.join(str(error).split())})") from error
    return OmegaConf.to_container(config, resolve=False)


def _in_order(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """With their names: first the texts that stand for a section, whose keys may be set then."""
    named = [(override.partition("=")[0], override) for override in overrides]
    return sorted(named, key=lambda entry: entry[0] not in BY_ITSELF)


def _kind(path: str, raw: Mapping) -> str:
    found = [kind for kind in KINDS if f"{kind}_args" in raw]
    if len(found) != 1:
        raise InputError(f"{path}: expected one of the sections jsft_args and self_judge_args")
    return found[0]


def _translated(given: Mapping, path: str) -> tuple[dict, list[str]]:
    """training_args with today's names, and a note for each that was changed."""
    args, notes = {}, []
    for key, value in given.items():
        if key.endswith("_strategy") and value is False:  # YAML reads a bare no so
            value = "no"
        if key in GONE:
            notes.append(f"training_args.{key} has no use in today's transformers; left out")
        elif key in SWITCHES:
            if value:
                name, setting = SWITCHES[key]
                args[name] = setting
                notes.append(f"training_args.{key} is {name}={setting} today")
        elif key in RENAMED:
            if RENAMED[key] in given:
                if key != "warmup_ratio":
                    raise InputError(f"{path}: training_args has both {key} and its new name "
                                     f"{RENAMED[key]}; keep one")
                if given["warmup_steps"]:  # steps went before the ratio
                    continue
            args[RENAMED[key]] = value
            notes.append(f"training_args.{key} is {RENAMED[key]} today")
        else:
            args.setdefault(key, value)
    return args, notes


def _check_sections(raw: Mapping, kind: str, path: str) -> None:
    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    arguments = _known(SFTConfig if kind == "jsft" else DPOConfig)
    arguments["resume_from_checkpoint"] = (str, bool, type(None))  # false starts over
    _check(raw["training_args"], arguments, f"{path}: training_args")
    _check(raw.get("peft_config") or {}, _known(LoraConfig), f"{path}: peft_config")
    for name in (f"{kind}_args", "model"):
        _check(raw[name], OURS[name], f"{path}: {name}")
    for key, known in CHOICES.items():
        value = raw[f"{kind}_args"].get(key, known[0])
        if value not in known:
            nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.0)
            raise InputError(f"{path}: {kind}_args: {key} is {value!r}; expected "
                             f"{', '.join(known)}; did you mean '{nearest[0]}'?")


def _known(dataclass_type: type) -> dict[str, tuple]:
    """Fields of a settings class and their types; () for a type that is not plain."""
    hints = typing.get_type_hints(dataclass_type)
    plain = {}
    for entry in fields(dataclass_type):
        hint = hints[entry.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if union else (hint,)
        simple = all(kind in (str, int, float, bool, type(None)) for kind in kinds)
        plain[entry.name] = kinds if simple else ()
    return plain


def _check(given: Mapping, known: Mapping[str, tuple], where: str) -> None:
    check_keys(given, known, where)
    for key, value in given.items():
        kinds = known[key]
        if kinds and not fits(value, kinds):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise InputError(f"{where}: {key} is {value!r}; expected {wanted}")


def _check_required(raw: Mapping, path: str) -> None:
    for name in REQUIRED:
        section, _, key = name.partition(".")
        value = (raw.get(section) or {}).get(key) if key else raw.get(section)
        if not value:
            raise InputError(f"{path}: {name} is required")
