"""Prompts in YAML files, by name in configs/templates or path: texts with fields in braces."""

import re
from collections.abc import Mapping
from pathlib import Path

from lm.records import InputError

TEMPLATES = Path(__file__).resolve().parents[1] / "configs" / "templates"
FIELD = re.compile(r"\{(\w+)\}")


def read_prompt(name: str) -> tuple[Path, Mapping]:
    """A prompt's file, and what stands in it."""
    import yaml

    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else TEMPLATES / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"{name}: no such prompt in {TEMPLATES}; or give the path of a .yaml")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: broken YAML ({' '.join(str(error).split())})") from error
    return path, found if isinstance(found, Mapping) else {}


def load_prompt(name: str, fields: Mapping[str, set[str]]) -> Mapping[str, str]:
    """Read a prompt; its keys, and the fields in their texts, are given."""
    path, prompt = read_prompt(name)
    for key, names in fields.items():
        if not isinstance(prompt.get(key), str) or set(FIELD.findall(prompt[key])) != names:
            expected = " and ".join(f"{{{field}}}" for field in sorted(names)) or "no field"
            raise InputError(f"{path}: field '{key}' must be a text with {expected}")
    return prompt


def fill(text: str, **fields: str) -> str:
    """The text with its fields filled in; braces in what is filled in are safe.

    >>> fill("{one} and {other}", one="{other}", other="2")
    '{other} and 2'
    """
    return FIELD.sub(lambda match: fields[match[1]], text)
