"""What people do inside and around a training loop: each leaves the bits of the plain loop, and nothing behind."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading

import pytest
import torch
from _bitwise import (
    CPU_PLACEMENTS,
    Program,
    assert_bitwise,
    compare,
    differences,
    flat,
    plain_run,
    plan_for,
    run_memopt,
    same_bits,
    spill_directory,
)
from _models import ids, lora, model_program
from _traces import Traces
from _traps import TRAPS, NativeDropout, Net, RunningScale, batch, simple_step
from torch import nn

import memopt

PLANS = ("recompute", "kept", "ssd")
LLAMA = model_program("llama", dropout=True)
DROPOUT = functools.partial(Net, NativeDropout)
DROPPING = Program(build=DROPOUT, step=simple_step, regions=["layers"])


def started(model, path, optimizer=None, **options):
    """A context on `model` with SSD space at `path`."""
    options.setdefault("budget", memopt.Budget(ssd=f"{path}:64MiB"))
    return memopt.optimize(model, optimizer, **options)


# ------------------------------------------------------------------------------------------------------- the forms
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", ["with", "decorator", "start"])
def test_the_three_forms(form, plan):
    """`with`, a decorated function (called twice), and start/stop leave the same bits."""
    results = []
    for guarded in (False, True):
        torch.manual_seed(0)
        model = LLAMA.build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)

        def loop(model=model, optimizer=optimizer):
            losses = []
            for i in range(2):
                losses.append(LLAMA.step(model, i).detach())
                optimizer.step()
                optimizer.zero_grad()
            return losses

        with spill_directory() as path:
            context = (
                started(model, path, optimizer, plan=plan_for(LLAMA, plan))
                if guarded
                else contextlib.nullcontext()
            )
            if not guarded:
                losses = loop() + loop()
            elif form == "with":
                with context:
                    losses = loop() + loop()
            elif form == "decorator":
                decorated = context(loop)
                losses = decorated() + decorated()
            else:
                run = memopt.start(
                    model,
                    optimizer,
                    plan=plan_for(LLAMA, plan),
                    budget=memopt.Budget(ssd=f"{path}:64MiB"),
                )
                losses = loop() + loop()
                run.stop()
                run.stop()  # twice is harmless
        results.append(flat([losses, dict(model.named_parameters())]))
    assert not differences(*results)


@pytest.mark.parametrize("plan", PLANS)
def test_without_an_optimizer(plan):
    """A step then ends at the next forward after a backward; updates are made by hand."""

    def step(model, i):
        loss = LLAMA.step(model, i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * parameter.grad)
        return loss

    program = Program(build=LLAMA.build, step=step, num_steps=4, lr=0.0)
    import memopt as package

    torch.manual_seed(0)
    from _bitwise import train

    with spill_directory() as path:
        record = train(
            program,
            lambda model, optimizer: package.optimize(
                model, plan=plan_for(LLAMA, plan), budget=package.Budget(ssd=f"{path}:64MiB")
            ),
        )
        compare(plain_run(program), record)
        assert record.run.trace is not None
        placements = {op.placement for region in record.run.plan.regions for op in region.ops}
        assert {"kept": "device", "ssd": "ssd"}.get(plan) in placements or plan == "recompute"


# ----------------------------------------------------------------------------------------- copies, files, evaluation
@pytest.mark.parametrize("placement", PLANS)
def test_state_dict_and_loading_in_the_loop(placement):
    def step(model, i):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        loss = LLAMA.step(model, i)
        model.load_state_dict(state)
        return loss, state.keys() == model.state_dict().keys()

    assert_bitwise(Program(build=LLAMA.build, step=step), placement)


@pytest.mark.parametrize("placement", CPU_PLACEMENTS)
def test_evaluation_and_generation_in_the_loop(placement):
    """no_grad and inference_mode forwards, and `generate`, before, between and after the micro-batches."""

    def step(model, i):
        model.eval()
        with torch.no_grad():
            before = model(input_ids=ids(i + 40)).logits
        model.train()
        first = LLAMA.step(model, i)
        model.eval()
        with torch.inference_mode():
            between = model(input_ids=ids(i + 41)).logits.sum().item()
        text = model.generate(
            ids(i, rows=1, tokens=5),
            max_new_tokens=4,
            do_sample=True,
            eos_token_id=95,
            pad_token_id=0,
        )
        model.train()
        second = LLAMA.step(model, i + 7)
        with torch.no_grad():  # in training mode: dropout draws
            after = model(input_ids=ids(i + 42)).logits
        return before, first, between, text, second, after

    assert_bitwise(Program(build=LLAMA.build, step=step), placement)


@pytest.mark.parametrize("placement", CPU_PLACEMENTS)
def test_evaluation_between_forward_and_backward(placement):
    def step(model, i):
        batch_ids = ids(i)
        loss = model(input_ids=batch_ids, labels=batch_ids).loss
        with torch.no_grad():
            validation = model(input_ids=ids(i + 9)).logits
        loss.backward()
        return loss, validation

    assert_bitwise(Program(build=LLAMA.build, step=step), placement)


# --------------------------------------------------------------------------------------------- forwards and backwards
@pytest.mark.parametrize("placement", CPU_PLACEMENTS)
def test_forward_without_backward(placement):
    """Losses that are dropped, kept for logging, or detached, then a normal step."""
    kept = []

    def step(model, i):
        dropped = model(batch(i + 5)).square().mean()
        kept.append(model(batch(i + 6)).square().mean())  # its graph lives on across steps
        value = dropped.item()
        del dropped
        loss = model(batch(i)).square().mean()
        loss.backward()
        if i == 2:
            kept.clear()
        return loss, value

    assert_bitwise(Program(build=DROPOUT, step=step, regions=["layers"], num_steps=4), placement)


@pytest.mark.parametrize("placement", CPU_PLACEMENTS)
def test_two_forwards_before_one_backward(placement):
    def step(model, i):
        loss = (model(batch(i)) * model(batch(i + 3))).square().mean()
        loss.backward()
        return loss

    for block in (NativeDropout, RunningScale):
        assert_bitwise(
            Program(build=functools.partial(Net, block), step=step, regions=["layers"]), placement
        )


@pytest.mark.parametrize("placement", CPU_PLACEMENTS)
def test_backward_of_an_earlier_step_after_the_optimizer(placement):
    """The second loss of a step is run backward after the update of frozen-input weights would be illegal; use a
    graph whose regions the optimizer does not touch."""

    def build():
        net = DROPOUT()
        net.layers.requires_grad_(False)
        return net

    old = []

    def step(model, i):
        x = batch(i).requires_grad_()
        h = x
        for layer in model.layers:
            h = layer(h)
        if i > 0:
            old.pop().square().mean().backward()
        old.append(h)
        loss = model(batch(i)).square().mean()
        loss.backward()
        return loss, x.grad

    program = Program(build=build, step=step, regions=["layers"])
    plain_run(program)
    old.clear()
    assert_bitwise(program, placement) if not placement.startswith("mix") else None
    old.clear()


@pytest.mark.parametrize("placement", CPU_PLACEMENTS)
def test_frozen_lora_and_tied(placement):
    """Frozen embeddings, LoRA adapters switched off for one forward (a reference model), tied head."""

    def step(model, i):
        tokens = ids(i)
        with model.disable_adapter(), torch.no_grad():
            reference = model(input_ids=tokens).logits
        loss = (model(input_ids=tokens).logits - reference).square().mean()
        loss.backward()
        return loss

    assert_bitwise(Program(build=functools.partial(lora, 0.1), step=step), placement)


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
def test_parameters_frozen_and_thawed_in_the_loop(placement):
    def step(model, i):
        model.layers[1].requires_grad_(i % 2 == 0)
        loss = model(batch(i)).square().mean()
        loss.backward()
        return loss

    assert_bitwise(Program(build=DROPOUT, step=step, regions=["layers"], num_steps=4), placement)


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
def test_only_the_input_needs_gradients(placement):
    """Adversarial examples, saliency: every parameter is frozen, the input is not."""

    def step(model, i):
        model.requires_grad_(False)
        x = batch(i).requires_grad_()
        loss = model(x).square().mean()
        loss.backward()
        model.requires_grad_(True)
        return loss, x.grad

    assert_bitwise(Program(build=DROPOUT, step=step, regions=["layers"]), placement)


@pytest.mark.parametrize("placement", CPU_PLACEMENTS)
def test_switching_training_mode_in_the_loop(placement):
    """Gradients through evaluation mode (no dropout, running statistics) and through training mode."""

    def step(model, i):
        model.train(i % 2 == 0)
        loss = model_program("cnn", dropout=True).step(model, i)
        model.train()
        return loss

    program = Program(build=model_program("cnn", dropout=True).build, step=step, num_steps=4)
    assert_bitwise(program, placement)


# ------------------------------------------------------------------------------------------------- exceptions
class Interrupting(Net):
    """Raises at a chosen place: in a region's forward, outside, in recomputation."""

    where = ""
    calls = 0

    def forward(self, x):
        h = self.inp(x)
        for number, layer in enumerate(self.layers):
            h = layer(h)
            if Interrupting.where == "between" and number == 1:
                raise KeyboardInterrupt
        return self.out(h)


