"""What a region reads beside arguments, weights and buffers changes between its forward and its backward."""

from __future__ import annotations

import functools
import gc
import random

import numpy as np
import pytest
import torch
from _bitwise import (
    assert_bitwise,
    run_memopt,
)
from _models import ids, lora, model_program
from _traps import WIDTH, Block, Net, Sines, batch
from _user_program import EACH, program
from torch import Tensor, nn

import memopt


# ------------------------------------------------------------------------------------- attributes of modules
class Scaled(Block):
    """Reads a number that a schedule sets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.mask = torch.ones(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x) * self.scale * self.mask))


@EACH
def test_state_set_by_the_loop(placement):
    """Without it: 13 of 16 gradients of the first loss taken at the second loss's scale, silently."""

    def step(model, i):
        losses = []
        for k in (2.0, 3.0):
            for layer in model.layers:
                layer.scale, layer.mask = k, torch.full((WIDTH,), 0.5 * k)
            losses.append(model(batch(i)).square().mean())
        sum(losses).backward()
        return losses

    assert_bitwise(program(Scaled, step), placement)


class Bookkeeping(Block):
    """Counts calls, logs, collects auxiliary losses, keeps a running mean outside of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls, self.log, self.losses, self.aux = 0, [], {"aux": []}, None
        self.mean = torch.zeros(WIDTH)
        self.numpy, self.python = np.random.default_rng(0), random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        h = torch.tanh(self.a(x) * (self.numpy.uniform() + self.python.random()))
        self.log.append(self.num_calls)
        self.losses["aux"].append(h.square().mean())
        self.aux = h.abs().mean()
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return x + self.b(h) * (1 + self.mean) * (1 + 0.1 * self.num_calls)


@EACH
def test_state_kept_by_the_block_itself(placement):
    """Side effects happen once, and the recomputation starts from the state before them."""

    def step(model, i):
        loss = model(batch(i)).square().mean() + model(batch(i + 9)).square().mean()
        for layer in model.layers:
            loss = loss + 0.1 * layer.aux + 0.1 * sum(layer.losses["aux"])
        loss.backward()
        state = [(x.num_calls, list(x.log), x.mean, x.aux) for x in model.layers]
        state.append([len(x.losses["aux"]) for x in model.layers])
        state.append([x.python.random() + x.numpy.uniform() for x in model.layers])
        for layer in model.layers:
            layer.losses["aux"].clear()
        return loss, state

    assert_bitwise(program(Bookkeeping, step), placement)


class Recurrent(Block):
    """Carries its state, graph and all, from call to call in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.state = None

    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x) if self.state is None else self.state
        self.state = torch.tanh(self.a(x) + self.b(before))
        return self.state


@EACH
def test_state_with_a_graph_in_an_attribute(placement):
    def step(model, i):
        for layer in model.layers:
            layer.state = None
        loss = sum(model(batch(i + k)).square().mean() for k in range(3))
        loss.backward()
        return loss

    assert_bitwise(program(Recurrent, step), placement)


@EACH
@pytest.mark.parametrize("kind", ["batch-norm", "dropout"])
def test_state_training_flag(kind, placement):
    class Normed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH) if kind == "batch-norm" else nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.norm(torch.tanh(self.a(x))))

    def step(model, i):
        model.eval()
        first = model(batch(i)).square().mean()
        model.train()
        first.backward()
        second = model(batch(i + 3)).square().mean()
        model.eval()
        second.backward()
        model.train()
        return first, second

    assert_bitwise(program(Normed, step), placement)


@EACH
def test_state_hooks_that_are_removed_before_backward(placement):
    patched = batch(500)

    def step(model, i):
        handles = [
            model.layers[1].a.register_forward_hook(lambda *_: patched),
            model.layers[0].a.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,)),
        ]
        loss = model(batch(i)).square().mean()
        for handle in handles:
            handle.remove()
        loss.backward()
        return loss

    assert_bitwise(program(Sines, step), placement)


def test_a_hook_that_collects_keeps_no_graph_alive():
    """A removed hook whose list holds the outputs must not live in a frame that those outputs hold."""
    model = Net(Sines)
    with memopt.optimize(model, plan="recompute", regions=["layers"]) as run:
        for i in range(8):
            found = []
            hook = functools.partial(lambda out, module, args, output: out.append(output), found)
            handles = [layer.a.register_forward_hook(hook) for layer in model.layers]
            model(batch(i)).sum()
            for handle in handles:
                handle.remove()
            del hook, found
            gc.collect()
            assert len(run._engine._live) == 0, "frames of dropped graphs are alive"


