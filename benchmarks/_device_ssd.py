"""The way device -> SSD -> device: memopt's native pipeline beside what it replaces, and beside a program that is busy.

"chain" is the native pipeline, "python" the same pipeline driven by a Python thread and blocking reads (memopt's
fallback), "blocking" one tensor after the other. The cases:

- ``idle``: the caller stores, then takes, and does nothing else;
- ``caller busy``: between two tensors the caller runs Python of its own, about as long as a disk of 2 GB/s takes for
  one (at least 1 ms), as a training loop does. What the native way is for: transfers go on without the caller's help;
- ``caller, GPU busy``: the same with kernels queued in the program's stream;
- ``a thread spins``: another thread runs bytecode all the time. Whoever lets go of Python's lock then waits for it for
  the switch interval (5 ms), and PyTorch's own ops let go of it. "locks lost" is how often that was so for a tensor:
  (time here - time idle) / interval.

GB/s is over the total time, to the end of the last transfer; "own" is the caller's Python, "calls" what one tensor's
calls cost it. The ratio is to "blocking" in the same round (median of ratios, above 1: faster). The first round is not
counted where there are more.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memopt.activations.cuda import CudaTransfers
from memopt.activations.stored import Label

MIB = 1 << 20
LABEL = Label(region="", what="benchmark")
CASES = ["idle", "caller busy", "caller, GPU busy", "a thread spins"]
DISK_BYTES_PER_S = 2e9
NUM_SPINNING = 6
"""Tensors of a pass beside a thread that spins: each may take a quarter of a second."""


@contextlib.contextmanager
def busy_python(*, busy: bool) -> Iterator[None]:
    """Keep Python's lock wanted by another thread."""
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            sum(range(2000))

    thread = threading.Thread(target=spin)
    if busy:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if busy:
            thread.join()


class Work:
    """Python that takes about ``seconds``, and kernels that take a little less."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.num_loops = 1000
        while (spent := self.loop()) < 0.002:
            self.num_loops *= 2
        self.num_loops = max(1, int(self.num_loops * seconds / spent))
        self.matrix = torch.ones(1024 if device.type == "cuda" else 16, device=device).diag()
        self.num_products = max(1, int(seconds / 100e-6))

    def loop(self) -> float:
        """Run bytecode that lets go of nothing; return the seconds."""
        begin, x = time.perf_counter(), 1
        for _ in range(self.num_loops):
            x = x * 3 % 1_000_003
        return time.perf_counter() - begin

    def run(self, case: str) -> float:
        """What the caller does between two tensors; return its own seconds."""
        if case == "caller, GPU busy":
            for _ in range(self.num_products):
                torch.mm(self.matrix, self.matrix)
        return self.loop() if case.startswith("caller") else 0.0


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of one direction: in all, of the caller's loop, and of its own Python in it."""

    total_s: float
    loop_s: float
    own_s: float


def timed_loop(
    steps: list[Callable[[], None]], between: Callable[[], float], end: Callable[[], None]
) -> Spent:
    """Run the steps with the caller's work between them, then wait for the end of everything."""
    torch.cuda.synchronize()
    begin, own = time.perf_counter(), 0.0
    for step in steps:
        step()
        own += between()
    loop = time.perf_counter() - begin
    end()
    torch.cuda.synchronize()
    return Spent(total_s=time.perf_counter() - begin, loop_s=loop, own_s=own)


