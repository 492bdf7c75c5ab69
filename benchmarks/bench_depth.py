"""How long the queue of one spill directory must be: speed by block size and by blocks in flight.

    python benchmarks/bench_depth.py DIRECTORY [--size-mib 256] [--rounds 5] [--out FILE]

One batch per pass writes, or reads, a reserved file with O_DIRECT through the io_uring engine. Rounds are interleaved
(every case once per round), because disks drift; medians are reported. ``memopt/io/depth.py`` is made of the outcome.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import time
from pathlib import Path

from _common import provenance, write_json
from rich.console import Console
from rich.table import Table

from memopt.io import IoFile, Transfer, create_unlinked
from memopt.io.uring import UringEngine

KIB, MIB = 1 << 10, 1 << 20
BLOCKS = (16 * KIB, 64 * KIB, 256 * KIB, MIB)
DEPTHS = (8, 32, 64, 128, 256)


def one_pass(file: IoFile, memory: memoryview, block_bytes: int, depth: int) -> dict[str, float]:
    """Write everything, then read it back; return bytes per second of both."""
    rates = {}
    with UringEngine.open(queue_depth=depth, block_bytes=block_bytes) as engine:
        for kind in ("write", "read"):
            begin = time.perf_counter()
            engine.submit([Transfer(kind=kind, file=file, offset=0, buffer=memory)]).wait()
            rates[kind] = len(memory) / (time.perf_counter() - begin)
        engine.detach(file)
    return rates


def table_of(rows: list[dict[str, object]]) -> Table:
    table = Table(title="GB/s by blocks in flight", title_justify="left")
    for column in ("", "block", *map(str, DEPTHS)):
        table.add_column(column, justify="right")
    for kind in ("write", "read"):
        for block_bytes in BLOCKS:
            rates = [
                f"{row['bytes_per_s'] / 1e9:.2f}"
                for row in rows
                if (row["kind"], row["block_bytes"]) == (kind, block_bytes)
            ]
            table.add_row(kind, f"{block_bytes // KIB} KiB", *rates)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    size_bytes = asked.size_mib * MIB
    memory = memoryview(mmap.mmap(-1, size_bytes))
    for begin in range(0, size_bytes, 16 * MIB):  # random: a drive that compresses must not win
        memory[begin : begin + 16 * MIB] = os.urandom(min(16 * MIB, size_bytes - begin))
    file = create_unlinked(asked.directory)
    os.posix_fallocate(file.buffered_fd, 0, size_bytes)
    one_pass(file, memory, MIB, 32)  # the file system writes extents for the first time slowly
    rates: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(asked.rounds):
        for block_bytes in BLOCKS:
            for depth in DEPTHS:
                for kind, rate in one_pass(file, memory, block_bytes, depth).items():
                    rates.setdefault((kind, block_bytes, depth), []).append(rate)
    direct = file.is_direct
    file.close()
    rows: list[dict[str, object]] = [
        {
            "kind": kind,
            "block_bytes": block_bytes,
            "depth": depth,
            "bytes_per_s": statistics.median(some),
        }
        for (kind, block_bytes, depth), some in rates.items()
    ]
    Console().print(table_of(rows))
    if asked.out:
        case = {"size_bytes": size_bytes, "rounds": asked.rounds, "direct": direct}
        write_json(asked.out, {"provenance": provenance(["memopt"]), "case": case, "rows": rows})


if __name__ == "__main__":
    main()
