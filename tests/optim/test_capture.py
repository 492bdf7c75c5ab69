"""Captured steps without a GPU: the operators are recorded instead of run, and run at every replay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from memopt.ops import frugal_step as op
from memopt.optim import Frugal, capture, execute, frugal, native

SHAPES = [(9, 20), (16, 12), (30,), (33, 5), ()]


class Graph:
    """What a CUDA graph does with the two operators: record them, repeat them."""

    def __init__(self):
        self.calls, self.recording = [], False

    def run(self, name):
        def call(*arguments):
            if self.recording:  # lists are read at capture, tensors at replay
                copied = [list(x) if isinstance(x, list) else x for x in arguments]
                self.calls.append((name, copied))
            else:
                getattr(torch.ops.memopt, name)(*arguments)

        return call

    def capture(self, function):
        self.calls, self.recording = [], True
        function()
        self.recording = False

    @torch.no_grad()
    def replay(self):
        for name, arguments in self.calls:
            getattr(torch.ops.memopt, name)(*arguments)


@pytest.fixture
def graph(monkeypatch):
    op.register()
    found, kept = Graph(), native.refusal
    ops = SimpleNamespace(
        memopt=SimpleNamespace(
            frugal_step=found.run("frugal_step"), frugal_clock=found.run("frugal_clock")
        )
    )

    class Torch:
        def __getattr__(self, name):
            return ops if name == "ops" else getattr(torch, name)

    def refusal(*arguments):
        reason = kept(*arguments)
        return "" if reason == "the parameters are on cpu" else reason

    for module in (execute, capture):
        monkeypatch.setattr(module, "torch", Torch())
    for module in (execute, frugal):
        monkeypatch.setattr(module, "is_capturing", lambda: found.recording)
    monkeypatch.setattr(native, "refusal", refusal)
    return found


def make(**settings):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for p in params:
        p.grad = torch.zeros_like(p)
    settings = {"density": 0.3, "update_gap": 3, "weight_decay": 0.1, **settings}
    named = [(f"layer{i}", p) for i, p in enumerate(params)]
    return params, Frugal(named, lr=1e-2, impl="native", **settings)


def fill(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        if p.grad is not None:
            p.grad.copy_(torch.randn(p.shape, generator=generator))


def near(params, others):
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def set_lr(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * (1 - 0.05 * step)


@pytest.mark.parametrize("full", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
def test_replays_are_eager_steps_over_switches_and_a_schedule(graph, selection, full):
    settings = {"selection": selection, "state_full": full}
    (params, optimizer), (others, plain) = make(capturable=True, **settings), make(**settings)
    for step in range(9):
        fill(params, step)
        fill(others, step)
        set_lr(optimizer, step)
        set_lr(plain, step)
        plain.step()
        if step < 2:
            optimizer.step()
            if step == 1:
                graph.capture(optimizer.step)
        else:
            optimizer.begin_step()
            graph.replay()
        near(params, others)
        assert [optimizer.state[p]["step"] for p in params] == [
            plain.state[p]["step"] for p in others
        ]
    assert optimizer.param_groups[0]["calls"] == plain.param_groups[0]["calls"] == 9
    assert optimizer.param_groups[0]["round"] == 2


def test_warming_up_with_other_parameters_does_not_count_twice(graph):
    """The first steps may lack gradients that the captured one has, so that there are two tables."""
    (params, optimizer), (others, plain) = make(capturable=True), make()
    for step in range(7):
        for side in (params, others):
            side[0].grad = None if step == 0 else torch.zeros_like(side[0])
            fill(side, step)
        plain.step()
        if step < 2:
            optimizer.step()
            if step == 1:
                kept = params[0].grad
                graph.capture(optimizer.step)
        else:
            kept.copy_(params[0].grad)
            optimizer.begin_step()
            graph.replay()
        near(params, others)


def test_partial_steps_are_captured_with_the_step_that_ends_them(graph):
    (params, optimizer), (others, plain) = make(capturable=True), make()

    def in_parts():
        optimizer.step_partial(params[:2])
        optimizer.step()

    for step in range(8):
        fill(params, step)
        fill(others, step)
        plain.step()
        if step < 2:
            in_parts()
            if step == 1:
                graph.capture(in_parts)
        elif step in (2, 5):
            in_parts()  # eager again, and nothing of the capture is left
        else:
            optimizer.begin_step()
            graph.replay()
        near(params, others)


def test_what_a_graph_would_do_wrong_is_refused(graph):
    params, optimizer = make(capturable=True)
    with pytest.raises(RuntimeError, match="none was captured"):
        optimizer.begin_step()
    fill(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="none was captured"):
        optimizer.begin_step()
    kept, params[0].grad = params[0].grad, None
    graph.recording = True
    with pytest.raises(RuntimeError, match="not run before"):
        optimizer.step()
    graph.recording = False
    params[0].grad = kept
    graph.capture(optimizer.step)
    graph.recording = True
    with pytest.raises(RuntimeError, match="not for a graph"):
        optimizer.begin_step()
    graph.recording = False
    assert optimizer.param_groups[0]["calls"] == 1
    with pytest.raises(RuntimeError, match="cannot be moved"):
        optimizer.move_state("meta")
    optimizer.begin_step()
    graph.replay()
    optimizer.load_state_dict(optimizer.state_dict())  # other addresses: the graph is of no use now
    with pytest.raises(RuntimeError, match="none was captured"):
        optimizer.begin_step()
    _, eager = make()
    graph.recording = True
    with pytest.raises(RuntimeError, match="capturable=True"):
        eager.step()


def test_stochastic_rounding_of_replays_is_that_of_eager_steps(graph):
    sides = []
    for capturable in (True, False):
        params, optimizer = make(capturable=capturable, quantize="8bit", rounding="stochastic")
        sides.append((params, optimizer))
    (params, optimizer), (others, plain) = sides
    for step in range(6):
        fill(params, step)
        fill(others, step)
        plain.step()
        if step == 0:
            optimizer.step()
            graph.capture(optimizer.step)
        else:
            optimizer.begin_step()
            graph.replay()
        ours, theirs = (
            side._groups[0].buckets[0].arena.arrays["exp_avg"] for side in (optimizer, plain)
        )
        assert (ours == theirs).float().mean() > 0.999


# ------------------------------------------------------------------------- tables
def test_more_tensors_than_a_launch_takes(graph, monkeypatch):
    monkeypatch.setattr(op, "MAX_TENSORS", 2)
    for selection in ("blocks", "columns"):
        (params, optimizer), (others, plain) = make(selection=selection), make(selection=selection)
        plain._impl = "reference"
        for step in range(5):
            fill(params, step)
            fill(others, step)
            optimizer.step()
            plain.step()
            near(params, others)
        assert [len(key) for key in optimizer._groups[0].buckets[0].tables] == [2, 2, 1]


def test_tables_do_not_grow_with_the_sets_of_parameters_that_have_gradients(graph):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(8, 6)) for _ in range(6)]
    optimizer = Frugal(params, impl="native", density=0.3)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    plain = Frugal(others, impl="reference", density=0.3)
    for step in range(1, 64):
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = torch.full_like(p, 0.1) if step >> i & 1 else None
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        plain.step()
    near(params, others)
    (bucket,) = optimizer._groups[0].buckets
    whole = native.max_chunks(bucket, range(6))
    assert sum(tables.chunks.numel() for tables in bucket.tables.values()) <= 4 * whole
    assert len(bucket.tables) > 2