class Raises(NativeDropout):
    """Counts its calls in one step and raises at the chosen one."""

    at = -1
    calls = 0
    error: type[BaseException] = KeyboardInterrupt

    def forward(self, x):
        Raises.calls += 1
        h = torch.sin(self.a(x))
        if Raises.calls == Raises.at:
            raise Raises.error
        return super().forward(h)


RAISING = Program(
    build=functools.partial(Interrupting, Raises), step=simple_step, regions=["layers"]
)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("at", [2, 4, 5, 6])
def test_an_exception_in_any_phase_leaves_the_next_step_exact(at, error, plan):
    """Calls 1-3 are the forward, 4-6 the recomputations; step 1 is aborted there, later steps repeat the plain ones."""

    def step(model, i):
        Raises.calls, Raises.at, Raises.error = 0, -1, error
        if i in (1, 2):
            state = torch.get_rng_state()
            Raises.at = at if guarded else -1
            if guarded:
                with pytest.raises(error):
                    simple_step(model, i)
                Raises.calls, Raises.at = 0, -1
            model.zero_grad()
            torch.set_rng_state(state)
        return simple_step(model, i)

    program = Program(
        build=functools.partial(Net, Raises), step=step, regions=["layers"], num_steps=4
    )
    guarded = False
    plain = plain_run(program)
    guarded = True
    Raises.at = -1
    record = run_memopt(program, plan_for(RAISING, plan))
    compare(plain, record)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "phase", ["first step", "forward", "recomputation", "between", "hook", "optimizer"]
)
def test_an_exception_leaves_nothing_behind(phase, plan):
    """It leaves the `with` block; the model is as it was, and a new context works."""
    torch.manual_seed(0)
    model = Interrupting(Raises).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Raises.calls, Raises.at, Raises.error = 0, -1, KeyboardInterrupt
    Interrupting.where = ""
    plan = plan_for(RAISING, plan)
    traces = Traces(model)
    with (
        spill_directory() as path,
        pytest.raises(KeyboardInterrupt),
        started(model, path, optimizer, plan=plan, regions=["layers"]),
    ):
        for i in range(3):
            Raises.calls = 0
            late = i == 2 or phase == "first step"
            Raises.at = (
                {"first step": 5, "forward": 2, "recomputation": 5}.get(phase, -1) if late else -1
            )
            Interrupting.where = phase if late else ""
            loss = model(batch(i)).square().mean()
            if phase == "hook" and late:
                loss.register_hook(lambda grad: (_ for _ in ()).throw(KeyboardInterrupt))
            loss.backward()
            if phase == "optimizer" and late:
                raise KeyboardInterrupt
            optimizer.step()
            optimizer.zero_grad()
    Interrupting.where, Raises.at = "", -1
    model.zero_grad()
    del loss
    traces.check()
    Interrupting.where = ""
    with spill_directory() as path, started(model, path, plan=plan, regions=["layers"]):
        for i in range(2):
            Raises.calls = 0
            simple_step(model, i)


