"""Compiled blocks are regions; what is compiled around regions is refused, and an unseen forward is told."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings

import pytest
import torch
from _bitwise import Program, assert_bitwise, compare, notes_of, plain_run, quiet, run_memopt, some
from _models import model_program
from _traps import WIDTH, Block, Net, Sines, batch, simple_step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

import memopt
from memopt.activations.regions import find_regions
from memopt.memory.accounting import AccountedMemory


class Calls:
    """A backend that runs what it was given, and counts compilations and calls of the compiled graphs."""

    def __init__(self) -> None:
        self.num_compiled = 0
        self.num_calls = 0

    def __call__(self, graph, example_inputs):
        self.num_compiled += 1

        def run(*args):
            self.num_calls += 1
            return graph(*args)

        return run


class Dropping(Block):
    def forward(self, x):
        return x + F.dropout(torch.tanh(self.b(F.dropout(torch.sin(self.a(x)), 0.2))), 0.3)


class Autocasting(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return x + self.b(torch.sin(self.a(x))) + self.a(torch.cos(x))


BLOCKS = {"sines": Sines, "dropout": Dropping, "autocast": Autocasting}


def in_place(block=Sines, backend="aot_eager"):
    """A net whose blocks were compiled with `block.compile()`."""
    net = Net(block)
    for layer in net.layers:
        layer.compile(backend=backend)
    return net


def program_of(build):
    return Program(build=build, step=simple_step, regions=["layers"])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    with quiet():
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


PROGRAMS = {name: program_of(functools.partial(in_place, block)) for name, block in BLOCKS.items()}
INDUCTOR = {
    name: program_of(functools.partial(in_place, block, "inductor"))
    for name, block in BLOCKS.items()
}


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("name", PROGRAMS)
def test_blocks_compiled_in_place(name, placement):
    record = assert_bitwise(PROGRAMS[name], placement)
    assert len(record.run.trace.regions) == 3
    assert "layers.0, layers.1, layers.2 run compiled" in notes_of(record.run)


@pytest.mark.slow  # minutes of C++ compilation on a busy machine; what is opaque is tested by `Hiding` as well
@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
@pytest.mark.parametrize("name", INDUCTOR)
def test_blocks_compiled_by_inductor(name, placement):
    """No op of Inductor's kernels is seen: the region's input and its recomputation are all there is."""
    record = assert_bitwise(INDUCTOR[name], placement)
    assert len(record.run.trace.regions) == 3


def cuda_step(model, i):
    loss = model(batch(i, 256, WIDTH).cuda()).square().mean()
    loss.backward()
    return loss


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["recompute", "host"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_compiled_by_inductor_on_the_gpu(name, placement):
    if name == "autocast":
        pytest.skip("the block asks for the CPU's autocast")
    program = Program(build=INDUCTOR[name].build, step=cuda_step, regions=["layers"], device="cuda")
    record = assert_bitwise(program, placement)
    assert len(record.run.trace.regions) == 3


def graphed_net(**how):
    net = Net(Sines)
    for layer in net.layers:
        layer.compile(**how)
    return net


GRAPHED = {
    "mode": {"mode": "reduce-overhead"},
    "option": {"options": {"triton.cudagraphs": True}},
    "none": {"mode": "default"},
    "other backend": {"backend": "aot_eager"},
}


@pytest.mark.parametrize("how", GRAPHED)
def test_blocks_with_cuda_graphs_are_refused(how):
    """On the CPU nothing is made of the setting; a card's parameters stand in as fakes."""
    net = graphed_net(**GRAPHED[how])
    assert len(find_regions(net, ["layers"])) == 3
    with FakeTensorMode():
        for module in net.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    on_card = torch.empty(parameter.shape, device="cuda")
                    module._parameters[name] = nn.Parameter(on_card)
    if how in ("mode", "option"):
        with pytest.raises(memopt.ConfigError, match=r"layers\.0.*max-autotune-no-cudagraphs"):
            find_regions(net, ["layers"])
    else:
        assert len(find_regions(net, ["layers"])) == 3


