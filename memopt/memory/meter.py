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

    def peak(self) -> int:
        """Return the peak since the last `take_peak`, which goes on."""

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

    def peak(self) -> int:
        """Accounted peak so far."""
        return self.accounted.peak_bytes

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
        self.reserved_peak_bytes = 0

    def current_bytes(self) -> int:
        """Allocated bytes."""
        return torch.cuda.memory_allocated(self.device)

    def take_peak(self) -> int:
        """Allocated peak; resets PyTorch's own peak statistics, which only a traced step does."""
        peak = self.peak()
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def peak(self) -> int:
        """Allocated peak so far; the reserved one is kept beside it."""
        reserved = torch.cuda.max_memory_reserved(self.device)
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, reserved)
        return torch.cuda.max_memory_allocated(self.device)

    def mark(self) -> Any:
        """Record a timing event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Elapsed device time."""
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
