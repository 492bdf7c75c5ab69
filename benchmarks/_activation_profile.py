"""Where one step's time goes on the device: kernels, copies and idle time, from a trace of PyTorch's profiler.

A row's ratio to the plain step has four causes, and a stopwatch shows only their sum: kernels that ran again, kernels
that ran slower beside copies, copies that held the compute stream up, and a host that queued work too late. Two rows
profiled in one run tell them apart: `kernels` has each kernel's number and median, `idle` the compute stream's gaps,
`copies` the bytes, the busy time and the rate of each direction.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

GAP_S = 2e-4  # shorter gaps between kernels are launches, and only summed
MAX_GAPS, MAX_KERNELS, MAX_NAME = 40, 30, 120
Event = dict[str, Any]


def profile_step(step: Callable[[], None]) -> dict[str, Any]:
    """Run `step` once under the profiler and return what `summary` says of it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        found.export_chrome_trace(str(path))
        return summary(json.loads(path.read_text())["traceEvents"])


def summary(events: Iterable[Event]) -> dict[str, Any]:
    """Return the step's device time by cause; seconds, bytes, bytes per second.

    Args:
        events: of a Chrome trace (microseconds): complete events of kernels, copies and sets on the device.
    """
    device = [
        e
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if not device:
        return {"device_s": 0.0}
    kernels = [e for e in device if e["cat"] == "kernel"]
    begin = min(e["ts"] for e in device)
    end = max(e["ts"] + e["dur"] for e in device)
    by_stream: dict[Any, float] = defaultdict(float)
    for event in kernels:
        by_stream[event["args"].get("stream")] += event["dur"]
    compute = max(by_stream, key=by_stream.__getitem__, default=None)
    busy = _merged(e for e in device if e["args"].get("stream") == compute)
    gaps = [(a_end, b_begin - a_end) for (_, a_end), (b_begin, _) in itertools.pairwise(busy)]
    long = sorted((g for g in gaps if g[1] * 1e-6 >= GAP_S), key=lambda g: -g[1])[:MAX_GAPS]
    return {
        "device_s": (end - begin) * 1e-6,
        "kernel_s": sum(e["dur"] for e in kernels if e["args"].get("stream") == compute) * 1e-6,
        "idle": {
            "total_s": sum(g for _, g in gaps) * 1e-6,
            "long_s": sum(g for _, g in gaps if g * 1e-6 >= GAP_S) * 1e-6,
            "at_and_length_s": sorted(((at - begin) * 1e-6, length * 1e-6) for at, length in long),
        },
        "copies": _copies(e for e in device if e["cat"] == "gpu_memcpy"),
        "kernels": _kernels(kernels),
    }


def _merged(events: Iterable[Event]) -> list[tuple[float, float]]:
    """Return the times in which at least one of the events ran, as (begin, end) in order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _copies(events: Iterable[Event]) -> dict[str, Any]:
    by_kind: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_kind[event["name"]].append(event)
    result = {}
    for name, found in sorted(by_kind.items()):
        nbytes = sum(int(e["args"].get("bytes", 0)) for e in found)
        busy_s = sum(end - begin for begin, end in _merged(found)) * 1e-6
        result[name] = {
            "num": len(found),
            "bytes": nbytes,
            "busy_s": busy_s,
            "bytes_per_s": nbytes / busy_s if busy_s else None,
        }
    return result


def _kernels(events: Iterable[Event]) -> list[dict[str, Any]]:
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[event["name"]].append(event["dur"] * 1e-6)
    heaviest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:MAX_KERNELS]
    return [
        {
            "name": name[:MAX_NAME],
            "num": len(times),
            "total_s": sum(times),
            "median_s": median(times),
        }
        for name, times in heaviest
    ]
