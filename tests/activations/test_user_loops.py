"""Loops and models as users write them: libraries around the loop, odd tensors, settings that make no sense."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
from _bitwise import (
    assert_bitwise,
    differences,
    flat,
    notes_of,
)
from _models import ids, model_program
from _traps import ROWS, WIDTH, Block, NativeDropout, Net, Sines, batch, simple_step
from _user_program import EACH, program
from torch import Tensor, nn
from torch.nn import functional as F

import memopt


# ------------------------------------------------------------------------------------------------- arguments
@EACH
def test_lists_and_dicts_given_to_regions_are_the_callers_own(placement):
    """Regions append auxiliary losses and count in what the model gives them; copies of it got the additions."""

    class Collecting(Net):
        def forward(self, x: Tensor):
            h, losses, counts = self.inp(x), [], {"calls": 0}
            for layer in self.layers:
                h = layer(h, losses, counts=counts)
            return self.out(h), sum(losses), len(losses), counts["calls"]

    class Appends(Block):
        def forward(self, x: Tensor, losses: list, counts: dict) -> Tensor:
            h = torch.tanh(self.a(x))
            losses.append(h.square().mean())
            counts["calls"] += 1
            return x + self.b(h)

    def step(model, i):
        out, aux, num_losses, num_calls = model(batch(i))
        loss = out.square().mean() + 0.1 * aux
        loss.backward()
        return loss, num_losses, num_calls

    assert_bitwise(program(lambda: Collecting(Appends), step), placement)


class Complex(nn.Module):
    """Complex weights; its inputs carry conjugate and negative bits."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, dtype=torch.complex64)

    def forward(self, x: Tensor, imaginary: Tensor) -> Tensor:
        return torch.tanh(self.a(x).conj() * 0.5) + imaginary * x


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Complex() for _ in range(3)])

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h.conj(), h.conj().imag)
        return h.abs()


@EACH
def test_complex_inputs_with_conjugate_bits(placement):
    def step(model, i):
        loss = model(torch.complex(batch(i), batch(i + 9))).square().mean()
        loss.backward()
        return loss

    assert_bitwise(program(ComplexNet, step), placement)


@EACH
@pytest.mark.parametrize("kind", ["empty", "sparse", "nested", "int8"])
def test_odd_tensors(kind, placement):
    class Odd(Block):
        def __init__(self) -> None:
            super().__init__()
            values = torch.randint(-127, 127, (WIDTH, WIDTH), dtype=torch.int8)
            self.register_buffer("q", values)

        def forward(self, x: Tensor, *more: Tensor) -> Tensor:
            h = self.b(torch.tanh(self.a(x)))
            if kind == "int8":
                h = h @ (self.q.to(h.dtype) / 127)
            return x + (torch.sparse.mm(more[0], h) if kind == "sparse" else h)

    class OddNet(Net):
        def forward(self, x: Tensor) -> Tensor:
            h, more = self.inp(x), ()
            if kind == "nested":
                h = torch.nested.nested_tensor_from_jagged(h, torch.tensor([0, 3, ROWS]))
            if kind == "sparse":
                more = (torch.eye(ROWS).to_sparse(),)
            for layer in self.layers:
                h = layer(h, *more)
            return self.out(h.values() if kind == "nested" else h)

    def step(model, i):
        loss = model(batch(i)[: 0 if kind == "empty" and i % 2 else ROWS]).square().sum()
        loss.backward()
        return loss

    if kind == "nested" and placement.startswith("mix"):
        pytest.skip("nothing of a nested tensor may be placed")
    assert_bitwise(program(lambda: OddNet(Odd), step, num_steps=4), placement)


def test_forward_mode_differentiation_runs_plainly():
    """Tangents may be tensors without memory: looking at one's bytes ended the process."""
    from torch.autograd import forward_ad

    def step(model, i):
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(batch(i), batch(i + 50)))
            value, tangent = forward_ad.unpack_dual(out)
        loss = model(batch(i + 1)).square().mean()
        loss.backward()
        return value, tangent, loss

    assert_bitwise(program(Sines, step), "recompute")


