"""Ops that nothing left needs: found, proven by a rehearsal, skipped; and run again wherever the proof fails."""

from __future__ import annotations

import math

import pytest
import torch
from _bitwise import Program, Tally, compare, plain_run, plan_for, run_memopt, spill_directory
from _traps import ROWS, WIDTH, Net, batch, simple_step
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import memopt
from memopt.activations.skips import unneeded
from memopt.types.plan import OpPlacement, Plan, RegionPlan


class Chain(nn.Module):
    """mm -> softmax -> tanh: with softmax stored, the product has no reader left."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH))

    def other(self, product):
        return 0.0

    def forward(self, x):
        product = x @ self.weight
        return x + torch.tanh(torch.softmax(product, -1) + self.other(product))


class NumpyReads(Chain):
    """Reads the product where no dispatcher sees it, and what it makes is saved inside the region."""

    def other(self, product):
        return torch.from_numpy(product.detach().numpy() * 0.5)


class NumpyChooses(Chain):
    """An unseen read decides which ops run."""

    def other(self, product):
        total = float(product.detach().numpy().sum())
        return 0.0 if math.isnan(total) else torch.full((1,), 0.25)


class NumpyRaises(Chain):
    """An unseen read of NaN is an error of the program's own."""

    def other(self, product):
        return int(product.detach().numpy().max() * 0.0)


class Writes(Chain):
    """The product is written to after softmax read it."""

    def other(self, product):
        return product.mul_(0.5)


class Leaves(Chain):
    """The product is kept by the module."""

    def other(self, product):
        self.kept = product
        return 0.0


class Dropped(Chain):
    """Random numbers are drawn between the skipped op and what is saved."""

    def other(self, product):
        return torch.rand(ROWS, WIDTH)


def keeping(program, name, placement="device"):
    """A plan that stores the outputs of one op only."""
    run = memopt.start(program.build().train(), regions=["layers"], plan="recompute")
    for step in range(2):
        simple_step(run.model, step)
    trace = run.trace
    run.stop()
    return Plan(
        regions=tuple(
            RegionPlan(
                name=region.name,
                ops=tuple(
                    OpPlacement(position=o.position, op=o.op, placement=placement, nbytes=o.nbytes)
                    for o in region.ops
                    if name in o.op
                ),
            )
            for region in trace.regions
        )
    )


def program_of(block):
    return Program(build=lambda: Net(block), step=simple_step, regions=["layers"], num_steps=5)


def skips_of(model, plan, num_steps=4, **options):
    """Run and return, per region, what is hollow, whether it was refuted, and how often proven."""
    run = memopt.start(model, regions=["layers"], plan=plan, **options)
    try:
        for step in range(num_steps):
            simple_step(model, step)
        skips = run._engine._skips
        return {
            n: (set(s.hollow), s.refuted, len(s._proven)) for n, s in skips.items()
        }, run.report()
    finally:
        run.stop()


@pytest.mark.parametrize("placement", ["device", "ssd"])
@pytest.mark.parametrize("block", [Chain, Dropped])
def test_what_only_stored_ops_read_is_proven_and_skipped(block, placement):
    program = program_of(block)
    plan = keeping(program, "softmax", placement)
    with spill_directory() as path:
        budget = memopt.Budget(ssd=f"{path}:64MiB")
        skips, report = skips_of(program.build().train(), plan, budget=budget)
    assert {(len(hollow), refuted, proven) for hollow, refuted, proven in skips.values()} == {
        (1, False, 1)
    }
    assert len(skips) == 3
    assert any("are not made again" in note for note in report.notes)
    for _ in range(2):
        compare(plain_run(program), run_memopt(program, plan))


@pytest.mark.parametrize("block", [NumpyReads, NumpyChooses, NumpyRaises])
def test_an_unseen_reader_refutes(block):
    program = program_of(block)
    plan = keeping(program, "softmax")
    skips, report = skips_of(program.build().train(), plan)
    assert len(skips) == 3
    assert all(refuted and not proven for _, refuted, proven in skips.values())
    assert any("read by something that PyTorch does not see" in note for note in report.notes)
    compare(plain_run(program), run_memopt(program, plan))


@pytest.mark.parametrize("block", [Writes, Leaves])
def test_what_is_written_or_leaves_the_region_is_no_candidate(block):
    program = program_of(block)
    plan = keeping(program, "softmax")
    skips, _ = skips_of(program.build().train(), plan)
    assert skips == {}
    compare(plain_run(program), run_memopt(program, plan))


def test_a_reader_that_found_no_room_needs_its_input(monkeypatch):
    """Placed is not stored: where the budget is full, the op runs again, and so must what it reads."""
    from memopt.activations.engine import ActivationEngine

    program = program_of(Chain)
    plan = keeping(program, "softmax", "ssd")
    full = []
    real = ActivationEngine.store

    def store(self, tensor, placement, label, **options):
        if len(full) % 2 == 0 and "softmax" in label.what:
            full.append(label)
            return None
        full.append(label)
        return real(self, tensor, placement, label, **options)

    monkeypatch.setattr("memopt.activations.modes.MIN_MOVE_BYTES", 1)
    monkeypatch.setattr(ActivationEngine, "store", store)
    compare(plain_run(program), run_memopt(program, plan))
    assert len(full) > 6


