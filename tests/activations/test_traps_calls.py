"""Rules 5, 8, 10 and 11: how a region is called, with which weights, and copies of the model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import io
import pickle

import pytest
import torch
from _bitwise import (
    Program,
    assert_bitwise,
    assert_bitwise_or_refused,
    differences,
    notes_of,
    plain_run,
    run_memopt,
    same_bits,
    some,
    spill_directory,
    trace_of,
)
from _models import ids, lora, model_program
from _traps import ROWS, TRAPS, WIDTH, Block, Net, batch, simple_step
from torch import nn

import memopt


# ------------------------------------------------------------------------------------------------------- rule 5
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "gemma3", "qwen3"])
def test_cache_is_off_in_training_and_back_in_evaluation(name):
    program = model_program(name)
    torch.manual_seed(0)
    plain = program.build().train()
    torch.manual_seed(0)
    model = program.build().train()
    tokens = ids(0)
    labels = {"labels": tokens}
    with memopt.optimize(model, plan="recompute") as run:
        for i in range(2):
            out = model(input_ids=tokens, **labels)
            out.loss.backward()
            model.zero_grad()
            cache = out[cache_name(model)]
            kept = 0 if cache is None else _cache_bytes(cache)
            assert kept == 0, f"step {i}: the cache pins {kept} bytes of keys and values"
        assert "cache" in notes_of(run)
        model.eval()
        plain.eval()
        with torch.no_grad():
            inside = model(input_ids=tokens, **labels)
            expected = plain(input_ids=tokens, **labels)
            assert same_bits(inside.logits, expected.logits)
            name = cache_name(model)
            assert _cache_bytes(inside[name]) == _cache_bytes(expected[name]) > 0
    after = model.train()(input_ids=tokens, **labels)
    assert _cache_bytes(after[cache_name(model)]) > 0, "restored after leaving"


def cache_name(model):
    """What transformers calls the cache: `cache` from 5.24 on, `past_key_values` before."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class _Remembers(Block):
    """Keeps its input in a cache, as attention does; a cache concatenates, so what it returns is contiguous."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x, memory=None):
        keys = x.t()[None, None]
        if memory is not None:
            keys, _ = memory.update(keys, keys, self.layer_idx)
        scale = 2.0 if keys.is_contiguous() else 3.0  # stands for a GEMM with other last bits
        return x + scale * self.b(torch.tanh(self.a(keys[0, 0].t())))


class _Remembering(Net):
    def __init__(self, by_keyword):
        indices = iter(range(4))
        super().__init__(lambda: _Remembers(next(indices)))
        self.by_keyword = by_keyword

    def forward(self, x):
        from transformers import DynamicCache

        self.memory, h = DynamicCache(), self.inp(x)
        for layer in self.layers:
            h = layer(h, memory=self.memory) if self.by_keyword else layer(h, self.memory)
        return self.out(h)


@pytest.mark.parametrize("placement", ["recompute", "kept"])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_cache_under_any_name_stays_empty_and_does_its_work(by_keyword, placement):
    """A recompute would append once more; a region without its cache would compute over other layouts."""
    program = Program(
        build=functools.partial(_Remembering, by_keyword), step=simple_step, regions=["layers"]
    )
    record = assert_bitwise(program, placement)
    assert _cache_bytes(record.model.memory) == 0
    assert "caches are left empty" in notes_of(record.run)
    simple_step(record.model, 0)
    assert _cache_bytes(record.model.memory) > 0, "left as it was"


@pytest.mark.parametrize("placement", ["recompute", "ssd"])
def test_a_cache_that_other_layers_fill_does_not_keep_a_region_from_its_plan(placement):
    """`layers.0` is no region, so its part of the cache is full when `layers.1` is called."""
    program = Program(
        build=functools.partial(_Remembering, True), step=simple_step, regions=["layers.1"]
    )
    record = assert_bitwise(program, placement)
    assert [region.name for region in record.run.trace.regions] == ["layers.1"]
    assert len([keys for keys in _all_keys(record.model.memory) if keys is not None]) == 2


def _all_keys(cache):
    return [layer.keys for layer in cache.layers]


def test_counters_of_a_cache_are_not_counted_up():
    """A static cache counts its tokens in a tensor, in place."""
    from transformers.cache_utils import Cache, StaticLayer

    from memopt.activations.caches import EmptyCaches

    module = _Remembers(0)
    cache = Cache(layers=[StaticLayer(max_cache_len=ROWS)])
    caches = EmptyCaches(module, (), {"memory": cache})
    args, kwargs, had_cache = caches.taken_out((), {"memory": cache})
    assert (args, kwargs, had_cache) == ((), {"memory": None}, True)

    def update(memory):
        keys = torch.ones(1, 1, ROWS, WIDTH)
        memory.update(keys, keys, 0)
        return int(memory.layers[0].cumulative_length)

    assert [caches.given_to(update)(**kwargs) for _ in range(2)] == [ROWS, ROWS]
    assert int(cache.layers[0].cumulative_length) == 0
    assert not EmptyCaches(module, (), {"memory": cache}).filled
    update(cache)
    assert EmptyCaches(module, (), {"memory": cache}).filled


def _cache_bytes(cache):
    if cache is None:
        return 0
    parts = (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if hasattr(cache, "cross_attention_cache")
        else (cache,)
    )
    tensors = [t for part in parts for layer in part.layers for t in (layer.keys, layer.values)]
    return sum(t.nbytes for t in tensors if t is not None)


@pytest.mark.parametrize("placement", ["recompute", "kept"])
def test_a_filled_cache_given_by_the_user_is_exact_or_refused(placement):
    """Training on a prefix that is in the cache already: dropping the cache would change the loss."""
    from transformers import DynamicCache

    program = model_program("llama")

    def step(model, i):
        with torch.no_grad():
            name = cache_name(model)
            empty = DynamicCache(config=model.config)
            prefix = model(input_ids=ids(i + 30), **{name: empty})[name]
        tokens = ids(i)
        loss = model(input_ids=tokens, labels=tokens, **{name: prefix}).loss
        loss.backward()
        return loss

    prefixed = Program(build=program.build, step=step)
    assert not same_bits(
        plain_run(prefixed).steps[0].outputs["out"], plain_run(program).steps[0].outputs["out"]
    ), "the prefix matters"
    assert_bitwise_or_refused(prefixed, placement)


def test_keys_and_values_are_not_counted_twice():
    """After the forward nothing of a region is alive but its input: the default cache would pin k and v."""
    from _memory import live_bytes

    program = model_program("llama")
    torch.manual_seed(0)
    model = program.build().train()
    tokens = ids(0, rows=4, tokens=64)
    hidden = 4 * 64 * 32 * 4
    with memopt.optimize(model, plan="recompute"), live_bytes() as live:
        for _ in range(2):
            loss = model(input_ids=tokens, labels=tokens).loss
            with_graph = live.current_bytes
            loss.backward()
            model.zero_grad()
            del loss
        logits = 4 * 64 * 96 * 4
        # three regions' inputs, the last output and its norm (saved in full: product and variance), logits thrice
        assert with_graph - live.current_bytes <= 8 * hidden + 4 * logits


# ------------------------------------------------------------------------------------------------------- rule 8
def _weights_changed_step(change):
    def step(model, i):
        loss = model(batch(i)).square().mean()
        with torch.no_grad():
            change(model)
        loss.backward()
        return loss

    return step


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_a_weight_changed_before_backward_raises_as_the_plain_loop_does(placement):
    def change(model):
        model.layers[1].b.weight.mul_(1.5)

    program = Program(
        build=TRAPS["1-in-place"].build, step=_weights_changed_step(change), regions=["layers"]
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain_run(program)
    healthy = dataclasses.replace(program, step=simple_step)
    from _bitwise import plan_for

    with pytest.raises(RuntimeError) as caught:
        run_memopt(program, plan_for(healthy, placement))
    assert "layers.1" in str(caught.value) or "inplace" in str(caught.value)


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
@pytest.mark.parametrize("what", ["bias", "replaced", "swapped", "buffer", "frozen"])
def test_what_the_region_reads_changed_before_backward_is_exact_or_refused(what, placement):
    """Changes that the plain loop allows, because its backward does not need the old values."""

    class Scaled(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.ones(WIDTH))
            self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)

        def forward(self, x):
            return x + self.b(torch.tanh(self.a(x) + self.shift + self.frozen))

    def change(model):
        for layer in model.layers:
            if what == "bias":
                layer.a.bias.add_(0.5)
            elif what == "buffer":
                layer.shift.add_(0.5)
            elif what == "frozen":
                layer.frozen.add_(0.5)
            elif what == "replaced":
                layer.shift = torch.zeros(WIDTH)
            else:
                layer.a, layer.b = layer.b, layer.a

    def step(model, i):
        loss = _weights_changed_step(change)(model, i)
        if what == "swapped":
            change(model)
        return loss

    program = Program(build=functools.partial(Net, Scaled), step=step, regions=["layers"])
    assert_bitwise_or_refused(program, placement)


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
def test_functional_call_is_exact(placement):
    """The parameters of the forward are gone when the backward recomputes: it brings them back."""

    def step(model, i):
        values = {
            n: p.detach().mul(1.0 + 0.1 * i).requires_grad_() for n, p in model.named_parameters()
        }
        loss = torch.func.functional_call(model, values, (batch(i),)).square().mean()
        loss.backward()
        for n, p in model.named_parameters():
            p.grad = values[n].grad
        return loss

    assert_bitwise(
        Program(build=TRAPS["1-in-place"].build, step=step, regions=["layers"]), placement
    )


# ------------------------------------------------------------------------------------------------------ rule 10
@dataclasses.dataclass
class Pair:
    """An argument that is no tuple, list or dict."""

    left: torch.Tensor
    right: torch.Tensor


class ByKeyword(Block):
    """Everything comes by keyword."""

    def forward(self, *, h, extra, flag=True, name="x"):
        assert flag is True and name == "y"
        k, _ = torch.native_dropout(self.a(h), 0.2, True)
        return h + self.b(torch.tanh(k)) * extra


class Nested(Block):
    """Tensors in tuples and dicts, some of which need gradients."""

    def forward(self, x, pair, table=None):
        cos, (sin, none) = pair
        assert none is None
        return x + self.b(torch.tanh(self.a(x) * cos)) * sin + table["bias"]["value"]


class TakesPair(Block):
    """A dataclass argument."""

    def forward(self, pair):
        return pair.left + self.b(torch.tanh(self.a(pair.left) * pair.right))


class CallNet(Net):
    """Calls its blocks in the way named by `way`; cos and sin are made from a parameter."""

    way = "keyword"

    def __init__(self, block):
        super().__init__(block)
        self.angle = nn.Parameter(torch.linspace(0.0, 1.0, WIDTH))

    def forward(self, x):
        h = self.inp(x)
        cos, sin = self.angle.cos(), self.angle.sin()
        for layer in self.layers:
            if self.way == "keyword":
                h = layer(h=h, extra=cos, flag=True, name="y")
            elif self.way == "nested":
                h = layer(h, (cos, (sin, None)), table={"bias": {"value": cos + sin}})
            elif self.way == "dataclass":
                h = layer(Pair(h, cos))
            else:
                h = layer(self.angle, h)
        return self.out(h)


class TakesParameter(Block):
    """A parameter as an argument, and the same tensor twice."""

    def forward(self, angle, x):
        return x + self.b(torch.tanh(self.a(x) * angle)) * x


CALLS = {
    "keyword": ByKeyword,
    "nested": Nested,
    "dataclass": TakesPair,
    "parameter": TakesParameter,
}


def call_program(way):
    """The program of one way of calling."""

    def build():
        net = CallNet(CALLS[way])
        net.way = way
        return net

    return Program(build=build, step=simple_step, regions=["layers"])


CALL_PROGRAMS = {way: call_program(way) for way in CALLS}


@pytest.mark.parametrize("placement", some("recompute", "kept", "ssd", "mix-0"))
@pytest.mark.parametrize("way", CALLS)
def test_tensors_anywhere_in_the_arguments(way, placement):
    record = assert_bitwise(CALL_PROGRAMS[way], placement)
    assert "angle" in record.steps[0].grads


@pytest.mark.parametrize("way", ["keyword", "nested"])
def test_an_input_given_by_keyword_or_in_a_tuple_is_moved(way):
    """Its bytes count as the region's input, and under input="ssd" they are on SSD while the others run."""
    program = CALL_PROGRAMS[way]
    for region in trace_of(program).regions:
        assert region.input_nbytes >= ROWS * WIDTH * 4
    plan = memopt.Plan(
        regions=tuple(
            memopt.types.plan.RegionPlan(name=f"layers.{i}", input="ssd") for i in range(3)
        ),
    )
    record = run_memopt(program, plan)
    moved = record.run.report().to_dict()["measured"]["ssd_bytes"]
    assert moved >= ROWS * WIDTH * 4