@EACH
@pytest.mark.parametrize("what", ["switched", "disabled"])
def test_state_of_adapters(what, placement):
    """Two peft adapters (or one and none) before one backward: the recomputation uses the one that was active."""
    from peft import LoraConfig

    def build():
        model = lora(0.0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model.add_adapter("second", config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.requires_grad_(True)
        return model

    def step(model, i):
        tokens = ids(i)
        first = model(input_ids=tokens, labels=tokens).loss
        if what == "switched":
            model.set_adapter("second")
            second = model(input_ids=tokens, labels=tokens).loss
        else:
            with model.disable_adapter():
                second = model(input_ids=tokens, labels=tokens).loss
        (first + second).backward()
        model.set_adapter("default")
        return first, second

    assert_bitwise(program(build, step, None), placement)


@EACH
def test_state_requires_grad(placement):
    def step(model, i):
        model.layers[1].a.weight.requires_grad_(False)
        loss = model(batch(i)).square().mean()
        model.layers[1].a.weight.requires_grad_(True)
        loss.backward()
        return loss

    assert_bitwise(program(Sines, step), placement)


# -------------------------------------------------------------------------------------------- flags of PyTorch
@EACH
def test_state_attention_kernels_chosen_around_the_forward(placement):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def step(model, i):
        tokens = ids(i)
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    assert_bitwise(program(model_program("llama").build, step, None), placement)


class Parametrized(Block):
    """Weight norm and an orthogonal weight; one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.a)
        nn.utils.parametrizations.orthogonal(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x) * torch.full((WIDTH,), 1.5).to(x.dtype))) + self.a(x)


@EACH
def test_state_cached_parametrizations_and_default_dtype(placement):
    def step(model, i):
        first = model(batch(i)).square().mean()
        first.backward()
        x = batch(i)
        torch.set_default_dtype(torch.float64)
        try:
            with nn.utils.parametrize.cached():
                second = model(x).square().mean()
        finally:
            torch.set_default_dtype(torch.float32)
        second.backward()
        return first, second

    assert_bitwise(program(Parametrized, step), placement)


# ----------------------------------------------------------------- state outside of modules (test_put_back.py has more)
OUTSIDE: dict = {}


class ReadsGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x) * OUTSIDE["what"]))


def _changing(value, change):
    def step(model, i):
        OUTSIDE["what"] = value(2.0)
        loss = model(batch(i)).square().mean()
        change(value(5.0))
        loss.backward()
        return loss, OUTSIDE["what"]

    return program(ReadsGlobal, step)


@EACH
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_global_that_changed_before_backward(kind, placement):
    value = float if kind == "number" else lambda k: torch.full((WIDTH,), k)
    assert_bitwise(_changing(value, lambda new: OUTSIDE.update(what=new)), placement)


@EACH
def test_a_global_tensor_that_was_written_before_backward_is_refused(placement):
    def change(new):
        with torch.no_grad():
            OUTSIDE["what"].set_(new)  # no version that the multiplication would miss

    changed = _changing(lambda k: torch.full((WIDTH,), k), change)
    with pytest.raises((memopt.MemoptError, RuntimeError)):
        run_memopt(changed, placement if placement in ("recompute", "ssd") else "recompute")


class Context:
    number = 0


class Slots:
    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


class Numbered(Net):
    """Counts in an object that it gives to every block."""

    context: type = Context

    def forward(self, x: Tensor) -> Tensor:
        h, context = self.inp(x), self.context()
        for layer in self.layers:
            context.number += 1
            h = layer(h, context)
        return self.out(h)


class ReadsContext(Block):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x + self.b(torch.tanh(self.a(x) * context.number))


@EACH
def test_an_object_shared_by_the_calls(placement):
    assert_bitwise(program(lambda: Numbered(ReadsContext)), placement)


def test_what_cannot_be_put_back_is_refused_where_it_changed():
    """An object without a dictionary of attributes."""

    class WithSlots(Numbered):
        context = Slots

    with pytest.raises(memopt.MemoptError, match="changed between"):
        run_memopt(program(lambda: WithSlots(ReadsContext)), "recompute")