@pytest.mark.gpu
def test_cuda_graphs_are_refused_before_anything_runs():
    net = graphed_net(mode="reduce-overhead").cuda()
    with pytest.raises(memopt.ConfigError, match="CUDA graphs"):
        memopt.start(net, regions=["layers"])
    cuda_step(net, 0)


@pytest.mark.parametrize("placement", some("ssd"))
def test_a_transformers_model_with_compiled_layers(placement):
    base = model_program("llama")

    def build():
        model = base.build()
        for layer in model.model.layers:
            layer.compile(backend="eager")
        return model

    record = assert_bitwise(Program(build=build, step=base.step), placement)
    assert "model.layers.0" in [r.name for r in record.run.trace.regions]
    assert "run compiled" in notes_of(record.run)


def test_the_region_runs_the_compiled_code_and_compiles_it_once():
    plain, ours = Calls(), Calls()
    in_plain, in_ours = in_place(backend=plain), in_place(backend=ours)
    for i in range(3):
        simple_step(in_plain, i)
    assert (plain.num_compiled, plain.num_calls) == (1, 9)
    torch._dynamo.reset()
    with memopt.optimize(in_ours, plan="recompute", regions=["layers"]):
        for i in range(3):
            simple_step(in_ours, i)
        assert (ours.num_compiled, ours.num_calls) == (1, 18), "once forward, once recomputed"
        before = ours.num_calls
        with torch.no_grad():
            in_ours(batch(0))
        assert ours.num_calls == before + 3


def test_compiled_regions_hold_only_their_input():
    """Between forward and backward, to the byte; plainly, every block saves at least three outputs more."""

    def held_bytes(context):
        torch._dynamo.reset()
        torch.manual_seed(0)
        with AccountedMemory() as accounted:
            net = in_place()
            with context(net):
                for i in range(3):
                    simple_step(net, i)
                    net.zero_grad()
                level = accounted.current_bytes
                loss = net(batch(0, 4096, WIDTH)).square().mean()
                held = accounted.current_bytes - level
                loss.backward()
        return held

    plain = held_bytes(contextlib.nullcontext)
    ours = held_bytes(functools.partial(memopt.optimize, plan="recompute", regions=["layers"]))
    row_bytes = 4096 * 4
    inputs = (1 + 3 + 1) * WIDTH * row_bytes  # of the first layer, the regions and the head
    head = 2 * row_bytes + 4  # its output, which `square` saves, and the loss
    assert ours == inputs + head
    assert plain >= ours + 3 * 3 * WIDTH * row_bytes


class _Hidden(torch.autograd.Function):
    """What a compiled function is to the modes: tensors appear from nowhere, and autograd saves some of them."""

    @staticmethod
    def forward(ctx, x):
        with _disable_current_modes():
            first, second = torch.sin(x), torch.cos(x)
            ctx.save_for_backward(x, first, second)
            return first * second

    @staticmethod
    def backward(ctx, grad):
        _, first, second = ctx.saved_tensors
        return grad * (second * second - first * first)


class Hiding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return _Hidden.apply(x * self.weight)


def test_what_hidden_code_saves_counts_for_the_region():
    """Else the planner would take such a model to fit any budget."""
    rows = 2048
    nbytes = rows * WIDTH * 4
    net = Net(Hiding)
    with memopt.optimize(net, plan="recompute", regions=["layers"]) as run:
        for i in range(2):
            net(batch(i, rows, WIDTH)).square().mean().backward()
    for region in run.trace.regions:
        by_ops = sum(op.saved_nbytes for op in region.ops)
        assert by_ops == nbytes, "x * weight"
        assert region.saved_nbytes == by_ops + 2 * nbytes + region.input_nbytes
    inside = 3 * (3 + 1) * nbytes
    assert run.report().baseline.device_bytes >= inside


