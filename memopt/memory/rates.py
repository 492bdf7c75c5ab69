"""Rates of one machine, measured with the buffers that training uses: link, page-locking, spill directories.

Copies are timed one at a time between two synchronisations, and the median is taken, so that one disturbance does not
count. Both directions together are timed on two streams, as training uses them. The disk is timed over many extents
under way at once, for as long as a burst into the drive's cache no longer decides, and read back through direct I/O.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memopt.memory.pinned import HostBuffer, HostPool

LINK_BYTES = 64 << 20
"""One copy: large enough for full speed (a link reaches it from about 16 MiB on)."""
PIECE_BYTES = 16 << 20
"""One extent of the disk's measurement."""

_MEMCPY_BYTES = 8 << 20
_NUM_UNDER_WAY = 4
Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class LinkRates:
    """Bytes per second between device and host, from page-locked memory where `locked`.

    On a CPU the device is host memory: both ways are the rate of copies in it, and `duplex_bytes_per_s` is 0.
    """

    d2h_bytes_per_s: float
    h2d_bytes_per_s: float
    duplex_bytes_per_s: float
    locked: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class LockRate:
    """Host memory faulted in and page-locked per second, `nbytes` of it at once; 0 and why it was refused."""

    bytes_per_s: float
    nbytes: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class DiskRates:
    """Sequential bytes per second of a set of spill directories, and how many bytes were written to find out."""

    write_bytes_per_s: float
    read_bytes_per_s: float
    probed_bytes: int


def memcpy_rate() -> float:
    """Rate of copies in host memory; small blocks, outside what is accounted to the loop."""
    source = bytearray(_MEMCPY_BYTES)
    target = bytearray(_MEMCPY_BYTES)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - begin)
    return _MEMCPY_BYTES / statistics.median(seconds)


def link_rates(device: torch.device, buffer: HostBuffer, repeats: int = 5) -> tuple[float, float]:
    """Return bytes per second to host and to device, one copy of the whole buffer at a time."""
    nbytes = buffer.nbytes
    on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)
    on_host = buffer.tensor(torch.uint8, (nbytes,))
    out_s = _median_s(device, lambda: on_host.copy_(on_device, non_blocking=True), repeats)
    in_s = _median_s(device, lambda: on_device.copy_(on_host, non_blocking=True), repeats)
    return nbytes / out_s, nbytes / in_s


def _median_s(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure_link(device: torch.device, nbytes: int = LINK_BYTES, repeats: int = 9) -> LinkRates:
    """Measure each way alone, then both at once.

    Args:
        device: a CUDA device, or the CPU.
        nbytes: of one copy; twice as much host memory is page-locked for it.
        repeats: copies per figure, of which the median counts.
    """
    if device.type != "cuda":
        rate = memcpy_rate()
        return LinkRates(
            d2h_bytes_per_s=rate,
            h2d_bytes_per_s=rate,
            duplex_bytes_per_s=0.0,
            locked=False,
            reason="the device is host memory: this is the rate of copies in it",
        )
    with torch.cuda.device(device), HostPool(2 * nbytes, register=True) as pool:
        first, second = pool.take(nbytes), pool.take(nbytes)
        d2h, h2d = link_rates(device, first, repeats)
        duplex = _duplex_rate(device, first, second, repeats)
        stats = pool.stats()
        locked = first.is_locked and second.is_locked
        first.release()
        second.release()
    return LinkRates(
        d2h_bytes_per_s=d2h,
        h2d_bytes_per_s=h2d,
        duplex_bytes_per_s=duplex,
        locked=locked,
        reason=stats.unlocked_reason,
    )


def _duplex_rate(
    device: torch.device, out_buffer: HostBuffer, in_buffer: HostBuffer, repeats: int
) -> float:
    nbytes = out_buffer.nbytes
    streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
    sources: list[Tensor] = [
        torch.empty(nbytes, dtype=torch.uint8, device=device),
        in_buffer.tensor(torch.uint8, (nbytes,)),
    ]
    targets = [
        out_buffer.tensor(torch.uint8, (nbytes,)),
        torch.empty(nbytes, dtype=torch.uint8, device=device),
    ]

    def both() -> None:
        for _ in range(2):  # twice, so that the two are side by side for most of the time
            for stream, target, source in zip(streams, targets, sources, strict=True):
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)

    return 4 * nbytes / _median_s(device, both, repeats)


