"""Rules 2, 4 and 16: generators, autocast's cache, and op lists that change."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch
from _bitwise import (
    CPU_PLACEMENTS,
    SWEEPS,
    Program,
    assert_bitwise,
    assert_bitwise_for_single_ops,
    assert_bitwise_or_refused,
    compare,
    every_op_plan,
    notes_of,
    plain_run,
    plan_for,
    run_memopt,
    some,
    trace_of,
)
from _models import ids, mixtral, padding
from _traps import ROWS, TRAPS, WIDTH, Block, Net, OwnGenerator, batch, simple_step
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError

import memopt

RANDOM = [name for name in TRAPS if name[:2] in ("2-", "4-")]


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("name", RANDOM)
def test_random_and_autocast_are_exact(name, placement):
    assert_bitwise(TRAPS[name], placement)


@pytest.mark.parametrize("limit", SWEEPS)
@pytest.mark.parametrize("name", [n for n in RANDOM if n != "2-random-branch"])
def test_random_and_autocast_are_exact_whichever_op_is_kept(name, limit):
    assert_bitwise_for_single_ops(TRAPS[name], limit=limit)


# ------------------------------------------------------------------------------------------------------- rule 2
def test_random_ops_are_told_from_others():
    kinds = {
        op.op: (op.kind, op.placeable) for op in trace_of(TRAPS["2-native-dropout"]).regions[0].ops
    }
    dropout = [kind for op, (kind, _) in kinds.items() if "native_dropout" in op]
    assert dropout == ["random"]
    for region in trace_of(TRAPS["2-rand-like"]).regions:
        for op in region.ops:
            if op.kind in ("random", "factory"):
                assert not op.placeable and op.reason, op


@pytest.mark.parametrize("placement", ["device", "ssd"])
@pytest.mark.parametrize("name", [n for n in TRAPS if n[:2] in ("1-", "2-", "3-", "6-")])
def test_a_plan_that_names_every_op_is_exact_or_refused(name, placement):
    """A plan may be edited by hand: random ops, factories and unseen writers' targets are in it too."""
    program = TRAPS[name]
    try:
        record = run_memopt(program, every_op_plan(trace_of(program), placement), num_steps=2)
    except (memopt.MemoptError, memopt.ConfigError):
        return
    compare(plain_run(program), record, num_steps=2)


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_a_generator_of_the_model_itself_is_exact_or_refused(placement):
    """PyTorch's checkpoint restores the default generators only; drawing again here would be silently wrong."""
    program = Program(
        build=functools.partial(Net, OwnGenerator), step=simple_step, regions=["layers"]
    )
    assert_bitwise_or_refused(program, placement)


class PythonRandom(Block):
    """Scales by Python's own random numbers: same ops, other values when run again."""

    def forward(self, x):
        return x + random.random() * self.b(torch.tanh(self.a(x) * random.random()))


@pytest.mark.parametrize("placement", ["recompute", "kept", "mix-0"])
def test_python_random_is_exact_or_refused(placement):
    program = Program(
        build=functools.partial(Net, PythonRandom), step=simple_step, regions=["layers"]
    )
    assert_bitwise_or_refused(program, placement)


def test_the_generator_is_where_the_plain_loop_leaves_it_inside_the_step():
    """Random ops outside regions, after them, and between backward and the next forward see the plain stream."""

    def step(model, i):
        h = model(batch(i)) * torch.rand(ROWS, 2)
        loss = F.dropout(h, 0.5).square().mean()
        loss.backward()
        return loss, torch.rand(3)

    program = Program(build=TRAPS["2-native-dropout"].build, step=step, regions=["layers"])
    for placement in CPU_PLACEMENTS:
        assert_bitwise(program, placement)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["recompute", "kept", "host", "mix-0", "mix-1", "mix-2"])
