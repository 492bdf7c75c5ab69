"""Llama-1B shapes in bfloat16 at 4,096 tokens on the GPU: loss and every gradient against the plain loop.

With flash attention under deterministic algorithms the plain loop repeats its own bits, and memopt must too. cuDNN's
attention has no deterministic backward in PyTorch (dQ is summed by atomics): there the loss must be the same bits,
every gradient too once that op's results are replayed, and without a replay each gradient as near to a plain run as
plain runs are to each other.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings

import pytest
import torch
from _bitwise import kept_plan, random_plan, same_bits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import memopt

pytestmark = pytest.mark.gpu
TOKENS = 4096
PLACEMENTS = ("recompute", "kept", "host", "mix-0", "mix-1", "mix-2")


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # before cuBLAS starts; deterministic mode wants it
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        built = LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    yield built.train()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def trace(model):
    """The traced step, shared by the mixes."""
    with deterministic_flash(), memopt.optimize(model, plan="recompute") as run:
        for _ in range(2):
            loss_and_grads(model, 0)
    assert len(run.trace.regions) == 16
    return run.trace


@contextlib.contextmanager
def deterministic_flash():
    """Flash attention with its deterministic backward, and every other op deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def loss_and_grads(model, step):
    """One forward and backward; the gradients are taken off the model."""
    ids = torch.randint(
        0, 128256, (1, TOKENS), generator=torch.Generator().manual_seed(step)
    ).cuda()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), grads


def plan_named(placement, trace):
    """A plan's name, or one over the trace."""
    if placement == "kept":
        return kept_plan(trace)
    if placement.startswith("mix-"):
        return random_plan(trace, int(placement[4:]), ("device", "host", "recompute"))
    return placement


@pytest.fixture(scope="module")
def plain(model):
    """Two different steps of the plain loop, and the check that it repeats itself."""
    with deterministic_flash():
        steps = [loss_and_grads(model, step) for step in range(2)]
        again = loss_and_grads(model, 0)
    assert same_bits(again[0], steps[0][0])
    assert not unequal(again[1], steps[0][1]), "the plain loop does not repeat its own bits"
    return steps


def unequal(a, b):
    """Names of gradients whose bits differ (compared on the device)."""
    return [
        name for name in a if not torch.equal(a[name].view(torch.int16), b[name].view(torch.int16))
    ]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_flash_is_bitwise(placement, model, plain, trace):
    with deterministic_flash(), memopt.optimize(model, plan=plan_named(placement, trace)) as run:
        for step in (0, 1, 0):  # traced, then twice under the plan
            loss, grads = loss_and_grads(model, step)
            assert same_bits(loss, plain[step][0])
            wrong = unequal(grads, plain[step][1])
            assert not wrong, (
                f"step {step}: {len(wrong)} of {len(grads)} gradients differ: {wrong[:5]}"
            )
            del grads
        measured = run.report().to_dict()["measured"]
    if placement == "host":
        assert measured["host_bytes"] > 16 * TOKENS * 2048 * 2, (
            "at least every region's input was moved"
        )


def test_flash_auto_within_a_budget(model, plain, trace):
    """What the planner chooses between recomputing everything and the plain step is as exact, and fits."""
    budget_bytes = int(trace.peak_bytes * 1.35)
    with (
        deterministic_flash(),
        memopt.optimize(model, budget=memopt.Budget(device=budget_bytes)) as run,
    ):
        for step in (0, 1, 0, 1, 0, 1, 0, 1):  # traced, timed, locking, planned, planned again
            loss, grads = loss_and_grads(model, step)
            assert same_bits(loss, plain[step][0])
            assert not unequal(grads, plain[step][1])
            del grads
        assert run.plan.solver == "greedy"
        assert run._engine.plan is run.plan, "in force"
        assert run.report().to_dict()["measured"]["device_bytes"] <= budget_bytes