def test_other_shapes_are_proven_anew():
    program = program_of(Chain)
    plan = keeping(program, "softmax")
    model, twin = program.build().train(), program.build().train()
    twin.load_state_dict(model.state_dict())
    run = memopt.start(model, regions=["layers"], plan=plan)
    for step, rows in enumerate((5, 5, 5, 9, 9, 5)):
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))
        for net in (model, twin):
            net.zero_grad()
            net(x).square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert {len(s._proven) for s in run._engine._skips.values()} == {2}
    run.stop()


def test_backward_twice_through_hollow_ops():
    program = program_of(Chain)
    plan = keeping(program, "softmax")
    model, twin = program.build().train(), program.build().train()
    twin.load_state_dict(model.state_dict())
    run = memopt.start(model, regions=["layers"], plan=plan, strict=True)
    for step in range(4):
        for net in (model, twin):
            net.zero_grad()
            loss = net(batch(step)).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert all(s._proven for s in run._engine._skips.values())
    run.stop()


def test_a_recompute_that_an_error_ended_proves_nothing():
    class Fails(NumpyReads):
        """Packs one tensor, then fails, in recomputations only: what the unseen read makes comes after."""

        def forward(self, x):
            x = torch.sin(x)
            if failing and torch._C._current_graph_task_id() != -1:
                calls.items.append(1)
                if len(calls.items) % 2 == 0:  # the recompute behind each rehearsal
                    raise KeyError("here")
            return super().forward(x)

    failing, calls = False, Tally()
    program = program_of(Fails)
    plan = keeping(program, "softmax")
    model = program.build().train()
    run = memopt.start(model, regions=["layers"], plan=plan)
    simple_step(model, 0)
    failing = True
    with pytest.raises(KeyError, match="here"):
        simple_step(model, 1)
    assert len(calls.items) == 2
    assert not any(s._proven or s.refuted for s in run._engine._skips.values())
    failing = False
    model.zero_grad()
    simple_step(model, 2)
    assert all(s.refuted for s in run._engine._skips.values())
    run.stop()


def test_the_rehearsal_runs_once_per_region_and_plan():
    calls = Tally()

    class Counted(Chain):
        def forward(self, x):
            calls.items.append(torch._C._current_graph_task_id() != -1)
            return super().forward(x)

    program = program_of(Counted)
    plan = keeping(program, "softmax")
    model = program.build().train()
    run = memopt.start(model, regions=["layers"], plan=plan)
    in_backward = []
    for step in range(8):
        calls.items.clear()
        simple_step(model, step)
        in_backward.append(sum(calls.items))
    run.stop()
    assert in_backward[0] == 3
    assert in_backward[1] == 6, "a rehearsal and the recompute"
    assert in_backward[-1] == 3
    assert sum(in_backward) <= 8 * 3 + 2 * 3


@given(
    st.lists(st.sets(st.integers(1, 11)), min_size=1, max_size=10),
    st.sets(st.integers(0, 11)),
)
def test_unneeded_is_the_closure(by, answered):
    """Against the definition: no chain of unanswered readers leads from an unneeded op to a needed one."""
    readers = {i: (f"op{i}", frozenset(r for r in reads if r > i)) for i, reads in enumerate(by)}
    found = unneeded(readers, answered)

    def needed(position):
        if position in answered:
            return False
        if position not in readers or not readers[position][1]:
            return True
        return any(needed(r) for r in readers[position][1])

    assert set(found) == {i for i in readers if i not in answered and not needed(i)}


def test_placements_of_models_stay_exact_with_skipping():
    program = program_of(Chain)
    for placement in ("kept", "ssd", "recompute"):
        compare(plain_run(program), run_memopt(program, plan_for(program, placement)))


class Reads(Chain):
    """From a step on, another op reads the product."""

    more = ""

    def other(self, product):
        if self.more == "reads":
            return torch.sin(product)
        if self.more == "writes":
            return product.t().mul_(0.5).t()
        return 0.0


@pytest.mark.parametrize("more", ["reads", "writes"])
def test_a_branch_that_reads_more_than_the_proof_saw(more):
    """Without a watch: NaN in 12 of 16 gradients, in the first step that takes the branch."""

    def step(model, i):
        for layer in model.layers:
            layer.more = more if i in (3, 5) else ""
        return simple_step(model, i)

    program = Program(build=lambda: Net(Reads), step=step, regions=["layers"], num_steps=7)
    record = run_memopt(program, keeping(program, "softmax"))
    assert any("are not made again" in note for note in record.run.report().notes)
    compare(plain_run(program), record)


class Thawed(Chain):
    """The scale's gradient needs the product; while it is frozen nothing does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.7), requires_grad=False)

    def forward(self, x):
        return x + torch.sin((x @ self.weight) * self.scale)


def test_a_weight_thawed_after_the_proof():
    """Without a watch: NaN in the gradients of everything that was thawed."""

    def step(model, i):
        for layer in model.layers:
            layer.scale.requires_grad_(i >= 3)
        return simple_step(model, i)

    program = Program(build=lambda: Net(Thawed), step=step, regions=["layers"], num_steps=6)
    record = run_memopt(program, keeping(program, "mul"))
    assert any("are not made again" in note for note in record.run.report().notes)
    compare(plain_run(program), record)
