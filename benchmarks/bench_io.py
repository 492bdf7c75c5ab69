"""Raw speed of memopt's storage engines beside fio and DeepSpeed's aio_handle, on the same file in the same run.

    python benchmarks/bench_io.py DIRECTORY [--size-mib 2048] [--rounds 5] [--out FILE]

Everyone writes and reads one laid-out file of the same size with O_DIRECT, the same block size and the same number of
blocks in flight. memopt moves buffers of its own pool, which asks for huge pages, and these alone make direct transfers
two to three times faster: so it is held against fio with huge pages (glibc's ``hugetlb`` tunable), and fio as it comes
stands beside, for DeepSpeed, whose locked tensors have small ones. Rounds are interleaved (every engine once per
round, in an order that rotates), because disks drift; the ratio to fio is taken inside each round and its median is
reported. CPU seconds are of the measuring process or thread alone, per GiB. DeepSpeed takes part when its engine is
built (``AsyncIOBuilder().load()`` before).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _common import provenance, write_json
from rich.console import Console
from rich.table import Table

from memopt.io import Engine, IoFile, Transfer, open_engine, open_file
from memopt.io.uring import UringEngine
from memopt.memory.pinned import HostPool

MIB = 1 << 20
BUFFER_BYTES = 256 * MIB
SMALL = "fio, small pages"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One pass over the file."""

    who: str
    kind: str
    bytes_per_s: float
    cpu_s_per_gib: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """What everyone does."""

    path: Path
    size_bytes: int
    block_bytes: int
    depth: int


def fio(case: Case, kind: str, *, registered: bool = False, huge_pages: bool = True) -> Result:
    command = [
        "fio", "--name=pass", f"--filename={case.path}", f"--size={case.size_bytes}",
        f"--bs={case.block_bytes}",
        f"--iodepth={case.depth}", f"--rw={kind}", "--ioengine=io_uring", "--direct=1", "--overwrite=1",
        "--scramble_buffers=0",
        f"--fixedbufs={int(registered)}", f"--registerfiles={int(registered)}", "--output-format=json",
    ]  # fmt: skip
    tunables = "glibc.malloc.hugetlb=1" if huge_pages else ""
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"GLIBC_TUNABLES": tunables},
    )
    job = json.loads(run.stdout)["jobs"][0]
    seconds = job[kind]["runtime"] / 1e3
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * seconds
    who = "fio, registered" if registered else "fio" if huge_pages else SMALL
    return Result(
        who=who,
        kind=kind,
        bytes_per_s=case.size_bytes / seconds,
        cpu_s_per_gib=cpu_s / (case.size_bytes / (1 << 30)),
    )


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memopt_pass(
    case: Case, engine: Engine, file: IoFile, buffer: memoryview, kind: str
) -> tuple[float, float]:
    """Move the whole file through one buffer that is reused, two transfers ahead; return seconds and CPU seconds."""
    half = len(buffer) // 2
    cpu, start = cpu_seconds(), time.perf_counter()
    waiting: list = []
    for number, offset in enumerate(range(0, case.size_bytes, half)):
        if len(waiting) == 2:
            waiting.pop(0).wait()
        part = buffer[number % 2 * half :][: min(half, case.size_bytes - offset)]
        waiting.append(engine.submit([Transfer(kind=kind, file=file, offset=offset, buffer=part)]))
    for ticket in waiting:
        ticket.wait()
    return time.perf_counter() - start, cpu_seconds() - cpu


