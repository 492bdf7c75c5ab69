"""Page-locking: seconds per GiB, waste, and what it does to the program beside it.

    python benchmarks/bench_pinned.py [--gib 4] [--out FILE]

Without a GPU only the part that needs none is measured (faulting pages in). With one, the same sizes are asked of
memopt's pool, of ``torch.empty(pin_memory=True)``, and of the same with PyTorch's own pinned options, each in a process
of its own (PyTorch's options are read once). *Waste* is what is locked beyond what was asked. *Stall* is the longest
gap between two short kernels' ends while the memory is being locked, beside the longest gap with nothing going on.
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

from _common import provenance, write_json
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
WAYS = {
    "memopt, 4 threads": {},
    "memopt, 4 threads, no huge pages": {"huge_pages": False},
    "memopt, 1 thread": {"num_threads": 1},
    "torch pin_memory": {},
    "torch pin_memory, options": {},
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


def measure(way: str, total_bytes: int) -> dict[str, object]:
    """Lock ``total_bytes`` one way in this process; return what it took."""
    import torch

    cuda = torch.cuda.is_available()
    pulse = Pulse() if cuda else None
    if pulse is not None:
        pulse.start()
        time.sleep(0.5)
        pulse.gaps_s.clear()
        time.sleep(1.0)
        quiet = max(pulse.gaps_s)
        pulse.gaps_s.clear()
    wanted = sizes_for(total_bytes)
    asked = sum(size * count for size, count in wanted.items())
    before, cpu, start = resident_bytes(), time.process_time(), time.perf_counter()
    result: dict[str, object] = {"way": way, "asked_bytes": asked}
    keep: list[object] = []
    if way.startswith("memopt"):
        from memopt.memory.pinned import HostPool

        pool = HostPool(2 * asked, cuda, **WAYS[way])
        pool.reserve(wanted)
        pool.settle()
        seconds = time.perf_counter() - start
        keep += [
            pool.take(size)
            for size, count in sorted(wanted.items(), reverse=True)
            for _ in range(count)
        ]
        stats = pool.stats()
        result |= {
            "locked_bytes": stats.locked_bytes,
            "mapped_bytes": stats.mapped_bytes,
            "note": stats.unlocked_reason,
        }
        result |= {"populate_thread_s": stats.populate_s, "lock_thread_s": stats.lock_s}
    else:
        for size, count in wanted.items():
            keep += [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        seconds = time.perf_counter() - start
        locked = torch.cuda.host_memory_stats().get(
            "allocated_bytes.current", resident_bytes() - before
        )
        result |= {"locked_bytes": locked, "mapped_bytes": locked}
    result |= {
        "seconds": seconds,
        "s_per_gib": seconds / (asked / GIB),
        "cpu_s": time.process_time() - cpu,
    }
    result["waste"] = int(result["mapped_bytes"]) / asked - 1  # type: ignore[call-overload]
    result["resident_bytes"] = resident_bytes() - before
    if pulse is not None:
        gaps = pulse.end()
        result |= {
            "stall_s": gaps[-1],
            "median_kernel_s": gaps[len(gaps) // 2],
            "quiet_stall_s": quiet,
        }
    return result


def torch_options() -> str:
    """PyTorch's fastest and most exact settings: without rounding from 2.13 on."""
    major, minor = (int(part) for part in importlib.metadata.version("torch").split(".")[:2])
    return TORCH_OPTIONS + (TORCH_OPTIONS_2_13 if (major, minor) >= (2, 13) else "")


def run_apart(way: str, total_bytes: int) -> dict[str, object]:
    """Measure in a fresh process, with PyTorch's options where the way asks for them."""
    environment = dict(os.environ)
    environment.pop("PYTORCH_ALLOC_CONF", None)
    if way.endswith("options"):
        environment["PYTORCH_ALLOC_CONF"] = torch_options()
    command = [sys.executable, __file__, "--way", way, "--gib", str(total_bytes / GIB)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"way": way, "failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: list[dict[str, object]], console: Console) -> None:
    table = Table(title="page-locking host memory")
    for column in ("way", "GiB", "s per GiB", "CPU s", "waste", "longest kernel", "quiet", "note"):
        table.add_column(column, justify="left" if column in ("way", "note") else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(str(row["way"]), *[""] * 6, f"failed: {row['failed']}")
            continue
        table.add_row(
            str(row["way"]),
            f"{row['asked_bytes'] / GIB:.2f}",
            f"{row['s_per_gib']:.3f}",
            f"{row['cpu_s']:.2f}",
            f"{100 * row['waste']:.2f} %",
            f"{1e3 * row['stall_s']:.1f} ms" if "stall_s" in row else "-",
            f"{1e3 * row['quiet_stall_s']:.1f} ms" if "stall_s" in row else "-",
            str(row.get("note", "")),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    total_bytes = int(args.gib * GIB)
    if args.way:
        print(json.dumps(measure(args.way, total_bytes)))
        return
    import torch

    console = Console(width=None if sys.stdout.isatty() else 140)
    ways = [way for way in WAYS if torch.cuda.is_available() or way.startswith("memopt")]
    rows = []
    for way in ways:
        runs = [run_apart(way, total_bytes) for _ in range(args.repeats)]
        good = sorted((run for run in runs if "failed" not in run), key=lambda run: run["seconds"])
        rows.append(good[len(good) // 2] if good else runs[0])  # the median run, whole
    show(rows, console)
    if args.out:
        record = provenance(["memopt", "torch", "numpy"])
        record |= {
            "benchmark": "pinned",
            "sizes": SIZES,
            "torch_options": torch_options(),
            "repeats": args.repeats,
        }
        write_json(args.out, record | {"rows": rows})


if __name__ == "__main__":
    main()