def in_backward(device: torch.device, body: Callable[[], Spent]) -> Spent:
    """Run ``body`` in a backward pass, where tensors are fetched: failures of reads are asked for at its end."""
    results: list[Spent] = []

    class Fetch(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
            results.append(body())
            return grad

    x = torch.ones(1, device=device, requires_grad=True)
    Fetch.apply(x).sum().backward()
    return results[0]


class Rounds:
    """Passes of the chain and of what it replaces over the same tensors.

    Args:
        transfers: of the device, with an SSD area.
        tensors: on the device, of equal size.
    """

    def __init__(self, transfers: CudaTransfers, tensors: list[torch.Tensor]) -> None:
        assert transfers.spill is not None
        self.area, self.transfers, self.tensors = transfers.spill, transfers, tensors
        self.piece, self.chain = tensors[0].nbytes, transfers.chain
        self.work = Work(max(1e-3, self.piece / DISK_BYTES_PER_S), tensors[0].device)
        names = (["chain"] if self.chain is not None else []) + ["python", "blocking"]
        self.ways = [(name, case) for case in CASES for name in names]
        self.spent: dict[tuple[str, str], list[tuple[Spent, Spent]]] = {w: [] for w in self.ways}

    def num_tensors(self, case: str) -> int:
        """Tensors of a pass."""
        return min(len(self.tensors), NUM_SPINNING if case == "a thread spins" else 128)

    def run(self, way: str, case: str) -> None:
        """One pass, there and back."""
        self.transfers.chain = self.chain if way == "chain" else None
        tensors = self.tensors[: self.num_tensors(case)]
        try:
            with busy_python(busy=case == "a thread spins"):
                body = self.blocking if way == "blocking" else self.pipeline
                self.spent[way, case].append(body(tensors, case))
        finally:
            self.transfers.chain = self.chain

    def pipeline(self, tensors: list[torch.Tensor], case: str) -> tuple[Spent, Spent]:
        """Send all, then fetch all, two ahead."""
        stored: list[Any] = []
        transfers, between = self.transfers, partial(self.work.run, case)

        def out(tensor: torch.Tensor) -> None:
            stored.append(transfers.store(tensor, "ssd", LABEL, clone_first=False, wait=True))

        def back(i: int) -> None:
            for ahead in stored[i : i + 3]:
                ahead.prefetch()
            stored[i].take(keep=False)

        there = timed_loop([partial(out, tensor) for tensor in tensors], between, transfers.finish)
        steps = [partial(back, i) for i in range(len(stored))]
        check = transfers.check
        home = in_backward(tensors[0].device, lambda: timed_loop(steps, between, check))
        stored.clear()  # their extents; the graph's function may live until the next collection
        return there, home

    def blocking(self, tensors: list[torch.Tensor], case: str) -> tuple[Spent, Spent]:
        """Copy, wait, write, wait; and the same back."""
        store, between = self.area.store, partial(self.work.run, case)
        buffer = self.area.staging.take(self.piece)
        host = buffer.tensor(torch.uint8, (self.piece,))
        extents = [store.alloc(self.piece) for _ in tensors]

        def out(tensor: torch.Tensor, extent: Any) -> None:
            host.copy_(tensor)
            store.write(extent, buffer.memoryview).wait()

        def back(extent: Any) -> None:
            store.read(extent, buffer.memoryview).wait()
            torch.empty_like(host, device=tensors[0].device).copy_(host)

        steps = [partial(out, t, e) for t, e in zip(tensors, extents, strict=True)]
        there = timed_loop(steps, between, lambda: None)
        steps = [partial(back, extent) for extent in extents]
        home = in_backward(tensors[0].device, lambda: timed_loop(steps, between, lambda: None))
        for extent in extents:
            store.free(extent)
        buffer.release()
        return there, home

    def rows(self) -> list[dict[str, Any]]:
        """Medians so far."""
        return [
            self._row(way, case, i)
            for (way, case) in self.ways
            for i in (0, 1)
            if self.spent[way, case]
        ]

    def _row(self, way: str, case: str, i: int) -> dict[str, Any]:
        num = self.num_tensors(case)
        counted, idle = self._counted(way, case, i), self._counted(way, "idle", i)
        blocking = self._counted("blocking", case, i)
        ratios = [b.total_s / s.total_s for s, b in zip(counted, blocking, strict=False)]
        total_s = statistics.median(s.total_s for s in counted)
        row = {
            "piece_bytes": self.piece,
            "way": way,
            "case": case,
            "direction": ("write", "read")[i],
            "num_tensors": num,
            "num_rounds": len(counted),
            "engine": self.area.store.engine.name,
            "chain_reason": self.transfers.chain_reason,
            "gb_per_s": num * self.piece / total_s / 1e9,
            "ratio_to_blocking": statistics.median(ratios) if ratios else None,
            "total_s": total_s,
            "own_s": statistics.median(s.own_s for s in counted),
            "calls_s_per_tensor": statistics.median(s.loop_s - s.own_s for s in counted) / num,
        }
        if case == "a thread spins" and idle:
            alone_s = statistics.median(s.total_s for s in idle) / self.num_tensors("idle")
            row["locks_lost_per_tensor"] = (total_s / num - alone_s) / sys.getswitchinterval()
        return row

    def _counted(self, way: str, case: str, i: int) -> list[Spent]:
        spent = self.spent[way, case]
        return [pair[i] for pair in spent[1:] or spent]


def run_rounds(
    sizes: list[Rounds], num_rounds: int, end_s: float, after_each: Callable[[], None]
) -> None:
    """Run every way of every size in turn until the time is over; what takes longest comes last."""
    for _ in range(num_rounds):
        for case in CASES:
            for rounds in sizes:
                for way in [name for name, other in rounds.ways if other == case]:
                    if time.perf_counter() > end_s:
                        return
                    rounds.run(way, case)
                    after_each()


def show_chain(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="device to SSD and back")
    names = (
        "GB/s",
        "to blocking",
        "total ms",
        "own ms",
        "calls ms a tensor",
        "locks lost a tensor",
    )
    for column in ("tensor", "case", "way", "direction", *names):
        table.add_column(column, justify="right")
    for row in rows:
        ratio, lost = row["ratio_to_blocking"], row.get("locks_lost_per_tensor")
        table.add_row(
            f"{row['piece_bytes'] / MIB:g} MiB",
            row["case"],
            row["way"],
            row["direction"],
            f"{row['gb_per_s']:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{1e3 * row['total_s']:.0f}",
            f"{1e3 * row['own_s']:.0f}",
            f"{1e3 * row['calls_s_per_tensor']:.2f}",
            "" if lost is None else f"{lost:.0f}",
        )
    console.print(table)
    if rows and rows[0]["chain_reason"]:
        console.print(f"no chain: {rows[0]['chain_reason']}")
