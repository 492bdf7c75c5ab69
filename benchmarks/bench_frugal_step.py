"""Step time of FRUGAL and its peers for the parameters of Llama-3.2-1B (1.24 B) on one GPU.

    python benchmarks/bench_frugal_step.py --out frugal_step.json

Builds the native library if it is missing, checks it, then measures in one run: the device's copy
bandwidth, torch's AdamW (fused, foreach) and SGD, FRUGAL with all parameters split and with
`frugal_groups`, its switch step, its first step, every peer that can be imported, and at the end
torch's Muon and memopt's GaLore (between switches). Times are
medians of blocks of consecutive steps between two CUDA events, after a warm-up; `host_ms` is what
one call costs the host. Claims checked are in `CLAIMS`; the exit status says whether they hold.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from memopt.ops import cuda_status  # noqa: E402
from memopt.optim import Frugal  # noqa: E402
from memopt.optim.presets import galore  # noqa: E402

CLAIMS = {"bf16 all": 0.55, "fp32 all": 0.55, "bf16 groups": 0.55, "fp32 groups": 0.66}
DENSITY = 0.25
IMPL = "native" if torch.cuda.is_available() else "foreach"


def llama_shapes(
    layers: int = 16, hidden: int = 2048, ffn: int = 8192, vocab: int = 128256
) -> dict[str, tuple[int, ...]]:
    """Return Llama-3.2-1B's parameters (embedding and head are tied)."""
    kv = hidden // 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        block = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def named_parameters(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str
) -> dict[str, torch.nn.Parameter]:
    """Make parameters with gradients."""
    made = {}
    for name, shape in shapes.items():
        param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02))
        param.grad = torch.empty_like(param).normal_(std=1e-3)
        made[name] = param
    return made


def groups_of(params: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    """The groups `frugal_groups` makes of this model: the block's matrices are split."""
    split = {n: p for n, p in params.items() if ".layers." in n and p.dim() == 2}
    full = {n: p for n, p in params.items() if n not in split}
    return [
        {"params": list(split.items())},
        {"params": list(full.items()), "split": False},
    ]


class Timer:
    """Blocks of consecutive steps on the GPU; wall time on a CPU."""

    def __init__(self, device: str, *, block: int, blocks: int) -> None:
        self.cuda, self.block, self.blocks = device == "cuda", block, blocks

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, step: Callable[[], object], warmup: int = 3) -> dict[str, float]:
        """Return the median time of a step, its spread, and the host's time, in ms."""
        for _ in range(warmup):
            step()
        self.sync()
        times, host = [], []
        for _ in range(self.blocks):
            begin = time.perf_counter()
            if self.cuda:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                for _ in range(self.block):
                    step()
                last.record()
                host.append((time.perf_counter() - begin) * 1e3 / self.block)
                torch.cuda.synchronize()
                times.append(first.elapsed_time(last) / self.block)
            else:
                for _ in range(self.block):
                    step()
                times.append((time.perf_counter() - begin) * 1e3 / self.block)
                host.append(times[-1])
        return {
            "ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times),
            "host_ms": statistics.median(host),
        }  # fmt: skip


def copy_bandwidth(timer: Timer, device: str, num_bytes: int) -> float:
    """Return bytes read plus written per second by a device-to-device copy."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * num_bytes / (timer.measure(lambda: target.copy_(source))["ms"] * 1e-3)


def state_bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in an optimizer's state, each storage once."""
    if isinstance(optimizer, Frugal):
        return optimizer.state_bytes()
    seen: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            try:
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # a tensor subclass without storage
                for name in value.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                    visit(getattr(value, name))
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)

    for values in optimizer.state.values():
        visit(values)
    return sum(seen.values())


def run_case(
    make: Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    timer: Timer,
    device: str,
) -> dict[str, Any]:
    """Time one optimizer; the parameters live only here."""
    gc.collect()
    if timer.cuda:
        torch.cuda.empty_cache()
    params = named_parameters(shapes, dtype, device)
    optimizer = make(params)
    timer.sync()
    begin = time.perf_counter()
    optimizer.step()
    timer.sync()
    first_ms = (time.perf_counter() - begin) * 1e3
    if timer.cuda:
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = timer.measure(optimizer.step)
    state = state_bytes_of(optimizer)
    numbers = sum(p.numel() for p in params.values())
    resident = numbers * dtype.itemsize * 2 + state
    result |= {
        "first_ms": first_ms,
        "state_bytes": state,
        "state_bytes_per_parameter": state / numbers,
    }
    if timer.cuda:
        peak = torch.cuda.max_memory_allocated()
        result |= {"peak_over_bytes": peak - resident, "peak_over_share": peak / resident - 1}
    result["moved_bytes"] = 3 * numbers * dtype.itemsize + 2 * state
    return result


