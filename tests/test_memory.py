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
for _ in range(6):  # as the steps of a training do; the heap has grown to its size by the fourth
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # 48 MB: glibc's own threshold rises to the blocks that are freed, but to 32 MB at most.
    activations = [torch.ones(12_000_000) for _ in range(4)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """For 192 MB that the process had five times before."""
    return int(subprocess.run([sys.executable, "-c", AGAIN, how], check=True, text=True,
                              capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept():
    assert page_faults("kept") < 0.1 * page_faults("given back")
