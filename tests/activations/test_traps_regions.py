"""Rules 15 and 18: higher-order ops, compiled regions, hooks, frozen regions, and what is skipped."""

from __future__ import annotations

import functools

import pytest
import torch
from _bitwise import (
    Executed,
    Program,
    Tally,
    assert_bitwise,
    compare,
    notes_of,
    plain_run,
    plan_for,
    quiet,
    run_memopt,
    some,
    trace_of,
)
from _models import model_program
from _traps import ROWS, TRAPS, WIDTH, Block, Net, Sines, batch, simple_step, two_traced_steps
from torch import nn

import memopt
from memopt.types.plan import OpPlacement, Plan, RegionPlan


# ------------------------------------------------------------------------------------------------------ rule 15
@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
def test_flex_attention_without_gradients_inside_a_region(placement):
    """On the CPU flex_attention has no backward: the higher-order op itself must pass through the modes."""
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(Block):
        def forward(self, x):
            with torch.no_grad():
                q = self.a(x).view(1, 1, ROWS, WIDTH)
                h = flex_attention(q, q.sin(), q.cos()).view(ROWS, WIDTH)
            return x + self.b(torch.tanh(x * h))

    program = Program(build=functools.partial(Net, Flex), step=simple_step, regions=["layers"])
    with quiet():
        assert_bitwise(program, placement)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("placement", ["recompute", "kept", "host", "mix-0"])
def test_flex_attention(placement, compiled):
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention) if compiled else flex_attention

    class Flex(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x):
            q = self.a(x).view(1, 128, 2, 32).transpose(1, 2)
            h = attend(q, q.sin(), q.cos()).transpose(1, 2).reshape(128, 64)
            return x + torch.tanh(h)

    def build():
        net = Net(Flex)
        net.inp, net.out = nn.Linear(64, 64), nn.Linear(64, 2)
        return net

    def step(model, i):
        loss = model(batch(i, 128, 64).cuda()).square().mean()
        loss.backward()
        return loss

    with quiet():
        program = Program(build=build, step=step, regions=["layers"], device="cuda")
        assert_bitwise(program, placement)


# ------------------------------------------------------------------------------------------------------ rule 18
@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd", "mix-0"])
@pytest.mark.parametrize("what", ["block", "part"])
def test_compiled_regions(what, placement):
    """A compiled function is opaque: one op or a few, never wrong."""

    class Part(Block):
        def __init__(self):
            super().__init__()
            self.fast = torch.compile(
                lambda h: torch.tanh(h) * torch.sigmoid(h), backend="aot_eager"
            )

        def forward(self, x):
            return x + self.b(self.fast(self.a(x)))

    def build():
        if what == "part":
            return Net(Part)
        net = Net(Sines)
        net.layers = nn.ModuleList(
            [torch.compile(layer, backend="aot_eager") for layer in net.layers]
        )
        return net

    with quiet():
        torch._dynamo.reset()
        assert_bitwise(Program(build=build, step=simple_step, regions=["layers"]), placement)


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_user_hooks(placement):
    """Forward and backward hooks on regions and submodules, and tensor hooks inside a region, all change values."""

    class Hooked(Block):
        def forward(self, x):
            h = self.a(x)
            if h.requires_grad:
                h.register_hook(lambda grad: grad * 1.5)
            return x + self.b(torch.tanh(h))

    def build():
        net = Net(Hooked)
        net.layers[0].a.register_forward_hook(lambda module, args, out: out * 1.25)
        net.layers[1].b.register_full_backward_hook(
            lambda module, grads, outs: tuple(g * 0.5 for g in grads)
        )
        net.layers[1].register_forward_hook(lambda module, args, out: out + 0.125)
        net.layers[2].register_forward_pre_hook(lambda module, args: (args[0] * 0.75,))
        net.layers[2].register_full_backward_pre_hook(
            lambda module, grads: tuple(g * 2.0 for g in grads)
        )
        net.layers[0].b.weight.register_hook(lambda grad: grad + 1.0)
        return net

    assert_bitwise(Program(build=build, step=simple_step, regions=["layers"]), placement)


def test_hooks_on_the_region_itself_fire_once():
    model = Net(Sines).train()
    fired = []
    model.layers[1].register_forward_hook(lambda module, args, out: fired.append("forward"))
    model.layers[1].register_full_backward_hook(
        lambda module, grads, outs: fired.append("backward")
    )
    run = two_traced_steps(model, plan="recompute")
    run.stop()
    assert fired == ["forward", "backward"] * 2


