"""Regions that do legal but unusual things: layouts, complex numbers, odd outputs, functions of one's own, nesting."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from _bitwise import (
    SWEEPS,
    Program,
    assert_bitwise,
    assert_bitwise_for_single_ops,
    assert_bitwise_or_refused,
    plain_run,
    some,
)
from _models import model_program
from _traps import ROWS, WIDTH, Block, Net, Sines, batch, simple_step
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memopt


class Layouts(Block):
    """Permuted, channels-last, offset, expanded and flipped tensors, in reductions whose bits depend on strides."""

    def forward(self, x):
        h = self.a(x).view(2, 4, 3, 4).contiguous(memory_format=torch.channels_last)
        h = torch.tanh(h) * torch.linspace(0.5, 1.5, 4)
        k = torch.sin(h.permute(3, 1, 0, 2)).sum(dim=(0, 2)) + h.flip(1).cumsum(1).mean(dim=(0, 3))
        part = torch.cos(self.b(x)[1:, 2:])  # not dense: a window of a larger storage is its input
        wide = torch.sigmoid(part.sum(0, keepdim=True).expand(ROWS, WIDTH - 2))
        return x + F.pad(wide, (1, 1)) * k.sum() + F.pad(part.t().contiguous().t(), (0, 2, 0, 1))


class Complex(Block):
    """Fourier transforms and lazy conjugation: a conjugate is a view with a flag, not other bytes."""

    def forward(self, x):
        h = torch.fft.rfft(self.a(x))
        k = torch.fft.fft(self.b(x).to(torch.complex64)).conj()
        k = torch.sin(k).conj() * torch.view_as_complex(torch.stack([x, -x], -1))
        back = torch.fft.irfft(h * h.conj(), n=WIDTH)
        return x + torch.tanh(back) + torch._neg_view(k.imag).sigmoid() + k.real.clone()


class OddOutputs(Block):
    """Returns its input, a view, an integer and a bool tensor, None, an empty tensor, one tensor twice, and a dict."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        index = h.argmax(-1)
        inner = {"mask": h > 0, "empty": h[:0], "again": h, "none": None}
        return self.b(h) + x, h[:, ::2], index, inner, x, h


