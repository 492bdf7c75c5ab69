"""Step time against peak memory: memopt beside checkpointing and the offloading that others ship.

    python benchmarks/bench_activations.py --out benchmarks/results/activations_h200_202611.json

One random Llama-3.1-8B in bfloat16, one sequence, forward and backward, gradients set to None between steps, the same
kernels in every row (Liger's RMSNorm, SwiGLU, rope and fused linear cross entropy; attention as
scaled_dot_product_attention chooses it, which is recorded). What differs between rows is only what happens to the
activations. See README.md beside this file for what is measured and how.

Each row is a process of its own: a fresh allocator, nothing pinned, no patch left over. The parent holds no GPU memory;
it starts rows in order of importance, ends one that passes its time limit or the host's memory, and rewrites the result
file after each. Before the measured model is built, a model of one layer runs one step with the same shapes, so that
compiling kernels and choosing algorithms is not part of any method's first step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _activation_child import Child
from _activation_methods import METHODS, Row, Settings, parse_row
from _activation_table import add_ratios, console_table, markdown
from _common import (
    ROOT,
    host_limit_bytes,
    median,
    nvidia_smi,
    parse_bytes,
    provenance,
    resident_bytes,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = LLAMA_8B | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
# Peers allocate pinned memory through PyTorch. Its default takes 0.5 to 0.7 s for a GiB; page-locking by eight threads
# is the fastest that PyTorch offers, so that no peer loses time to a default. expandable_segments keeps fragmentation
# from deciding which row fits. memopt page-locks by itself; the options are the same in every row.
ALLOCATOR = (
    "pinned_use_cuda_host_register:True,pinned_num_register_threads:8,expandable_segments:True"
)
BUDGETS = {16384: "39GiB", 65536: "61GiB"}
NUM_STEPS = {
    16384: (2, 5),
    65536: (1, 3),
    0: (1, 3),
}  # (untimed, timed); memopt has SETTLING_STEPS untimed ones more
# In order of importance: a run that is cut short has the rows that matter most.
ROWS = (
    "16384:memopt 16384:plain 16384:checkpoint 65536:memopt 65536:checkpoint 16384:trl_checkpoint "
    "16384:transformers_offload 16384:memopt=recompute 65536:trl_checkpoint 16384:save_on_cpu 16384:trl "
    "16384:deepspeed_offload 65536:transformers_offload 65536:plain 65536:save_on_cpu 65536:trl"
)
DRY_ROWS = (
    "128:plain 128:checkpoint 128:memopt@1GiB 128:memopt=recompute@1GiB 128:memopt=ssd@1GiB 128:save_on_cpu "
    "128:deepspeed_offload 128:transformers_offload 128:trl"
)
PACKAGES = (
    "memopt",
    "torch",
    "transformers",
    "liger-kernel",
    "trl",
    "deepspeed",
    "accelerate",
    "triton",
    "numpy",
)
FITS = 0.97  # a row is not tried when the estimate alone is above this share of the memory


def _hopeless(row: Row, config: dict[str, Any], limits: dict[str, int]) -> str:
    """Return why a row cannot fit, by the bytes that a plain step saves per layer and token; empty if it may."""
    h, f = config["hidden_size"], config["intermediate_size"]
    kv = h * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * f
    params_bytes = 2 * (2 * config["vocab_size"] * h + config["num_hidden_layers"] * layer)
    # Saved in bfloat16: both norms' inputs and outputs, attention's output and q, k, v, and three tensors of the MLP.
    saved_bytes = 2 * (6 * h + 2 * kv + 3 * f) * row.tokens * config["num_hidden_layers"]
    saved = METHODS[row.method].saved
    needs = {
        "device": 2 * params_bytes + (saved_bytes if saved == "device" else 0),
        "host": saved_bytes if saved == "host" else 0,
    }
    for place, need_bytes in needs.items():
        if place in limits and need_bytes > FITS * limits[place]:
            return f"estimated {need_bytes / 2**30:.0f} GiB of {place} memory, {limits[place] / 2**30:.0f} GiB exist"
    return ""


def _limits(args: argparse.Namespace) -> dict[str, int]:
    """Return the bytes of device and host memory that rows may use."""
    limits = {
        "host": parse_bytes(args.host_limit)
        if args.host_limit
        else math.floor(0.92 * host_limit_bytes())
    }
    total = nvidia_smi("memory.total").get("memory.total", "")
    if total.endswith(" MiB"):
        limits["device"] = int(total.removesuffix(" MiB")) << 20
    return limits


def _watch(process: subprocess.Popen[bytes], *, until: float, host_bytes: int) -> tuple[str, str]:
    """Wait for a row; end its process group when time or host memory runs out. Returns (status, reason) then."""
    ended = ("", "")
    begin = time.monotonic()
    while process.poll() is None:
        resident = resident_bytes(process.pid)
        if time.monotonic() > until:
            ended = ("time limit", f"ended after {time.monotonic() - begin:.0f} s")
        elif resident > host_bytes:
            ended = ("out of host memory", f"ended at a resident set of {resident / 2**30:.1f} GiB")
        if ended[0]:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.1)
    return ended


def _run_row(
    row: Row, child: Child, args: argparse.Namespace, *, until: float, host_bytes: int
) -> dict[str, Any]:
    """Run one row in a process of its own and return its result."""
    result_path = args.out.with_name(args.out.name + ".row")
    result_path.unlink(missing_ok=True)
    program = Path(__file__).with_name("_activation_child.py")
    command = [sys.executable, str(program), json.dumps(asdict(child)), str(result_path)]
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    if child.device != "cpu":
        env.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
    with args.log.open("ab") as log:
        log.write(f"\n===== {row.tokens} {row.label}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        with _ended_with_us(process):
            status, reason = _watch(process, until=until, host_bytes=host_bytes)
    result: dict[str, Any] = json.loads(result_path.read_text()) if result_path.exists() else {}
    result_path.unlink(missing_ok=True)
    if status:
        result |= {"status": status, "reason": reason}
    result.setdefault("status", "failed")
    if result["status"] == "failed":
        result.setdefault(
            "reason", f"the process ended with {process.returncode}; see {args.log.name}"
        )
    return result


@contextlib.contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the row's process when this one is interrupted: it has a session of its own and would run on."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _child_for(row: Row, args: argparse.Namespace) -> Child:
    return Child(
        row=asdict(row),
        settings=asdict(Settings(host_budget=args.host_budget, ssd_budget=args.ssd_budget)),
        device=args.device,
        config=TINY if args.dry else LLAMA_8B,
        liger=not args.dry,
        liger_rope=args.rope == "liger",
        keep_grads=args.grads == "kept",
        profile=args.profile,
    )


def _tried(
    row: Row, args: argparse.Namespace, *, deadline: float, limits: dict[str, int]
) -> dict[str, Any]:
    """Return a row's result, run or not."""
    child = _child_for(row, args)
    why = "needs CUDA" if METHODS[row.method].needs_cuda and args.device == "cpu" else ""
    why = why or _hopeless(row, child.config, limits)
    if why:
        return {"status": "does not fit" if "GiB" in why else "skipped", "reason": why}
    if time.monotonic() > deadline - args.least_time:
        return {
            "status": "not run",
            "reason": f"--limit {args.limit:g} s was spent by the rows before",
        }
    until = min(time.monotonic() + args.row_limit, deadline)
    return _run_row(row, child, args, until=until, host_bytes=limits["host"])