def test_an_error_of_the_user_keeps_its_type_and_message():
    model = model_program("llama").build().train()
    with pytest.raises(KeyError, match="my own"), memopt.optimize(model, plan="recompute"):
        raise KeyError("my own")
    with (
        pytest.raises((RuntimeError, ValueError, IndexError)) as caught,
        memopt.optimize(model, plan="recompute"),
    ):
        model(input_ids=torch.full((1, 4), 10_000))  # no such token
    assert "memopt" not in type(caught.value).__module__


# --------------------------------------------------------------------------------------------- leaving and re-entering
@pytest.mark.parametrize("plan", PLANS)
def test_leaving_restores_the_model_exactly(plan):
    model = LLAMA.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    traces = Traces(model, optimizer)
    with spill_directory() as path:
        with started(model, path, optimizer, plan=plan_for(LLAMA, plan)):
            for i in range(3):
                LLAMA.step(model, i)
                optimizer.step()
                optimizer.zero_grad()
        optimizer.zero_grad()
        traces.check()


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_leaving_early(num_steps, plan):
    """Before the first step, after the traced one, and with a forward that was never run backward."""
    model = DROPOUT().train()
    traces = Traces(model)
    with spill_directory() as path:
        with started(model, path, plan=plan_for(DROPPING, plan), regions=["layers"]) as run:
            for i in range(num_steps):
                simple_step(model, i)
            pending = model(batch(9))
            if num_steps == 1:
                del pending
        assert str(run.report())
        pending = None
        model.zero_grad()
        traces.check()


