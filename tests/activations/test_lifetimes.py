"""What people do inside and around a training loop: each leaves the bits of the plain loop, and nothing behind."""

from __future__ import annotations

import contextlib
import functools

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
    same_bits,
    some,
    spill_directory,
)
from _models import ids, lora, model_program
from _traps import NativeDropout, Net, RunningScale, batch, simple_step

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
        model = DROPOUT().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)

        def loop(model=model, optimizer=optimizer):
            losses = []
            for i in range(2):
                losses.append(simple_step(model, i)[0].detach())
                optimizer.step()
                optimizer.zero_grad()
            return losses

        with spill_directory() as path:
            context = (
                started(model, path, optimizer, plan=plan_for(DROPPING, plan), regions=["layers"])
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
                    plan=plan_for(DROPPING, plan),
                    regions=["layers"],
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


@pytest.mark.parametrize("placement", some("recompute", "ssd", "mix-0"))
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


@pytest.mark.parametrize("placement", some("recompute", "ssd", "mix-0"))
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
@pytest.mark.parametrize("placement", some("recompute", "ssd", "mix-0"))
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


@pytest.mark.parametrize("placement", some("recompute", "ssd", "mix-0"))
def test_two_forwards_before_one_backward(placement):
    def step(model, i):
        loss = (model(batch(i)) * model(batch(i + 3))).square().mean()
        loss.backward()
        return loss

    for block in (NativeDropout, RunningScale):
        assert_bitwise(
            Program(build=functools.partial(Net, block), step=step, regions=["layers"]), placement
        )


@pytest.mark.parametrize("placement", some("recompute", "ssd", "mix-0"))
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


@pytest.mark.parametrize("placement", some("recompute", "ssd", "mix-0"))
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


@pytest.mark.parametrize("placement", some("recompute", "ssd", "mix-0"))
def test_switching_training_mode_in_the_loop(placement):
    """Gradients through evaluation mode (no dropout, running statistics) and through training mode."""

    def step(model, i):
        model.train(i % 2 == 0)
        loss = model_program("cnn", dropout=True).step(model, i)
        model.train()
        return loss

    program = Program(build=model_program("cnn", dropout=True).build, step=step, num_steps=4)
    assert_bitwise(program, placement)


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
