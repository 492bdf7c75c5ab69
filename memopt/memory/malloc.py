"""Make freed CPU tensors leave the resident set.

glibc serves large blocks by mmap and returns them to the system when freed, but each such free
raises the threshold of what "large" means (up to 32 MiB): after some steps most activations come
from the heap, which shrinks only from its top. Pinning the threshold keeps frees real
(mallopt(3), M_MMAP_THRESHOLD).
"""

from __future__ import annotations

import ctypes
import platform

_M_MMAP_THRESHOLD = -3
THRESHOLD_BYTES = 1 << 20


def pin_mmap_threshold(nbytes: int = THRESHOLD_BYTES) -> str:
    """Fix glibc's mmap threshold for this process; return what was done, for the report."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return "malloc is not glibc's: resident memory may stay above what tensors hold"
    if ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, nbytes) != 1:
        return "mallopt(M_MMAP_THRESHOLD) was refused: resident memory may lag behind frees"
    return f"malloc's mmap threshold is fixed at {nbytes >> 20} MiB, so that freed tensors leave the process"