@contextlib.contextmanager
def cudnn():
    """cuDNN's attention, and every other op deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # an error would forbid cuDNN's
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


class AttentionBackward(TorchDispatchMode):
    """Records what cuDNN's attention backward was given and returned, or checks that it is given the same
    bits and returns what it returned then: the one op of the step that does not repeat itself."""

    def __init__(self, recorded=None):
        super().__init__()
        self.calls = []
        self.recorded = recorded

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default:
            return out
        given = [a.clone() for a in args[:6]]  # grad_out, query, key, value, out, logsumexp
        if self.recorded is None:
            self.calls.append((given, [o.clone() for o in out]))
            return out
        then, returned = self.recorded[len(self.calls)]
        same = [torch.equal(bits(a), bits(b)) for a, b in zip(given, then, strict=True)]
        self.calls.append(same)
        return tuple(o.clone() for o in returned)


def bits(tensor):
    """Integers of the elements' size."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def cudnn_plan(placement, model):
    """The placement, over a trace with cuDNN's attention in it."""
    if not placement.startswith("mix"):
        return placement
    with memopt.optimize(model, plan="recompute") as run:
        for _ in range(2):
            loss_and_grads(model, 0)
    return plan_named(placement, run.trace)


@pytest.mark.parametrize("placement", ["recompute", "host", "mix-0"])
def test_cudnn_is_bitwise_but_for_its_own_backward(placement, model):
    """All of cuDNN's backward calls are given the plain run's bits, and with what they returned there put in
    the place of what they return, every gradient is the plain run's."""
    with cudnn():
        with AttentionBackward() as record:
            plain_loss, plain_grads = loss_and_grads(model, 0)
        assert len(record.calls) == 16
        with AttentionBackward(record.calls) as replay:
            _, again = loss_and_grads(model, 0)
        assert all(map(all, replay.calls)) and not unequal(again, plain_grads), (
            "something else than the attention's backward does not repeat itself"
        )
        del again
        with memopt.optimize(model, plan=cudnn_plan(placement, model)):
            for step in range(3):
                with AttentionBackward(record.calls) as replay:
                    loss, grads = loss_and_grads(model, 0)
                assert same_bits(loss, plain_loss)
                assert len(replay.calls) == 16
                assert all(map(all, replay.calls)), f"step {step}: {replay.calls}"
                wrong = unequal(grads, plain_grads)
                assert not wrong, f"step {step}: {len(wrong)} differ: {wrong[:5]}"


@pytest.mark.parametrize("placement", ["recompute", "host", "mix-0"])
def test_cudnn_is_as_near_as_plain_runs_are(placement, model):
    """Each gradient is as near to one of eight plain runs as these are to each other. The noise has long tails (one
    rounding in a late layer moves every layer before it): how far a plain run lies outside of the seven
    others is what memopt is held to, times five (seen: 2 left out, 3.6 in six runs of memopt's, on another day 1.5;
    a wrong gradient is away by thousands of them)."""
    with cudnn():
        runs = [loss_and_grads(model, 0) for _ in range(8)]
        names = list(runs[0][1])
        apart = torch.zeros(len(names), 8, 8)
        for a, b in itertools.combinations(range(8), 2):
            apart[:, a, b] = distances(runs[a][1], runs[b][1])
        apart += apart.transpose(1, 2).clone()
        left_out = []
        for i in range(8):
            others = [j for j in range(8) if j != i]
            spread = apart[:, others][:, :, others].amax((1, 2))
            left_out.append(excess(apart[:, i, others], spread))
        allowed = 5 * max(1.0, *(float(e.max()) for e in left_out))
        spread = apart.amax((1, 2))
        with memopt.optimize(model, plan=cudnn_plan(placement, model)):
            for step in range(2):
                loss, grads = loss_and_grads(model, 0)
                assert same_bits(loss, runs[0][0]), f"step {step}: the loss differs"
                away = torch.stack([distances(grads, other) for _, other in runs], 1)
                outside = excess(away, spread)
                worst = int(outside.argmax())
                print(
                    f"{placement}, step {step}: {int((outside > 1).sum())} of {len(names)} outside, worst "
                    f"{float(outside[worst]):.2f}; plain runs left out: "
                    f"{[(int((e > 1).sum()), round(float(e.max()), 2)) for e in left_out]}"
                )
                assert float(outside[worst]) <= allowed, names[worst]
                del grads


def distances(a, b):
    """Euclidean distance of each gradient, in float32."""
    return torch.stack([torch.linalg.vector_norm(a[n].float() - b[n].float()) for n in a]).cpu()


def excess(away, spread):
    """Distance to the nearest run over the largest distance between two; 0 where both are 0."""
    nearest = away.amin(1)
    return torch.where(nearest == 0, nearest, nearest / spread)
