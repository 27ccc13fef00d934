"""What a stage was made of. Run: pytest tests/test_stages.py -n0"""

import json

import pytest

from lm.stages import content_hash
from scripts.generate import fingerprint

MODEL = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture
def folder(tmp_path):
    for name in (*MODEL, *ADAPTER, "README.md", "merge.json", "training_args.bin"):
        (tmp_path / name).write_text("a")
    return tmp_path


@pytest.mark.parametrize("told_by", [content_hash, fingerprint])
@pytest.mark.parametrize("name", [*MODEL, *ADAPTER])
def test_another_template_or_config_is_another_model(told_by, name, folder):
    before = told_by(folder)
    (folder / name).write_text("bc")
    assert told_by(folder) != before


@pytest.mark.parametrize("told_by", [content_hash, fingerprint])
@pytest.mark.parametrize("name", ["README.md", "merge.json", "training_args.bin", "answers.json"])
def test_what_lies_beside_a_model_is_no_part_of_it(told_by, name, folder):
    before = told_by(folder)
    (folder / name).write_text("bc")
    assert told_by(folder) == before


def test_the_same_adapter_made_again_is_the_same(folder):
    """PEFT writes sets in any order; and the base, whose folder may move, is told by its own."""
    found = set()
    for targets, base, rank in (("kq", "a", 4), ("qk", "b", 4), ("qk", "b", 8), ("qv", "b", 8)):
        (folder / "adapter_config.json").write_text(json.dumps(
            {"target_modules": list(targets), "base_model_name_or_path": base, "r": rank}))
        found.add(content_hash(folder))
    assert len(found) == 3
