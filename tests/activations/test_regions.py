"""Which modules are found as regions: those that the model really calls, whatever holds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.activations.regions import find_regions

WIDTH = 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.query(x)))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class PartsInLists(nn.Module):
    """As in vit-pytorch: `for norm, attention, norm, feed_forward in self.layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), FeedForward()])
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, attention, other_norm, feed_forward in self.layers:
            x = x + attention(norm(x))
            x = x + feed_forward(other_norm(x))
        return x


class PartsInDictionaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": Attention(), "feed": FeedForward()}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["mix"](x)
            x = x + layer["feed"](x)
        return x


class PartsInHolders(nn.Module):
    """A layer that is a module without a forward: its owner does the work."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(3):
            layer = nn.Module()
            layer.mix, layer.feed = Attention(), FeedForward()
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer.mix(x)
            x = x + layer.feed(x)
        return x


class CalledList(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = x + part(x)
        return x


class PartsInCalledLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CalledList([Attention(), FeedForward()]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


FOUND = {
    PartsInLists: ["layers.0.1", "layers.0.3"],
    PartsInDictionaries: ["layers.0.mix", "layers.0.feed"],
    PartsInHolders: ["layers.0.mix", "layers.0.feed"],
    PartsInCalledLists: ["layers.0"],
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", FOUND)
def test_what_is_found_is_called(kind, named):
    model = kind()
    names = [name for name, _ in find_regions(model, ["layers"] if named else None)]
    first = [name for name in names if name.startswith("layers.0")]
    assert first == FOUND[kind]
    assert len(names) == 3 * len(first)
    with memopt.optimize(model, regions=["layers"] if named else None, plan="recompute") as run:
        for _ in range(2):
            model(torch.ones(64, WIDTH)).sum().backward()
        assert run.trace is None or [r.name for r in run.trace.regions] == names
        model(torch.ones(64, WIDTH))
        assert run.trace is not None
        assert [r.name for r in run.trace.regions] == names


def test_regions_that_never_ran_are_noted():
    class Bypassing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(FeedForward() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block.down(nn.functional.gelu(block.up(x)))
            return x

    model = Bypassing()
    with memopt.optimize(model) as run:
        for _ in range(3):
            model(torch.ones(64, WIDTH)).sum().backward()
    assert any("no region ran" in note for note in run.report().notes)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FeedForward() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("plan", ["device", "recompute"])
def test_steps_end_where_the_loop_calls_the_regions_itself(plan, with_optimizer):
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if with_optimizer else None
    with memopt.optimize(model, optimizer, plan=plan) as run:
        for _ in range(7):
            x = torch.ones(64, WIDTH)
            for block in model.blocks:
                x = x + block(x)
            x.sum().backward()
            if optimizer is not None:
                optimizer.step()
    assert run.report().num_steps == 7


@pytest.mark.parametrize("plan", ["device", "recompute"])
def test_a_model_under_a_transform_of_torch_func_runs_plainly(plan):
    torch.manual_seed(0)
    model, x = Blocks(), torch.ones(64, WIDTH)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    expected = torch.func.grad(loss)(weights)
    with memopt.optimize(model, plan=plan):
        for _ in range(3):
            model(x).sum().backward()
            got = torch.func.grad(loss)(weights)
            assert all(torch.equal(got[name], expected[name]) for name in expected)
