"""Small tables of numbers to a device, without a wait for what the device is doing.

`torch.tensor(values, device="cuda")` and a copy from pageable memory end with a synchronisation of
the stream: a switch that brings a few tables to the device would let it run dry.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers (nested lists, or a CPU tensor) as a tensor on a device."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class _Event(Protocol):
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


@dataclass
class _Slot:
    """Bytes of page-locked memory, and the event after the last copy out of them."""

    memory: Tensor
    sent: _Event


# What a forked child inherits: freeing it would call CUDA, which ends such a process.
_inherited: list[_Slot] = []


class PinnedRoom:
    """Page-locked memory that is kept, for tables that are written again and again.

    A copy leaves from the smallest slot whose last copy has arrived; a slot is added, or replaced
    by a larger one, where none fits. With `MOST_SLOTS` on their way the host waits for the oldest.
    The bytes are written by this thread alone: a copy of 300 KB by PyTorch wakes all of its threads,
    and waits for all of them; beside other processes that took 14 ms where the copy takes 0.03.
    Holds nothing for a device that is not CUDA. Not for a captured stream: a graph would read what
    lies in the room when it is replayed.

    Args:
        device: where the tables are.
    """

    MOST_SLOTS = 16

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slots: list[_Slot] = []  # in the order of their last use
        self._pid = os.getpid()

    def copy_into(self, target: Tensor, values: NDArray[Any]) -> None:
        """Copy numbers into a contiguous tensor of the same size and dtype; may return before."""
        source = torch.from_numpy(values)
        assert source.dtype == target.dtype
        assert source.numel() == target.numel()
        if not self._is_locked():
            target.copy_(source.view_as(target))
            return
        memory = self._take(values.nbytes)
        memory.numpy()[: values.nbytes] = values.reshape(-1).view(np.uint8)
        sent = self._send(target, memory[: values.nbytes].view(target.dtype).view_as(target))
        self._slots.append(_Slot(memory, sent))

    def num_bytes(self) -> int:
        """Return the bytes of page-locked memory that are held."""
        return sum(slot.memory.numel() for slot in self._slots)

    def _take(self, nbytes: int) -> Tensor:
        """Take memory that nothing reads any more out of the slots, or make some."""
        arrived = [slot for slot in self._slots if slot.sent.query()]
        fitting = [slot for slot in arrived if slot.memory.numel() >= nbytes]
        if fitting:
            chosen = min(fitting, key=lambda slot: slot.memory.numel())
        elif arrived or len(self._slots) >= self.MOST_SLOTS:
            chosen = arrived[0] if arrived else self._slots[0]
            chosen.sent.synchronize()
        else:
            return self._allocate(nbytes)
        self._slots = [slot for slot in self._slots if slot is not chosen]
        return chosen.memory if chosen.memory.numel() >= nbytes else self._allocate(nbytes)

    def _is_locked(self) -> bool:
        return self.device.type == "cuda"

    def _allocate(self, nbytes: int) -> Tensor:
        size = 1 << (nbytes - 1).bit_length()  # as PyTorch rounds it anyway
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _send(self, target: Tensor, source: Tensor) -> _Event:
        """Begin the copy on the current stream; return the event after it."""
        target.copy_(source, non_blocking=True)
        sent = torch.cuda.Event()
        sent.record(torch.cuda.current_stream(self.device))
        return sent

    def __del__(self) -> None:
        """Leave to a forked child what it must not free."""
        if self._slots and os.getpid() != self._pid:
            _inherited.extend(self._slots)
