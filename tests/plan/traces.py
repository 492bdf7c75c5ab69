"""Small StepTraces: hand-made for closed forms, drawn by hypothesis for properties."""

from __future__ import annotations

from hypothesis import strategies as st

from memopt.types.hardware import Hardware
from memopt.types.trace import OpTrace, RegionTrace, StepTrace

MIB = 1 << 20
CUDA = Hardware(
    device="cuda",
    name="toy",
    d2h_bytes_per_s=100 * MIB,
    h2d_bytes_per_s=100 * MIB,
    ssd_write_bytes_per_s=25 * MIB,
    ssd_read_bytes_per_s=50 * MIB,
)
CPU = Hardware(
    device="cpu",
    name="toy",
    d2h_bytes_per_s=1e10,
    h2d_bytes_per_s=1e10,
    ssd_write_bytes_per_s=500 * MIB,
    ssd_read_bytes_per_s=1000 * MIB,
)


def op(position, nbytes, saved=None, time_s=1.0, kind="matmul", placeable=True, **changes):
    return OpTrace(
        position=position,
        op=f"op{position}",
        nbytes=nbytes,
        saved_nbytes=nbytes if saved is None else saved,
        flops=0,
        time_s=time_s,
        kind=kind,
        placeable=placeable,
        reason="" if placeable else "factory",
        **changes,
    )


def region(k, ops, **changes):
    forward = changes.pop("forward_s", sum(o.time_s for o in ops))
    fields = {
        "name": f"block.{k}",
        "group": "block",
        "input_nbytes": 10 * MIB,
        "saved_nbytes": 10 * MIB + sum(o.saved_nbytes for o in ops),
        "ops": tuple(ops),
        "num_ops": 2 * len(ops) + 1,
        "forward_s": forward,
        "recompute_s": forward,
        "backward_s": 2 * forward,
        "forward_peak_bytes": sum(o.nbytes for o in ops),
        "backward_peak_bytes": sum(o.saved_nbytes for o in ops),
        "grad_nbytes": 0,
    }
    return RegionTrace(**{**fields, **changes})


def step(regions, **changes):
    fields = {
        "device": "cuda",
        "shapes": "toy",
        "param_bytes": 100 * MIB,
        "grad_bytes": sum(r.grad_nbytes for r in regions),
        "buffer_bytes": 0,
        "optimizer_bytes": 0,
        "grad_bytes_at_start": 0,
        "resident_bytes": 100 * MIB,
        "outside_saved_bytes": 0,
        "outside_peak_bytes": 0,
        "optimizer_peak_bytes": 0,
        "peak_bytes": 0,
        "regions": tuple(regions),
        "forward_s": sum(r.forward_s for r in regions),
        "backward_s": sum(r.backward_s + r.recompute_s for r in regions),
        "optimizer_s": 0.0,
    }
    return StepTrace(**{**fields, **changes})


SIZES = st.integers(0, 40).map(lambda n: n * (MIB // 2 + 1000))  # no multiples of a page
TIMES = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3, 1.0])


@st.composite
def kinds_of_region(draw, max_ops):
    ops = []
    for j in range(draw(st.integers(0, max_ops))):
        nbytes = draw(SIZES)
        saved = draw(st.sampled_from([0, nbytes, nbytes // 2]))
        kind = draw(st.sampled_from(["attention", "matmul", "other"]))
        freed_at = draw(st.sampled_from([None, 3 * j + 1, 3 * j + 3, 3 * j + 4, 100]))
        placeable = draw(st.integers(0, 4)) > 0
        lasting = {"freed_at": freed_at, "rewritten": draw(st.booleans())}
        ops.append(op(3 * j, nbytes, saved, draw(TIMES), kind, placeable, **lasting))
    forward = sum(o.time_s for o in ops) * draw(st.sampled_from([0.9, 1.0, 1.2])) + 0.01
    every, kept = sum(o.nbytes for o in ops), sum(o.saved_nbytes for o in ops)
    grad, inputs = draw(SIZES), draw(SIZES)
    inputs_saved = draw(st.sampled_from([None, 0, inputs]))
    more = (
        draw(st.sampled_from([0, inputs])) if inputs_saved is None else inputs_saved + draw(SIZES)
    )
    return {
        "ops": ops,
        "forward_s": forward,
        "recompute_s": forward * draw(st.sampled_from([0.7, 1.0])),
        "backward_s": forward * draw(st.sampled_from([1.0, 2.0])),
        "input_nbytes": inputs,
        "saved_nbytes": kept + more,
        "input_saved_nbytes": inputs_saved,
        "input_outside_nbytes": draw(st.sampled_from([0, 0, inputs])),
        "input_op": draw(st.sampled_from([None, 0, 3, 6])),
        "beside_nbytes": draw(st.sampled_from([0, 0, MIB])),
        "around_nbytes": draw(st.sampled_from([0, MIB])),
        "entry_nbytes": draw(st.sampled_from([0, 4 * MIB])),
        "cast_nbytes": draw(st.sampled_from([0, 3 * MIB])),
        "cached_nbytes": draw(st.sampled_from([0, 2 * MIB])),
        "recompute_peak_bytes": draw(st.sampled_from([0, kept // 2, kept, every + MIB])),
        "forward_peak_bytes": int(every * draw(st.sampled_from([0.5, 1.0, 1.1]))),
        "backward_peak_bytes": kept + grad + draw(SIZES),
        "grad_nbytes": grad,
    }


@st.composite
def steps(draw, device="cuda", max_regions=5, max_ops=4):
    kinds = draw(st.lists(kinds_of_region(max_ops), min_size=1, max_size=2))
    order = draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=max_regions))
    regions = [region(k, **kinds[which], group=f"kind{which}") for k, which in enumerate(order)]
    grads = sum(r.grad_nbytes for r in regions) + draw(SIZES)
    accumulating = draw(st.sampled_from([0, 0, grads]))
    outside = draw(SIZES)
    trace = step(
        regions,
        device=device,
        grad_bytes=grads,
        grad_bytes_at_start=accumulating,
        resident_bytes=100 * MIB + accumulating + draw(SIZES),
        outside_saved_bytes=outside,
        outside_peak_bytes=outside + draw(SIZES),
        optimizer_peak_bytes=draw(st.sampled_from([0, 150 * MIB])),
        optimizer_s=draw(TIMES),
        num_micro_batches=draw(st.sampled_from([1, 1, 3])),
    )
    extra = draw(st.sampled_from([0.0, 0.2]))
    micro = trace.num_micro_batches
    times = {
        "forward_s": (trace.forward_s + extra) * micro,
        "backward_s": trace.backward_s * micro,
        "outside_standing_bytes": draw(st.sampled_from([None, None, 0, outside])),
        "peak_bytes": draw(st.sampled_from([0, trace.resident_bytes + 200 * MIB])),
    }
    return StepTrace(**{**{f: getattr(trace, f) for f in trace.__dataclass_fields__}, **times})
