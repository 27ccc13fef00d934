"""The examples in docstrings are true. Run: pytest tests/test_doctests.py"""

import doctest
import importlib

import pytest
from conftest import ROOT

MODULES = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts)
                 for folder in ("lm", "cut", "self_judge", "scripts")
                 for file in (ROOT / folder).glob("*.py") if ">>> " in file.read_text())


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert not failed and attempted
