"""What a region holds op by op, on figures small enough to add up by hand, in MiB."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from traces import CPU, MIB, op, region, step

from memopt.plan import predict, uniform_plan
from memopt.plan.inside import Inside
from memopt.plan.validate_inside import own_backward
from memopt.types.plan import OpPlacement, Plan, RegionPlan

# a: 40, not saved, gone when c is made. b: 10, saved, the code is done with it when d is made. c: 20, saved. d: 10
OPS = (
    op(0, 40 * MIB, 0, freed_at=2),
    op(1, 10 * MIB, freed_at=3),
    op(2, 20 * MIB, freed_at=4),
    op(3, 10 * MIB, 0, freed_at=4),
)
PEAKS = {
    "forward_peak_bytes": 55 * MIB,  # 40 + 10 at b, and 5 of a kernel's workspace
    "recompute_peak_bytes": 50 * MIB,
    "backward_peak_bytes": 60 * MIB,
}
BLOCK = region(0, OPS, **PEAKS)


def mib(nbytes):
    return nbytes / MIB


def test_forward_peak_moves_to_where_what_is_kept_still_stands():
    inside = Inside(BLOCK)
    assert mib(inside.forward_bytes([0, 0, 0, 0])) == 55
    # b and c kept: at b 50, at c 30, at d 30 + 10: the peak stays, nothing comes on top
    assert mib(inside.forward_bytes([0, 10 * MIB, 20 * MIB, 0])) == 55
    # a kept: at c 40 + 10 + 20, at d 40 + 20 + 10
    assert mib(inside.forward_bytes([40 * MIB, 0, 0, 0])) == 75


def test_recompute_peak_by_what_stands_and_what_is_fetched():
    inside = Inside(BLOCK)
    assert mib(inside.recompute_bytes([], [])) == 50
    # a stands (40 above which these count): b 10 while a is there; then a is gone: 10 + 20 - 40
    assert mib(inside.recompute_bytes([0], [])) == 30  # but a rehearsal keeps a, and holds b and c
    # c fetched: it is there from the begin, beside a and b
    assert mib(inside.recompute_bytes([], [2])) == 70
    # d is behind the last output that is saved: never made again, and nothing of it is taken off
    assert mib(inside.recompute_bytes([3], [])) == 50


def test_without_detail_the_bounds_are_those_of_the_sums():
    plain = [replace(o, freed_at=None) for o in OPS]
    inside = Inside(replace(BLOCK, ops=tuple(plain)))
    assert mib(inside.forward_bytes([0, 10 * MIB, 20 * MIB, 0])) == 80  # never above all there is
    assert mib(inside.forward_bytes([0, 10 * MIB, 0, 0])) == 65


def two(**changes):
    trace = step([replace(BLOCK, name=f"block.{k}", **changes) for k in range(2)], device="cpu")
    second = replace(trace.regions[1], input_op=3)
    return replace(trace, regions=(trace.regions[0], second))


def test_an_output_that_is_the_next_regions_input_stands_once():
    trace = two()
    keeps = RegionPlan(name="block.0", ops=(OpPlacement(position=3, op="op3", placement="device"),))
    nothing = predict(trace, uniform_plan(trace, "recompute"), CPU).device_bytes
    assert mib(nothing) == 100 + 2 * 10 + 10 + 60
    assert predict(trace, Plan(regions=(keeps,)), CPU).device_bytes == nothing
    apart = replace(trace, regions=(trace.regions[0], replace(trace.regions[1], input_op=None)))
    assert mib(predict(apart, Plan(regions=(keeps,)), CPU).device_bytes - nothing) == 10
    written = replace(OPS[3], rewritten=True)  # then the plan keeps a copy
    first = replace(trace.regions[0], ops=(*OPS[:3], written))
    copied = replace(trace, regions=(first, trace.regions[1]))
    assert mib(predict(copied, Plan(regions=(keeps,)), CPU).device_bytes - nothing) == 10


def test_an_input_that_the_plain_step_does_not_save_goes():
    untouched = uniform_plan(two(), "device")
    saved = two(input_saved_nbytes=10 * MIB, saved_nbytes=40 * MIB)
    dropped = two(input_saved_nbytes=0, saved_nbytes=30 * MIB)
    by = [predict(trace, untouched, CPU).device_bytes for trace in (saved, dropped)]
    assert mib(by[0] - by[1]) == 20
    # kept by an op outside all the same
    outside = two(input_saved_nbytes=0, saved_nbytes=30 * MIB, input_outside_nbytes=10 * MIB)
    assert predict(outside, untouched, CPU).device_bytes == by[0]


def test_a_region_that_saves_no_output_holds_what_is_fetched_beside_its_measured_peak():
    """The judge took what is fetched off the measured peak."""
    saves_nothing = region(
        0,
        (op(0, 10 * MIB, 0),),
        forward_peak_bytes=5 * MIB,
        recompute_peak_bytes=30 * MIB,
        backward_peak_bytes=0,
    )
    entry = RegionPlan(
        name=saves_nothing.name,
        ops=(OpPlacement(position=0, op="op0", placement="ssd", nbytes=10 * MIB),),
    )
    assert mib(Inside(saves_nothing).recompute_bytes([], [0])) == 40
    assert mib(own_backward(saves_nothing, entry)) == 40