def test_a_tensor_shared_by_all_regions_is_moved_at_most_once():
    """A mask-like tensor that enters each of 8 regions: its bytes do not reach the SSD 8 times."""
    shared_bytes = 64 * 1024 * 4

    class Shared(Block):
        def forward(self, x, big):
            return x + self.b(torch.tanh(self.a(x))) * big[:ROWS, :WIDTH]

    class SharedNet(Net):
        def forward(self, x):
            h = self.inp(x)
            big = self.scale + torch.ones(64, 1024)  # a sum saves nothing
            for layer in self.layers:
                h = layer(h, big)
            return self.out(h)

    def build():
        net = SharedNet(Shared, 8)
        net.scale = nn.Parameter(torch.ones(()))
        return net

    program = Program(build=build, step=simple_step, regions=["layers"])
    record = assert_bitwise(program, "ssd")
    assert record.run.report().to_dict()["measured"]["ssd_bytes"] < 2 * shared_bytes


# ------------------------------------------------------------------------------------------------------ rule 11
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _through_file(model),  # noqa: PLW0108 -- defined below
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


def _through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["llama", "cnn", "lora"])
def test_a_copy_is_a_plain_model_with_its_own_weights(name, how):
    if name == "lora" and how in ("pickle", "torch.save"):
        try:
            COPIES[how](lora(0.0))
        except Exception as error:
            pytest.skip(f"peft itself cannot: {error}")
    program = model_program(name)
    torch.manual_seed(0)
    model = program.build().train()
    with (
        spill_directory() as path,
        memopt.optimize(model, plan="ssd", budget=memopt.Budget(ssd=f"{path}:64MiB")),
    ):
        for i in range(2):
            program.step(model, i)
        twin = COPIES[how](model)
        assert all(
            "memopt" not in type(v).__module__ for m in twin.modules() for v in vars(m).values()
        )
        for (
            module
        ) in twin.modules():  # a method bound to the copy itself may stand in its `__dict__`
            assert module.forward.__self__ is module
            assert module.forward.__func__ is type(module).forward
        assert sorted(twin.state_dict()) == sorted(model.state_dict())
        torch.manual_seed(0)
        reference = program.build().train()
        reference.load_state_dict(model.state_dict())
        with torch.no_grad():
            for parameter in (*twin.parameters(), *reference.parameters()):
                parameter.mul_(1.25)
        twin.zero_grad()
        losses = []
        for net in (twin, reference):
            torch.manual_seed(3)
            losses.append(program.step(net, 5))
        assert same_bits(*losses)
        grads = [
            {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
            for net in (twin, reference)
        ]
        assert not differences(*grads)
        program.step(model, 2)  # the original goes on


def test_ema_in_the_loop_is_exact():
    program = model_program("llama", dropout=True)

    def step(model, i):
        shadow = copy.deepcopy(model).eval()
        loss = program.step(model, i)
        with torch.no_grad():
            return loss, shadow(input_ids=ids(i)).logits

    ema = Program(build=program.build, step=step)
    for placement in ("recompute", "kept", "ssd"):
        assert_bitwise(ema, placement)


def test_a_forward_that_the_user_patched_before_is_kept_and_put_back():
    program = model_program("llama")
    model = program.build().train()
    layer = model.model.layers[0]
    original = layer.forward
    calls = []

    def patched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = patched
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    with memopt.optimize(model, plan="recompute"):
        program.step(model, 0)
        program.step(model, 1)
        assert len(calls) >= 4, (
            "the user's forward ran in forward and in recomputation of both steps"
        )
    assert layer.forward is patched
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
