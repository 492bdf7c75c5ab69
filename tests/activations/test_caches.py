"""Key/value caches in training: the plain loop's ops on tensors that lie as the plain loop's do, and nothing kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from _bitwise import assert_bitwise, compare, kept_plan, plain_run, run_memopt, trace_of
from _models import ids, model_program
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import memopt


class Layouts(TorchDispatchMode):
    """Strides of what attention and batched products are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func) or "bmm" in str(func):
            given = [a for a in args if isinstance(a, Tensor)]
            self.seen.append((str(func), [(tuple(a.shape), a.stride()) for a in given]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "qwen3"])
def test_keys_and_values_are_laid_out_as_in_the_plain_loop(name):
    """Without a cache, keys are views of a projection: other strides, and on some processors other bits."""

    def seen(context):
        torch.manual_seed(0)
        model = model_program(name).build().train()
        tokens = ids(0)
        with context(model):
            for _ in range(2):
                loss = model(input_ids=tokens, labels=tokens).loss
                with Layouts() as backward:
                    loss.backward()
                with Layouts() as forward:
                    model(input_ids=tokens, labels=tokens).loss.backward()
                model.zero_grad()
        return forward.seen, backward.seen

    plain_forward, plain_backward = seen(lambda model: torch.enable_grad())
    forward, backward = seen(lambda model: memopt.optimize(model, plan="recompute"))
    regions = len(plain_forward)
    assert regions
    # recomputations come between: the plain ops must all be there, in their order
    for plain, other in ((plain_forward, forward), (plain_backward, backward)):
        rest = iter(other)
        assert all(op in rest for op in plain), name


def test_regions_after_an_untouched_one_follow_the_plan():
    """The untouched one fills the model's cache; the others would be taken for a continued generation."""
    program = model_program("llama")
    plan = kept_plan(trace_of(program))
    first = dataclasses.replace(plan.regions[0], plain=True, ops=())
    mixed = dataclasses.replace(plan, regions=(first, *plan.regions[1:]))
    record = run_memopt(program, mixed)
    compare(plain_run(program), record)
    notes = "\n".join(record.run.report().notes)
    assert "filled" not in notes
    assert "caches are left empty" in notes


def test_accumulation_with_dropout_and_caches():
    program = model_program("gpt2", dropout=True)
    assert_bitwise(program, "recompute")