def measure_page_locking(
    device: torch.device, nbytes: int = 1 << 30, num_threads: int | None = None
) -> LockRate:
    """Time faulting in and page-locking `nbytes`, the way a session does it."""
    if device.type != "cuda":
        return LockRate(bytes_per_s=0.0, nbytes=0, reason="nothing is page-locked without CUDA")
    threads = num_threads or min(16, max(4, (os.cpu_count() or 4) * 3 // 4))
    with torch.cuda.device(device), HostPool(nbytes, register=True, num_threads=threads) as pool:
        begin = time.perf_counter()
        pool.reserve({nbytes: 1})
        pool.settle()
        seconds = time.perf_counter() - begin
        stats = pool.stats()
    if stats.unlocked_reason:
        return LockRate(bytes_per_s=0.0, nbytes=nbytes, reason=stats.unlocked_reason)
    return LockRate(bytes_per_s=nbytes / seconds, nbytes=nbytes)


def measure_disk(
    store: Any, max_bytes: int, max_s: float = 2.0, progress: Progress | None = None
) -> DiskRates:
    """Write extents until `max_bytes` or `max_s` is reached, then read them all back.

    Args:
        store: an extent store (`alloc`, `write`, `read`, `free`), with room for one piece at least.
        max_bytes: at most this is written.
        max_s: no write begins after so many seconds.
        progress: called with the share that is done, 0 to 1.

    Raises:
        OSError: a write or read failed.
        ExtentStoreFull: the disk has less room than it said (an OSError too).
    """
    tell = progress or (lambda _: None)
    piece = min(PIECE_BYTES, max_bytes)
    num_pieces = max(1, max_bytes // piece)
    with HostPool(_NUM_UNDER_WAY * piece, register=False) as pool:
        buffers = [pool.take(piece) for _ in range(_NUM_UNDER_WAY)]
        for buffer in buffers:  # random: a drive that compresses must not win
            buffer.memoryview[:] = os.urandom(piece)
        extents: list[Any] = []
        try:
            end = time.perf_counter() + max_s

            def begin_write(index: int) -> Any:
                if index and time.perf_counter() > end:
                    return None
                extents.append(store.alloc(piece))
                tell(0.5 * index / num_pieces)
                return store.write(extents[-1], buffers[index % _NUM_UNDER_WAY].memoryview)

            def begin_read(index: int) -> Any:
                tell(0.5 + 0.5 * index / len(extents))
                return store.read(extents[index], buffers[index % _NUM_UNDER_WAY].memoryview)

            write_s = _pipelined(begin_write, num_pieces)
            read_s = _pipelined(begin_read, len(extents))
        finally:
            for extent in extents:
                store.free(extent)
            for buffer in buffers:
                buffer.release()
    tell(1.0)
    probed = piece * len(extents)
    return DiskRates(
        write_bytes_per_s=probed / write_s, read_bytes_per_s=probed / read_s, probed_bytes=probed
    )


def _pipelined(begin: Callable[[int], Any], count: int) -> float:
    """Keep a few tickets under way until `count` were begun or `begin` returns None; return the seconds taken."""
    start = time.perf_counter()
    tickets: deque[Any] = deque()
    for index in range(count):
        if len(tickets) == _NUM_UNDER_WAY:
            tickets.popleft().wait()
        ticket = begin(index)
        if ticket is None:
            break
        tickets.append(ticket)
    for ticket in tickets:
        ticket.wait()
    return time.perf_counter() - start