def test_cuda_dropout_with_keyword_arguments_only(placement):
    """Rule 10 beside rule 2: a region called with keyword arguments only still gets its CUDA generator restored."""

    class Keyword(Block):
        def forward(self, *, h, scale):
            k = F.dropout(self.a(h), 0.3)
            return h + F.dropout(torch.tanh(self.b(k)), 0.3) * scale["by"]

    class KeywordNet(Net):
        def forward(self, x):
            h = self.inp(x)
            for layer in self.layers:
                h = layer(h=h, scale={"by": h.mean()})
            return self.out(h)

    def step(model, i):
        loss = model(batch(i).cuda()).square().mean()
        loss.backward()
        return loss

    program = Program(
        build=functools.partial(KeywordNet, Keyword), step=step, regions=["layers"], device="cuda"
    )
    assert_bitwise(program, placement)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["kept", "host"])
@pytest.mark.parametrize(
    "backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"]
)
def test_cuda_attention_with_dropout_advances_the_generator(backend, placement):
    """Attention answered from storage must leave the generator where running it would have."""

    class Attends(Block):
        def forward(self, x):
            q, k, v = (
                t.view(1, ROWS * 8, 2, 64).transpose(1, 2) for t in (self.a(x), self.b(x), x)
            )
            h = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True)
            return x + F.dropout(torch.tanh(h.transpose(1, 2).reshape(x.shape)), 0.3)

    def build():
        net = Net(Attends)
        for module in net.modules():
            if isinstance(module, Block):
                module.a, module.b = torch.nn.Linear(128, 128), torch.nn.Linear(128, 128)
        net.inp, net.out = torch.nn.Linear(128, 128), torch.nn.Linear(128, 2)
        return net.to(torch.bfloat16)

    def step(model, i):
        torch.use_deterministic_algorithms(True)
        try:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                loss = model(batch(i, ROWS * 8, 128).cuda().to(torch.bfloat16)).square().mean()
            loss.backward()
        finally:
            torch.use_deterministic_algorithms(False)
        return loss

    program = Program(build=build, step=step, regions=["layers"], device="cuda")
    try:
        plain = plain_run(program)
    except RuntimeError as error:
        pytest.skip(f"{backend} cannot run this: {error}")
    record = run_memopt(program, plan_for(program, placement))
    if backend != "CUDNN_ATTENTION":
        compare(plain, record)
    for p, o in zip(
        plain.steps[:1], record.steps[:1], strict=True
    ):  # forward is exact in every backend
        assert torch.equal(p.outputs["out"], o.outputs["out"])
        assert torch.equal(p.generator, o.generator)


# ------------------------------------------------------------------------------------------------------- rule 4
def _sine_step(model, i):
    SWITCH.kind = "sin"
    return simple_step(model, i)


class Switch:
    """State that memopt does not put back: it does not look behind `__slots__`."""

    __slots__ = ("kind",)


SWITCH = Switch()
SWITCH.kind = "sin"


class Toggled(Block):
    """Its op sequence depends on a switch that the user turns between forward and backward."""

    def forward(self, x):
        h = self.a(x)
        h = {"sin": torch.sin, "cos": torch.cos, "two": lambda t: torch.sin(torch.sin(t))}[
            SWITCH.kind
        ](h)
        return x + self.b(torch.tanh(h))


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
@pytest.mark.parametrize("later", ["cos", "two"])
def test_another_op_in_recomputation_is_named(later, placement):
    """Same shapes, same number of outputs: only the overload, or the number of ops, tells."""

    def step(model, i):
        SWITCH.kind = "sin"
        loss = model(batch(i)).square().mean()
        if i == 1:
            SWITCH.kind = later
        loss.backward()
        return loss

    program = Program(build=functools.partial(Net, Toggled), step=step, regions=["layers"])
    expected = (
        (memopt.RecomputeMismatchError,)
        if later == "cos"
        else (memopt.RecomputeMismatchError, CheckpointError)
    )
    plan = plan_for(dataclasses.replace(program, step=_sine_step), placement)
    with pytest.raises(expected) as caught:
        run_memopt(program, plan)
    if later == "cos":
        text = str(caught.value)
        assert "layers.2" in text, "the region is named"
        assert "sin" in text and "cos" in text, "both ops are named"
        assert any(c.isdigit() for c in text.replace("layers.2", "")), "the position is named"


