"""Page-locking: seconds per GiB, waste, and what it does to the program beside it.

    python benchmarks/bench_pinned.py [--gib 4] [--repeats 3] [--limit 60] [--out FILE]

Without a GPU only the part that needs none is measured (faulting pages in). With one, the same sizes are asked of
memopt's pool, of ``torch.empty(pin_memory=True)``, and of the same with PyTorch's own pinned options, each in a process
of its own (PyTorch's options are read once), in which each repeat begins with no page locked: a new pool, or PyTorch's
host cache emptied. The median repeat is shown. A row is written after each way; no way begins, and no repeat, when
``--limit`` seconds have passed. *Waste* is what is locked beyond what was asked. *Stall* is the longest gap between two
short kernels' ends while the memory is being locked, beside the longest gap with nothing going on. The ratio is to
``torch pin_memory``, seconds per GiB (below 1: faster).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from _common import ROOT, provenance, write_json
from rich.console import Console
from rich.table import Table

GIB = 1 << 30
MIB = 1 << 20
TORCH_OPTIONS = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
TORCH_OPTIONS_2_13 = ",pinned_max_round_threshold_mb:1"
# Op outputs of a transformer block at 16,384 tokens, width 4,096 (MLP 14,336), bfloat16, and two odd ones.
SIZES = [
    16_384 * 4096 * 2 + 4096,
    16_384 * 14_336 * 2,
    16_384 * 1024 * 2,
    16_384 * 32 * 4,
    12_345_678,
]
BASE = "torch pin_memory"
WAYS: dict[str, dict[str, Any]] = {  # the ones that are compared come first
    "memopt, 4 threads": {},
    BASE: {},
    "torch pin_memory, options": {},
    "memopt, 4 threads, no huge pages": {"huge_pages": False},
    "memopt, 1 thread": {"num_threads": 1},
}


def sizes_for(total_bytes: int) -> dict[int, int]:
    """How many of each size add up to about ``total_bytes``."""
    count = max(1, total_bytes // sum(SIZES))
    return dict.fromkeys(SIZES, count)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Pulse(threading.Thread):
    """Runs short kernels one after the other and remembers the longest time that one took."""

    def __init__(self) -> None:
        import torch

        super().__init__(daemon=True)
        self.gaps_s: list[float] = []
        self._over = threading.Event()
        self._torch = torch
        self._data = torch.randn(1024, 1024, device="cuda")
        self._stream = torch.cuda.Stream()

    def run(self) -> None:
        """Until the end."""
        with self._torch.cuda.stream(self._stream):
            while not self._over.is_set():
                start = time.perf_counter()
                self._data @ self._data
                self._stream.synchronize()
                self.gaps_s.append(time.perf_counter() - start)

    def end(self) -> list[float]:
        """Stop; return every kernel's seconds, sorted."""
        self._over.set()
        self.join()
        return sorted(self.gaps_s)


def measure_way(way: str, total_bytes: int, repeats: int, end_s: float) -> dict[str, object]:
    """Lock ``total_bytes`` one way, some times over, in this process; return the median repeat and every seconds."""
    import torch

    runs: list[dict[str, object]] = []
    for _ in range(repeats):
        if runs and time.time() > end_s:
            break
        runs.append(measure(way, total_bytes))
        if not way.startswith("memopt") and not empty_torch_cache(torch):
            break
    median = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]  # type: ignore[arg-type, return-value]
    return median | {"num_repeats": len(runs), "all_seconds": [run["seconds"] for run in runs]}


def empty_torch_cache(torch: Any) -> bool:
    """Give PyTorch's cached page-locked blocks back; return whether this torch can."""
    for name in ("_host_emptyCache", "_accelerator_emptyHostCache"):
        if hasattr(torch._C, name):
            torch.cuda.synchronize()
            getattr(torch._C, name)()
            return True
    return False


