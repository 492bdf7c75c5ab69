"""Rules 1, 3, 6, 7 and 17: writes to what the engine keeps, moves or starts from."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import _traps
import numpy as np
import pytest
import torch
from _bitwise import (
    SWEEPS,
    Program,
    assert_bitwise,
    assert_bitwise_for_single_ops,
    assert_bitwise_or_refused,
    compare,
    notes_of,
    plain_run,
    plan_for,
    run_memopt,
    some,
    spill_directory,
    trace_of,
    train,
)
from _traps import TRAPS, WIDTH, ZEROING, Block, Net, batch, simple_step
from torch import nn

import memopt

WRITES = [name for name in TRAPS if name[:2] in ("1-", "3-", "6-")]


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_exact(name, placement):
    assert_bitwise(TRAPS[name], placement)


@pytest.mark.parametrize("limit", SWEEPS)
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_exact_whichever_op_is_kept(name, limit):
    assert_bitwise_for_single_ops(TRAPS[name], limit=limit)


# ------------------------------------------------------------------------------------------------------- rule 1
@pytest.mark.parametrize("placement", ["kept", "ssd"])
def test_a_forced_placement_really_stores_an_output_that_is_written_later(placement):
    """Copy on write, not 'never placed': the plan stores the linear layer's output although mul_ follows."""
    program = TRAPS["1-in-place"]
    region = trace_of(program).regions[0]
    linear = [op for op in region.ops if op.kind == "matmul"]
    assert len(linear) == 2
    assert linear[0].placeable, linear[0].reason
    record = assert_bitwise(program, placement)
    placed = {op.position: op.placement for op in record.run.plan.regions[0].ops}
    assert placed.get(linear[0].position) == {"kept": "device", "ssd": "ssd"}[placement]


# ------------------------------------------------------------------------------------------------------- rule 3
@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_rebound_buffer_is_exact_or_refused(placement):
    """No schema declares this side effect; PyTorch's own checkpoint is silently wrong here."""
    program = Program(
        build=functools.partial(Net, _traps.ReboundBuffer), step=simple_step, regions=["layers"]
    )
    assert_bitwise_or_refused(program, placement)


def test_buffers_keep_their_identity_and_version_order():
    """Recomputation puts values back into the same storages; nothing is rebound."""
    model = Net(_traps.ConvBn).train()
    before = {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()}
    with memopt.optimize(model, plan="recompute", regions=["layers"]):
        for i in range(2):
            simple_step(model, i)
    assert {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()} == before


def test_a_buffer_changed_by_the_user_between_forward_and_backward_stays_changed():
    """What the recomputation puts back are the later values, not those at the end of the region's forward."""

    def step(model, i):
        loss = model(batch(i)).square().mean()
        for layer in model.layers:
            layer.count.fill_(40 + i)
        loss.backward()
        return loss

    program = Program(
        build=functools.partial(Net, _traps.RunningScale), step=step, regions=["layers"]
    )
    for placement in ("recompute", "kept", "mix-0"):
        record = assert_bitwise_or_refused(program, placement)
        if record is not None:
            assert int(record.steps[1].buffers["layers.0.count"]) == 41


# ------------------------------------------------------------------------------------------------------- rule 6
@pytest.mark.parametrize("name", ["6-fill", "6-in-place"])
def test_unseen_writers_are_found_and_named(name):
    program = TRAPS[name]
    trace = trace_of(program)
    for region in trace.regions:
        if name == "6-in-place":
            assert region.has_unseen_writer
            linear = [op for op in region.ops if op.kind == "matmul"]
            # never placed, or copied at birth where it is placed: that is exact, as the sweep over single ops shows
            assert linear[0].placeable or linear[0].reason
            assert linear[1].placeable, linear[1].reason
        factories = [op for op in region.ops if "zeros_like" in op.op or "empty_like" in op.op]
        assert bool(factories) == (name == "6-fill")
        assert not any(op.placeable for op in factories), "factory outputs are never placed"
    if name == "6-in-place":
        record = run_memopt(program, plan_for(program, "kept"))
        assert "unseen" in notes_of(record.run) or "does not see" in notes_of(record.run)
        assert "addmm" in notes_of(record.run) or "layers.0" in notes_of(record.run), (
            "the report names the op"
        )


