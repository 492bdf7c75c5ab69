"""Side effects of a region's forward happen once, wherever they are, and whatever the loop does before backward.

Each block collects, counts or reads somewhere: in its attributes, in objects, in globals, closures and classes. Each
loop takes what was collected and clears it *before* backward, so that a recompute finds things as they were when the
forward began: what it then leaves there would be taken for the next step's.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter, defaultdict, deque
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from _bitwise import Program, assert_bitwise
from _traps import WIDTH, Block, Net, batch
from _user_program import EACH, program
from torch import Tensor, nn

import memopt
from memopt.activations.put_back import undo_all
from memopt.activations.surroundings import Surroundings


def collecting(clear):
    """A step that adds what the forward left to its loss, clears it, and runs backward."""

    def step(model, i):
        loss = model(batch(i)).square().mean()
        found = [clear(model) for _ in range(2)]  # the second time nothing is left
        loss = loss + 0.1 * sum(found[0])
        loss.backward()
        return loss, len(found[0]), len(clear(model))

    return step


def drain(container):
    """Take everything out of a list or dictionary."""
    items = list(container.values() if isinstance(container, dict) else container)
    container.clear()
    return [x for item in items for x in (item if isinstance(item, list) else [item])]


class Collects(Block):
    """The mean of its activations goes where `keep` puts it."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.keep(h.square().mean())
        return x + self.b(h)

    def keep(self, value: Tensor) -> None:
        raise NotImplementedError


class InList(Collects):
    def __init__(self) -> None:
        super().__init__()
        self.bag: list = []

    def keep(self, value: Tensor) -> None:
        self.bag.append(value)


class InDefaultDict(InList):
    def __init__(self) -> None:
        super().__init__()
        self.bag = defaultdict(list)

    def keep(self, value: Tensor) -> None:
        self.bag["aux"].append(value)


class Owner:
    """An object of the program's own."""

    def __init__(self) -> None:
        self.bag: list = []
        self.itself = self


class InObject(Collects):
    def __init__(self) -> None:
        super().__init__()
        self.owner = Owner()

    @property
    def bag(self):
        return self.owner.itself.bag

    def keep(self, value: Tensor) -> None:
        self.bag.append(value)


class InAttribute(Collects):
    """Adds to what is there: the loop sets None."""

    aux = None

    def keep(self, value: Tensor) -> None:
        self.aux = value if self.aux is None else self.aux + value


def _take_aux(model):
    found = [layer.aux for layer in model.layers if layer.aux is not None]
    for layer in model.layers:
        layer.aux = None
    return found


GLOBAL: list = []


class InGlobal(Collects):
    def keep(self, value: Tensor) -> None:
        GLOBAL.append(value)


class InClass(Collects):
    bag: list = []  # noqa: RUF012

    def keep(self, value: Tensor) -> None:
        self.bag.append(value)


def in_closure() -> Program:
    """A block whose methods share a list with the loop."""
    shared: list = []

    class InClosure(Collects):
        def keep(self, value: Tensor) -> None:
            shared.append(value)

    return program(InClosure, collecting(lambda model: drain(shared)), num_steps=4)


def _from_layers(model):
    return [value for layer in model.layers for value in drain(layer.bag)]


BAGS = {
    "list": program(InList, collecting(_from_layers), num_steps=4),
    "defaultdict": program(InDefaultDict, collecting(_from_layers), num_steps=4),
    "object": program(InObject, collecting(_from_layers), num_steps=4),
    "attribute": program(InAttribute, collecting(_take_aux), num_steps=4),
    "global": program(InGlobal, collecting(lambda model: drain(GLOBAL)), num_steps=4),
    "class": program(InClass, collecting(lambda model: drain(InClass.bag)), num_steps=4),
    "closure": in_closure(),
}


@EACH
@pytest.mark.parametrize("where", BAGS)
def test_what_is_collected_and_cleared_before_backward_stays_cleared(where, placement):
    """Without it: two losses of each block in the second step's sum, one of them of the first step's recompute."""
    assert_bitwise(BAGS[where], placement)


