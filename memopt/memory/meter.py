"""One way to ask a device for its memory and its clock, on CUDA and on CPU."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from memopt.memory.accounting import AccountedMemory


class Meter(Protocol):
    """Memory levels in bytes and marks in time of one device."""

    def current_bytes(self) -> int:
        """Bytes of live tensors now."""

    def take_peak(self) -> int:
        """Return the peak since the last call and start a new one."""

    def mark(self) -> Any:
        """A point in the device's time."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two marks; waits until the device has passed them."""


class CpuMeter:
    """Accounted storages and the process's clock."""

    def __init__(self, accounted: AccountedMemory) -> None:
        self.accounted = accounted

    def current_bytes(self) -> int:
        """Accounted bytes."""
        return self.accounted.current_bytes

    def take_peak(self) -> int:
        """Accounted peak."""
        peak = self.accounted.peak_bytes
        self.accounted.reset_peak()
        return peak

    def mark(self) -> float:
        """Seconds of a monotonic clock."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Difference."""
        return end - begin


class CudaMeter:
    """The caching allocator's allocated bytes and events on the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def current_bytes(self) -> int:
        """Allocated bytes."""
        return torch.cuda.memory_allocated(self.device)

    def take_peak(self) -> int:
        """Allocated peak; resets PyTorch's own peak statistics."""
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def mark(self) -> Any:
        """Record a timing event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Elapsed device time."""
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
