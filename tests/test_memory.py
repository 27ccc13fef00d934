"""Freed memory is kept, and wanted again without a fault for each of its pages."""

import subprocess
import sys

import pytest

AGAIN = """
import resource
import sys

import torch

from lm.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):  # as the steps of a training do
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(5_000_000) for _ in range(10)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """For 200 MB that the process had twice before."""
    return int(subprocess.run([sys.executable, "-c", AGAIN, how], check=True, text=True,
                              capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept():
    assert page_faults("kept") < 0.5 * page_faults("given back")
