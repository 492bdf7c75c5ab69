"""Copies of small pieces between host and device, and the way device -> SSD -> device, each beside what it replaces.

    python benchmarks/bench_copies.py [--directory DIRECTORY] [--total-mib 512] [--repeats 9] [--out FILE]

Part one: the same bytes as one large copy, as a loop of PyTorch's ``copy_``, as a loop in C, and in batches of 16 MiB
and of everything (``cudaMemcpyBatchAsync``); to the device, to the host, and both at once. Wall time between two
synchronisations, the queueing included; ways take turns; GB/s is the median's, the ratio is to the large copy of the
same repeat (median of ratios).

Part two (with ``--directory``): tensors go to extents in that directory and come back, with the copy's other end on the
device. "chain" is memopt's native pipeline, "python" the same pipeline driven by a Python thread and blocking reads
(memopt's fallback), "blocking" one tensor after the other. Each also beside a Python thread that is always busy, as a
training loop is: that is what the native way is for.
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

    def torch_loop(self, way: str, piece: int) -> None:
        """One call of PyTorch's for each piece."""
        destination, source = self.ends(way)
        with torch.cuda.stream(self.streams[way]):
            for to, by in zip(destination.split(piece), source.split(piece), strict=True):
                to.copy_(by, non_blocking=True)

    def batches(self, way: str, piece: int, batch_bytes: int, *, batched: bool) -> None:
        """One call of ours for each batch."""
        destination, source = (tensor.data_ptr() for tensor in self.ends(way))
        for begin in range(0, self.total_bytes, batch_bytes):
            copies = Copies()
            for at in range(begin, min(begin + batch_bytes, self.total_bytes), piece):
                copies.add(destination + at, source + at, piece)
            copies.queue(self.streams[way].cuda_stream, batched=batched)

    def run_all(self, how: str, ways: list[str], piece: int) -> None:
        """Queue the copies of each direction."""
        for way in ways:
            self.run(how, way, piece)

    def run(self, how: str, way: str, piece: int) -> None:
        """Queue all copies of one direction."""
        if how == "one":
            self.torch_loop(way, self.total_bytes)
        elif how == "torch loop":
            self.torch_loop(way, piece)
        elif how == "C loop":
            self.batches(way, piece, BATCH_BYTES, batched=False)
        elif how == "batches of 16 MiB":
            self.batches(way, piece, BATCH_BYTES, batched=True)
        else:
            self.batches(way, piece, self.total_bytes, batched=True)


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
                    spent = timed(partial(link.run_all, how, ways, piece))
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


def measure_chain(
    directory: Path, piece: int, total_bytes: int, rounds: int
) -> list[dict[str, Any]]:
    tensors = [
        torch.full((piece,), i % 251, dtype=torch.uint8, device="cuda")
        for i in range(total_bytes // piece)
    ]
    device = torch.device("cuda", torch.cuda.current_device())
    spent: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    with open_engine("auto", directory=directory) as engine:
        area = SpillArea(
            ExtentStore([(directory, 2 * total_bytes)], engine), HostPool(256 * MIB, True)
        )
        transfers = CudaTransfers(device, HostPool(64 * MIB, True), area, 1 << 30)
        chain, reason = transfers.chain, transfers.chain_reason
        ways = (["chain"] if chain is not None else []) + ["python", "blocking"]
        for _ in range(rounds + 1):
            for busy in (False, True):
                for way in ways:
                    transfers.chain = chain if way == "chain" else None
                    with busy_python(busy=busy):
                        pair = (
                            blocking(area.store, area.staging, tensors)
                            if way == "blocking"
                            else pipeline(transfers, tensors)
                        )
                    spent.setdefault((way, busy), []).append(pair)
        transfers.chain = chain
        transfers.close()
        name = engine.name
    rows = []
    for (way, busy), pairs in spent.items():
        out, back = (statistics.median(pair[i] for pair in pairs[1:]) for i in (0, 1))
        rows.append(
            {
                "piece_bytes": piece,
                "way": way,
                "busy_python": busy,
                "engine": name,
                "chain_reason": reason,
                "write_gb_per_s": total_bytes / out / 1e9,
                "read_gb_per_s": total_bytes / back / 1e9,
            }
        )
    return rows


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
    parser.add_argument("--chain-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    if not copies_status()[0]:
        sys.exit(f"this benchmark needs the native library: {copies_status()[1]}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    link = measure_link(args.total_mib * MIB, args.repeats)
    show_link(link, console)
    chain: list[dict[str, Any]] = []
    if args.directory is not None:
        for piece in (64 * MIB, MIB):
            chain += measure_chain(args.directory, piece, args.chain_mib * MIB, args.rounds)
        show_chain(chain, console)
    if args.out:
        record = provenance(["memopt", "torch", "cffi"])
        record |= {"benchmark": "copies", "library": cuda_status().build}
        record |= {"batched": copies_status()[1] or "cudaMemcpyBatchAsync", "repeats": args.repeats}
        write_json(args.out, record | {"link": link, "chain": chain})


if __name__ == "__main__":
    main()