def test_the_model_works_again_after_a_mismatch():
    def step(model, i):
        SWITCH.kind = "sin"
        loss = model(batch(i)).square().mean()
        if i == 1:
            SWITCH.kind = "cos"
            with pytest.raises(memopt.RecomputeMismatchError):
                loss.backward()
            SWITCH.kind = "sin"
            model.zero_grad()
            loss = model(batch(i)).square().mean()
        loss.backward()
        return loss

    def plain_step(model, i):
        SWITCH.kind = "sin"
        return simple_step(model, i)[0]

    build = functools.partial(Net, Toggled)
    plain = plain_run(Program(build=build, step=plain_step))
    program = Program(build=build, step=step, regions=["layers"])
    kept = plan_for(Program(build=build, step=plain_step, regions=["layers"]), "kept")
    compare(plain, run_memopt(program, kept))


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_autocast_without_its_cache(placement):
    def step(model, i):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = model(batch(i)).float().square().mean() + model(batch(i + 1)).float().mean()
        loss.backward()
        return loss

    program = Program(build=TRAPS["4-layer-twice"].build, step=step, regions=["layers"])
    assert_bitwise(program, placement)


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_autocast_switched_inside_a_region(placement):
    class Switches(Block):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                h = torch.sin(self.a(x.float()))
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                k = self.a(h)
            return x + self.b(k) + self.a(h).to(x.dtype)

    def step(model, i):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch(i)).float().square().mean()
        loss.backward()
        return loss

    assert_bitwise(
        Program(build=functools.partial(Net, Switches), step=step, regions=["layers"]), placement
    )


def test_a_region_called_twice_in_one_step():
    """One module, two calls: two regions `name` and `name#k`, each with its own storage."""

    class Recurrent(Net):
        def forward(self, x):
            h = self.inp(x)
            for layer in (*self.layers, *self.layers, self.layers[0]):
                h = layer(h)
            return self.out(h)

    program = Program(
        build=functools.partial(Recurrent, Block2), step=simple_step, regions=["layers"]
    )
    names = [region.name for region in trace_of(program).regions]
    assert len(names) == len(set(names)) == 7
    for placement in CPU_PLACEMENTS:
        assert_bitwise(program, placement)


class Block2(Block):
    """Dropout and two layers."""

    def forward(self, x):
        h, _ = torch.native_dropout(self.a(x), 0.2, True)
        return x + self.b(torch.tanh(h).view(ROWS, WIDTH))


# ------------------------------------------------------------------------------------------------------ rule 16
def _mixtral_step(model, i):
    losses = []
    for k in range(2):  # two micro-batches that route differently
        tokens = ids(10 * i + k)
        losses.append(model(input_ids=tokens, attention_mask=padding(i), labels=tokens).loss)
        losses[-1].backward()
    return losses


EAGER = Program(build=functools.partial(mixtral, 0.0, "eager"), step=_mixtral_step, num_steps=4)


@pytest.mark.parametrize("placement", some("kept", "ssd"))
def test_eager_experts_change_their_op_list_and_stay_exact(placement):
    assert_bitwise(EAGER, placement)


def test_eager_experts_really_change_their_op_list():
    """Without this the test above tests nothing."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        num_ops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.num_ops += 1
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = EAGER.build()
    counts = set()
    for i in range(6):
        tokens = ids(i, rows=1, tokens=3)
        with Count() as mode:
            model(input_ids=tokens, labels=tokens)
        counts.add(mode.num_ops)
    assert len(counts) > 1


def test_eager_experts_are_placed_by_input_and_attention_only_and_the_report_says_so():
    def step(model, i):
        tokens = ids(i, rows=1, tokens=3)  # three tokens: which experts are hit changes often
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    program = Program(build=EAGER.build, step=step, num_steps=8)
    for placement in ("kept", "ssd", "mix-0"):
        record = run_memopt(program, plan_for(program, placement))
        compare(plain_run(program), record)
        text = notes_of(record.run)
        assert "op" in text and ("chang" in text or "differ" in text or "var" in text), text
