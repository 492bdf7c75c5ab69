"""Copies of small pieces between host and device, and the way device -> SSD -> device, each beside what it replaces.

    python benchmarks/bench_copies.py [--directory DIRECTORY] [--repeats 9] [--limit 40] [--out FILE]

Part one: the same bytes as one large copy, as a loop of PyTorch's ``copy_``, as a loop in C, and in batches of 16 MiB
and of everything (``cudaMemcpyBatchAsync``); to the device, to the host, and both at once. Wall time between two
synchronisations, the queueing included; ways take turns; GB/s is the median's, the ratio is to the large copy of the
same repeat (median of ratios).

Part two (with ``--directory``): tensors go to extents in that directory and come back inside a backward pass, with
the copy's other end on the device; see ``_device_ssd.py`` for the ways and the cases. Passes begin until ``--limit``
seconds of part two are over, and results are written after each.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import provenance, write_json
from _device_ssd import Rounds, run_rounds, show_chain
from rich.console import Console
from rich.table import Table

from memopt.activations.cuda import CudaTransfers
from memopt.activations.spill import SpillArea
from memopt.io import ExtentStore, open_engine
from memopt.memory.pinned import HostPool
from memopt.ops import cuda_status
from memopt.ops.copies import Copies, copies_status

MIB = 1 << 20
PIECES = [256 << 10, 1 << 20, 4 << 20]
BATCH_BYTES = 16 << 20
DIRECTIONS = ["h2d", "d2h", "both"]


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


def measure_link(total_bytes: int, repeats: int, limit_s: float) -> list[dict[str, Any]]:
    link = Link(total_bytes)
    rows = []
    began, num_done = time.perf_counter(), 0
    for piece in PIECES:
        for direction in DIRECTIONS:
            ways = ["h2d", "d2h"] if direction == "both" else [direction]
            seconds: dict[str, list[float]] = {how: [] for how in HOWS}
            num_done += 1
            until = began + limit_s * num_done / (len(PIECES) * len(DIRECTIONS))
            for repeat in range(repeats + 1):
                if repeat > 1 and time.perf_counter() > until:
                    break
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where the spill file goes; none: part one")
    parser.add_argument("--total-mib", type=int, default=512)
    parser.add_argument("--chain-mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only-chain", action="store_true", help="part two alone")
    parser.add_argument("--link-limit", type=float, default=15.0, help="seconds of part one")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds of part two")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    console = Console(width=None if sys.stdout.isatty() else 140)
    record = provenance(["memopt", "torch", "cffi"])
    record |= {"benchmark": "copies", "library": cuda_status().build, "repeats": args.repeats}
    record |= {"batched": copies_status()[1] or "cudaMemcpyBatchAsync", "link": [], "chain": []}
    if not args.only_chain:
        if not copies_status()[0]:
            sys.exit(f"this benchmark needs the native library: {copies_status()[1]}")
        record["link"] = measure_link(args.total_mib * MIB, args.repeats, args.link_limit)
        show_link(record["link"], console)
        save(args.out, record)
    if args.directory is not None:
        record["chain_bytes"] = args.chain_mib * MIB
        measure_chain(args, record)
        show_chain(record["chain"], console)


def measure_chain(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Fill ``record["chain"]``: rounds over all ways, tensors large and small in turn, until the limit."""
    end = time.perf_counter() + args.limit
    device = torch.device("cuda", torch.cuda.current_device())
    total_bytes = args.chain_mib * MIB
    with contextlib.closing(open_engine("auto", directory=args.directory)) as engine:
        store = ExtentStore([(args.directory, 2 * total_bytes)], engine)
        area = SpillArea(store, HostPool(256 * MIB, True))
        with contextlib.closing(
            CudaTransfers(device, HostPool(64 * MIB, True), area, 1 << 30)
        ) as transfers:
            sizes = []
            for piece in (64 * MIB, MIB):
                shape, num = (piece,), total_bytes // piece
                tensors = [
                    torch.full(shape, i % 251, dtype=torch.uint8, device=device) for i in range(num)
                ]
                sizes.append(Rounds(transfers, tensors))
            run_rounds(sizes, args.rounds + 1, end, partial(keep, args.out, record, sizes))


def keep(path: Path | None, record: dict[str, Any], sizes: list[Rounds]) -> None:
    """Write what there is so far."""
    record["chain"] = [row for size in sizes for row in size.rows()]
    save(path, record)


def save(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, record)


if __name__ == "__main__":
    main()
