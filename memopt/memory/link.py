"""What a session measures where `memopt probe` kept nothing: with its own buffers, in a fraction of a second."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from memopt.memory.pinned import HostPool
from memopt.memory.rates import link_rates, memcpy_rate
from memopt.types.errors import NO_ROOM_ERRNOS
from memopt.types.hardware import Hardware

_LINK_BYTES = 64 << 20
PROBE_BYTES = 32 << 20
"""Written and read once to rate the spill directories."""
_ASSUMED_RATE = 1e9


def measure_hardware(device: torch.device, host: HostPool | None, store: Any) -> Hardware:
    """Measure the link and the spill directories that a session has.

    Args:
        device: the session's device.
        host: page-locked blocks, or None on CPU.
        store: the session's own extent store (what is measured with counts against its budget), or None.
    """
    write_rate = read_rate = 0.0
    d2h = h2d = 0.0
    source = "measured"
    if store is not None:
        rates = _disk_rates(store)
        if rates is None:
            source = (
                "assumed 1 GB/s of SSD: no room to measure it in the ssd budget or in host memory"
            )
        write_rate, read_rate = rates or (_ASSUMED_RATE, _ASSUMED_RATE)
    if device.type == "cuda":
        buffer = host.try_take(_LINK_BYTES) if host is not None else None
        if buffer is None:
            d2h = h2d = 20e9
            source = (
                "assumed 20 GB/s: no room to measure the link in the host budget or in host memory"
            )
        else:
            d2h, h2d = link_rates(device, buffer)
            buffer.release()
    else:
        d2h = h2d = memcpy_rate()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Hardware(
        device=device.type,
        name=name,
        d2h_bytes_per_s=d2h,
        h2d_bytes_per_s=h2d,
        ssd_write_bytes_per_s=write_rate,
        ssd_read_bytes_per_s=read_rate,
        source=source,
    )


def _disk_rates(store: Any) -> tuple[float, float] | None:
    """Write and read one extent of what the budget and the disk have left, None where that is nothing."""
    extent = _probe_extent(store)
    if extent is None:
        return None
    nbytes = extent.nbytes
    with HostPool(PROBE_BYTES, register=False) as pool:
        buffer = pool.try_take(nbytes)
        if buffer is None:
            store.free(extent)
            return None
        try:
            buffer.memoryview[:] = os.urandom(nbytes)
            begin = time.perf_counter()
            store.write(extent, buffer.memoryview).wait()
            middle = time.perf_counter()
            store.read(extent, buffer.memoryview).wait()
            end = time.perf_counter()
        finally:
            store.free(extent)
            buffer.release()
    return nbytes / (middle - begin), nbytes / (end - middle)


def _probe_extent(store: Any) -> Any | None:
    nbytes = min(PROBE_BYTES, store.stats().budget_bytes)
    while nbytes >= store.unit_bytes:
        try:
            return store.alloc(nbytes, counted=False)
        except OSError as error:
            if error.errno not in NO_ROOM_ERRNOS:
                raise
            nbytes //= 2
    return None
