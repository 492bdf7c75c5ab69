"""The first step on fake tensors: it tells what the step takes, and nobody can tell that it happened."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memopt
from memopt._dry_run import dry_run
from memopt._states import measure_states
from memopt.activations.regions import find_regions
from memopt.plan import smallest_budget
from memopt.plan.cost import assumed_hardware
from memopt.trace.purity import Impure
from tests.test_refusal import MIB, Net, llama, llama_loss, net_loss, refused, train

CPU = torch.device("cpu")


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512, n_embd=128, n_layer=4, n_head=4, n_positions=512,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gpt2_loss(model):
    tokens = torch.randint(0, 512, (2, 256), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 200:] = 0
    return model(input_ids=tokens, attention_mask=mask, labels=tokens).loss


KINDS = {"llama": (llama, llama_loss), "gpt2": (gpt2, gpt2_loss), "blocks": (Net, net_loss)}


def build(kind):
    torch.manual_seed(0)
    model = KINDS[kind][0]().train()
    return model, torch.optim.AdamW(model.parameters()), KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_refused_before_any_op_with_a_number_that_works(kind):
    model, optimizer, loss_of = build(kind)
    states = measure_states(model, optimizer)
    versions = [p._version for p in model.parameters()]
    number, message = refused(model, optimizer, loss_of, 4 * states.param_bytes + 2 * MIB)
    assert "nothing was run" in message
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is None for p in model.parameters())
    report = train(model, optimizer, loss_of, memopt.Budget(device=number))
    assert 0.8 * number < report.measured.device_bytes <= number
    model, optimizer, loss_of = build(kind)
    refused(model, optimizer, loss_of, int(0.9 * number))


@pytest.mark.parametrize("kind", KINDS)
def test_it_never_names_more_than_the_traced_step(kind, monkeypatch):
    """Else a budget that works could be refused."""
    model, optimizer, loss_of = build(kind)
    number, _ = refused(
        model, optimizer, loss_of, 4 * measure_states(model, optimizer).param_bytes + 2 * MIB
    )
    with memopt.optimize(model, optimizer, plan="recompute") as run:
        loss_of(model).backward()
        optimizer.step()
        trace = run.trace
    real = smallest_budget(trace, assumed_hardware("cpu"))
    assert 0.9 * real <= number <= real


class Stateful(nn.Module):
    """All that a forward may leave behind on its own model."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.drop = nn.Dropout(0.5)
        self.blocks = nn.ModuleList([StatefulBlock() for _ in range(3)])
        self.calls = 0
        self.seen = []
        self.cache = {"last": None, "all": [torch.zeros(3)]}
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        self.seen.append(x.shape)
        self.cache["last"] = x.detach()
        self.cache["all"].append(x)
        self.cache["all"][0].add_(1)
        self.total.add_(x.detach().mean())
        x = self.drop(self.norm(x)) + torch.randn(64) + torch.rand_like(x)
        for block in self.blocks:
            x = block(x)
        self.register_buffer("late", x.detach().mean(0))
        return x.mean()


class StatefulBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = {"count": [0]}
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        self.inner["count"][0] = self.inner["count"][0] + 1
        return F.relu(self.drop(self.norm(self.a(x))) * self.scale, inplace=True)


