"""Steps small enough to work out by hand: every expected figure is written as the sum it is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from traces import CPU, CUDA, MIB, op, region, step

from memopt.plan import check, predict, predict_plain, smallest_budget, solve_greedy, uniform_plan
from memopt.types.errors import BudgetError, ConfigError
from memopt.types.plan import OpPlacement, Plan, RegionPlan

# one block: input 10, a (20, saved), b (30, saved), c (10, not saved: the region's output and never run again)
OPS = (op(0, 20 * MIB, time_s=0.2), op(2, 30 * MIB, time_s=0.3), op(4, 10 * MIB, 0, time_s=0.1))
BLOCK = {
    "forward_s": 0.6,
    "recompute_s": 0.5,
    "backward_s": 1.2,
    "forward_peak_bytes": 40 * MIB,
    "backward_peak_bytes": 70 * MIB,
    "grad_nbytes": 5 * MIB,
}


def two_blocks(**changes):
    times = {"forward_s": 2 * 0.6 + 0.1, "backward_s": 2 * (0.5 + 1.2) + 0.2, "optimizer_s": 0.05}
    fields = {"outside_peak_bytes": 12 * MIB, "grad_bytes": 14 * MIB, **times, **changes}
    return step([region(k, OPS, **BLOCK) for k in range(2)], **fields)


def placed(where, *positions, **region_fields):
    ops = tuple(
        OpPlacement(position=o.position, op=o.op, placement=where, nbytes=o.nbytes)
        for o in OPS
        if o.position in positions
    )
    return RegionPlan(ops=ops, **region_fields)


def test_untouched_step():
    # backward of block 1: states, both blocks' input + a + b, gradients from outside and of its output, its transients
    # beside a and b
    assert predict_plain(two_blocks()) == (100 + 2 * (10 + 20 + 30) + 4 + 10 + (70 - 50)) * MIB
    # turning point: the same standing bytes, the last output, the outside peak
    assert predict_plain(two_blocks(outside_peak_bytes=40 * MIB)) == (100 + 2 * 60 + 10 + 40) * MIB
    plan = uniform_plan(two_blocks(), "device")
    got = predict(two_blocks(), plan, CUDA)
    assert got.step_s == pytest.approx(2 * (0.6 + 1.2) + 0.1 + 0.2 + 0.05)
    assert (got.host_bytes, got.ssd_bytes, got.d2h_bytes, got.exposed_s) == (0, 0, 0, 0.0)


def test_everything_recomputed():
    got = predict(two_blocks(), uniform_plan(two_blocks(), "recompute"), CUDA)
    assert got.step_s == pytest.approx(2 * (0.6 + 0.5 + 1.2) + 0.3 + 0.05)
    # backward of block 1: both inputs, the gradients from outside (14 - 2 * 5), the gradient of its output, the block
    assert got.device_bytes == (100 + 2 * 10 + 4 + 10 + 70) * MIB


def test_gradients_that_exist_at_the_start_do_not_grow():
    trace = two_blocks(grad_bytes_at_start=14 * MIB, resident_bytes=114 * MIB)
    got = predict(trace, uniform_plan(trace, "recompute"), CUDA)
    assert got.device_bytes == (114 + 2 * 10 + 10 + 70) * MIB


def test_peak_moves_to_the_end_of_backward_where_gradients_are_large():
    trace = two_blocks(grad_bytes=10 * MIB + 2 * 35 * MIB)
    trace = replace(trace, regions=tuple(replace(r, grad_nbytes=35 * MIB) for r in trace.regions))
    got = predict(trace, uniform_plan(trace, "recompute"), CUDA)
    # block 0: its input, gradients from outside and of block 1, its output's gradient, its own transients
    assert got.device_bytes == (100 + 10 + 10 + 35 + 10 + 70) * MIB


def test_an_output_kept_on_the_device_stands_and_saves_its_time():
    plan = Plan(regions=(placed("device", 2, name="block.0"), RegionPlan(name="block.1")))
    got = predict(two_blocks(), plan, CUDA)
    assert got.step_s == pytest.approx(2 * (0.6 + 1.2) + 0.2 + 0.5 + 0.3 + 0.05)
    assert (
        got.device_bytes == (100 + 2 * 10 + 30 + 4 + 10 + 70) * MIB
    )  # b of block 0 stands while block 1 runs back


def test_storing_what_is_never_run_again_saves_nothing():
    plan = Plan(regions=(placed("device", 4, name="block.0"), RegionPlan(name="block.1")))
    got = predict(two_blocks(), plan, CUDA)
    assert got.step_s == predict(two_blocks(), uniform_plan(two_blocks(), "recompute"), CUDA).step_s


def test_copies_hidden_and_exposed():
    # 100 MiB/s: b takes 0.3 s each way; it leaves at 0.5 s of its forward and is back before its recompute
    hidden = Plan(
        regions=(placed("host", 2, name="block.0"),), window_bytes=30 * MIB, prefetch_bytes=30 * MIB
    )
    got = predict(two_blocks(), hidden, CUDA)
    assert (got.exposed_s, got.d2h_bytes, got.host_bytes) == (0.0, 30 * MIB, 30 * MIB)
    # no room to fetch ahead: block 0 waits for all of it
    late = replace(hidden, prefetch_bytes=29 * MIB)
    assert predict(two_blocks(), late, CUDA).exposed_s == pytest.approx(0.3)
    # nothing can fetch ahead for the block whose backward comes first
    last = Plan(
        regions=(placed("host", 2, name="block.1"),), window_bytes=30 * MIB, prefetch_bytes=30 * MIB
    )
    assert predict(two_blocks(), last, CUDA).exposed_s == pytest.approx(0.3)


def test_a_full_window_makes_compute_wait():
    # a leaves at 0.2 s and is out at 0.4 s; b is made at 0.5 s and out at 0.8 s; block 1's a is made at 0.8 s ...
    # with a link ten times slower: a is out at 2.2 s, b waits for that from 0.5 s on: 1.7 s exposed
    slow = replace(CUDA, d2h_bytes_per_s=10 * MIB)
    plan = Plan(
        regions=(placed("host", 0, 2, name="block.0"),),
        window_bytes=30 * MIB,
        prefetch_bytes=1 << 30,
    )
    assert predict(two_blocks(), plan, slow).exposed_s >= 1.7
    wide = replace(plan, window_bytes=50 * MIB)
    out_by = 0.2 + 2.0 + 3.0
    first_recompute_at = 2 * 0.6 + 0.3  # waits until everything is out; the way back then hides
    assert predict(two_blocks(), wide, slow).exposed_s == pytest.approx(out_by - first_recompute_at)


def test_what_is_on_its_way_and_fetched_early_is_counted():
    plan = Plan(
        regions=(placed("host", 2, name="block.0", input="host"), RegionPlan(name="block.1")),
        window_bytes=35 * MIB,
        prefetch_bytes=40 * MIB,
    )
    got = predict(two_blocks(), plan, CUDA)
    # backward of block 1: its input, 4 of gradients, its output's gradient, transients, b and input of block 0;
    # the window was drained before
    assert got.device_bytes == (100 + 10 + 4 + 10 + 70 + 40) * MIB


def test_ssd_on_cpu_costs_copies_both_ways_and_staging():
    trace = replace(two_blocks(), device="cpu")
    plan = Plan(
        regions=(placed("ssd", 2, name="block.0"),), window_bytes=64 * MIB, prefetch_bytes=64 * MIB
    )
    got = predict(trace, plan, CPU, staging_bytes=64 * MIB)
    assert got.exposed_s == pytest.approx(30 * MIB / 1e10 * 2)
    assert got.ssd_bytes == 30 * MIB
    assert got.device_bytes == (100 + 2 * 10 + 4 + 10 + 70 + 64) * MIB


def six_blocks(**changes):
    fields = {**BLOCK, "grad_nbytes": 60 * MIB, "backward_peak_bytes": 110 * MIB}
    return step([region(k, OPS, **fields) for k in range(6)], **changes)


def at_smallest_budget(trace):
    least = smallest_budget(trace, CUDA)
    return solve_greedy(trace, CUDA, device_bytes=least, host_bytes=0, ssd_bytes=0)


def test_activations_use_the_room_of_gradients_that_do_not_exist_yet():
    # recomputed, the peak is in block 0's backward, with five blocks' gradients: 100 + 10 + 300 + 10 + 110;
    # untouched, block 5's has five blocks' a and b instead of these gradients: 100 + 60 + 250 + 10 + 110
    assert predict_plain(six_blocks()) == 530 * MIB
    assert all(r.plain for r in at_smallest_budget(six_blocks()).regions)
    # with all gradients there from the start only the last block's outputs find room: in its own backward
    held = six_blocks(grad_bytes_at_start=360 * MIB, resident_bytes=460 * MIB)
    assert [r.plain for r in at_smallest_budget(held).regions] == [False] * 5 + [True]
    # in between, late blocks keep more than early ones
    half = step(
        [
            replace(r, grad_nbytes=30 * MIB, backward_peak_bytes=80 * MIB)
            for r in six_blocks().regions
        ]
    )
    kept = [
        sum(o.nbytes for o in r.ops) + 50 * MIB * r.plain for r in at_smallest_budget(half).regions
    ]
    assert 0 < sum(kept) < 6 * 50 * MIB
    assert sum(kept[3:]) > sum(kept[:3])


def test_attention_is_stored_first():
    # the link hides 50 MiB of a block's 0.5 s of forward; attention saves 5 ms a MiB, the other output under 1
    ops = (
        op(0, 60 * MIB, time_s=0.05),
        op(2, 20 * MIB, time_s=0.1, kind="attention"),
        op(4, 5 * MIB, 0, time_s=0.35),
    )
    trace = step([region(k, ops, backward_peak_bytes=120 * MIB) for k in range(5)])
    budget = (
        smallest_budget(trace, CUDA, host_bytes=1 << 30) + 45 * MIB
    )  # the window and what comes back
    plan = solve_greedy(trace, CUDA, device_bytes=budget, host_bytes=1 << 30, ssd_bytes=0)
    moved = [r for r in plan.regions if not r.plain]
    assert len(moved) >= 3
    for entry in moved[:-1]:  # nothing can fetch ahead for the one whose backward comes first
        assert [o.position for o in entry.ops] == [2]


def test_error_names_the_smallest_budget_and_its_parts():
    with pytest.raises(BudgetError) as caught:
        solve_greedy(two_blocks(), CUDA, device_bytes=150 * MIB, host_bytes=0, ssd_bytes=0)
    least = smallest_budget(two_blocks(), CUDA)
    text = str(caught.value)
    for part in (
        f"{least // MIB} MiB ({least} bytes)",
        "3% stays free",
        "backward of block.1",
        "new gradients 4.00 MiB",
    ):
        assert part in text, text


def test_plans_that_do_not_belong_to_the_step_are_refused():
    trace = two_blocks()
    wrong_op = OpPlacement(position=2, op="other", placement="device", nbytes=30 * MIB)
    no_op = OpPlacement(position=3, op="op3", placement="device", nbytes=30 * MIB)
    for entry, words in (
        (RegionPlan(name="block.7"), "does not have"),
        (RegionPlan(name="block.0", ops=(wrong_op,)), "the plan says other"),
        (RegionPlan(name="block.0", ops=(no_op,)), r"\[3\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            predict(trace, Plan(regions=(entry,)), CUDA)
        assert check(
            trace, Plan(regions=(entry,)), CUDA, device_bytes=1 << 40, host_bytes=0, ssd_bytes=0
        )
    with pytest.raises(ConfigError, match="'cpu'"):
        predict(trace, Plan(), CPU)
    with pytest.raises(ConfigError, match="no region"):
        predict(replace(trace, regions=()), Plan(), CUDA)


def test_forced_plans():
    trace = two_blocks()
    host = uniform_plan(trace, "host")
    assert host.outside == "host"
    assert all(r.input == "host" and [o.position for o in r.ops] == [0, 2] for r in host.regions)
    assert not any(r.ops or r.plain for r in uniform_plan(trace, "recompute").regions)
    attention = replace(OPS[2], kind="attention")
    with_attention = step([region(0, (OPS[0], attention), **BLOCK)])
    assert [o.position for o in uniform_plan(with_attention, "ssd").regions[0].ops] == [0, 4]
    with pytest.raises(ConfigError, match="CPU"):
        uniform_plan(replace(trace, device="cpu"), "host")
    with pytest.raises(ConfigError, match="'both' is not one of"):
        uniform_plan(trace, "both")