def measure(way: str, total_bytes: int) -> dict[str, object]:
    """Lock ``total_bytes`` one way and let go of them; return what it took."""
    import torch

    pulse = Pulse() if torch.cuda.is_available() else None
    quiet = 0.0
    if pulse is not None:
        pulse.start()
        time.sleep(0.2)
        pulse.gaps_s.clear()
        time.sleep(0.3)
        quiet = max(pulse.gaps_s)
        pulse.gaps_s.clear()
    wanted = sizes_for(total_bytes)
    asked = sum(size * count for size, count in wanted.items())
    before, cpu = resident_bytes(), time.process_time()
    take = from_memopt if way.startswith("memopt") else from_torch
    keep, result = take(way, wanted, asked)
    result |= {"way": way, "asked_bytes": asked, "cpu_s": time.process_time() - cpu}
    result["s_per_gib"] = float(result["seconds"]) / (asked / GIB)  # type: ignore[arg-type]
    result["waste"] = int(result["mapped_bytes"]) / asked - 1  # type: ignore[call-overload]
    result["resident_bytes"] = resident_bytes() - before
    if pulse is not None:
        gaps = pulse.end()
        result |= {"stall_s": gaps[-1], "median_kernel_s": gaps[len(gaps) // 2]}
        result["quiet_stall_s"] = quiet
    for item in keep:
        if hasattr(item, "close"):
            item.close()
    return result


def from_memopt(
    way: str, wanted: dict[int, int], asked: int
) -> tuple[list[Any], dict[str, object]]:
    """Reserve in a new pool and take every buffer; return what holds it (the pool last), and the figures."""
    import torch

    from memopt.memory.pinned import HostPool

    start = time.perf_counter()
    pool = HostPool(2 * asked, torch.cuda.is_available(), **WAYS[way])
    pool.reserve(wanted)
    pool.settle()
    seconds = time.perf_counter() - start
    sizes = sorted(wanted.items(), reverse=True)
    keep: list[Any] = [pool.take(size) for size, count in sizes for _ in range(count)]
    stats = pool.stats()
    return [*keep, pool], {
        "seconds": seconds,
        "locked_bytes": stats.locked_bytes,
        "mapped_bytes": stats.mapped_bytes,
        "note": stats.unlocked_reason,
        "populate_thread_s": stats.populate_s,
        "lock_thread_s": stats.lock_s,
    }


def from_torch(way: str, wanted: dict[int, int], asked: int) -> tuple[list[Any], dict[str, object]]:
    """Allocate every tensor page-locked; return them and the figures."""
    import torch

    del way, asked
    before, start = resident_bytes(), time.perf_counter()
    keep: list[Any] = [
        torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for size, count in wanted.items()
        for _ in range(count)
    ]
    seconds = time.perf_counter() - start
    stats = torch.cuda.host_memory_stats()
    locked = stats.get("allocated_bytes.current", resident_bytes() - before)
    return keep, {"seconds": seconds, "locked_bytes": locked, "mapped_bytes": locked}


def torch_options() -> str:
    """PyTorch's fastest and most exact settings: without rounding from 2.13 on."""
    major, minor = (int(part) for part in importlib.metadata.version("torch").split(".")[:2])
    return TORCH_OPTIONS + (TORCH_OPTIONS_2_13 if (major, minor) >= (2, 13) else "")


def run_apart(way: str, total_bytes: int, repeats: int, end_s: float) -> dict[str, object]:
    """Measure in a fresh process, with PyTorch's options where the way asks for them."""
    environment = dict(os.environ)
    environment.pop("PYTORCH_ALLOC_CONF", None)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), environment.get("PYTHONPATH", "")])
    )
    if way.endswith("options"):
        environment["PYTORCH_ALLOC_CONF"] = torch_options()
    command = [sys.executable, __file__, "--way", way, "--gib", str(total_bytes / GIB)]
    command += ["--repeats", str(repeats), "--end", str(end_s)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"way": way, "failed": done.stderr.strip().splitlines()[-4:]}
    return json.loads(done.stdout.splitlines()[-1])


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Set every row's ratio to plain ``pin_memory``, where that was measured."""
    base = [row["s_per_gib"] for row in rows if row["way"] == BASE and "failed" not in row]
    for row in rows:
        if base and "failed" not in row:
            row["ratio_to_torch"] = row["s_per_gib"] / base[0]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="page-locking host memory")
    names = ("GiB", "s per GiB", "to torch", "waste", "CPU s", "longest kernel", "quiet", "runs")
    for column in ("way", *names, "note"):
        table.add_column(column, justify="left" if column in ("way", "note") else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(str(row["way"]), *[""] * len(names), f"failed: {row['failed']}")
            continue
        stall = "stall_s" in row
        table.add_row(
            str(row["way"]),
            f"{row['asked_bytes'] / GIB:.2f}",
            f"{row['s_per_gib']:.3f}",
            f"{row['ratio_to_torch']:.2f}" if "ratio_to_torch" in row else "",
            f"{100 * row['waste']:.2f} %",
            f"{row['cpu_s']:.2f}",
            f"{1e3 * row['stall_s']:.1f} ms" if stall else "-",
            f"{1e3 * row['quiet_stall_s']:.1f} ms" if stall else "-",
            str(row["num_repeats"]),
            str(row.get("note", "")),
        )
    console.print(table)


def has_cuda() -> bool:
    """Whether there is a CUDA device, without the seconds that importing torch takes."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    total_bytes = int(args.gib * GIB)
    if args.way:
        print(json.dumps(measure_way(args.way, total_bytes, args.repeats, args.end)))
        return
    end_s = time.time() + args.limit
    console = Console(width=None if sys.stdout.isatty() else 140)
    ways = [way for way in WAYS if way.startswith("memopt") or has_cuda()]
    record = {"benchmark": "pinned", "sizes": SIZES, "torch_options": torch_options()}
    record |= {"repeats": args.repeats}
    rows: list[dict[str, Any]] = []
    for way in ways:
        if time.time() > end_s:
            console.print(f"{way}: not begun, --limit {args.limit:g} s is over")
            continue
        rows.append(run_apart(way, total_bytes, args.repeats, end_s))
        add_ratios(rows)
        console.print(f"{way}: {rows[-1].get('s_per_gib', rows[-1].get('failed'))} s per GiB")
        if args.out:
            write_json(args.out, provenance(["memopt", "torch", "numpy"]) | record | {"rows": rows})
    show(rows, console)


if __name__ == "__main__":
    main()