def test_a_flat_sequential_compiled_in_place_is_one_region():
    def build():
        net = Net(Sines)
        parts = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid()]
        net.layers = nn.ModuleList([nn.Sequential(*parts)])
        net.layers[0].compile(backend="aot_eager")
        return net

    record = assert_bitwise(program_of(build), "recompute")
    assert [r.name for r in record.run.trace.regions] == ["layers.0"]


def test_a_compiled_part_beside_the_regions_is_left_alone():
    def build():
        net = Net(Sines)
        net.inp.compile(backend="aot_eager")
        net.layers[1].a.compile(backend="aot_eager")
        return net

    record = assert_bitwise(program_of(build), "recompute")
    assert "run compiled" not in notes_of(record.run)


def test_the_compiled_call_is_back_after_the_context():
    net = in_place()
    before = [dict(layer.__dict__) for layer in net.layers]
    with memopt.optimize(net, plan="recompute", regions=["layers"]):
        simple_step(net, 0)
        assert net.layers[0].__dict__["_compiled_call_impl"] is not before[0]["_compiled_call_impl"]
        again = copy.deepcopy(net)
        torch.save(net, io.BytesIO())
    for layer, names in zip(net.layers, before, strict=True):
        assert layer.__dict__.keys() == names.keys()
        assert layer.__dict__["_compiled_call_impl"] is names["_compiled_call_impl"]
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        assert not torch.equal(again(batch(0)), net(batch(0))), "a copy has weights of its own"


# ------------------------------------------------------------------------------------------------ compiled as a whole
def wrapped():
    return torch.compile(Net(Sines), backend="aot_eager")


def whole_in_place():
    net = Net(Sines)
    net.compile(backend="aot_eager")
    return net


def inner_wrapped():
    base = model_program("llama").build()
    base.model = torch.compile(base.model, backend="aot_eager")
    return base


def inner_in_place():
    base = model_program("llama").build()
    base.model.compile(backend="aot_eager")
    return base


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (wrapped, ["the model is compiled", "torch.compile", "the module that was given"]),
        (whole_in_place, ["the model is compiled", ".compile()", "leave that call out"]),
        (inner_wrapped, ["module 'model' is compiled", "layers.0"]),
        (inner_in_place, ["module 'model' is compiled", "model.layers.0"]),
    ],
)
def test_what_is_compiled_around_regions_is_refused(build, words):
    model = build()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(memopt.ConfigError) as caught, memopt.optimize(model):
        pass
    for word in [*words, "block.compile()"]:
        assert word in str(caught.value)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


@pytest.mark.parametrize("way", ["compiled-model", "compiled-function", "compiled-later"])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_loop_that_calls_something_compiled_around_the_model_is_told(way, with_optimizer):
    """The numbers are right, nothing is placed, and both the report and a warning say so."""
    model = Net(Sines)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call = {
        "compiled-model": lambda: torch.compile(model, backend="aot_eager"),
        "compiled-function": lambda: torch.compile(lambda x: model(x) + 0, backend="aot_eager"),
        "compiled-later": lambda: model,
    }[way]()
    expected = copy.deepcopy(model)
    asked = [optimizer] if with_optimizer else []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with memopt.optimize(model, *asked, plan="recompute", regions=["layers"]) as run:
            if way == "compiled-later":
                model.compile(backend="aot_eager")
            for i in range(2):
                call(batch(i)).square().mean().backward()
                expected(batch(i)).square().mean().backward()
                for ours, plain in zip(model.parameters(), expected.parameters(), strict=True):
                    assert torch.equal(ours.grad, plain.grad)
                optimizer.step()
                expected.load_state_dict(model.state_dict())
                model.zero_grad(), expected.zero_grad()
            call(batch(2)).sum().backward()
    told = [w for w in seen if "no forward of it was seen" in str(w.message)]
    assert len(told) == (1 if with_optimizer else 0)
    assert notes_of(run).count("no forward of it was seen") == 1


def test_a_loop_that_is_seen_is_not_told():
    program = Program(build=functools.partial(Net, Sines), step=simple_step, regions=["layers"])
    record = run_memopt(program, "recompute")
    compare(plain_run(program), record)
    assert "was seen" not in notes_of(record.run)
