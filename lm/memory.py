"""Memory that a CPU's process frees and soon wants again.

A training step on a CPU allocates and frees gigabytes of activations. glibc gives large blocks back
to the kernel, which hands them out again a page at a time, each filled with zeros first: up to a
tenth of the step's time.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_IN_HEAP = 2 ** 26  # bytes; larger blocks still go back: few, and too much to waste
NEVER = 2 ** 31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its C library is glibc; elsewhere do nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
        mallopt(M_TRIM_THRESHOLD, NEVER)