def test_a_second_context_on_the_same_model_is_refused():
    model = DROPOUT().train()
    run = memopt.start(model, plan="recompute", regions=["layers"])
    with pytest.raises(memopt.ConfigError, match="already"):
        memopt.start(model, plan="device", regions=["layers"])
    with pytest.raises(memopt.ConfigError, match="already"), memopt.optimize(model):
        pass
    with pytest.raises(memopt.ConfigError, match="already"):
        memopt.start(nn.Sequential(model, nn.Tanh()), plan="device")  # a model that contains it
    with pytest.raises(memopt.ConfigError, match="already"):
        memopt.start(model.layers[0], plan="device")  # a part of it
    simple_step(model, 0)  # the first still works
    run.stop()
    memopt.start(model, plan="device", regions=["layers"]).stop()


def test_two_models_at_once():
    """A student and a teacher in one loop, each under its own context."""

    def loop(guards):
        torch.manual_seed(0)
        student, teacher = DROPOUT().train(), DROPOUT().train()
        losses = []
        with contextlib.ExitStack() as stack:
            for guard, model in zip(guards, (student, teacher), strict=True):
                stack.enter_context(guard(model))
            for i in range(3):
                loss = (student(batch(i)) - teacher(batch(i))).square().mean()
                loss.backward()
                losses.append(loss.detach())
        return flat([losses, [p.grad for p in (*student.parameters(), *teacher.parameters())]])

    plain = loop([lambda m: contextlib.nullcontext()] * 2)
    with spill_directory() as path:
        both = loop(
            [
                lambda m: memopt.optimize(m, plan="device", regions=["layers"]),
                lambda m: started(m, path, plan="ssd", regions=["layers"]),
            ]
        )
    assert not differences(plain, both)


def test_start_in_one_thread_and_stop_in_another():
    torch.manual_seed(0)
    model = DROPOUT().train()
    traces = Traces(model)
    with spill_directory() as path:
        run = memopt.start(
            model, plan="ssd", regions=["layers"], budget=memopt.Budget(ssd=f"{path}:16MiB")
        )
        for i in range(2):
            simple_step(model, i)
        thread = threading.Thread(target=run.stop)
        thread.start()
        thread.join()
        del thread
        model.zero_grad()
        traces.check()


@pytest.mark.parametrize("plan", PLANS)
def test_the_session_does_not_keep_the_model_alive(plan):
    import weakref

    model = DROPOUT().train()
    with (
        spill_directory() as path,
        started(model, path, plan=plan_for(DROPPING, plan), regions=["layers"]),
    ):
        simple_step(model, 0)
        simple_step(model, 1)
    alive = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not [r for r in alive if r() is not None]


@pytest.mark.parametrize("placement", CPU_PLACEMENTS)
def test_200_steps_grow_nothing(placement):
    """Live tensors, files, threads, SSD bytes and Python objects of memopt are the same after 20 and after 200."""
    program = TRAPS["1-in-place"]
    plan = plan_for(program, placement)
    torch.manual_seed(0)
    model = program.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    levels = []
    with (
        spill_directory() as path,
        started(model, path, optimizer, plan=plan, regions=["layers"]) as run,
    ):
        for i in range(201):
            simple_step(model, i)
            optimizer.step()
            optimizer.zero_grad()
            if i in (20, 110, 200):
                levels.append((*Traces.figures(), run.report().to_dict()["measured"]["ssd_bytes"]))
    assert levels[0] == levels[1] == levels[2], levels


def test_losses_agree_when_everything_happens_at_once():
    """Accumulation, dropout, evaluation, a copy, a changed shape and a dropped forward in every step."""
    import copy

    def step(model, i):
        results = []
        for k in range(2):
            tokens = ids(i + k, rows=1 + (i + k) % 2, tokens=9 + 4 * ((i + k) % 3))
            loss = model(input_ids=tokens, labels=tokens).loss / 2
            loss.backward()
            results.append(loss)
        model(input_ids=ids(i))
        with torch.no_grad():
            results.append(copy.deepcopy(model).eval()(input_ids=ids(i)).logits)
        return results

    program = Program(build=LLAMA.build, step=step, num_steps=4)
    for placement in CPU_PLACEMENTS:
        record = assert_bitwise(program, placement)
        assert same_bits(
            record.steps[-1].outputs["out.0"], plain_run(program).steps[-1].outputs["out.0"]
        )