def test_a_plan_cannot_force_an_op_with_an_unseen_writer():
    program = TRAPS["6-in-place"]
    trace = trace_of(program)
    plan = plan_for(program, "mix-0")
    forced = dataclasses.replace(
        plan,
        regions=tuple(
            dataclasses.replace(
                region,
                ops=tuple(
                    memopt.types.plan.OpPlacement(
                        position=op.position, op=op.op, placement="device", nbytes=op.nbytes
                    )
                    for op in traced.ops
                ),
            )
            for region, traced in zip(plan.regions, trace.regions, strict=True)
        ),
    )
    try:
        record = run_memopt(program, forced)
    except (memopt.ConfigError, memopt.MemoptError):
        return
    compare(plain_run(program), record)


def test_a_fresh_unseen_write_is_found_by_a_strict_step():
    """The writer wakes after the traced step: only `strict=True` can see it."""

    class Late(Block):
        awake = False

        def forward(self, x):
            h = self.a(x)
            if Late.awake:
                h.detach().numpy()[...] *= np.float32(0.5)
            return x + self.b(torch.sin(h))

    def step(model, i):
        Late.awake = i >= 2
        return simple_step(model, i)

    program = Program(
        build=functools.partial(Net, Late), step=step, regions=["layers"], num_steps=4
    )
    for placement in ("kept", "ssd"):
        assert_bitwise_or_refused(program, placement, strict=True)


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
def test_an_unseen_write_to_the_region_input_is_exact_or_refused(placement):
    program = Program(
        build=functools.partial(Net, _traps.UnseenInput), step=simple_step, regions=["layers"]
    )
    assert_bitwise_or_refused(program, placement)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["kept", "host", "mix-0", "mix-1", "mix-2", "mix-3"])
def test_liger_rope_writes_in_place_unseen(placement):
    """A Llama whose rope, norms and SwiGLU are Liger's Triton kernels."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers import LlamaConfig, LlamaForCausalLM

    def build():
        config = LlamaConfig(
            hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
            vocab_size=512,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        apply_liger_kernel_to_llama(model=model)
        return model

    def step(model, i):
        ids = torch.randint(0, 512, (1, 256), generator=torch.Generator().manual_seed(i)).cuda()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        return loss

    program = Program(build=build, step=step, device="cuda")
    compare(
        plain_run(program), train_again(program)
    )  # the plain loop repeats itself: the test can tell
    trace = trace_of(program)
    assert all(region.has_unseen_writer for region in trace.regions)
    assert_bitwise(program, placement)


def train_again(program):
    """A second plain run."""
    import contextlib

    return train(program, lambda model, optimizer: contextlib.nullcontext())


# ------------------------------------------------------------------------------------------------------- rule 7
@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("way", ["zero_", "view", "detach"])
def test_a_returned_output_that_the_caller_changes_is_exact_or_named(way, placement):
    program = ZEROING[way]
    plan = plan_for(program, placement)
    try:
        record = run_memopt(program, plan)
    except memopt.SavedOutputChangedError as error:
        assert placement != "recompute", "nothing is kept"
        text = str(error)
        assert "layers." in text and "addmm" in text, "region and op are named"
        return
    compare(plain_run(program), record)


def test_a_returned_output_that_the_caller_changes_whichever_op_is_kept():
    from _bitwise import single_op_plans

    for way in ("zero_", "detach"):
        program = ZEROING[way]
        for _, plan in single_op_plans(trace_of(program)):
            try:
                record = run_memopt(program, plan, num_steps=2)
            except memopt.SavedOutputChangedError:
                continue
            compare(plain_run(program), record, num_steps=2)


@pytest.mark.parametrize("placement", ["kept", "ssd", "mix-0", "mix-4"])
def test_a_returned_output_written_through_data_is_exact_or_refused(placement):
    """`.data` bumps no version counter: keeping an alias of a returned output cannot be checked."""
    assert_bitwise_or_refused(ZEROING["data"], placement)


@pytest.mark.parametrize("way", ["zero_", "view", "detach"])
def test_an_output_that_the_caller_changes_is_not_placed(way):
    """The traced step tells, so that no plan of the planner's own ends in that error in the middle of a run."""
    program = _traps.ZEROING[way]
    for region in trace_of(program).regions:
        changed = [op for op in region.ops if "changed in place by its caller" in op.reason]
        assert len(changed) == 1, region.ops
        assert not changed[0].placeable
        assert any(op.placeable for op in region.ops)
    for placement in ("kept", "ssd", "mix-0"):
        compare(plain_run(program), run_memopt(program, plan_for(program, placement)))