# ----------------------------------------------------------------------------------------------- whole loops
def _logps(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    return torch.gather(logits, 2, tokens[:, 1:, None]).squeeze(-1)


@EACH
def test_a_policy_against_a_reference_model(placement):
    """GRPO's shape: sample, old log-probabilities, two updates on one batch, clipped gradients."""
    torch.manual_seed(3)
    reference = model_program("llama").build().eval()

    def step(model, i):
        tokens = ids(i)
        model.eval()
        with torch.no_grad():
            options = {"do_sample": True, "eos_token_id": 95, "pad_token_id": 0}
            text = model.generate(tokens[:1, :4], max_new_tokens=3, **options)
            old, kept = _logps(model, tokens), _logps(reference, tokens)
        model.train()
        losses = []
        for _ in range(2):
            new = _logps(model, tokens)
            ratio, gap = (new - old).exp(), kept - new
            clipped = torch.min(ratio, ratio.clamp(0.8, 1.2))
            loss = (0.04 * (gap.exp() - gap - 1) - clipped).mean() / 2
            loss.backward()
            losses.append(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return losses, text

    assert_bitwise(program(model_program("llama", dropout=True).build, step, None), placement)


@EACH
def test_two_towers_called_by_the_loop(placement):
    """Contrastive training with a cache of gradients: towers are called alone, several times, in and out of no_grad."""

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = Net(NativeDropout), Net(Sines)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.text(a) @ self.image(b).t()

    def step(model, i):
        whole = F.cross_entropy(model(batch(i), batch(i + 5)), torch.arange(ROWS))
        whole.backward()
        with torch.no_grad():
            cached = [model.text(batch(i + k)) for k in range(2)]
        for tensor in cached:
            tensor.requires_grad_()
        torch.cat(cached).square().mean().backward()
        for k in range(2):
            (model.text(batch(i + k)) * cached[k].grad).sum().backward()
        both = (model.text(batch(i)) * model.text(batch(i + 1))).sum() + model.image(batch(i)).sum()
        both.backward()
        return whole, both

    assert_bitwise(program(Clip, step, ["text.layers", "image.layers"]), placement)


@EACH
def test_hidden_states_and_attentions_as_outputs(placement):
    def build():
        model = model_program("llama").build()
        model.set_attn_implementation("eager")
        return model

    def step(model, i):
        tokens = ids(i)
        out = model(
            input_ids=tokens, labels=tokens, output_hidden_states=True, output_attentions=True
        )
        loss = out.loss + sum(h.square().mean() for h in (*out.hidden_states, *out.attentions))
        loss.backward()
        return loss, out.hidden_states, out.attentions

    assert_bitwise(program(build, step, None), placement)


def test_checkpointing_switched_on_inside_the_context_is_taken_over():
    """Trainers do so; regions would be recomputed twice."""

    def step(model, i):
        if i == 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.gradient_checkpointing_enable()
        tokens = ids(i)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    record = assert_bitwise(
        program(model_program("llama", dropout=True).build, step, None), "recompute"
    )
    assert "gradient checkpointing was on" in notes_of(record.run)
    assert record.model.model.gradient_checkpointing, "left off after the context"


def _accelerated(guarded: bool, inside: bool, precision: str):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = raw = model_program("llama", dropout=True).build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    if not inside:
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    context = memopt.optimize(model, optimizer, plan="recompute")
    with context if guarded else contextlib.nullcontext() as run:
        if inside:
            model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        for i in range(6):
            with accelerator.accumulate(model):
                loss = model(input_ids=ids(i), labels=ids(i)).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    if guarded:
        assert run.report().num_steps == 3
        assert run.trace.num_micro_batches == 2
        engine = run._engine
        before = dict(engine._op_lists)
        model(input_ids=ids(0), labels=ids(0)).loss.backward()
        assert engine._op_lists == before, "the closed session is still called"
        raw.zero_grad()
    return flat(dict(raw.named_parameters()))


@pytest.mark.parametrize(("inside", "precision"), [(False, "no"), (True, "bf16")])
def test_accelerate(inside, precision):
    """`prepare` before the context wraps the optimizer; inside, it wraps the patched forward for good."""
    found = _accelerated(True, inside, precision)
    assert not differences(_accelerated(False, inside, precision), found)


# ------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("optimizer", [[1, 2], "adam", object()])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(memopt.ConfigError, match=r"not a torch\.optim\.Optimizer"):
        memopt.start(Net(Sines), optimizer)


def test_an_optimizer_that_never_steps_is_told():
    model = Net(Sines)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memopt.optimize(model, optimizer, plan="recompute", regions=["layers"]) as run:
        for i in range(3):
            simple_step(model, i)
    assert "was never called inside the context" in notes_of(run)


def test_a_step_that_does_not_end_warns_while_it_runs(monkeypatch):
    import memopt._takeover as takeover

    monkeypatch.setattr(takeover, "_MANY_ROOTS", 4)
    model = Net(Sines)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memopt.optimize(model, optimizer, plan="recompute", regions=["layers"]):
        for i in range(3):
            simple_step(model, i)
        with pytest.warns(UserWarning, match="no step\\(\\) of the given optimizer"):
            simple_step(model, 3)


def test_regions_called_alone_are_not_numbered_for_ever():
    """Without `optimizer.step()` nothing else starts the numbers anew: a list per call was kept."""
    model = Net(Sines)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memopt.optimize(model, optimizer, plan="recompute", regions=["layers"]) as run:
        for i in range(20):
            h = batch(i)
            for layer in model.layers:
                h = layer(h)
            if i % 2:
                h.sum().backward()
            del h
        assert len(run._engine._op_lists) == 3


@pytest.mark.parametrize("spec", [42, lambda module: True])
def test_regions_that_make_no_sense_are_refused(spec):
    with pytest.raises(memopt.ConfigError, match=r"name.* module"):
        memopt.start(Net(Sines), regions=spec)


# ------------------------------------------------------------------------------------------------ copies of a moment
@EACH
@pytest.mark.parametrize("kind", ["copy", "replica"])
def test_shallow_copies_compute_with_their_own_weights(kind, placement):
    """Without it: the copy's output was that of the module which it was made from."""

    def step(model, i):
        first, second = model.layers[0], model.layers[1]
        twin = copy.copy(first) if kind == "copy" else first._replicate_for_data_parallel()
        twin._modules = {**first._modules, "a": second.a}
        with torch.no_grad():
            evaluated = twin(batch(i))
        hook = twin.register_forward_hook(lambda *_: None)  # another way through Module.__call__
        outputs = [model(batch(i)), twin(batch(i)), twin(h=batch(i)), evaluated]
        hook.remove()
        sum(o.square().mean() for o in outputs).backward()
        return outputs

    class Named(Sines):
        def forward(self, h: Tensor) -> Tensor:
            return super().forward(h)

    assert_bitwise(program(Named, step), placement)


class Result:
    """What a model may return."""

    def __init__(self, loss: Tensor) -> None:
        self.inner = SimpleNamespace(loss=loss)


@dataclasses.dataclass
class Output:
    """The same, as a dataclass."""

    inner: object


class Returning(Net):
    """Returns its loss in an object that is no container, or leaves it in an attribute."""

    kind = ""

    def forward(self, x: Tensor) -> object:
        loss = super().forward(x).square().mean()
        if self.kind == "attribute":
            self.inner = SimpleNamespace(loss=loss)
            return None
        return Output(inner=Result(loss).inner) if self.kind == "dataclass" else Result(loss)


@pytest.mark.parametrize(
    ("kind", "given"),
    [("dataclass", True), ("object", False), ("dataclass", False), ("attribute", True)],
)
def test_steps_of_a_model_that_returns_an_object_are_counted(kind, given):
    """Where nothing had to be placed, the report told of one step whatever the loop did."""
    torch.manual_seed(0)
    model = Returning(Sines)
    model.kind = kind
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memopt.optimize(model, optimizer if given else None) as run:
        for i in range(5):
            returned = model(batch(i)) or model
            returned.inner.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert run.report().num_steps == 5


@EACH
def test_accelerates_unwrap_model_in_the_loop(placement):
    """With keep_fp32_wrapper=False it calls the root's forward with the model as first argument."""
    accelerate = pytest.importorskip("accelerate")

    def step(model, i):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare_model(model)
        loss = prepared(batch(i)).square().mean()
        accelerator.backward(loss)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        with torch.no_grad():
            return loss, unwrapped(batch(i + 1))

    assert_bitwise(program(Sines, step), placement)
