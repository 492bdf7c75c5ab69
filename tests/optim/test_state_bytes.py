"""State bytes: the closed form for LLaMA shapes through the real layout code, and peaks of steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.optim import Frugal
from memopt.optim.bucket import Bucket, make_entry
from memopt.optim.rules import state_full_rule
from memopt.optim.settings import Settings

GIB = 2**30
# hidden, ffn, layers; vocabulary 32,000, untied head
LLAMA = {
    "60M": (512, 1376, 8, 0.2913), "130M": (768, 2048, 12, 0.5246), "350M": (1024, 2736, 24, 1.0519),
    "1B": (2048, 5461, 24, 3.2272), "7B": (4096, 11008, 32, 14.0176),
}  # fmt: skip


def llama(hidden, ffn, layers):
    """Return (split, always full) parameters on the meta device."""
    split, full = [], [(32000, hidden), (32000, hidden), (hidden,)]
    for _ in range(layers):
        split += [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
        full += [(hidden,)] * 2
    return [
        [torch.nn.Parameter(torch.empty(s, device="meta")) for s in shapes]
        for shapes in (split, full)
    ]


def state_bytes_of(hidden, ffn, layers, selection, density=0.25):
    """Allocate all state on the meta device with the optimizer's own code; also return each switch's."""
    split, full = llama(hidden, ffn, layers)
    optimizer = Frugal(
        [{"params": split}, {"params": full, "split": False}], density=density, selection=selection
    )
    for group in optimizer.param_groups:
        optimizer._group_state(group, group["params"])
    return optimizer


@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
@pytest.mark.parametrize("size", LLAMA)
def test_closed_form(size, selection):
    hidden, ffn, layers, published = LLAMA[size]
    optimizer = state_bytes_of(hidden, ffn, layers, selection)
    linear = layers * (4 * hidden * hidden + 3 * hidden * ffn)
    others = 2 * 32000 * hidden + (2 * layers + 1) * hidden
    closed = 8 * (others + 0.25 * linear)
    assert closed / GIB == pytest.approx(published, abs=1e-4)
    if selection == "blocks":
        assert optimizer.state_bytes() == 8 * (others + math.floor(0.25 * linear))
    elif selection == "columns" and ffn % 4:  # floor(0.25 * n) of each tensor
        floors = 4 * hidden * (hidden // 4) + 2 * ffn * (hidden // 4) + hidden * (ffn // 4)
        assert optimizer.state_bytes() == 8 * (others + layers * floors)
    assert optimizer.state_bytes() <= closed
    assert optimizer.state_bytes() == pytest.approx(closed, rel=1e-4)


@pytest.mark.parametrize("selection", ["svd", "random"])
def test_low_rank_adds_its_basis(selection):
    hidden, ffn, layers, _ = LLAMA["130M"]
    optimizer = state_bytes_of(hidden, ffn, layers, selection)
    rank = hidden // 4
    moments = layers * (4 * rank * hidden + 3 * rank * ffn)
    bases = layers * 7 * rank * hidden
    others = 2 * 32000 * hidden + (2 * layers + 1) * hidden
    assert optimizer.state_bytes() == 8 * (others + moments) + 4 * bases


def test_every_round_of_blocks_uses_the_whole_budget():
    """Within one row of floor(density * elements), never above, for 7B's shapes."""
    split, _ = llama(*LLAMA["7B"][:3])
    optimizer = Frugal(split)
    settings = Settings.of(optimizer.param_groups[0])
    entries = [make_entry(p, f"{i}", settings) for i, p in enumerate(split)]
    bucket = Bucket(entries, settings, state_full_rule("adamw"))
    budget = math.floor(0.25 * sum(p.numel() for p in split))
    assert bucket.arena.capacity == budget
    for round_ in range(50):
        used = sum(part.num_slots for part in bucket.plan(settings, round_, 0.25))
        assert budget - 11008 < used <= budget


def test_eight_bit_bytes_per_parameter():
    """2 + 2 + 0.25 * 2 (1 + 4/256): below every Adam-type peer."""
    split, _ = llama(*LLAMA["1B"][:3])
    split = [torch.nn.Parameter(p.to(torch.bfloat16)) for p in split]
    optimizer = Frugal(split, quantize="8bit")
    optimizer._group_state(optimizer.param_groups[0], split)
    elements = sum(p.numel() for p in split)
    assert 4 + optimizer.state_bytes() / elements == pytest.approx(4.508, abs=1e-3)


# --------------------------------------------------------------------------- measured on a CPU
class LiveBytes(TorchDispatchMode):
    """Follows the bytes of every storage that an op makes, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((out,)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key):
        self.live -= self.seen.pop(key)


@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates", "random"])
def test_peak_during_a_step(selection):
    """At most 1 % over weights + gradients + state, and nothing stays allocated by later steps."""
    params = [torch.nn.Parameter(torch.randn(1024, 1024)) for _ in range(48)]  # tiles are 2^18
    optimizer = Frugal(params, selection=selection, update_gap=100, impl="foreach")
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    inputs = {p.grad.untyped_storage()._cdata for p in params}
    inputs |= {p.untyped_storage()._cdata for p in params}
    for bucket in optimizer._groups[0].buckets:
        inputs |= {a.untyped_storage()._cdata for a in bucket.arena.arrays.values()}
        inputs |= {b.untyped_storage()._cdata for b in bucket.bases if b is not None}
    resident = 2 * sum(4 * p.numel() for p in params) + optimizer.state_bytes()
    with LiveBytes() as counter:
        counter.seen.update(dict.fromkeys(inputs, 0))
        optimizer.step()
    assert counter.peak <= 0.01 * resident, counter.peak / resident
    assert counter.peak > 0


@pytest.mark.parametrize("on_switch", ["reset", "project"])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates", "randperm"])
def test_a_switch_allocates_nothing_that_stays(selection, on_switch):
    params = [torch.nn.Parameter(torch.randn(64, 48)) for _ in range(5)]
    optimizer = Frugal(params, selection=selection, update_gap=2, on_switch=on_switch)
    addresses, sizes = set(), set()
    for _ in range(7):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        (bucket,) = optimizer._groups[0].buckets
        addresses.add(tuple(array.data_ptr() for array in bucket.arena.arrays.values()))
        values = [value for state in optimizer.state.values() for value in state.values()]
        held = {x.untyped_storage() for x in values if isinstance(x, torch.Tensor)}
        held_bytes = {storage.data_ptr(): storage.nbytes() for storage in held}
        sizes.add((optimizer.state_bytes(), sum(held_bytes.values())))
    assert len(addresses) == 1
    elements = 64 * 48 * 5  # a quarter of every side is whole
    assert sizes == {(8 * elements // 4, 8 * elements // 4)}