def test_frozen_regions_are_not_recomputed_and_store_nothing():
    """No gradient goes into the first two regions: their forward runs once, and nothing of it is kept."""
    calls = Tally()

    class Counted(Sines):
        def forward(self, x):
            calls.items.append(1)
            return super().forward(x)

    def build():
        net = Net(Counted)
        for part in (net.inp, net.layers[0], net.layers[1]):
            part.requires_grad_(False)
        return net

    program = Program(build=build, step=simple_step, regions=["layers"])
    plain_run(program)
    for placement in ("recompute", "kept", "ssd"):
        plan = plan_for(program, placement)
        calls.items.clear()
        record = run_memopt(program, plan)
        compare(plain_run(program), record)
        assert len(calls.items) == 3 * (2 + 2), (
            f"{placement}: regions 0 and 1 run once a step, region 2 twice"
        )
        stored = [
            op
            for region in record.run.plan.regions
            if region.name in ("layers.0", "layers.1")
            for op in region.ops
            if op.placement in ("device", "host", "ssd") and op.nbytes
        ]
        assert not stored or placement != "ssd"


def test_an_op_that_nothing_left_needs_is_skipped():
    """With softmax stored, q k^T need not run again: its only reader is answered from storage."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x):
            q, k, v = (layer(x).view(1, ROWS, WIDTH) for layer in (self.q, self.k, self.v))
            weights = torch.softmax(q @ k.transpose(1, 2), dim=-1)
            return x + self.o(torch.tanh(weights @ v)).view(ROWS, WIDTH)

    program = Program(build=functools.partial(Net, Attends), step=simple_step, regions=["layers"])
    trace = trace_of(program)

    def plan(placement):
        return Plan(
            regions=tuple(
                RegionPlan(
                    name=region.name,
                    ops=tuple(
                        OpPlacement(
                            position=op.position, op=op.op, placement=placement, nbytes=op.nbytes
                        )
                        for op in region.ops
                        if "softmax" in op.op
                    ),
                )
                for region in trace.regions
            )
        )

    num_products = {}
    for placement in ("recompute", "device"):
        compare(plain_run(program), run_memopt(program, plan(placement)))
        model = program.build().train()
        run = two_traced_steps(model, plan=plan(placement))
        loss = model(batch(5)).square().mean()
        with Executed() as executed:
            loss.backward()
        num_products[placement] = executed.counts["aten.bmm.default"]
        run.stop()
    assert num_products["recompute"] == 3 * (2 + 4), (
        "two products again and four gradients in each of three regions"
    )
    assert num_products["device"] == 3 * (1 + 4), "q k^T is skipped"


def test_a_plan_that_names_other_ops_than_the_model_runs_is_refused_or_noted():
    """A plan from another model: positions and op names do not fit."""
    program = TRAPS["1-in-place"]
    plan = Plan(
        regions=(
            RegionPlan(
                name="layers.0",
                ops=(OpPlacement(position=0, op="aten.conv2d.default", placement="device"),),
            ),
            RegionPlan(name="layers.77"),
        )
    )
    try:
        record = run_memopt(program, plan)
    except (memopt.ConfigError, memopt.MemoptError) as error:
        text = str(error)
    else:
        compare(plain_run(program), record)
        text = notes_of(record.run)
    assert "layers.77" in text or "conv2d" in text


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_models_own_checkpointing_is_taken_over_or_refused_with_the_remedy(
    placement, reentrant
):
    program = model_program("llama", dropout=True)

    def build():
        model = program.build()
        with quiet():  # the name is deprecated
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    calls = Tally()

    def step(model, i):
        calls.items.clear()
        handle = model.model.layers[1].mlp.register_forward_pre_hook(
            lambda *_: calls.items.append(1)
        )
        loss = program.step(model, i)
        handle.remove()
        return loss

    own = Program(build=build, step=step)
    plain = plain_run(own)  # before: it counts as well
    try:
        record = run_memopt(own, plan_for(own, placement))
    except memopt.ConfigError as error:
        assert "gradient_checkpointing_disable" in str(error)  # noqa: PT017 -- one of two right ways
        return
    compare(plain, record)
    assert len(calls.items) == 2, "taken over, never doubled: one forward and one recomputation"
