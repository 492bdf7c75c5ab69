"""Rules 9, 12, 13 and 14: the backward graph, its threads and its lifetime."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref

import pytest
import torch
from _bitwise import (
    SWEEPS,
    Executed,
    Program,
    assert_bitwise,
    assert_bitwise_for_single_ops,
    differences,
    plan_for,
    some,
    spill_directory,
)
from _traps import ROWS, TRAPS, WIDTH, Block, Net, Sines, batch, simple_step, two_traced_steps

import memopt

GRAPH = [name for name in TRAPS if name[:2] == "9-" or name[:3] == "12-"]


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("name", GRAPH)
def test_graphs_are_exact(name, placement):
    assert_bitwise(TRAPS[name], placement)


@pytest.mark.parametrize("limit", SWEEPS)
@pytest.mark.parametrize("name", GRAPH)
def test_graphs_are_exact_whichever_op_is_kept(name, limit):
    assert_bitwise_for_single_ops(TRAPS[name], limit=limit)


# ------------------------------------------------------------------------------------------------------ rule 12
def test_retained_graph_is_answered_from_storage_each_time():
    program = Program(build=functools.partial(Net, Sines), step=simple_step, regions=["layers"])
    model = Net(Sines).train()
    run = two_traced_steps(model, plan=plan_for(program, "kept"))
    loss = model(batch(5)).square().mean()
    for keep in (True, True, False):
        with Executed() as executed:
            loss.backward(retain_graph=keep)
        assert executed.counts.get("aten.sin.default", 0) == 0, (
            f"retain_graph={keep}: the region was recomputed"
        )
    run.stop()


def test_recomputing_runs_what_is_not_stored():
    """The counter above can count: under "recompute" each of the six sines runs again."""
    model = Net(Sines).train()
    run = two_traced_steps(model, plan="recompute")
    loss = model(batch(5)).square().mean()
    with Executed() as executed:
        loss.backward()
    assert executed.counts["aten.sin.default"] == 6
    run.stop()


def test_stored_data_is_dropped_as_it_is_consumed():
    """In a backward that keeps no graph, region 2's storage is gone when region 0's backward runs."""
    from _memory import live_bytes

    class Wide(Block):
        def forward(self, x):
            wide = torch.sin(self.a(x).repeat(1, 200))
            return x + self.b(torch.tanh(wide)[:, :WIDTH])

    program = Program(build=functools.partial(Net, Wide), step=simple_step, regions=["layers"])
    model = Net(Wide).train()
    run = two_traced_steps(model, plan=plan_for(program, "kept"))
    seen = []
    first = model.layers[0].a.weight
    handle = first.register_hook(lambda grad: seen.append(live.current_bytes))
    with live_bytes() as live:
        loss = model(batch(5)).square().mean()
        full = live.current_bytes
        loss.backward()
    handle.remove()
    run.stop()
    one = ROWS * WIDTH * 200 * 4
    assert full > 6 * one, "sin's and tanh's outputs of three regions are kept"
    # while region 0's last gradient is made, at most its own tensors and their gradients are alive
    assert seen[0] < 5 * one, (
        f"{seen[0] / one:.1f} wide tensors alive in the first region's backward, {full / one:.1f} before"
    )


# ------------------------------------------------------------------------------------------------------ rule 13
@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_backward_in_another_thread(placement):
    def step(model, i):
        loss = model(batch(i)).square().mean()
        errors = []

        def backward():
            try:
                loss.backward()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return loss

    for name in ("2-native-dropout", "1-in-place", "3-running-scale"):
        assert_bitwise(Program(build=TRAPS[name].build, step=step, regions=["layers"]), placement)


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
def test_forward_and_backward_in_a_worker_thread(placement):
    """The whole step in a thread that did not enter the context."""

    def step(model, i):
        results = []
        thread = threading.Thread(target=lambda: results.append(simple_step(model, i)))
        thread.start()
        thread.join()
        return results[0]

    assert_bitwise(
        Program(build=TRAPS["2-native-dropout"].build, step=step, regions=["layers"]), placement
    )


# ------------------------------------------------------------------------------------------------------ rule 14
@pytest.mark.parametrize("plan", ["recompute", "kept", "ssd"])
def test_backward_after_leaving(plan):
    threads = threading.active_count()
    torch.manual_seed(0)
    plain = TRAPS["2-native-dropout"].build().train()
    torch.manual_seed(0)
    model = TRAPS["2-native-dropout"].build().train()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    with spill_directory() as path:
        for net, guard in (
            (plain, contextlib.nullcontext()),
            (
                model,
                memopt.optimize(
                    model,
                    plan=plan_for(TRAPS["2-native-dropout"], plan),
                    regions=["layers"],
                    budget=memopt.Budget(ssd=f"{path}:16MiB"),
                ),
            ),
        ):
            torch.manual_seed(1)
            with guard:
                for i in range(2):
                    simple_step(net, i)
                net.zero_grad()
                loss = net(batch(7)).square().mean()
            if net is model:
                for name, module in model.named_modules():
                    assert vars(module).keys() == before[name].keys(), "unpatched at once"
            with torch.no_grad():
                net(batch(9))  # other work in between
            loss.backward()
            del loss
        grads = [{n: p.grad for n, p in net.named_parameters()} for net in (plain, model)]
        assert not differences(*grads)
        gc.collect()
    assert threading.active_count() == threads, "the engine's threads end when the last graph dies"


def test_a_graph_dropped_after_leaving_frees_everything():
    from _memory import live_bytes

    threads = threading.active_count()
    model = Net(Sines).train()
    with spill_directory() as path, live_bytes() as live:
        run = memopt.start(
            model, plan="ssd", regions=["layers"], budget=memopt.Budget(ssd=f"{path}:16MiB")
        )
        for i in range(2):
            simple_step(model, i)
        model.zero_grad()
        level = live.current_bytes
        loss = model(batch(7)).square().mean()
        run.stop()
        reference = weakref.ref(loss)
        del loss
        gc.collect()
        assert reference() is None
        assert live.current_bytes <= level
    assert threading.active_count() == threads


def test_a_second_context_while_a_graph_of_the_first_lives():
    torch.manual_seed(0)
    model = Net(Sines).train()
    plain = Net(Sines).train()
    plain.load_state_dict(model.state_dict())
    program = Program(build=functools.partial(Net, Sines), step=simple_step, regions=["layers"])
    run = two_traced_steps(model, plan=plan_for(program, "kept"))
    old = model(batch(7)).square().mean()
    run.stop()
    run = two_traced_steps(model, plan="recompute")
    old.backward()
    plain(batch(7)).square().mean().backward()
    grads = [{n: p.grad for n, p in net.named_parameters()} for net in (plain, model)]
    assert not differences(*grads)
    run.stop()