def _save(
    args: argparse.Namespace,
    earlier: list[dict[str, Any]],
    run: dict[str, Any],
    plans: dict[str, Any],
) -> None:
    add_ratios(run["rows"])
    result = {"benchmark": "activations", "format": 1, "runs": [*earlier, run]}
    write_json(args.out, result)
    args.out.with_suffix(".md").write_text(markdown(result))
    if plans and args.plans:
        write_json(args.plans, plans)


def _main_parent(args: argparse.Namespace) -> int:
    """Run the rows in order and rewrite the results after each; 0 if none failed or was refused."""
    from rich.console import Console

    deadline = time.monotonic() + args.limit
    limits = _limits(args)
    rows = [
        parse_row(text, budgets=BUDGETS, num_steps={0: (1, 1)} if args.dry else NUM_STEPS)
        for text in args.rows.split()
    ]
    run = provenance(PACKAGES) | {
        "config": _child_for(rows[0], args).config,
        "rope": args.rope,
        "grads": args.grads,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", ALLOCATOR),
        "limits": limits,
        "rows": [],
    }
    earlier = json.loads(args.out.read_text())["runs"] if args.append and args.out.exists() else []
    plans: dict[str, Any] = {}
    console = Console(width=None if sys.stdout.isatty() else 170)
    for row in rows:
        begin = time.monotonic()
        result = _tried(row, args, deadline=deadline, limits=limits)
        report = result.get("method_report") or {}
        made = {key: report.pop(key) for key in ("plan", "trace") if report.get(key) is not None}
        if made:
            plans[f"{row.tokens} {row.label}"] = made
        result |= {
            "median_step_s": median(result.get("step_s", ())),
            "row_s": time.monotonic() - begin,
        }
        run["rows"].append(asdict(row) | {"label": row.label} | result)
        _save(args, earlier, run, plans)
        took = f"{result['row_s']:5.1f} s  {row.tokens} {row.label}: {result['status']}"
        print(took, result.get("reason", ""), flush=True)
    console.print(console_table(run))
    return int(any(row["status"] in ("failed", "refused") for row in run["rows"]))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="result file (JSON); a .md is written beside it"
    )
    parser.add_argument(
        "--append", action="store_true", help="keep the runs that --out already holds"
    )
    parser.add_argument(
        "--rows",
        help="TOKENS:METHOD[=PLAN][@DEVICE_BUDGET] ..., by spaces; methods: " + ", ".join(METHODS),
    )
    parser.add_argument(
        "--grads",
        choices=("none", "kept"),
        default="none",
        help="gradients between steps: set to None (as optimizer.zero_grad() does), or kept and added to",
    )
    parser.add_argument(
        "--rope", choices=("liger", "hf"), default="liger", help="rotary embedding in every row"
    )
    parser.add_argument("--host-budget", default="100GiB", help="memopt's host budget")
    parser.add_argument("--ssd-budget", default="", help="memopt's SSD budget, DIR:SIZE")
    parser.add_argument(
        "--host-limit", help="end a row above this resident set (default: 92%% of what exists)"
    )
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for all rows")
    parser.add_argument("--row-limit", type=float, default=130.0, help="seconds for one row")
    parser.add_argument(
        "--least-time", type=float, default=20.0, help="start no row with less than this left"
    )
    parser.add_argument("--plans", type=Path, help="write memopt's traces and plans to this file")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="one more step of each row under the profiler: kernels, copies, gaps (not part of its times)",
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="a tiny model on the CPU: tests the script, measures nothing",
    )
    args = parser.parse_args(argv)
    args.rows = args.rows or (DRY_ROWS if args.dry else ROWS)
    args.device = "cpu" if args.dry else "cuda"
    args.log = args.out.with_suffix(".log")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if no row failed or was refused."""
    args = _arguments(argv)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that `finally` ends the row that is running
    if not args.dry:
        return _main_parent(args)
    with (
        tempfile.TemporaryDirectory() as spill
    ):  # without a GPU there is no host tier: SSD stands in
        args.host_budget, args.ssd_budget = "", args.ssd_budget or f"{spill}:64MiB"
        return _main_parent(args)


if __name__ == "__main__":
    sys.exit(main())