def frugal_cases() -> dict[str, Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]]:
    """The configurations of FRUGAL that are measured."""

    def all_split(
        **settings: Any,
    ) -> Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]:
        settings = {"density": DENSITY, "update_gap": 10**6, "impl": IMPL, **settings}
        return lambda params: Frugal(list(params.items()), lr=1e-4, **settings)

    def grouped(
        **settings: Any,
    ) -> Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]:
        settings = {"density": DENSITY, "update_gap": 10**6, "impl": IMPL, **settings}
        return lambda params: Frugal(groups_of(params), lr=1e-4, **settings)

    return {
        "frugal all": all_split(),
        "frugal all, every step a switch": all_split(update_gap=1),
        "frugal groups": grouped(),
        "frugal groups, every step a switch": grouped(update_gap=1),
        "frugal columns": all_split(selection="columns"),
        "frugal columns, every step a switch": all_split(selection="columns", update_gap=1),
        "frugal rows": all_split(selection="rows"),
        "frugal rows, every step a switch": all_split(selection="rows", update_gap=1),
        "frugal coordinates": all_split(selection="coordinates"),
        "frugal coordinates, every step a switch": all_split(selection="coordinates", update_gap=1),
        "frugal 8bit": all_split(quantize="8bit"),
        "frugal 8bit stochastic": all_split(quantize="8bit", rounding="stochastic"),
        "frugal stochastic": all_split(rounding="stochastic"),
        "frugal kahan": all_split(rounding="kahan"),
        "frugal all, project, every step a switch": all_split(update_gap=1, on_switch="project"),
        "frugal all, foreach": all_split(impl="foreach"),
    }


