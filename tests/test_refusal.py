"""A budget that no plan keeps is refused in the first step, before weights change, with a number that works."""

from __future__ import annotations

import copy
import gc
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memopt
from memopt._states import measure_states, optimizer_peak_bytes

MIB = 1 << 20


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def llama_loss(model):
    tokens = torch.randint(0, 512, (2, 512), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, labels=tokens).loss


def cnn():
    layers = []
    for width_in, width in ((3, 24), (24, 24), (24, 24), (24, 24)):
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 5))


def cnn_loss(model):
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(model(x), torch.arange(8) % 5)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a = nn.Linear(width, 4 * width)
        self.b = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.b(F.gelu(self.a(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks=5, width=128):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 16)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net_loss(model):
    x = torch.randn(2048, 128, generator=torch.Generator().manual_seed(1))
    return model(x).square().mean()


KINDS = {"llama": (llama, llama_loss), "cnn": (cnn, cnn_loss), "blocks": (Net, net_loss)}


def build(kind):
    torch.manual_seed(0)
    model = KINDS[kind][0]().train()
    return model, torch.optim.AdamW(model.parameters()), KINDS[kind][1]


def train(model, optimizer, loss_of, budget, *, steps=3, plan="auto"):
    """Return the report; whatever is refused is refused with everything as it was."""
    with memopt.optimize(model, optimizer, budget=budget, plan=plan) as run:
        for _ in range(steps):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    return run.report()


def named_bytes(error):
    return int(re.search(r"(\d+) MiB \((\d+) bytes\)", str(error.value))[2])


def refused(model, optimizer, loss_of, device_bytes, **budget):
    """Assert that a step under this budget is refused and changes nothing; return the number it names."""
    weights = copy.deepcopy([p.detach() for p in model.parameters()])
    states = copy.deepcopy(optimizer.state_dict()["state"])
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(memopt.BudgetError) as error:
        train(model, optimizer, loss_of, memopt.Budget(device=device_bytes, **budget), steps=1)
    assert "host memory" not in str(error.value), "it is the device here"
    assert "give an SSD directory" in str(error.value)
    assert all(map(torch.equal, weights, (p.detach() for p in model.parameters())))
    after = optimizer.state_dict()["state"]
    assert states.keys() == after.keys()
    assert all(torch.equal(states[i][k], after[i][k]) for i in states for k in states[i])
    assert {name: dict(vars(m)).keys() for name, m in model.named_modules()} == {
        name: found.keys() for name, found in attributes.items()
    }
    optimizer.zero_grad()
    found = named_bytes(error), str(error.value)
    del error
    gc.collect()  # the error's traceback holds the refused step's tensors, in a cycle: the next try would count them
    return found


def smallest_of(kind, **budget):
    """Return what the planner says of a step that had room."""
    from memopt.plan import smallest_budget
    from memopt.plan.cost import assumed_hardware

    model, optimizer, loss_of = build(kind)
    with memopt.optimize(model, optimizer, plan="recompute") as run:
        loss_of(model).backward()
        optimizer.step()
        trace = run.trace
    return smallest_budget(trace, assumed_hardware("cpu"))


def climb(model, optimizer, loss_of, device_bytes):
    """Enter with the number that each refusal names until one works; return (numbers, report)."""
    numbers = [device_bytes]
    while True:
        try:
            return numbers, train(model, optimizer, loss_of, memopt.Budget(device=numbers[-1]))
        except memopt.BudgetError as error:
            optimizer.zero_grad()
            number = int(re.search(r"MiB \((\d+) bytes\)", str(error))[1])
            assert number > numbers[-1], "a refusal must name more than what was refused"
            numbers.append(number)
            assert len(numbers) < 40


def without_dry_run(monkeypatch):
    """The step itself must find out."""

    def cannot(*_):
        raise RuntimeError("no dry run")

    monkeypatch.setattr("memopt._refusal.dry_run", cannot)


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_budgets_lead_to_one_that_works_and_less_is_refused(kind, monkeypatch):
    without_dry_run(monkeypatch)
    model, optimizer, loss_of = build(kind)
    states = measure_states(model, optimizer)
    number, message = refused(model, optimizer, loss_of, 4 * states.param_bytes + 2 * MIB)
    assert "is a lower bound" in message
    assert "the forward of" in message or "the backward of" in message
    numbers, report = climb(model, optimizer, loss_of, number)
    assert report.measured.device_bytes <= numbers[-1] <= 1.02 * smallest_of(kind)
    model, optimizer, loss_of = build(kind)
    refused(model, optimizer, loss_of, int(0.9 * numbers[-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_comes_through_is_judged_before_the_optimizer(kind, monkeypatch):
    """One MiB below what works: the planner's slack, so no tensor exceeds the budget on the way."""
    without_dry_run(monkeypatch)
    model, optimizer, loss_of = build(kind)
    enough = smallest_of(kind)
    number, message = refused(model, optimizer, loss_of, enough - MIB)
    assert number == enough or "lower bound" in message
    assert train(model, optimizer, loss_of, memopt.Budget(device=enough)).num_steps == 3


def test_the_judgement_before_the_optimizer_is_exact(monkeypatch):
    """Where the optimizer's own moment decides, too: all parameters stepped at once."""
    without_dry_run(monkeypatch)
    torch.manual_seed(0)
    model = Net(width=256)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    param_bytes = measure_states(model, optimizer).param_bytes

    def loss_of(model):
        return model(torch.ones(8, 256)).square().mean()

    number, message = refused(model, optimizer, loss_of, int(4.6 * param_bytes))
    assert "the optimizer's step" in message
    assert "lower bound" not in message
    assert number > 4.9 * param_bytes
    assert train(model, optimizer, loss_of, memopt.Budget(device=number)).num_steps == 3
    assert (
        train(model, optimizer, loss_of, memopt.Budget(device=number)).measured.device_bytes
        > 0.97 * number
    )


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_what_an_optimizers_step_holds_is_known_before(foreach, stepped):
    from memopt.memory.accounting import AccountedMemory

    model, _, loss_of = build("blocks")
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    loss_of(model).backward()
    if stepped:
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    expected = optimizer_peak_bytes(optimizer)
    after = optimizer.state_dict()
    assert str(before) == str(after)
    with AccountedMemory() as accounted:
        for p in model.parameters():
            accounted.track(p)
            accounted.track(p.grad)
        for state in optimizer.state.values():
            for value in state.values():
                accounted.track(value)
        level = accounted.current_bytes
        accounted.reset_peak()
        optimizer.step()
    assert expected == accounted.peak_bytes - level


def test_without_an_optimizer_the_end_of_backward_judges(monkeypatch):
    without_dry_run(monkeypatch)
    model, optimizer, loss_of = build("blocks")
    states = measure_states(model, None)
    with memopt.optimize(model, plan="recompute") as run:
        loss_of(model).backward()
        model.zero_grad()  # gradients that stand at the next forward count
        loss_of(model)
        trace = run.trace
    from memopt.plan import smallest_budget
    from memopt.plan.cost import assumed_hardware

    model.zero_grad()
    enough = smallest_budget(trace, assumed_hardware("cpu"))
    stepped = []
    with (
        pytest.raises(memopt.BudgetError, match=r"the smallest that works|lower bound"),
        memopt.optimize(model, budget=memopt.Budget(device=enough - MIB)),
    ):
        loss_of(model).backward()
        stepped.append(optimizer.step())
    assert not stepped
    assert states.param_bytes > 0
    model.zero_grad()
    with memopt.optimize(model, budget=memopt.Budget(device=enough)) as run:
        for _ in range(2):
            loss_of(model).backward()
            model.zero_grad()
    assert run.report().num_steps == 2


def test_what_is_there_only_because_the_step_is_traced_is_no_reason_to_refuse(tmp_path):
    """With SSD, inputs leave; copies of inputs that the tracer keeps are no plan's."""
    model, optimizer, loss_of = build("blocks")
    ssd = f"{tmp_path}:1GiB"
    from memopt.plan import smallest_budget
    from memopt.types.hardware import Hardware

    with memopt.optimize(model, optimizer, plan="recompute", budget=memopt.Budget(ssd=ssd)) as run:
        loss_of(model).backward()
        optimizer.step()
        trace = run.trace
        staging = run._resources.staging_bytes
    hardware = Hardware(
        device="cpu", name="x", d2h_bytes_per_s=1e9, h2d_bytes_per_s=1e9,
        ssd_write_bytes_per_s=1e9, ssd_read_bytes_per_s=1e9, source="x",
    )  # fmt: skip
    enough = smallest_budget(trace, hardware, ssd_bytes=1 << 30, staging_bytes=staging)
    optimizer.zero_grad()
    report = train(model, optimizer, loss_of, memopt.Budget(device=enough, ssd=ssd))
    assert report.num_steps == 3
    refused(model, optimizer, loss_of, enough - 2 * MIB, ssd=ssd)


def test_the_loop_may_go_on_after_a_refusal_was_caught():
    model, optimizer, loss_of = build("blocks")
    weights = copy.deepcopy([p.detach() for p in model.parameters()])
    budget = memopt.Budget(device=4 * measure_states(model, optimizer).param_bytes + 2 * MIB)
    with memopt.optimize(model, optimizer, budget=budget):
        for _ in range(2):
            with pytest.raises(memopt.BudgetError):
                loss_of(model).backward()
            optimizer.zero_grad()
    assert all(map(torch.equal, weights, (p.detach() for p in model.parameters())))
    loss_of(model).backward()
    optimizer.step()


def test_out_of_memory_on_a_device_names_what_it_would_take(capsys):
    """PyTorch's own words tell what was held and asked for; nothing else may be said where they do not."""
    words = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
        "9.11 GiB is free. 30.00 GiB allowed; Of the allocated memory 29.50 GiB is allocated by PyTorch, and "
        "1.00 MiB is reserved by PyTorch but unallocated."
    )
    model, _, loss_of = build("blocks")
    for message, expected in ((words, True), ("no more", False)):
        with pytest.raises(torch.OutOfMemoryError), memopt.optimize(model, plan="recompute"):
            loss_of(model)
            raise torch.OutOfMemoryError(message)
        printed = capsys.readouterr().err
        found = re.search(r"(\d+) MiB \((\d+) bytes\) is a lower bound", printed)
        assert found is not None
        assert (int(found[2]) >= 31.5 * 1024**3) == expected