def world(model):
    """Everything about a model and the generators that a forward could have changed."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_modules", "_parameters", "_buffers"):
                found[name, key] = copy.deepcopy(value)
        for kind in ("_parameters", "_buffers"):
            for key, tensor in vars(module)[kind].items():
                if tensor is None:
                    continue
                found[name, kind, key] = (
                    id(tensor), tensor.data_ptr(), tensor._version, tensor.detach().clone(), tensor.grad,
                )  # fmt: skip
    found["generators"] = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


def test_nothing_of_the_model_changes():
    model = Stateful().train()
    x = torch.randn(8, 64)
    before, x_before = world(model), x.clone()
    observer = dry_run(model, find_regions(model), (x,), {}, CPU)
    assert len(observer.records) == 3
    assert same(before, world(model))
    assert torch.equal(x, x_before)
    assert x._version == 0
    model(x)
    assert not same(before, world(model)), "the comparison must see what a forward does"
    assert model.calls == 1


def test_a_cache_among_the_arguments_stays_as_it_is():
    from transformers import DynamicCache

    model = llama().train()
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(0, 512, (1, 16))
    before = world(model)
    parameters = inspect.signature(model.forward).parameters  # `cache` from transformers 5.24 on
    name = "cache" if "cache" in parameters else "past_key_values"
    batch = {"input_ids": tokens, "labels": tokens, name: cache}
    with contextlib.suppress(Impure):
        dry_run(model, find_regions(model), (), batch, CPU)
    assert cache.get_seq_length() == 0
    assert same(before, world(model))


COUNTS = [0]
LOG: list[str] = []
TOTAL = torch.zeros(())


def count():
    COUNTS[0] += 1


class Shared(nn.Module):
    calls = 0
    seen: list[int] = []  # noqa: RUF012 - what is tested


def through_global(self, x):
    COUNTS[0] += 1
    return x


def through_helper(self, x):
    count()
    return x


def through_print(self, x):
    print("called")
    return x


def through_class(self, x):
    type(self).calls += 1
    return x


def through_dunder(self, x):
    self.__class__.calls = self.__class__.calls + 1
    return x


def through_global_tensor(self, x):
    TOTAL.add_(1)
    return x


def through_import(self, x):
    import os

    os.environ["MEMOPT_TEST"] = "1"
    return x


def through_generator(self, x):
    torch.manual_seed(3)
    return x


def through_python_random(self, x):
    return x * random.random()


def through_class_list(self, x):
    self.seen.append(1)
    return x


def through_lambda(self, x):
    keep = lambda y: LOG.append("x") or y  # noqa: E731
    return keep(x)


def through_item(self, x):
    return x * x.mean().item()


def through_branch(self, x):
    return x if x.sum() > 0 else -x


def through_numpy(self, x):
    return x * float(x.detach().numpy().mean())


EFFECTS = [f for name, f in list(globals().items()) if name.startswith("through_")]


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda f: f.__name__)
def test_what_could_have_an_effect_is_not_run(effect, capsys):
    class Model(Shared):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return self.net(self.effect(x))

    Model.effect = effect
    model = Model().train()
    x = torch.randn(4, 128)
    before = world(model)
    with pytest.raises(Exception, match=r".") as caught:
        dry_run(model, find_regions(model), (x,), {}, CPU)
    assert not isinstance(caught.value, AssertionError)
    assert same(before, world(model))
    assert COUNTS == [0] and LOG == [] and Shared.calls == Model.calls == 0 and Shared.seen == []
    assert TOTAL == 0
    assert capsys.readouterr().out == ""


def hooked(model):
    model.blocks[1].register_forward_hook(lambda *_: count())


def pre_hooked(model):
    model.register_forward_pre_hook(lambda *_: count())


def parameter_hooked(model):
    model.head.weight.register_post_accumulate_grad_hook(lambda _: count())


def patched(model):
    plain = model.head.forward
    model.head.forward = lambda x: (count(), plain(x))[1]


def with_object(model):
    model.log = object()


def with_generator(model):
    model.generator = torch.Generator()


def evaluating(model):
    model.eval()


@pytest.mark.parametrize(
    "change",
    [hooked, pre_hooked, parameter_hooked, patched, with_object, with_generator, evaluating],
)
def test_models_that_hold_what_is_not_understood_are_not_run(change):
    model = Net().train()
    change(model)
    with pytest.raises(Impure):
        dry_run(model, find_regions(model), (torch.randn(4, 128),), {}, CPU)
    assert COUNTS == [0]


class Experts(nn.Module):
    """A grouped product has no fake for float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 64, 64) * 0.1)

    def forward(self, x):
        ends = torch.tensor([x.shape[0] // 2, x.shape[0]], dtype=torch.int32)
        return x + torch._grouped_mm(x, self.weights, offs=ends)


def test_an_op_without_a_fake_leaves_no_traceback_in_the_log(caplog):
    model = nn.Sequential(*(Experts() for _ in range(2))).train()
    regions = [("0", model[0]), ("1", model[1])]
    with pytest.raises(Exception, match="BF16"):
        dry_run(model, regions, (torch.randn(8, 64),), {}, CPU)
    assert not caplog.records


def test_without_a_dry_run_the_step_itself_tells():
    model, optimizer, loss_of = build("blocks")
    hooked(model)
    _, message = refused(
        model, optimizer, loss_of, 4 * measure_states(model, optimizer).param_bytes + 2 * MIB
    )
    COUNTS[0] = 0
    assert "nothing was run" not in message
    assert "lower bound" in message


def test_an_ample_budget_needs_none(monkeypatch):
    calls = []
    monkeypatch.setattr("memopt._refusal.dry_run", lambda *a: calls.append(a))
    model, optimizer, loss_of = build("blocks")
    train(model, optimizer, loss_of, memopt.Budget(device="4GiB"), steps=1)
    assert not calls
    train(model, optimizer, loss_of, memopt.Budget(device="40MiB"), steps=2)
    assert len(calls) == 1, "once a session"


def test_blocks_of_one_kind_run_once_and_others_themselves():
    """A wider block in the middle is another kind; what is repeated is what each would have shown."""

    class Mixed(Net):
        def __init__(self):
            super().__init__(blocks=5)
            block = self.blocks[2]
            block.a, block.b = nn.Linear(128, 1024), nn.Linear(1024, 128)

    torch.manual_seed(0)
    model = Mixed().train()
    x = torch.randn(2048, 128)
    traces = dry_run(model, find_regions(model), (x,), {}, CPU).region_traces()
    with memopt.optimize(model, plan="recompute") as run:
        for _ in range(2):
            model(x).square().mean().backward()
            model.zero_grad()
        real = run.trace.regions
    assert [t.saved_nbytes for t in traces] == [t.saved_nbytes for t in real]
    assert traces[2].saved_nbytes > 1.5 * traces[1].saved_nbytes
    for dry, seen in zip(traces[1:], real[1:], strict=True):
        assert dry.backward_peak_bytes == pytest.approx(seen.backward_peak_bytes, rel=0.01)
        assert dry.input_nbytes == seen.input_nbytes


@pytest.mark.gpu
def test_on_cuda_nothing_is_allocated():
    torch.manual_seed(0)
    model = Net(blocks=6, width=512).cuda().train()
    x = torch.randn(16 << 10, 512, device="cuda")
    model(x[:1]).sum().backward()
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    dry_run(model, find_regions(model), (x,), {}, torch.device("cuda"))
    # 512: PyTorch's fake mode makes one element, to be sure that the device has a context
    assert torch.cuda.max_memory_allocated() <= before + 512
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(state, torch.cuda.get_rng_state())
