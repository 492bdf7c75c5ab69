"""One row of bench_activations.py, in a process of its own: build, warm up, step, measure.

    python benchmarks/_activation_child.py CHILD_AS_JSON RESULT_FILE

The result file is rewritten after every step, so that a row that is ended keeps the steps it finished.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _activation_methods import METHODS, Attached, Row, Settings
from _activation_profile import profile_step
from _common import nvidia_smi, resident_peak_bytes, time_step, write_json


@dataclass(frozen=True, kw_only=True)
class Child:
    """What one row's process is told."""

    row: dict[str, Any]
    settings: dict[str, Any]
    device: str
    config: dict[str, Any]
    liger: bool
    liger_rope: bool
    keep_grads: bool = False
    profile: bool = False


def _build(child: Child, *, num_layers: int | None = None) -> Any:
    """Return a random model in bfloat16, made on the device: transformers' own init, normal(0, 0.02), in under 1 s."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = child.config | ({"num_hidden_layers": num_layers} if num_layers else {})
    config = LlamaConfig(**(shape | {"attn_implementation": "sdpa"}))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(child.device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


def _attention_ops(step: Callable[[], None]) -> list[str]:
    """Run `step` and return which attention kernels PyTorch chose, by the overloads that the dispatcher saw."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "attention" in str(func):
                seen.add(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        step()
    return sorted(seen)


def _step(
    model: Any, tokens: Any, attached: Attached, losses: list[Any], *, keep_grads: bool = False
) -> None:
    """Run one training step as a loop without an optimizer runs it; `keep_grads` accumulates instead."""
    if not keep_grads:
        model.zero_grad(set_to_none=True)
    with attached.step_context():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    losses.append(loss.detach())


def _warm_up(child: Child, tokens: Any) -> dict[str, Any]:
    """Compile and choose every kernel on a model of one layer, at the measured shapes; return what was chosen."""
    import torch

    begin = time.perf_counter()
    attached = Attached(step_context=nullcontext)

    def step() -> None:
        _step(_build(child, num_layers=1), tokens, attached, [])

    attention = _attention_ops(step)
    if child.device != "cpu":
        torch.cuda.empty_cache()
    return {"warm_up_s": time.perf_counter() - begin, "attention": attention}


class Peaks:
    """Peaks of PyTorch's allocator that survive others' resets: a method under test may reset the counters itself."""

    def __init__(self) -> None:
        import torch

        self._allocated_bytes = self._reserved_bytes = 0
        self._reset = torch.cuda.reset_peak_memory_stats

    def install(self) -> None:
        """Take what the counters hold before anyone resets them from now on."""
        import torch

        def keep_and_reset(device: Any = None) -> None:
            self._take()
            self._reset(device)

        torch.cuda.reset_peak_memory_stats = keep_and_reset

    def start(self) -> None:
        """Begin a new period."""
        self._reset()
        self._allocated_bytes = self._reserved_bytes = 0

    def _take(self) -> None:
        import torch

        self._allocated_bytes = max(self._allocated_bytes, torch.cuda.max_memory_allocated())
        self._reserved_bytes = max(self._reserved_bytes, torch.cuda.max_memory_reserved())

    def read(self) -> dict[str, int | None]:
        """Return the period's peaks; PyTorch's own pinned memory (what peers use) since the start."""
        import torch

        self._take()
        return {
            "peak_allocated_bytes": self._allocated_bytes,
            "peak_reserved_bytes": self._reserved_bytes,
            "torch_pinned_bytes": torch.cuda.host_memory_stats().get("allocated_bytes.peak"),
            "num_alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries"),
        }


def _grad_norm(model: Any) -> float:
    import torch

    squares = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float32) ** 2 for p in model.parameters()
    ]
    return float(torch.stack(squares).sum().sqrt())


def _measure(child: Child, row: Row, flush: Callable[[dict[str, Any]], None]) -> None:
    """Run a row's steps; hand every state of the result to `flush`, so that a killed row keeps what it has."""
    import torch

    if child.liger:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            apply_liger_kernel_to_llama,
        )

        apply_liger_kernel_to_llama(
            rope=child.liger_rope,
            rms_norm=True,
            swiglu=True,
            cross_entropy=False,
            fused_linear_cross_entropy=True,
        )
    torch.manual_seed(1)
    tokens = torch.randint(child.config["vocab_size"], (1, row.tokens), device=child.device)
    result: dict[str, Any] = _warm_up(child, tokens) | {
        "untimed_step_s": [],
        "step_s": [],
        "device_step_s": [],
    }
    begin = time.perf_counter()
    model = _build(child)
    result["build_s"] = time.perf_counter() - begin
    peaks = Peaks() if child.device != "cpu" else None
    if peaks is not None:
        peaks.install()
        peaks.start()
    losses: list[Any] = []
    with METHODS[row.method].attach(model, row, Settings(**child.settings)) as attached:
        for index in range(row.num_untimed + row.num_timed):
            if index == row.num_untimed and peaks is not None:
                result["untimed_peaks"] = peaks.read()
                peaks.start()
            taken = time_step(
                lambda: _step(model, tokens, attached, losses, keep_grads=child.keep_grads),
                child.device,
            )
            if index < row.num_untimed:
                result["untimed_step_s"].append(taken.wall_s)
            else:
                result["step_s"].append(taken.wall_s)
                result["device_step_s"].append(taken.device_s)
            flush(result)
        result |= (peaks.read() if peaks is not None else {}) | {
            "resident_peak_bytes": resident_peak_bytes()
        }
        result |= {"gpu_after": nvidia_smi("clocks.sm", "temperature.gpu", "power.draw")}
        result |= {"losses": [float(loss) for loss in losses], "grad_norm": _grad_norm(model)}
        flush(result)
        result["method_report"] = attached.report()
        if child.profile:
            result["profile"] = profile_step(
                lambda: _step(model, tokens, attached, losses, keep_grads=child.keep_grads)
            )
    flush(result | {"status": "ok"})


def run_child(spec_text: str, result_path: Path) -> None:
    """Measure one row and leave its result in a file; every failure becomes a status with its reason."""
    child = Child(**json.loads(spec_text))
    row = Row(**child.row)
    latest: dict[str, Any] = {}

    def flush(result: dict[str, Any]) -> None:
        latest.update(result)
        write_json(result_path, latest)

    try:
        _measure(child, row, flush)
    except Exception as error:  # noqa: BLE001 -- a row's failure is a result
        traceback.print_exc()
        name = type(error).__name__
        status = {"OutOfMemoryError": "out of device memory", "BudgetError": "refused"}.get(
            name, "failed"
        )
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("memopt"):
            status = "not installed"
        flush({"status": status, "reason": f"{name}: {str(error)[:600]}"})


if __name__ == "__main__":
    run_child(sys.argv[1], Path(sys.argv[2]))