class OddNet(Net):
    """Uses all of it."""

    def forward(self, x):
        h = self.inp(x)
        for layer in self.layers:
            g, view, index, inner, same, again = layer(h)
            assert inner["none"] is None
            assert same is h or torch.equal(same, h)
            scale = inner["mask"].float().mean() + inner["empty"].sum() + (inner["again"] is again)
            h = g * scale + F.pad(view, (0, WIDTH // 2)) + index[:, None] * 0.01 + again.sum() * 0.1
        return self.out(h)


class _Swish(torch.autograd.Function):
    """Saves an input, an intermediate and its output; asks which gradients are needed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, power: int) -> torch.Tensor:
        gate = torch.sigmoid(x * scale)
        out = x * gate**power
        ctx.save_for_backward(x, gate, out, scale)
        ctx.power = power
        ctx.extra = gate.cos()  # kept without save_for_backward: what PyTorch's hooks never see
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, out, scale = ctx.saved_tensors
        slope = (
            gate**ctx.power + x * ctx.power * gate ** (ctx.power - 1) * gate * (1 - gate) * scale
        )
        other = (grad * out * ctx.extra).sum(0) if ctx.needs_input_grad[1] else None
        return grad * slope, other, None


class OwnFunction(Block):
    """An autograd function that hides one tensor from the saved-tensor hooks."""

    def forward(self, x):
        return x + self.b(_Swish.apply(self.a(x), self.b.bias, 2))


class Vmapped(Block):
    """functorch transforms inside a region."""

    def forward(self, x):
        h = torch.vmap(lambda row: torch.sin(row) * row.sum())(self.a(x))
        k = torch.vmap(lambda row, shift: F.softmax(row + shift, -1), in_dims=(0, None))(
            x, self.b.bias
        )
        return x + self.b(h) + k


class FuncGrad(Block):
    """torch.func.grad, which PyTorch refuses under saved-tensor hooks, so under any checkpoint."""

    def forward(self, x):
        slopes = torch.vmap(torch.func.grad(lambda row: (torch.tanh(row) ** 2).sum()))(x)
        return x + self.b(self.a(slopes))


class ChecksItself(Block):
    """Checkpoints a part of itself, in both of PyTorch's ways."""

    reentrant = False

    def forward(self, x):
        def part(t):
            h, _ = torch.native_dropout(torch.tanh(self.a(t)), 0.2, True)
            return torch.sin(h)

        return x + self.b(checkpoint(part, x, use_reentrant=self.reentrant))


class ChecksItselfReentrant(ChecksItself):
    """The old way."""

    reentrant = True


class PartlyFrozen(Block):
    """Detached branches, no_grad and inference blocks, a parameter that takes no gradient."""

    def forward(self, x):
        with torch.no_grad():
            target = torch.tanh(self.a(x))
        h = self.b(torch.sin(target * self.a.weight.detach().sum()))
        return x + h * target + F.dropout(torch.cos(self.b(x.detach())), 0.3)


class ListOps(Block):
    """Ops over lists of tensors, ops with many outputs, unbind, chunk, stack, einsum, layer and group norms."""

    def forward(self, x):
        parts = [torch.sin(p) for p in self.a(x).chunk(3, dim=-1)]
        stacked = torch.stack([p.cumsum(0) for p in parts]).unbind(1)
        h = torch.cat([s.flatten() for s in stacked]).view(ROWS, WIDTH)
        h = F.layer_norm(h, (WIDTH,)) + F.group_norm(h[..., None], 3)[..., 0]
        values, order = torch.sort(h, dim=-1)
        std, mean = torch.std_mean(values, dim=0)
        return (
            x
            + self.b(torch.einsum("ij,kj->ik", values, h)[:, :ROWS] @ h) * std
            + mean
            + order * 0.01
        )


BLOCKS = {
    "layouts": Layouts,
    "complex": Complex,
    "own-function": OwnFunction,
    "vmap": Vmapped,
    "checks-itself": ChecksItself,
    "checks-itself-reentrant": ChecksItselfReentrant,
    "partly-frozen": PartlyFrozen,
    "list-ops": ListOps,
}
PROGRAMS = {
    name: Program(build=functools.partial(Net, block), step=simple_step, regions=["layers"])
    for name, block in BLOCKS.items()
}
PROGRAMS["odd-outputs"] = Program(
    build=functools.partial(OddNet, OddOutputs), step=simple_step, regions=["layers"]
)


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("name", PROGRAMS)
def test_unusual_regions_are_exact(name, placement):
    assert_bitwise(PROGRAMS[name], placement)


@pytest.mark.parametrize("limit", SWEEPS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_unusual_regions_are_exact_whichever_op_is_kept(name, limit):
    assert_bitwise_for_single_ops(PROGRAMS[name], limit=limit)


def test_func_grad_is_exact_or_refused_by_pytorch_itself():
    """The message is PyTorch's; leaving the region out is the remedy, and the model is whole."""
    program = Program(build=functools.partial(Net, FuncGrad), step=simple_step, regions=["layers"])
    plain_run(program)
    model = program.build()
    with (
        pytest.raises(RuntimeError, match="saved tensor hooks"),
        memopt.optimize(model, plan="recompute", regions=["layers"]),
    ):
        simple_step(model, 0)
    assert all("forward" not in vars(m) for m in model.modules())
    simple_step(model, 0)


# -------------------------------------------------------------------------------------------- unusual inputs of regions
class InputNet(Net):
    """Hands its blocks inputs of another layout: transposed, sliced, expanded, offset."""

    way = "transposed"

    def forward(self, x):
        h = self.inp(x)
        for layer in self.layers:
            if self.way == "transposed":
                h = h.t().contiguous().t()
            elif self.way == "sliced":
                h = torch.cat([h, h], dim=1)[:, WIDTH // 2 : WIDTH // 2 + WIDTH]
            elif self.way == "expanded":
                h = h + h.mean(0, keepdim=True).expand(ROWS, WIDTH)
                h = h.sum(0, keepdim=True).expand(ROWS, WIDTH)
            else:
                h = torch.cat([h, h])[1 : ROWS + 1]
            h = layer(h)
        return self.out(h)


class SumsInput(Block):
    """Reductions whose bits depend on the order of the input's memory."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) + x.sum(0) * 0.1 + x.softmax(-1).mean(1, keepdim=True)


def input_program(way):
    """The program of one kind of input."""

    def build():
        net = InputNet(SumsInput)
        net.way = way
        return net

    return Program(build=build, step=simple_step, regions=["layers"])


INPUTS = {way: input_program(way) for way in ("transposed", "sliced", "expanded", "offset")}


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("way", INPUTS)
def test_inputs_of_any_layout(way, placement):
    assert_bitwise(INPUTS[way], placement)


# ---------------------------------------------------------------------------------------------- unusual training loops
def _in_backward_step(model, i):
    """The optimizer in the backward: each weight is updated as soon as its gradient is complete."""
    handles = []
    for parameter in model.parameters():

        def update(p):
            with torch.no_grad():
                p.sub_(0.01 * p.grad)
            p.grad = None

        handles.append(parameter.register_post_accumulate_grad_hook(update))
    loss = model(batch(i)).square().mean()
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss, [p.detach().clone() for p in model.parameters()]


def _anomaly_step(model, i):
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        return simple_step(model, i)


def _accumulate_into_zeros_step(model, i):
    """Gradients exist before and are zeroed in place, and the loss is scaled as a GradScaler does."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = model(batch(i)).square().mean()
    (loss * 1024.0).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
    return loss


def _inputs_argument_step(model, i):
    """backward(inputs=...) for some weights first, then for others, through one graph."""
    loss = model(batch(i)).square().mean()
    loss.backward(inputs=[model.layers[2].a.weight, model.inp.weight], retain_graph=True)
    loss.backward(inputs=[p for n, p in model.named_parameters() if "bias" in n])
    return loss


def _two_losses_step(model, i):
    """Two losses that share the first regions only; the first backward stops in the middle of the graph."""
    h = model.inp(batch(i))
    for layer in model.layers[:2]:
        h = layer(h)
    early = h.square().mean()
    late = model.out(model.layers[2](h)).square().mean()
    early.backward(retain_graph=True)
    late.backward()
    return early, late


LOOPS = {
    "in-backward": _in_backward_step,
    "anomaly": _anomaly_step,
    "accumulate": _accumulate_into_zeros_step,
    "inputs": _inputs_argument_step,
    "two-losses": _two_losses_step,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("name", LOOPS)
def test_unusual_loops(name, placement):
    whole = Program(build=functools.partial(Net, Sines), step=simple_step, regions=["layers"])
    program = dataclasses.replace(whole, step=LOOPS[name])
    if name == "two-losses" and placement.startswith("mix"):
        # the regions are called outside the root's forward: there is no first step to trace, so no plan to draw from
        pytest.skip("a mix needs a trace of root forwards")
    if name == "two-losses":
        assert_bitwise_or_refused(program, {"kept": "device"}.get(placement, placement))
        return
    assert_bitwise(program, placement)


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_a_weight_shared_by_all_regions(placement):
    """The order in which a shared weight's gradients are summed is the plain one."""

    def build():
        net = Net(Sines, 4)
        for layer in net.layers[1:]:
            layer.a = net.layers[0].a
        net.out.weight = nn.Parameter(net.layers[0].b.weight.detach()[:2].clone())
        return net

    assert_bitwise(Program(build=build, step=simple_step, regions=["layers"]), placement)


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
def test_regions_within_regions(placement):
    """A block and a part of it are both named: the outer one is the region, or it is refused."""
    base = model_program("llama", dropout=True)
    program = Program(
        build=base.build, step=base.step, regions=["model.layers", "model.layers.1.mlp"]
    )
    assert_bitwise_or_refused(program, placement)


def test_the_root_itself_as_a_region():
    base = model_program("llama")
    program = Program(build=base.build, step=base.step, regions=lambda name, module: name == "")
    plain_run(program)
    for placement in ("recompute", "ssd"):
        try:
            assert_bitwise_or_refused(program, placement)
        except ValueError as error:
            assert "region" in str(error)  # noqa: PT017 -- refusing is one of two right ways


def test_a_model_without_regions_is_exact_and_noted():
    def build():
        return nn.Bilinear(WIDTH, WIDTH, 2)

    def step(model, i):
        loss = model(batch(i), batch(i + 1)).square().mean()
        loss.backward()
        return loss

    from _bitwise import compare, notes_of, run_memopt

    program = Program(build=build, step=step)
    for plan in ("recompute", "ssd", "auto"):
        record = run_memopt(program, plan)
        compare(plain_run(program), record)
        assert "no region" in notes_of(record.run)


def test_subclassed_weights():
    """Weights that are tensor subclasses (two tensors in one) pass through the modes."""
    from torch.testing._internal.two_tensor import TwoTensor

    def build():
        net = Net(Sines)
        for layer in net.layers:
            weight = layer.a.weight.detach()
            layer.a.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
        return net

    def step(model, i):
        out = model(batch(i))
        loss = out.square().mean()
        loss = loss.a if isinstance(loss, TwoTensor) else loss
        loss.sum().backward()
        return [p.grad.a if isinstance(p.grad, TwoTensor) else p.grad for p in model.parameters()]

    def run(guard):
        torch.manual_seed(0)
        model = build()
        results = []
        with guard(model):
            for i in range(3):
                results.append([g.clone() for g in step(model, i)])
                model.zero_grad()
        return results

    import contextlib

    try:
        plain = run(lambda model: contextlib.nullcontext())
    except (RuntimeError, TypeError, AttributeError) as error:
        pytest.skip(f"PyTorch itself cannot: {error}")
    for plan in ("recompute", "device"):
        ours = run(lambda model, plan=plan: memopt.optimize(model, plan=plan, regions=["layers"]))
        assert all(
            torch.equal(a, b)
            for p, o in zip(plain, ours, strict=True)
            for a, b in zip(p, o, strict=True)
        )