@EACH
def test_hooks_that_collect_into_a_list_or_an_object(placement):
    def step(model, i):
        owner, bag = Owner(), []

        def hook(module, args, out):
            owner.bag.append(out.mean())

        handles = [layer.a.register_forward_hook(hook) for layer in model.layers]
        handles += [
            layer.b.register_forward_hook(lambda module, args, out: bag.append(out.mean()))
            for layer in model.layers
        ]
        loss = model(batch(i)).square().mean() + 0.1 * sum(owner.bag) + 0.1 * sum(bag)
        loss.backward()
        for handle in handles:
            handle.remove()
        return loss, len(owner.bag), len(bag)

    assert_bitwise(program(Block2, step), placement)


class Block2(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


# ------------------------------------------------------------------- counted and reset before backward
COUNT = 0
USER_MODULE = ModuleType("memopt_test_user_module")
sys.modules[USER_MODULE.__name__] = USER_MODULE
USER_MODULE.scale = 1.0


def count_globally() -> int:
    """A helper that the block's forward names."""
    global COUNT  # noqa: PLW0603
    COUNT += 1
    return COUNT


class Counts(Block):
    """Depends on how often it was called, counted in six places."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.number, self.counter, self.space = 0, Counter(), SimpleNamespace(calls=0)
        self.array = np.ones(WIDTH, np.float32)
        self.window = deque([1.0] * 300, maxlen=300)  # longer than what is taken apart item by item

    def forward(self, x: Tensor, memo: list = []) -> Tensor:  # noqa: B006
        self.number += 1
        Counts.calls += 1
        self.counter["calls"] += 1
        self.space.calls += 1
        self.array[...] *= 1.01
        USER_MODULE.scale *= 1.01
        memo.append(1)
        calls = self.number + Counts.calls + self.counter["calls"] + self.space.calls + len(memo)
        h = torch.tanh(self.a(x) * USER_MODULE.scale / (sum(self.window) / 300))
        self.window.append(calls * 0.1)
        scale = calls * 0.1 + count_globally() * 0.1
        return x + self.b(h) * scale * torch.from_numpy(self.array.copy())


def counting_step(model, i):
    """Everything is another between forward and backward, and must be so afterwards."""
    global COUNT  # noqa: PLW0603
    loss = model(batch(i)).square().mean()
    for layer in model.layers:
        layer.number, layer.space = -5, SimpleNamespace(calls=-7)
        layer.counter.clear()
        layer.array[...] = 2.0
    Counts.calls, COUNT, USER_MODULE.scale = -3, -4, 1.5
    loss.backward()
    state = [
        (x.number, x.space.calls, x.counter["calls"], x.array.copy(), list(x.window)[-3:])
        for x in model.layers
    ]
    globals_ = Counts.calls, COUNT, USER_MODULE.scale, len(Counts.forward.__defaults__[0])
    COUNT = Counts.calls = 0
    USER_MODULE.scale = 1.0
    Counts.forward.__defaults__[0].clear()
    for layer in model.layers:
        layer.number, layer.space.calls = 0, 0
    return loss, [(*s[:3], torch.from_numpy(s[3]), s[4]) for s in state], globals_


@EACH
def test_what_is_counted_anywhere_and_reset_before_backward(placement):
    assert_bitwise(program(Counts, counting_step, num_steps=4), placement)


# ------------------------------------------------------------------------------------------- objects given to the call
class Sample:
    """What graph libraries pass from layer to layer."""


class TakesSample(Block):
    """Changes the object that it is given and returns it."""

    def forward(self, sample: Sample) -> Sample:
        sample.x = sample.x + self.b(torch.tanh(self.a(sample.x) / (1 + sample.depth)))
        sample.depth += 1
        sample.means.append(sample.x.mean())
        return sample


class SampleNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        sample = Sample()
        sample.x, sample.depth, sample.means = self.inp(x), 0, []
        for layer in self.layers:
            sample = layer(sample)
        assert len(sample.means) == sample.depth == len(self.layers)
        return self.out(sample.x) + sum(sample.means)


@EACH
def test_an_object_that_every_block_changes(placement):
    assert_bitwise(program(lambda: SampleNet(TakesSample)), placement)


def test_an_object_that_holds_the_graph_makes_no_cycle():
    """The graph holds the frame; a frame that held the object, which holds the graph, would never die."""
    model = SampleNet(TakesSample)
    with memopt.optimize(model, regions=["layers"], plan="recompute"):
        for i in range(3):
            loss = model(batch(i)).mean()
            loss.backward()
        gc.collect()
        gc.disable()
        others = _frames()
        try:
            loss = model(batch(5)).mean()  # and no backward
            node = weakref.ref(loss)
            edges = [loss.grad_fn.next_functions[0][0]]
            del loss
            assert node() is None
            edges.clear()
            assert all(any(f is other for other in others) for f in _frames())
        finally:
            gc.enable()


def _frames():
    from memopt.activations.frame import Frame

    return [x for x in gc.get_objects() if type(x) is Frame]


# ----------------------------------------------------------------------------------------------------------- the parts
class Holder(nn.Module):
    """A module with every kind of value."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list = ["a", ["b"], {"c": (1, [2])}]
        self.names.append(self.names)
        self.tail = deque(range(5), maxlen=5)
        self.counts = defaultdict(int, a=1)
        self.owner = Owner()
        self.table = dict.fromkeys(range(1000), 0)
        self.empty: dict = {}
        self.gone = Owner()


def test_values_come_back_and_go_again():
    holder = Holder()
    surroundings = Surroundings([holder], [])
    surroundings.take_arguments([])
    inner = holder.names[1]
    inner.append("later")
    holder.names[2]["c"][1].append(3)
    holder.tail.append(9)
    holder.counts = None
    holder.owner.bag.append("later")
    holder.owner.new = 1
    holder.table[3] = 4
    holder.empty["k"] = 1
    holder.gone = Owner()
    holder.gone.bag = ["another"]
    holder.added = True
    undo: list = []
    surroundings.swap_in(undo)
    assert inner == ["b"]
    assert holder.names[1] is inner
    assert holder.names[2] == {"c": (1, [2])}
    assert holder.names[3] is holder.names
    assert list(holder.tail) == [0, 1, 2, 3, 4]
    assert holder.counts["new"] == 0
    assert holder.owner.bag == []
    assert not hasattr(holder.owner, "new")
    assert holder.table[3] == 0
    assert holder.empty == {}
    assert holder.gone.bag == []
    assert not hasattr(holder, "added")
    holder.empty["of the recompute"] = holder.table[5] = holder.owner.bag = 1
    holder.names.append(1)
    undo_all(undo)
    assert inner == ["b", "later"]
    assert holder.names[2] == {"c": (1, [2, 3])}
    assert len(holder.names) == 4
    assert list(holder.tail) == [1, 2, 3, 4, 9]
    assert holder.counts is None
    assert holder.owner.bag == ["later"]
    assert holder.owner.new == 1
    assert holder.table[3] == 4
    assert holder.table[5] == 0
    assert holder.empty == {"k": 1}
    assert holder.gone.bag == ["another"]
    assert holder.added


def test_attribute_names_are_not_globals():
    """`x.loss` in a forward must not keep the loop's global `loss` alive."""
    model = Net(ReadsLoss)
    surroundings = Surroundings(list(model.modules()), [])
    names = {place.key[2] for place, _ in surroundings._places.values() if place.key[0] == "name"}
    assert "COUNT" in names
    assert "GLOBAL" not in names


class ReadsLoss(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.GLOBAL * COUNT


def test_a_recompute_that_fails_puts_everything_back():
    class Fails(InList):
        def keep(self, value: Tensor) -> None:
            super().keep(value)
            if torch._C._current_graph_task_id() != -1:
                raise KeyboardInterrupt  # in the recompute

    model = Net(Fails)
    with memopt.optimize(model, regions=["layers"], plan="recompute"):
        loss = model(batch(0)).square().mean()
        for layer in model.layers:
            layer.bag.clear()
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        assert [len(layer.bag) for layer in model.layers] == [0, 0, 0]
