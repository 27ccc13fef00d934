"""The notebooks run from the first to the last cell, on a tiny model."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_judge import save_tiny_judge

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert {path.name for path in NOTEBOOKS} == {"cut.ipynb", "self_judge.ipynb"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tiny_llama, tmp_path, monkeypatch):
    model = save_tiny_judge(tmp_path) if path.stem == "self_judge" else tiny_llama
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("STEPS", "2")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}},
                   kernel_name="python3").execute()
    printed = [output for cell in notebook.cells if cell.cell_type == "code"
               for output in cell.outputs]
    assert any(output.output_type == "display_data" and "image/png" in output.data
               for output in printed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
