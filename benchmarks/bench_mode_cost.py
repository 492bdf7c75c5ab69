"""What seeing every op costs: microseconds per op of a dispatch mode in Python, and of memopt's two.

    python benchmarks/bench_mode_cost.py --out benchmarks/results/mode_cost.json

memopt places activations from two `TorchDispatchMode`s. Where the device is a GPU and an op runs longer than its
dispatch, this is hidden; on the CPU and with small ops it is the price of the whole approach. The program is a Llama
layer's ops (projections, norms from element-wise ops, rotary embedding, attention, SwiGLU) on tensors so small that
arithmetic hardly counts, run without a mode, under a mode that only calls the op, and under memopt's:

    forward              every op is numbered and checked for writes, nothing is placed (all is recomputed)
    forward, kept        every op output that may be kept is kept on the device
    recompute            every op is matched with the forward's and runs again
    recompute, answered  every kept output is answered instead

The clock is the thread's own CPU time, so that other programs on the machine count little; passes of all variants take
turns; figures are each variant's fastest pass, as timeit advises (what is slower measures the machine's other work),
and medians and quartiles are in the result file. Building the mode and the frame (once per region call) is outside
the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import ROOT, provenance, write_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

VARIANTS = ("no mode", "empty mode", "forward", "forward, kept", "recompute", "recompute, answered")
TOKENS, HIDDEN, HEADS, MLP = 8, 16, 2, 32


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    import torch

    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    import torch

    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), -1) * sin


def make_program(num_layers: int) -> Callable[[], Tensor]:
    """Return a function that runs `num_layers` Llama layers forward on tiny tensors that require gradients."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).requires_grad_()

    q, k, v, o = (weight(HIDDEN, HIDDEN) for _ in range(4))
    gate, up, down = weight(MLP, HIDDEN), weight(MLP, HIDDEN), weight(HIDDEN, MLP)
    norm = weight(HIDDEN)
    x0, cos, sin = (
        weight(1, TOKENS, HIDDEN),
        torch.rand(TOKENS, HIDDEN // HEADS),
        torch.rand(TOKENS, HIDDEN // HEADS),
    )

    def heads(x: Tensor) -> Tensor:
        return x.view(1, TOKENS, HEADS, HIDDEN // HEADS).transpose(1, 2)

    def program() -> Tensor:
        x = x0
        for _ in range(num_layers):
            h = _rms_norm(x, norm)
            queries, keys, values = (heads(F.linear(h, w)) for w in (q, k, v))
            mixed = F.scaled_dot_product_attention(
                _rotate(queries, cos, sin), _rotate(keys, cos, sin), values, is_causal=True
            )
            x = x + F.linear(mixed.transpose(1, 2).reshape(1, TOKENS, HIDDEN), o)
            h = _rms_norm(x, norm)
            x = x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
        return x

    return program


@dataclass
class Modes:
    """Makes the mode of each variant; a recompute variant replays the frame of one earlier forward."""

    program: Callable[[], Tensor]

    def __post_init__(self) -> None:
        """Record the op sequence once, and the frames that the recompute variants replay."""
        self.bare = self._forward({})
        with self.bare:
            self.program()
        self.ops = list(self.bare.frame.ops)
        self.all_kept = {i: (_name(op), "device") for i, op in enumerate(self.ops)}
        self.kept = self._forward(self.all_kept)
        with self.kept:
            self.program()

    def _forward(self, placements: dict[int, tuple[str, Any]]) -> Any:
        import torch

        from memopt.activations.frame import Frame, RngState
        from memopt.activations.modes import ForwardMode

        device = torch.device("cpu")
        frame = Frame("layer", torch.nn.Module(), RngState.capture(device))
        return ForwardMode(frame, placements, frozenset(), _no_store, device)

    def make(self, variant: str) -> AbstractContextManager[Any]:
        """Return a fresh mode of the variant."""
        from memopt.activations.modes import RecomputeMode

        if variant == "no mode":
            return nullcontext()
        if variant == "empty mode":
            return empty_mode()
        if variant.startswith("forward"):
            placing: AbstractContextManager[Any] = self._forward(
                self.all_kept if variant.endswith("kept") else {}
            )
            return placing
        mode = self.kept if variant.endswith("answered") else self.bare
        answering: AbstractContextManager[Any] = RecomputeMode(mode.frame, keep=True)
        return answering


def _name(op: Any) -> str:
    from memopt.activations.facts import facts_of

    return facts_of(op).name


def _no_store(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("only the device is a placement here")


def empty_mode() -> AbstractContextManager[Any]:
    """Return a mode that calls the op and nothing else: what PyTorch itself charges."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Empty(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    mode: AbstractContextManager[Any] = Empty()  # type: ignore[no-untyped-call]
    return mode


def measure(num_layers: int, num_passes: int) -> dict[str, Any]:
    """Return per variant the microseconds per op: whole, above no mode, above the empty mode."""
    import torch

    torch.set_num_threads(1)
    modes = Modes(make_program(num_layers))
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for index in range(num_passes + 2):
        for variant in VARIANTS:
            mode = modes.make(variant)
            begin = time.thread_time()
            with mode:
                modes.program()
            if index >= 2:
                times[variant].append((time.thread_time() - begin) / len(modes.ops) * 1e6)
    fastest = {variant: min(values) for variant, values in times.items()}
    return {
        "num_ops": len(modes.ops),
        "num_answered": len(modes.kept.frame.answers),
        "num_passes": num_passes,
        "us_per_op": fastest,
        "us_above_no_mode": {v: us - fastest["no mode"] for v, us in fastest.items()},
        "us_above_empty_mode": {v: us - fastest["empty mode"] for v, us in fastest.items()},
        "median_us_per_op": {v: statistics.median(values) for v, values in times.items()},
        "quartiles_us_per_op": {
            v: statistics.quantiles(values, n=4) for v, values in times.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write the result."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--layers", type=int, default=2, help="layers in one pass")
    parser.add_argument("--passes", type=int, default=300, help="timed passes of each variant")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    result = (
        provenance(("memopt", "torch"))
        | {"benchmark": "mode_cost"}
        | measure(args.layers, args.passes)
    )
    write_json(args.out, result)
    table = Table(
        title=f"{result['num_ops']} ops a pass, {args.passes} passes: microseconds per op"
    )
    for column in ("", "whole", "above no mode", "above the empty mode"):
        table.add_column(column, justify="right" if column else "left")
    for variant in VARIANTS:
        figures = [
            result[key][variant] for key in ("us_per_op", "us_above_no_mode", "us_above_empty_mode")
        ]
        num_shown = {"no mode": 1, "empty mode": 2}.get(
            variant, 3
        )  # the rest compare a row with itself or backwards
        table.add_row(variant, *(f"{us:.2f}" for us in figures[:num_shown]))
    table.caption = (
        f"{result['num_answered']} of the ops are kept and answered in the variants that say so"
    )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
