"""Keep the resident set near what tensors need: give freed heap memory back to the system.

glibc serves large blocks by mmap and returns them when they are freed, but each such free raises
the threshold of what "large" means (up to 32 MiB). After some steps most activations come from the
heap, which shrinks only from its top: the holes that frees leave stay resident, and the process
ends far above what its tensors ever held.

Fixing the threshold at 1 MiB (mallopt(3), M_MMAP_THRESHOLD) makes every free real, and every
allocation a page fault per 4 KiB: 1.3 million faults and 2.2 of 6.5 CPU seconds in a step of the
demo. So the threshold is left alone, and holes are given back (malloc_trim(3)) only when the
resident set exceeds what tensors needed at their peak by a slack.
Figures, also of other ways that were tried: benchmarks/LOG.md.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable

from memopt.memory.accounting import AccountedMemory
from memopt.memory.host import resident_bytes

SLACK_BYTES = 64 << 20
_SLACK_SHARE = 16
_CHECK_EVERY_BYTES = 8 << 20
_FREE_OF_CHARGE_S = 1.0
_TIME_SHARE = 0.05
"""A trim walks every free block of the heap, 70 ns each: with millions of them it is no trifle."""


class HeapTrimmer:
    """Trims the heap when the resident set outgrows the tensors that `accounted` counts.

    The resident set stays within `base_bytes`, the highest level that tensors reached, and a slack
    of 64 MiB or a sixteenth of that level, whichever is more.

    Args:
        accounted: told of every tensor; its `on_sample` becomes this object's.
        trim: gives free heap memory back to the system; found in the C library unless given.
        resident: returns the process's resident bytes.
        clock: seconds; trims take at most a twentieth of them, the first second aside.
    """

    def __init__(
        self,
        accounted: AccountedMemory,
        trim: Callable[[], None] | None = None,
        resident: Callable[[], int] = resident_bytes,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._accounted = accounted
        self._trim = trim or _glibc_trim()
        self._resident = resident
        self._clock = clock
        self._begin_s = self._trimming_s = 0.0
        self._peak_bytes = 0
        self._rest_bytes = 0
        self._next_check_bytes = 0
        self.base_bytes = 0
        """Resident bytes that are no tensor's: code, Python's objects, buffers."""
        self.num_trims = 0

    def start(self) -> str:
        """Begin; what is resident now and no tensor's is the base. Return a note for the report."""
        if self._trim is None:
            return "malloc is not glibc's: resident memory may stay above what tensors hold"
        self._peak_bytes = self._accounted.current_bytes
        self._trim()
        self._begin_s = self._clock()
        self.base_bytes = self._rest_bytes = max(0, self._resident() - self._peak_bytes)
        self._accounted.on_sample = self._grew
        return (
            "freed heap memory is given back (malloc_trim) where the resident set exceeds what "
            f"tensors needed at their peak by {SLACK_BYTES >> 20} MiB and 1/{_SLACK_SHARE} of it"
        )

    def _grew(self, current_bytes: int) -> None:
        """Tensors were born; look at the resident set after every few MiB of them."""
        self._peak_bytes = max(self._peak_bytes, current_bytes)
        if self._accounted.born_bytes < self._next_check_bytes:
            return
        self._next_check_bytes = self._accounted.born_bytes + _CHECK_EVERY_BYTES
        resident = self._resident()
        self._lower_base(resident - current_bytes)
        slack = max(SLACK_BYTES, self._peak_bytes // _SLACK_SHARE)
        if resident - self.base_bytes <= self._peak_bytes + slack:
            return
        now_s = self._clock()
        if self._trimming_s > _FREE_OF_CHARGE_S + _TIME_SHARE * (now_s - self._begin_s):
            return
        assert self._trim is not None
        self._trim()
        self._trimming_s += self._clock() - now_s
        self.num_trims += 1
        # What stays after everything free is gone is no hole: imports, buffers, Python's objects.
        self._rest_bytes = self._resident() - current_bytes
        self.base_bytes = max(self.base_bytes, self._rest_bytes)

    def _lower_base(self, rest_bytes: int) -> None:
        """Let the base follow what is no tensor's down: a buffer that stood at a trim may be gone.

        What is resident and no tensor's now holds the base and the holes, so it is never less than
        the base, but for tensors whose memory was not yet written to: two looks must agree.
        """
        most = max(0, rest_bytes, self._rest_bytes)
        self.base_bytes = min(self.base_bytes, most)
        self._rest_bytes = rest_bytes

    def stop(self) -> None:
        """Stop looking, and give back what is free now."""
        self._accounted.on_sample = None
        if self._trim is not None:
            self._trim()


def _glibc_trim() -> Callable[[], None] | None:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    malloc_trim = ctypes.CDLL(None).malloc_trim
    malloc_trim.argtypes = [ctypes.c_size_t]
    return lambda: malloc_trim(0)
