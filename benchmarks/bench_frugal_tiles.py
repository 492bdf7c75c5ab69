"""Which tiles the step's kernel should use for columns and coordinates, measured beside each other.

    python benchmarks/bench_frugal_tiles.py --build .native/tiles             # anywhere with nvcc
    python benchmarks/bench_frugal_tiles.py --libraries .native/tiles --out tiles.json   # on a GPU

`--build` compiles one library a variant of `VARIANTS` (csrc/cuda/frugal_tiles.cuh names the numbers).
The measurement runs each library in a process of its own: the update of columns and coordinates
against PyTorch's, then the step's time for the 1.24 B parameters of Llama-3.2-1B, all split. Blocks
are timed as the control: no variant changes them. To have other sources beside the variants, call
`python tools/build_cuda.py --out .../.native/tiles/NAME` in their checkout; they must read the tables
that this checkout writes, which the comparison with PyTorch tells.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

LIBRARY = "libmemopt_cuda.so"
# Packs of a lane, tiles on their way, threads of a block, blocks on a processor. Of 128 threads each
# warp steps four tiles, not two, for one look-up of its segment; 7 blocks are 28 warps in 72
# registers, 8 are 32 in 64. "2 packs" were measured: up to a tenth slower.
NAMES = ("PACKS", "STAGES", "THREADS", "BLOCKS")
VARIANTS = {
    "256 threads, 3 blocks": (4, 1, 256, 3),
    "128 threads, 7 blocks": (4, 1, 128, 7),
    "128 threads, 8 blocks": (4, 1, 128, 8),
    "64 threads, 14 blocks": (4, 1, 64, 14),
}
CASES = ("frugal all", "frugal columns", "frugal rows", "frugal coordinates")


def build(out: Path) -> None:
    """Compile every variant into a directory of its name."""
    for name in VARIANTS:
        flags = " ".join(f"-D{define}" for define in defines_of(name))
        command = [sys.executable, str(ROOT / "tools/build_cuda.py"), "--out", str(out / name)]
        subprocess.run(command, check=True, env={**os.environ, "NVCC_APPEND_FLAGS": flags})
        shutil.rmtree(out / name / "objects")


def defines_of(variant: str) -> tuple[str, ...]:
    """Return what csrc/cuda/frugal_tiles.cuh is compiled with."""
    return tuple(f"MEMOPT_TILE_{n}={v}" for n, v in zip(NAMES, VARIANTS[variant], strict=True))


def measure_one() -> dict[str, Any]:
    """Check and time the library that $MEMOPT_CUDA_LIBRARY names; runs in a process of its own."""
    import torch
    from bench_frugal_step import Timer, frugal_cases, llama_shapes, run_case

    from memopt.ops import cuda_status
    from tests.optim import gpu_checks

    status = cuda_status()
    if not status.available:
        raise SystemExit(status.reason)
    found: dict[str, Any] = {"path": status.path, "errors": {}, "ms": {}}
    for selection in ("columns", "rows", "coordinates"):
        for density in (0.25, 0.9):
            worst, _ = gpu_checks.against_reference(selection=selection, density=density)
            found["errors"][f"{selection} {density}"] = worst
    timer, cases = Timer("cuda", block=10, blocks=7), frugal_cases()
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for name in CASES:
            result = run_case(cases[name], llama_shapes(), dtype, timer, "cuda")
            found["ms"][f"{label} {name}"] = [result[k] for k in ("ms", "min_ms", "max_ms")]
    found["device"] = torch.cuda.get_device_name()
    return found


def measure(libraries: Path, out: Path, limit_s: float) -> int:
    """Run every library in turn, twice in all so that a drift shows; write after each."""
    begin, results = time.perf_counter(), {"command": sys.argv, "rounds": []}
    paths = sorted(path.parent for path in libraries.glob(f"*/{LIBRARY}"))
    if not paths:
        raise SystemExit(f"{libraries} holds no */{LIBRARY}: call with --build first")
    failed, longest = 0, 0.0
    for path in [*paths, *reversed(paths)]:
        start = time.perf_counter()
        if start - begin + longest > limit_s:
            results["left_out"] = True
            break
        done = subprocess.run(
            [sys.executable, __file__, "--one"], check=False, capture_output=True, text=True,
            env={**os.environ, "MEMOPT_CUDA_LIBRARY": str((path / LIBRARY).resolve())},
        )  # fmt: skip
        ok = done.returncode == 0
        found = json.loads(done.stdout.splitlines()[-1]) if ok else {"error": done.stderr[-2000:]}
        wrong = not ok or max(found["errors"].values()) > 1e-6
        failed += wrong
        results["rounds"].append({"variant": path.name, **found})
        out.write_text(json.dumps(results, indent=1) + "\n")
        medians = {k: round(v[0], 3) for k, v in found.get("ms", {}).items()}
        print(f"{path.name}: {'WRONG ' if wrong else ''}{medians or found['error']}", flush=True)
        longest = max(longest, time.perf_counter() - start)
    return failed


def main() -> None:
    """Parse arguments; build, measure, or be the process of one library."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--build", type=Path, help="compile the variants into this directory")
    parser.add_argument("--libraries", type=Path, help="measure what was compiled into this")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument(
        "--limit-s", type=float, default=150.0, help="start nothing that ends later"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one()))
    elif options.build:
        build(options.build)
    elif options.libraries and options.out:
        raise SystemExit(min(1, measure(options.libraries, options.out, options.limit_s)))
    else:
        parser.error("one of --build DIR, or --libraries DIR with --out FILE")


if __name__ == "__main__":
    main()
