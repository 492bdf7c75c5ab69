"""StepTraces of Llama-shaped steps, from arithmetic: bytes by shape, times by FLOPs and traffic at given rates."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.types.hardware import Hardware
from memopt.types.trace import OpTrace, RegionTrace, StepTrace

GIB = 1 << 30
H200 = Hardware(
    device="cuda",
    name="H200-like",
    d2h_bytes_per_s=55e9,
    h2d_bytes_per_s=55e9,
    ssd_write_bytes_per_s=5e9,
    ssd_read_bytes_per_s=6e9,
    source="arithmetic",
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    tokens: int
    layers: int = 32
    h: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv: float = 0.25
    vocab: int = 128256
    gemm: float = 540e12
    attn_forward: float = 650e12
    attn_backward: float = 570e12
    traffic: float = 3.5e12


def llama(shape: Shape, *, accumulate: bool = False) -> StepTrace:
    """bf16, batch 1, fused norm, rope, SwiGLU and loss; gradients None at the start unless `accumulate`."""
    s, h, ffn, kv = shape.tokens, shape.h, shape.ffn, shape.kv
    unit = 2 * s * h
    wide = ffn / h
    ops: list[OpTrace] = []

    def op(name, units, saved, time_s, *, flops=0.0, kind="other", extra=0):
        nbytes, kept = int(units * unit) + extra, int(saved * unit) + extra * (saved > 0)
        ops.append(
            OpTrace(
                position=2 * len(ops),
                op=name,
                nbytes=nbytes,
                saved_nbytes=kept,
                flops=int(flops),
                time_s=time_s,
                kind=kind,
                placeable=True,
            )
        )

    def mm(name, units_in, units_out, saved):
        flops = 2.0 * s * units_in * h * units_out * h
        op(name, units_out, saved, flops / shape.gemm, flops=flops, kind="matmul")
        return flops / shape.gemm

    def small(name, units, saved, touched):
        op(name, units, saved, touched * unit / shape.traffic)
        return touched * unit / shape.traffic

    attention = 2.0 * s * s * h
    gemm = elementwise = 0.0
    elementwise += small("norm", 1, 1, 2)
    gemm += mm("mm.q", 1, 1, 0) + mm("mm.k", 1, kv, 0) + mm("mm.v", 1, kv, kv)
    elementwise += small("rope", 1 + kv, 1 + kv, 2 + 2 * kv)
    op(
        "attention",
        1,
        1,
        attention / shape.attn_forward,
        flops=attention,
        kind="attention",
        extra=4 * s * shape.heads,
    )
    gemm += mm("mm.o", 1, 1, 0)
    elementwise += small("add", 1, 1, 3) + small("norm", 1, 1, 2)
    gemm += mm("mm.gate", 1, wide, wide) + mm("mm.up", 1, wide, wide)
    elementwise += small("swiglu", wide, wide, 3 * wide)
    down = mm("mm.down", wide, 1, 0)
    last = small("add", 1, 0, 3)
    forward = gemm + down + elementwise + last + attention / shape.attn_forward
    params = h * h * (2 + 2 * kv) + 3 * h * ffn + 2 * h
    grad = int(2 * params)
    saved = unit + sum(o.saved_nbytes for o in ops)
    regions = tuple(
        RegionTrace(
            name=f"model.layers.{k}",
            group="block",
            input_nbytes=unit,
            saved_nbytes=saved,
            ops=tuple(ops),
            num_ops=2 * len(ops),
            forward_s=forward,
            recompute_s=forward - down - last,
            backward_s=2 * (gemm + down + elementwise + last)
            + 2.5 * attention / shape.attn_backward,
            forward_peak_bytes=int((3 * wide + 3) * unit),
            backward_peak_bytes=saved - unit + int((wide + 1.5) * unit) + grad,
            grad_nbytes=grad,
        )
        for k in range(shape.layers)
    )
    head = 2.0 * s * h * shape.vocab / shape.gemm
    embedding = 2 * shape.vocab * h
    states = grad * shape.layers + 2 * embedding
    return StepTrace(
        device="cuda",
        shapes=f"1x{s}",
        param_bytes=states,
        grad_bytes=states,
        buffer_bytes=0,
        optimizer_bytes=0,
        grad_bytes_at_start=states if accumulate else 0,
        resident_bytes=states * (2 if accumulate else 1) + 16 * s,
        outside_saved_bytes=unit,
        outside_peak_bytes=2 * unit + embedding + GIB // 4,
        optimizer_peak_bytes=2 * states,
        peak_bytes=0,
        regions=regions,
        forward_s=sum(r.forward_s for r in regions) + head,
        backward_s=sum(r.backward_s + r.recompute_s for r in regions) + 2 * head,
        optimizer_s=0.0,
    )