def test_kept_outputs_share_the_version_counter():
    """A region's output kept on the device, modified by the caller: the change is seen although values agree."""

    class Scales(Net):
        def forward(self, x):
            h = self.inp(x)
            for layer in self.layers:
                h, u = layer(h)
                with torch.no_grad():
                    u.mul_(1.0)  # legal, and without effect
            return self.out(h)

    program = Program(
        build=functools.partial(Scales, _traps.ReturnsInner), step=simple_step, regions=["layers"]
    )
    for placement in ("kept", "ssd"):
        assert_bitwise_or_refused(program, placement)


# ------------------------------------------------------------------------------------------------------ rule 17
class WritesInput(Block):
    """Adds to its own input in place; what made the input does not need it."""

    def forward(self, x):
        x.add_(1.0)
        return self.b(torch.sin(self.a(x.clone())))


class WritesInputView(Block):
    """The same through a view."""

    def forward(self, x):
        x.view(-1)[: x.numel() // 2].mul_(0.5)
        return self.b(torch.sin(self.a(x.clone())))


@pytest.mark.parametrize("block", [WritesInput, WritesInputView])
@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_a_region_that_writes_its_input_is_exact_or_refused(block, placement):
    program = Program(build=functools.partial(Net, block), step=simple_step, regions=["layers"])
    assert_bitwise_or_refused(program, placement)


def test_a_region_that_writes_its_input_is_left_alone_with_a_note():
    """plan="auto" under a budget that does not hold the plain step: exact, and the report says why."""
    from _memory import live_bytes

    def step(model, i):
        loss = model(batch(i, 20_000, WIDTH)).square().mean()
        loss.backward()
        return loss

    # with three blocks everything recomputed takes 0.99 of the plain step: the values before the writes are kept
    build = functools.partial(Net, WritesInput, num_blocks=10)
    program = Program(build=build, step=step, regions=["layers"])
    with live_bytes() as live:
        plain = plain_run(program)
        budget = memopt.Budget(device=live.peak_bytes * 9 // 10)
    record = run_memopt(program, "auto", budget=budget)
    compare(plain, record)
    assert "input" in notes_of(record.run)


def test_in_place_residual_between_regions():
    """Region i+1 writes its input, which is the output that region i returned (and may have kept)."""

    class Residual(Block):
        def forward(self, x):
            x += torch.tanh(self.a(x.clone()))
            return x * self.b.weight.mean()

    def build():
        return Net(Residual)

    def step(model, i):
        loss = model(batch(i)).square().mean()
        loss.backward()
        return loss

    try:
        program = Program(build=build, step=step, regions=["layers"])
        plain_run(program)
    except RuntimeError:
        pytest.fail("the plain loop refuses this program: it is no test")
    for placement in ("recompute", "kept", "ssd"):
        assert_bitwise_or_refused(program, placement)


def test_warnings_of_tmpfs_are_not_raised_on_a_real_file_system():
    """The harness's own spill directory is a real file system, or the SSD tests test memory."""
    with spill_directory() as path, warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        run = memopt.start(model, plan="ssd", budget=memopt.Budget(ssd=f"{path}:1MiB"))
        run.stop()