def peer_cases() -> dict[str, Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]]:
    """Return torch's optimizers and every other that can be imported."""
    cases: dict[str, Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "torch AdamW fused": lambda p: torch.optim.AdamW(list(p.values()), lr=1e-4, fused=True),
        "torch AdamW foreach": lambda p: torch.optim.AdamW(list(p.values()), lr=1e-4, foreach=True),
        "torch SGD fused": lambda p: torch.optim.SGD(list(p.values()), lr=1e-4, fused=True),
    }
    if importlib.util.find_spec("bitsandbytes"):

        def bnb(p: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(list(p.values()), lr=1e-4)

        cases["bitsandbytes AdamW8bit"] = bnb
    if importlib.util.find_spec("torchao"):

        def ao(p: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
            from torchao.optim import AdamW8bit

            return AdamW8bit(list(p.values()), lr=1e-4)

        cases["torchao AdamW8bit"] = ao
    if importlib.util.find_spec("flashoptim"):

        def flash(p: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
            import flashoptim

            return flashoptim.FlashAdamW(list(p.values()), lr=1e-4)

        cases["FlashOptim FlashAdamW"] = flash
    return cases


def slow_cases() -> dict[str, Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]]:
    """Return methods that multiply matrices in every step; they come last, for the time they take."""

    def rank_512(p: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        rank = min(512, min(min(q.shape) for q in p.values() if q.dim() == 2) // 2)
        return galore(groups_of(p), lr=1e-4, rank=rank, update_gap=10**6)

    cases = {"GaLore r512, memopt's": rank_512}
    if hasattr(torch.optim, "Muon"):  # torch 2.9
        cases["torch Muon, matrices"] = lambda p: torch.optim.Muon(
            [q for q in p.values() if q.dim() == 2], lr=1e-4
        )
    return cases


def svd_switch(timer: Timer, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Time the first (switch) step and a later step of selection svd for one block's matrices."""
    shapes = {n: s for n, s in llama_shapes(layers=1, vocab=64).items() if len(s) == 2}
    params = named_parameters(shapes, dtype, device)
    optimizer = Frugal(list(params.items()), lr=1e-4, selection="svd", update_gap=10**6)
    begin = time.perf_counter()
    optimizer.step()
    timer.sync()
    switch = (time.perf_counter() - begin) * 1e3
    return {"switch_ms": switch, "step_ms": timer.measure(optimizer.step)["ms"]}


COLD = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from benchmarks import bench_frugal_step as b
params = b.named_parameters(b.llama_shapes(), torch.bfloat16, "cuda")
make = (b.peer_cases() | b.frugal_cases())[sys.argv[2]]
optimizer = make(params)
torch.cuda.synchronize()
begin = time.perf_counter()
optimizer.step()
torch.cuda.synchronize()
print((time.perf_counter() - begin) * 1e3)
"""


def cold_first_step_ms(case: str) -> float:
    """Return the time of the very first step of a process: library loading and all."""
    command = [sys.executable, "-c", COLD, str(ROOT), case]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def verdicts(results: dict[str, Any]) -> dict[str, Any]:
    """Compare with the claims: (measured, allowed, holds)."""
    found: dict[str, Any] = {}
    bandwidth = results["copy_bytes_per_s"]
    for label in ("bf16", "fp32"):
        times = results["times"].get(label)
        if not times or "torch AdamW fused" not in times:
            continue
        adamw = times["torch AdamW fused"]
        for kind in ("all", "groups"):
            case = times.get(f"frugal {kind}", {})
            switched = times.get(f"frugal {kind}, every step a switch", {})
            if "ms" not in case or "ms" not in switched or "ms" not in adamw:
                found[f"{label} {kind}: measured"] = [0.0, 1.0, False]
                continue
            checks = {
                "share of AdamW fused": (case["ms"] / adamw["ms"], CLAIMS[f"{label} {kind}"]),
                "ms, against bytes / copy bandwidth / 0.8": (
                    case["ms"], case["moved_bytes"] / bandwidth / 0.8 * 1e3,
                ),
                "switch step / step": (switched["ms"] / case["ms"], 2.0),
                "first step ms over AdamW's": (case["first_ms"] - adamw["first_ms"], 1000.0),
                "peak over w + g + state, share": (case.get("peak_over_share", 0.0), 0.01),
            }  # fmt: skip
            for name, (measured, allowed) in checks.items():
                found[f"{label} {kind}: {name}"] = [measured, allowed, measured <= allowed]
        for kind in ("columns", "rows", "coordinates"):
            case = times.get(f"frugal {kind}", {})
            if "ms" in case:
                least = case["moved_bytes"] / bandwidth / 0.8 * 1e3
                name = f"{label} {kind}: ms, against bytes / copy bandwidth / 0.8"
                found[name] = [case["ms"], least, case["ms"] <= least]
                switched = times.get(f"frugal {kind}, every step a switch", {})
                if "ms" in switched:
                    ratio = switched["ms"] / case["ms"]
                    found[f"{label} {kind}: switch step / step"] = [ratio, 2.0, ratio <= 2.0]
    if cold := results.get("cold_first_step_ms"):
        more = cold["frugal all"] - cold["torch AdamW fused"]
        found["bf16 all: first step of a process, ms over AdamW's"] = [more, 1000.0, more <= 1000.0]
    return found


def ensure_library(device: str) -> str:
    """Build the native library if it is missing; return what was loaded."""
    if device == "cuda" and not any((ROOT / d).exists() for d in (".native/libmemopt_cuda.so",)):
        subprocess.run([sys.executable, str(ROOT / "tools/build_cuda.py")], check=True)
    status = cuda_status()
    if device == "cuda" and not status.available:
        raise SystemExit(status.reason)
    return status.build


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do everything; write the results after each part, so that a time limit loses little."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    results: dict[str, Any] = {
        "command": " ".join(sys.argv), "torch": torch.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "times": {},
    }  # fmt: skip
    results["library"] = ensure_library(device)
    timer = Timer(device, block=options.block, blocks=options.blocks)
    shapes = llama_shapes(2, 128, 512, 1000) if options.tiny else llama_shapes()
    if device == "cuda" and not options.skip_checks:
        from tests.optim import gpu_checks

        try:
            results["checks"], results["failed_checks"] = gpu_checks.run_all()
        except Exception as error:  # noqa: BLE001 - the timings may still be had
            results["failed_checks"] = [f"{type(error).__name__}: {error}"[:2000]]
        save(results, options.out)
        sys.stdout.write(f"checks failed: {results['failed_checks']}\n")
    results["copy_bytes_per_s"] = copy_bandwidth(timer, device, 1 << (20 if options.tiny else 32))
    cases = peer_cases() | frugal_cases() | slow_cases()
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        times = results["times"].setdefault(label, {})
        for name, make in cases.items():
            only_low = any(
                word in name
                for word in (
                    "stochastic", "kahan", "bitsandbytes", "torchao", "Flash", "GaLore", "Muon",
                )
            )  # fmt: skip
            if (label == "fp32" and only_low) or (device == "cpu" and "fused" in name):
                continue
            if time.perf_counter() - begin > options.limit_s:
                results.setdefault("left_out", []).append(f"{label} {name}")
                continue
            try:
                times[name] = run_case(make, shapes, dtype, timer, device)
            except Exception as error:  # noqa: BLE001 - a peer that fails is a result
                times[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            sys.stdout.write(f"{label} {name}: {times[name].get('ms', times[name])}\n")
            sys.stdout.flush()
            save(results, options.out)
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        colds = ("torch AdamW fused", "frugal all")
        results["cold_first_step_ms"] = {case: cold_first_step_ms(case) for case in colds}
        results["svd, one block of seven matrices"] = svd_switch(timer, torch.bfloat16, device)
    results["claims"] = verdicts(results) if device == "cuda" else {}
    results["wall_s"] = time.perf_counter() - begin
    return results


def save(results: dict[str, Any], out: Path | None) -> None:
    """Write what is there."""
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Parse arguments, run, print the claims."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--block", type=int, default=10, help="steps between two events")
    parser.add_argument("--blocks", type=int, default=7, help="blocks per median")
    parser.add_argument(
        "--limit-s", type=float, default=300.0, help="start no case after this time"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes: tries the script itself")
    parser.add_argument("--skip-checks", action="store_true", help="timings only")
    options = parser.parse_args()
    results = run(options)
    save(results, options.out)
    for name, (measured, allowed, holds) in results["claims"].items():
        sys.stdout.write(
            f"{'ok  ' if holds else 'FAIL'} {name}: {measured:.4g} (allowed {allowed:.4g})\n"
        )
    failed = results.get("failed_checks") or [n for n, c in results["claims"].items() if not c[2]]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