def memopt(case: Case, kind: str, *, name: str, registered: bool = False) -> Result:
    nbytes = min(BUFFER_BYTES, case.size_bytes)
    with ExitStack() as stack:
        pool = stack.enter_context(HostPool(nbytes, register=False, chunk_bytes=nbytes))
        held = pool.take(nbytes)
        buffer = memoryview(held.tensor(torch.uint8, (nbytes,)).numpy())
        buffer[:] = os.urandom(MIB) * (nbytes // MIB)
        file = open_file(case.path, writable=True)
        stack.callback(file.close)
        if not file.is_direct:
            raise SystemExit(f"no direct I/O on {case.path}: {file.direct_reason}")
        engine: Engine = (
            UringEngine.open(queue_depth=case.depth, block_bytes=case.block_bytes)
            if name == "io_uring"
            else open_engine("threads", queue_depth=case.depth)
        )
        stack.enter_context(engine)
        reason = engine.register_buffers([buffer]) if registered else ""
        if reason:
            raise SystemExit(f"registered buffers: {reason}")
        seconds, cpu_s = memopt_pass(case, engine, file, buffer, kind)
        engine.detach(file)
        held.release()
    who = f"memopt {name}{', registered' if registered else ''}"
    gib = case.size_bytes / (1 << 30)
    return Result(
        who=who, kind=kind, bytes_per_s=case.size_bytes / seconds, cpu_s_per_gib=cpu_s / gib
    )


def deepspeed(case: Case, kind: str) -> Result:
    """DeepSpeed's handle with its locked tensor, asynchronous, as its swappers call it."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = (
        AsyncIOBuilder()
        .load(verbose=False)
        .aio_handle(case.block_bytes, case.depth, False, True, 1)
    )
    buffer = handle.new_cpu_locked_tensor(
        min(BUFFER_BYTES, case.size_bytes), torch.empty(0, dtype=torch.uint8)
    )
    buffer.fill_(7)
    call = handle.async_pread if kind == "read" else handle.async_pwrite
    cpu, start = cpu_seconds(), time.perf_counter()
    for offset in range(0, case.size_bytes, buffer.numel()):
        call(buffer, str(case.path), offset)
        handle.wait()
    seconds, cpu_s = time.perf_counter() - start, cpu_seconds() - cpu
    handle.free_cpu_locked_tensor(buffer)
    gib = case.size_bytes / (1 << 30)
    return Result(
        who="DeepSpeed aio_handle",
        kind=kind,
        bytes_per_s=case.size_bytes / seconds,
        cpu_s_per_gib=cpu_s / gib,
    )


def fio_version() -> str:
    return subprocess.run(
        ["fio", "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()


def run_rounds(
    case: Case, rounds: int, *, with_deepspeed: bool, console: Console
) -> list[list[Result]]:
    contestants = [
        lambda kind: fio(case, kind, huge_pages=False),
        lambda kind: fio(case, kind),
        lambda kind: memopt(case, kind, name="io_uring"),
        lambda kind: fio(case, kind, registered=True),
        lambda kind: memopt(case, kind, name="io_uring", registered=True),
        lambda kind: memopt(case, kind, name="threads"),
    ]
    if with_deepspeed:
        contestants.append(lambda kind: deepspeed(case, kind))
    all_rounds = []
    for number in range(rounds):
        order = contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
        results = [contestant(kind) for kind in ("write", "read") for contestant in order]
        all_rounds.append(results)
        line = "  ".join(f"{r.who} {r.kind} {r.bytes_per_s / 1e9:.2f}" for r in results)
        console.print(f"round {number + 1}: {line}", highlight=False)
    return all_rounds


def rival_of(who: str) -> str:
    """Return the fio that moves memory of the same kind."""
    if "registered" in who:
        return "fio, registered"
    return SMALL if who in (SMALL, "DeepSpeed aio_handle") else "fio"


def summary(rounds: list[list[Result]]) -> list[dict[str, object]]:
    """Median speed, median CPU time and the median over rounds of the ratio to the matching fio of the same round."""
    rows = []
    for kind in ("write", "read"):
        for who in dict.fromkeys(r.who for r in rounds[0]):
            mine = [
                next(r for r in results if (r.who, r.kind) == (who, kind)) for results in rounds
            ]
            rival = rival_of(who)
            theirs = [
                next(r for r in results if (r.who, r.kind) == (rival, kind)) for results in rounds
            ]
            rows.append(
                {
                    "who": who,
                    "kind": kind,
                    "gb_per_s": statistics.median(r.bytes_per_s for r in mine) / 1e9,
                    "cpu_s_per_gib": statistics.median(r.cpu_s_per_gib for r in mine),
                    "ratio_to_fio": statistics.median(
                        m.bytes_per_s / t.bytes_per_s for m, t in zip(mine, theirs, strict=True)
                    ),
                }
            )
    return rows


def show(rows: list[dict[str, object]], case: Case, console: Console) -> None:
    title = f"{case.size_bytes >> 20} MiB, blocks of {case.block_bytes >> 10} KiB, {case.depth} in flight, O_DIRECT"
    table = Table(title=title)
    for column in ("who", "kind", "GB/s", "x fio of the same round", "CPU s per GiB"):
        table.add_column(column, justify="left" if column in ("who", "kind") else "right")
    for row in rows:
        table.add_row(
            str(row["who"]),
            str(row["kind"]),
            f"{row['gb_per_s']:.2f}",
            f"{row['ratio_to_fio']:.3f}",
            f"{row['cpu_s_per_gib']:.3f}",
        )
    console.print(table)


def deepspeed_is_built() -> bool:
    """Whether DeepSpeed's engine was compiled before; compiling takes minutes and is not this script's business."""
    if importlib.util.find_spec("deepspeed") is None:
        return False
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
    return next(cache.rglob("async_io.so"), None) is not None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--block-kib", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed (apt-get install fio)")
    path = args.directory / f"bench-io-{os.getpid()}.bin"
    case = Case(
        path=path,
        size_bytes=args.size_mib * MIB,
        block_bytes=args.block_kib << 10,
        depth=args.depth,
    )
    with_deepspeed = not args.no_deepspeed and deepspeed_is_built()
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, case.size_bytes)
        memopt(
            case, "write", name="threads"
        )  # every block written once: nobody pays for first writes
        rounds = run_rounds(case, args.rounds, with_deepspeed=with_deepspeed, console=console)
    finally:
        path.unlink(missing_ok=True)
    rows = summary(rounds)
    show(rows, case, console)
    if args.out:
        record = provenance(["memopt", "numpy", "cffi", "deepspeed"])
        record |= {"benchmark": "io", "fio": fio_version(), "load_average": os.getloadavg()}
        record |= {
            "size_bytes": case.size_bytes,
            "block_bytes": case.block_bytes,
            "depth": case.depth,
        }
        record |= {"summary": rows, "rounds": [[asdict(r) for r in x] for x in rounds]}
        write_json(args.out, record)


if __name__ == "__main__":
    main()
