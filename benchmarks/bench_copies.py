"""Copies of small pieces between host and device, and the way device -> SSD -> device, each beside what it replaces.

    python benchmarks/bench_copies.py [--directory DIRECTORY] [--repeats 9] [--limit 50] [--out FILE]

Part one: the same bytes as one large copy, as a loop of PyTorch's ``copy_``, as a loop in C, and in batches of 16 MiB
and of everything (``cudaMemcpyBatchAsync``); to the device, to the host, and both at once. Wall time between two
synchronisations, the queueing included; ways take turns; GB/s is the median's, the ratio is to the large copy of the
same repeat (median of ratios).

Part two (with ``--directory``): tensors go to extents in that directory and come back, with the copy's other end on the
device. "chain" is memopt's native pipeline, "python" the same pipeline driven by a Python thread and blocking reads
(memopt's fallback), "blocking" one tensor after the other. Each also beside a Python thread that is always busy, as a
training loop is: that is what the native way is for. Rounds begin until the limit (seconds since the start of the
program) has passed, the first of each way is not counted where there are more, and results are written after each.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import provenance, write_json
from rich.console import Console
from rich.table import Table

from memopt.activations.cuda import CudaTransfers
from memopt.activations.spill import SpillArea
from memopt.activations.stored import Label
from memopt.io import ExtentStore, open_engine
from memopt.memory.pinned import HostPool
from memopt.ops import cuda_status
from memopt.ops.copies import Copies, copies_status

BEGAN = time.perf_counter()
MIB = 1 << 20
PIECES = [256 << 10, 1 << 20, 4 << 20]
BATCH_BYTES = 16 << 20
DIRECTIONS = ["h2d", "d2h", "both"]
LABEL = Label(region="", what="benchmark")


class Link:
    """Two buffers on each side, and one stream for each direction."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.pool = HostPool(2 * total_bytes, True)
        self.host = {
            way: self.pool.take(total_bytes).tensor(torch.uint8, (total_bytes,))
            for way in ("h2d", "d2h")
        }
        self.device = {
            way: torch.ones(total_bytes, dtype=torch.uint8, device="cuda") for way in self.host
        }
        self.streams = {way: torch.cuda.Stream() for way in self.host}

    def ends(self, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Destination and source."""
        pair = self.device[way], self.host[way]
        return pair if way == "h2d" else pair[::-1]

    def torch_loop(self, way: str, begin: int, end: int, piece: int) -> None:
        """One call of PyTorch's for each piece."""
        destination, source = (tensor[begin:end] for tensor in self.ends(way))
        with torch.cuda.stream(self.streams[way]):
            for to, by in zip(destination.split(piece), source.split(piece), strict=True):
                to.copy_(by, non_blocking=True)

    def native(self, way: str, begin: int, end: int, piece: int, *, batched: bool) -> None:
        """One call of ours."""
        destination, source = (tensor.data_ptr() for tensor in self.ends(way))
        copies = Copies()
        for at in range(begin, end, piece):
            copies.add(destination + at, source + at, piece)
        copies.queue(self.streams[way].cuda_stream, batched=batched)

    def run(self, how: str, ways: list[str], piece: int) -> None:
        """Queue all copies, 16 MiB of each direction in turn where they are not one."""
        at_once = self.total_bytes if how in ("one", "one batch") else BATCH_BYTES
        for begin in range(0, self.total_bytes, at_once):
            for way in ways:
                if how == "one":
                    self.torch_loop(way, begin, begin + at_once, at_once)
                elif how == "torch loop":
                    self.torch_loop(way, begin, begin + at_once, piece)
                else:
                    self.native(way, begin, begin + at_once, piece, batched=how != "C loop")


HOWS = ["one", "torch loop", "C loop", "batches of 16 MiB", "one batch"]


def timed(body: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    body()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure_link(total_bytes: int, repeats: int) -> list[dict[str, Any]]:
    link = Link(total_bytes)
    rows = []
    for piece in PIECES:
        for direction in DIRECTIONS:
            ways = ["h2d", "d2h"] if direction == "both" else [direction]
            seconds: dict[str, list[float]] = {how: [] for how in HOWS}
            for repeat in range(repeats + 1):
                for how in HOWS[repeat % len(HOWS) :] + HOWS[: repeat % len(HOWS)]:
                    spent = timed(partial(link.run, how, ways, piece))
                    if repeat:  # the first round warms up
                        seconds[how].append(spent)
            moved = total_bytes * len(ways)
            for how in HOWS:
                ratios = [a / b for a, b in zip(seconds["one"], seconds[how], strict=True)]
                rows.append(
                    {
                        "piece_bytes": piece,
                        "direction": direction,
                        "how": how,
                        "gb_per_s": moved / statistics.median(seconds[how]) / 1e9,
                        "ratio_to_one": statistics.median(ratios),
                    }
                )
    link.pool.close()
    return rows


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


def pipeline(transfers: CudaTransfers, tensors: list[torch.Tensor]) -> tuple[float, float]:
    """Send all, then fetch all, two ahead; return the seconds of each."""
    stored: list[Any] = []

    def out() -> None:
        stored.extend(
            transfers.store(tensor, "ssd", LABEL, clone_first=False, wait=True)
            for tensor in tensors
        )
        transfers.finish()

    def back() -> None:
        for i, item in enumerate(stored):
            for ahead in stored[i : i + 3]:
                ahead.prefetch()
            item.take(keep=False)
        if transfers.chain is not None:
            transfers.chain.check()

    seconds = timed(out), timed(back)
    stored.clear()
    return seconds


def blocking(
    store: ExtentStore, pool: HostPool, tensors: list[torch.Tensor]
) -> tuple[float, float]:
    """Copy, wait, write, wait; and the same back."""
    buffer = pool.take(tensors[0].nbytes)
    host = buffer.tensor(torch.uint8, (buffer.nbytes,))
    extents = [store.alloc(tensor.nbytes) for tensor in tensors]

    def out() -> None:
        for tensor, extent in zip(tensors, extents, strict=True):
            host.copy_(tensor)
            store.write(extent, buffer.memoryview).wait()

    def back() -> None:
        for extent in extents:
            store.read(extent, buffer.memoryview).wait()
            torch.empty_like(host, device="cuda").copy_(host)

    seconds = timed(out), timed(back)
    for extent in extents:
        store.free(extent)
    buffer.release()
    return seconds


class Rounds:
    """Passes of the chain and of what it replaces over the same tensors.

    Args:
        directory: where the spill file goes.
        piece: bytes of a tensor.
        total_bytes: of all tensors.
    """

    def __init__(self, directory: Path, piece: int, total_bytes: int) -> None:
        self.piece, self.total_bytes = piece, total_bytes
        self.tensors = [
            torch.full((piece,), i % 251, dtype=torch.uint8, device="cuda")
            for i in range(total_bytes // piece)
        ]
        self.engine = open_engine("auto", directory=directory)
        self.area = SpillArea(
            ExtentStore([(directory, 2 * total_bytes)], self.engine), HostPool(256 * MIB, True)
        )
        device = torch.device("cuda", torch.cuda.current_device())
        self.transfers = CudaTransfers(device, HostPool(64 * MIB, True), self.area, 1 << 30)
        self.chain = self.transfers.chain
        names = (["chain"] if self.chain is not None else []) + ["python", "blocking"]
        self.ways = [(name, busy) for busy in (False, True) for name in names]
        self.spent: dict[tuple[str, bool], list[tuple[float, float]]] = {w: [] for w in self.ways}

    def run(self, way: str, *, busy: bool) -> None:
        """One pass, there and back."""
        self.transfers.chain = self.chain if way == "chain" else None
        with busy_python(busy=busy):
            if way == "blocking":
                pair = blocking(self.area.store, self.area.staging, self.tensors)
            else:
                pair = pipeline(self.transfers, self.tensors)
        self.transfers.chain = self.chain
        self.spent[way, busy].append(pair)

    def rows(self) -> list[dict[str, Any]]:
        """Medians so far."""
        rows = []
        for (way, busy), pairs in self.spent.items():
            counted = pairs[1:] or pairs
            if not counted:
                continue
            out, back = (statistics.median(pair[i] for pair in counted) for i in (0, 1))
            rows.append(
                {
                    "piece_bytes": self.piece,
                    "way": way,
                    "busy_python": busy,
                    "num_rounds": len(counted),
                    "engine": self.engine.name,
                    "chain_reason": self.transfers.chain_reason,
                    "write_gb_per_s": self.total_bytes / out / 1e9,
                    "read_gb_per_s": self.total_bytes / back / 1e9,
                }
            )
        return rows

    def close(self) -> None:
        """Give everything back."""
        self.transfers.close()
        self.engine.close()


def show_link(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="copies over the link: GB/s (ratio to one large copy)")
    for column in ("piece", "direction", *HOWS):
        table.add_column(column, justify="right")
    for piece in PIECES:
        for direction in DIRECTIONS:
            cells = {
                r["how"]: f"{r['gb_per_s']:.1f} ({r['ratio_to_one']:.2f})"
                for r in rows
                if (r["piece_bytes"], r["direction"]) == (piece, direction)
            }
            table.add_row(f"{piece >> 10} KiB", direction, *(cells[how] for how in HOWS))
    console.print(table)


def show_chain(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="device to SSD and back: GB/s")
    for column in ("tensor", "way", "Python busy", "write", "read"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['piece_bytes'] / MIB:g} MiB",
            row["way"],
            "yes" if row["busy_python"] else "no",
            f"{row['write_gb_per_s']:.2f}",
            f"{row['read_gb_per_s']:.2f}",
        )
    console.print(table)
    if rows and rows[0]["chain_reason"]:
        console.print(f"no chain: {rows[0]['chain_reason']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where the spill file goes; none: part one")
    parser.add_argument("--total-mib", type=int, default=512)
    parser.add_argument("--chain-mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=50.0, help="seconds; no pass begins later")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    if not copies_status()[0]:
        sys.exit(f"this benchmark needs the native library: {copies_status()[1]}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    record = provenance(["memopt", "torch", "cffi"])
    record |= {"benchmark": "copies", "library": cuda_status().build, "repeats": args.repeats}
    record |= {"batched": copies_status()[1] or "cudaMemcpyBatchAsync", "chain": []}
    record["link"] = measure_link(args.total_mib * MIB, args.repeats)
    show_link(record["link"], console)
    save(args.out, record)
    if args.directory is not None:
        record["chain_bytes"] = args.chain_mib * MIB
        measure_chain(args, record)
        show_chain(record["chain"], console)


def measure_chain(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Fill ``record["chain"]``: rounds over all ways, tensors large and small in turn, until the limit."""
    sizes = [Rounds(args.directory, piece, args.chain_mib * MIB) for piece in (64 * MIB, MIB)]
    try:
        for _ in range(args.rounds + 1):
            for rounds in sizes:
                for way, busy in rounds.ways:
                    if time.perf_counter() - BEGAN > args.limit:
                        return
                    rounds.run(way, busy=busy)
                    record["chain"] = [row for size in sizes for row in size.rows()]
                    save(args.out, record)
    finally:
        for rounds in sizes:
            rounds.close()


def save(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, record)


if __name__ == "__main__":
    main()
