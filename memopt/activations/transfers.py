"""Moving tensors off the device and back: the protocol, its statistics, and the CPU form.

One `Transfers` serves one device. `store` starts a tensor's way out and returns a `Stored`, or
None where the budget of that place has no room left: the caller then recomputes, which is always
exact. On a CPU the device is host memory, so the only other place is SSD.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from memopt.activations.spill import SpillArea, SpillStored
from memopt.activations.stored import Label, Stored
from memopt.types.plan import Placement

LinkDirection = Literal["d2h", "h2d"]


@dataclass(slots=True)
class Moved:
    """Bytes moved per direction and seconds the compute stream waited, since the last reset."""

    d2h_bytes: int = 0
    h2d_bytes: int = 0
    ssd_write_bytes: int = 0
    ssd_read_bytes: int = 0
    exposed_s: float = 0.0
    num_early: int = 0
    """Tensors that came while the host memory for them was still being locked."""
    on_wait: Callable[[Any, Any], None] | None = None
    """Called with two marks of the device's time between which compute waits."""
    on_copy: Callable[[LinkDirection, int, Any, Any], None] | None = None
    """Called with bytes and two such marks between which the link carries them, and nothing else of ours."""

    def waited_on_cpu(self, begin_s: float) -> None:
        """Count the time since `begin_s`, on the process's clock, as a wait of compute."""
        end_s = time.perf_counter()
        self.exposed_s += end_s - begin_s
        if self.on_wait is not None:
            self.on_wait(begin_s, end_s)


class Transfers(Protocol):
    """What carries tensors for one device."""

    device: torch.device
    moved: Moved
    window_bytes: int
    spill: SpillArea | None
    chain_reason: str
    """Why a device's transfers to SSD are driven from Python; empty where they are native, or there are none."""

    def store(
        self, tensor: Tensor, placement: Placement, label: Label, *, clone_first: bool, wait: bool
    ) -> Stored | None:
        """Start moving a dense tensor to "host" or "ssd"; None when there is no room.

        `wait`: for host memory that is being locked; else that counts as no room, this once.
        """

    def full(self, placement: Placement) -> str:
        """Say what had no room when the last tensor was refused."""

    def drain(self) -> None:
        """Let go of every source on its way out, before backward needs the room."""

    def together(self) -> AbstractContextManager[None]:
        """Queue the fetches that are started inside as few transfers; nothing may be taken inside."""

    def poll(self) -> None:
        """Free what has arrived and raise the first transfer that failed."""

    def check(self) -> None:
        """Raise where the bytes of a fetch that was taken did not arrive.

        `take` may return before that is known. It is asked for by itself before `backward()` returns;
        whoever uses gradients inside of backward (an optimizer that steps there) asks first.
        """

    def finish(self) -> None:
        """Wait for everything under way."""

    def exposed_s(self) -> float:
        """Return the seconds that compute waited for transfers, in waits that are over."""

    def host_bytes(self) -> tuple[int, int]:
        """Return host bytes mapped now and at most."""

    def ssd_bytes(self) -> tuple[int, int]:
        """Return extent bytes in use now and at most."""

    def close(self) -> None:
        """Give everything back."""


class CpuTransfers:
    """Transfers of a machine without an accelerator: SSD only.

    The tensor is copied into a staging buffer on the compute thread (that is the transfer off
    "the device"), and written from there while compute goes on.
    """

    def __init__(self, spill: SpillArea | None, window_bytes: int) -> None:
        self.device = torch.device("cpu")
        self.moved = Moved()
        self.window_bytes = window_bytes
        self.spill = spill
        self.chain_reason = ""

    def store(
        self, tensor: Tensor, placement: Placement, label: Label, *, clone_first: bool, wait: bool
    ) -> Stored | None:
        """Copy out now; `clone_first` needs nothing more, the copy is done on return."""
        del clone_first, wait
        assert placement == "ssd", "without CUDA the device is host memory"
        if self.spill is None:
            return None
        begin_s = time.perf_counter()
        stored = SpillStored.from_cpu(tensor, self.spill, label, self.moved)
        self.moved.waited_on_cpu(begin_s)
        return stored

    def full(self, placement: Placement) -> str:
        """Extents or staging."""
        return (
            self.spill.full if self.spill is not None else ""
        ) or f"the {placement} budget was full"

    def drain(self) -> None:
        """Nothing: staging buffers hold what is on its way."""

    def together(self) -> AbstractContextManager[None]:
        """Nothing: the storage engine takes reads one by one."""
        return nullcontext()

    def poll(self) -> None:
        """Raise a failed transfer."""
        if self.spill is not None:
            self.spill.poll()

    def check(self) -> None:
        """Raise a failed transfer: a fetch is waited for when it is taken."""
        self.poll()

    def finish(self) -> None:
        """Wait for every write."""
        if self.spill is not None:
            self.spill.finish()

    def exposed_s(self) -> float:
        """Waits of the process."""
        return self.moved.exposed_s

    def host_bytes(self) -> tuple[int, int]:
        """Staging buffers: host memory of memopt's own."""
        return self.spill.staging_bytes() if self.spill is not None else (0, 0)

    def ssd_bytes(self) -> tuple[int, int]:
        """Extent bytes."""
        return self.spill.extent_bytes() if self.spill is not None else (0, 0)

    def close(self) -> None:
        """Close the extent files."""
        if self.spill is not None:
            self.spill.close()
