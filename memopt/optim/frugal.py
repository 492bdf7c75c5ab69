"""FRUGAL: full-rank updates with a fraction of the optimizer state (arXiv 2411.07837, ICML 2025).

Each parameter of a *split* group is divided, anew every `update_gap` steps, into a part that a
state-full rule (AdamW) updates and a rest that a state-free rule (signSGD) updates:

    w <- w (1 - lr weight_decay)                              the whole tensor, first
    w <- w - lr state_full_lr_scale AdamW(g)                  on the chosen part
    w <- w - lr state_free_lr_scale f(g without that part)    on the rest

How this differs from the paper's code: the budget counts elements, not tensors; the state lives in
one arena that is reused at every switch; selections depend on (seed, round, name) only; for
subspaces the state-free update stays out of the state-full part (`complement="exact"`).
The two scales are independent (the paper's code multiplies them: its free one is our product).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from memopt.optim import checkpoint
from memopt.optim.execute import begin_replay, is_capturing, update_params
from memopt.optim.group_state import CLOCK, GroupState, state_keys
from memopt.optim.rules import state_free_rule, state_full_rule
from memopt.optim.settings import Settings, warn_of_no_effect
from memopt.optim.sharding import any_over_shards, as_sharded
from memopt.optim.tensors import local_part, shards_of

IMPLEMENTATIONS = ("auto", "native", "foreach", "reference")


class Frugal(Optimizer):
    """A split optimizer; see the module's text for the update and `docs/frugal.md` for choices.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either; a group may carry any
            argument below but `impl` and `foreach` as its own setting, and `split=False` to keep
            state for all of it.
        lr: learning rate of the whole group; a tensor is allowed.
        betas: AdamW's and Lion's coefficients; sgdm uses the first as its momentum.
        eps: added to AdamW's denominator.
        weight_decay: decoupled, at the group's learning rate, never scaled.
        density: share of the elements that have state, in [0, 1].
        update_gap: steps between switches.
        selection: "blocks" | "columns" | "rows" | "coordinates" | "svd" | "random" | "randperm".
        state_full: "adamw" | "lion" | "sgdm", or a registered rule.
        state_free: "sign" | "sgd" | "column_normalized" | "none", or a registered rule.
        state_full_lr_scale: factor on lr for the chosen part.
        state_free_lr_scale: factor on lr for the rest.
        on_switch: "reset" zeroes all moments and counters of split parameters; "project" carries
            what stays chosen; "keep" (svd and random only) leaves them as they are, as GaLore does.
        order: order of blocks: "random" | "ascending" | "descending" | "mirror".
        complement: "exact", or "reference" to let the state-free update leak into a subspace.
        quantize: "8bit" stores moments in blocks of 256.
        rounding: of bfloat16 weights and moments: "nearest", "stochastic"; "kahan" keeps the error
            of the weights in a tensor of their size.
        capturable: the step may be captured in a CUDA graph; see `begin_step`.
        seed: of the selections.
        impl: "native" (CUDA), "foreach", "reference"; "auto" takes native where it can run.
        maximize: ascend.
        foreach: True is impl="foreach", False impl="reference", for torch's sake.
        arena_density: the largest density that a schedule will set; default `density`.

    Raises:
        ValueError: for a setting out of range, complex parameters or sparse gradients.
    """

    def __init__(  # noqa: PLR0913 - torch's optimizers take their settings as arguments
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.25,
        update_gap: int = 200,
        selection: str = "blocks",
        state_full: str = "adamw",
        state_free: str = "sign",
        state_full_lr_scale: float = 1.0,
        state_free_lr_scale: float = 1.0,
        on_switch: str = "reset",
        order: str = "random",
        complement: str = "exact",
        quantize: str | None = None,
        rounding: str = "nearest",
        capturable: bool = False,
        seed: int = 0,
        impl: str = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        arena_density: float | None = None,
    ) -> None:
        if foreach is not None:
            asked = "foreach" if foreach else "reference"
            if impl not in ("auto", asked):
                raise ValueError(
                    f"foreach={foreach!r} means impl={asked!r}, but impl={impl!r} was given: say one"
                )
            impl = asked
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl={impl!r} is not known: choose one of {IMPLEMENTATIONS}")
        self._impl = impl
        self._groups: dict[int, GroupState] = {}
        self._probed = False
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "density": density,
            "update_gap": update_gap, "selection": selection, "state_full": state_full,
            "state_free": state_free, "state_full_lr_scale": state_full_lr_scale,
            "state_free_lr_scale": state_free_lr_scale, "on_switch": on_switch, "order": order,
            "complement": complement, "quantize": quantize, "rounding": rounding,
            "capturable": capturable, "maximize": maximize, "seed": seed, "split": True,
            "arena_density": arena_density, **CLOCK,
        }  # fmt: skip
        super().__init__(params, defaults)
        warn_of_no_effect(self.param_groups)

    # ------------------------------------------------------------------ groups
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its dict may carry any of the constructor's settings and `split`.

        The dict is copied: several optimizers can be built from the same groups.
        """
        if "impl" in param_group:
            raise ValueError("impl is the optimizer's, not a group's: give it to Frugal(...)")
        self._forget_removed_groups()
        super().add_param_group(dict(param_group))
        group = self.param_groups[-1]
        # A number of its own, as other libraries (DeepSpeed ZeRO) step groups one at a time and
        # show a list of one group meanwhile: the position in the list says nothing.
        group["number"] = 1 + max((g["number"] for g in self.param_groups[:-1]), default=-1)
        try:
            if group["arena_density"] is None:
                group["arena_density"] = group["density"]
            settings = Settings.of(group)
            settings.check_lr()
            state_full_rule(settings.state_full)
            state_free_rule(settings.state_free)
            _check_once(group)
            for param in group["params"]:
                _check_param(param, settings)
        except ValueError:
            self.param_groups.pop()
            raise

    def _forget_removed_groups(self) -> None:
        """Drop the state of groups that a user took out: where it lies followed from its group."""
        numbers = {group["number"] for group in self.param_groups}
        for number in self._groups.keys() - numbers:
            for param in self._groups.pop(number).home:
                self.state.pop(param, None)

    @staticmethod
    def _names(group: dict[str, Any]) -> dict[Tensor, str]:
        """Return the names selections depend on: from `named_parameters`, else "group.position".

        Names that are not as many as the parameters are those of tensors that were put into one.
        """
        params = group["params"]
        names = group.get("param_names") or []
        if len(names) != len(params):
            names = checkpoint.position_names(group)
        return dict(zip(params, names, strict=True))

    def _group_state(self, group: dict[str, Any], present: list[Tensor]) -> GroupState:
        """Return the group at work; built at its first gradient, and again for thawed parameters."""
        found = self._groups.get(group["number"])
        if found is not None:
            found.group, found.state = group, self.state  # either may have been replaced
            if found.knows(present):
                return found
        checkpoint.forget_keys(self.state, group["params"])
        known = set(present) | {p for p in group["params"] if p.requires_grad or p in self.state}
        members = [param for param in group["params"] if param in known]
        if found is None:
            built = GroupState(group, self.state, members, self._names(group))
        else:
            built = checkpoint.regroup(found, members, self._names(group))
        self._groups[group["number"]] = built
        return built

    # ------------------------------------------------------------------ stepping
    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient and were not stepped partially; end the call.

        Inside a compiled function it runs as it is.
        """
        return self._step(closure)

    @_disable_dynamo  # as torch.optim does it: imports nothing before the first call
    @torch.no_grad()
    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not is_capturing() and self._is_probe():
            return loss
        for group in self.param_groups:
            self._step_group(group, [p for p in group["params"] if p.grad is not None])
            found = self._groups.get(group["number"])
            if found is not None:
                found.stepped.clear()
                if found.open:
                    found.end_call()
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def step_partial(self, params: Iterable[Tensor]) -> None:
        """Update some parameters now, as part of the step that the next `step()` ends.

        The first partial step opens the call (and switches, if that is due). `step()` then skips
        what has been stepped, also if its gradient is still there. Gradients must be complete.

        Raises:
            ValueError: for a parameter that is not this optimizer's, has no gradient, or has been
                stepped in this call.
        """
        wanted = list(params)
        if len(set(wanted)) < len(wanted):
            raise ValueError(
                "step_partial got a parameter twice: a parameter can be stepped once in a step"
            )
        where: dict[Tensor, dict[str, Any]] = {}
        for param in wanted:
            group = self._group_of(param)
            if group is None:
                raise ValueError("step_partial got a parameter that this optimizer does not have")
            if param.grad is None:
                raise ValueError("step_partial got a parameter without a gradient")
            found = self._groups.get(group["number"])
            if found is not None and param in found.stepped:
                raise ValueError("a parameter can be stepped once in a step: call step() to end it")
            where[param] = group
        for group in self.param_groups:
            members = [param for param in wanted if where[param] is group]
            if members:
                self._step_group(group, members)
                self._groups[group["number"]].stepped.update(members)

    def _group_of(self, param: Tensor) -> dict[str, Any] | None:
        for group in self.param_groups:  # those at work know theirs: hooks call for every parameter
            found = self._groups.get(group["number"])
            if found is not None and param in found.home:
                return group
        holders = (g for g in self.param_groups if any(p is param for p in g["params"]))
        return next(holders, None)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        found = self._groups.get(group["number"])
        if found is not None and found.stepped:
            params = [param for param in params if param not in found.stepped]
        if not params:
            return
        for param in params:
            _check_grad(param)
        with _full_precision(params[0]):
            state = self._group_state(group, params)
            if not is_capturing():
                state.begin_call()
            elif not group["capturable"]:
                raise RuntimeError("a step is being captured: build Frugal with capturable=True")
            update_params(state, params, self._impl)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Do the host's part of a step whose kernels a CUDA graph is about to replay.

        Switches if that is due, counts the step, writes the learning rate and the counters to the
        device. Step eagerly at least once, capture `step()`, then call this before every replay.

        Raises:
            RuntimeError: where no graph has captured a step since the state was made or loaded, and
                inside a capture.
        """
        if is_capturing():  # a replay would copy what its host buffers hold by then
            raise RuntimeError("begin_step() is not for a graph: call it before the replay")
        groups = {group["number"]: group for group in self.param_groups}
        for number in groups.keys() & self._groups.keys():
            self._groups[number].group = groups[number]
        begun = [begin_replay(found) for found in self._groups.values()]  # all of them
        if not any(begun):
            raise RuntimeError(
                "begin_step() goes before the replay of a captured step(), and none was captured since"
                " the state was made or loaded: step eagerly once, capture step(), then replay"
            )

    def _is_probe(self) -> bool:
        """Handle the first step of a checkpoint library that wants to see the state's keys.

        `torch.distributed.checkpoint` calls `step()` with all-zero gradients on an empty optimizer.
        Nothing is allocated, chosen or counted then; `state` shows the keys, `state_dict()` makes
        the tensors. The update of an all-zero first gradient is the weight decay alone, for every
        rule. Ranks with shards of the same parameters decide together.
        """
        if self._groups or (self.state and not self._probed):
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return False
        if any_over_shards(params, any(bool(local_part(p.grad).any()) for p in params)):
            return False
        self._probed = True
        for group in self.param_groups:
            factor = 1 - float(group["lr"]) * group["weight_decay"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                self.state[param] = state_keys(group, param)
                if factor != 1:
                    local_part(param).mul_(factor)
        return True

    # ------------------------------------------------------------------ looking inside
    def state_full_mask(self, param: Tensor) -> Tensor:
        """Return which elements of a parameter have state in the current round: bool, its shape.

        Raises:
            ValueError: before the first step, and for svd and random, which select a subspace.
        """
        for found in self._groups.values():
            if param in found.home:
                bucket, i = found.home[param]
                part, entry = bucket.parts[i], bucket.entries[i]
                if part is not None:
                    return part.mask(entry.rows, entry.columns).view(local_part(param).shape)
        raise ValueError("the parameter has no state yet: masks exist from the first step on")

    def state_bytes(self) -> int:
        """Return the bytes of optimizer state that are allocated."""
        return sum(found.num_bytes() for found in self._groups.values())

    def move_state(self, device: torch.device | str | None) -> None:
        """Move all state to `device` between two steps; None brings it back beside the parameters.

        `step()` brings it back by itself.
        """
        for found in self._groups.values():
            found.move(None if device is None else torch.device(device))

    # ------------------------------------------------------------------ saving and loading
    def state_dict(self) -> dict[str, Any]:
        """Return settings, clock and state: tensors and plain values; fixed keys and shapes.

        Raises:
            RuntimeError: between `step_partial` and the `step()` that ends the call.
        """
        self._refuse_open("state_dict()")
        if self._probed and not self._groups:
            for group in self.param_groups:
                self._group_state(group, [p for p in group["params"] if p.requires_grad])
        state_dict = super().state_dict()
        self._show_shards(state_dict["state"])
        return state_dict

    def _refuse_open(self, what: str) -> None:
        if any(found.open for found in self._groups.values()):
            raise RuntimeError(f"a partial step is open: call step() before {what}")

    def _show_shards(self, shown: dict[Any, dict[str, Any]]) -> None:
        number = 0
        for group in self.param_groups:
            found = self._groups.get(group["number"])
            for param in group["params"]:
                if found is not None and param in found.home and number in shown:
                    shown[number] = as_sharded(*found.home[param], shown[number])
                number += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, without casting state to the parameters' dtype."""
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_open("copying or pickling it")
        return {**super().__getstate__(), "_impl": self._impl, "_probed": self._probed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._groups = {}
        checkpoint.rebuild_groups(self)


@contextmanager
def _full_precision(param: Tensor) -> Iterator[None]:
    """Leave autocast, which would do the projections of a step in low precision."""
    with ExitStack() as left:
        for kind in {"cpu", "cuda", local_part(param).device.type}:
            if torch.is_autocast_enabled(kind):
                left.enter_context(torch.autocast(kind, enabled=False))
        yield


def _check_once(group: dict[str, Any]) -> None:
    if len(set(group["params"])) < len(group["params"]):
        counts = Counter(group["params"])
        twice = next(i for i, param in enumerate(group["params"]) if counts[param] > 1)
        name = group["param_names"][twice] if group.get("param_names") else twice
        raise ValueError(
            f"parameter {name!r} is in the group {counts[group['params'][twice]]} times and would be"
            " stepped as often: list tied weights once, as model.parameters() does"
        )


def _check_param(param: Tensor, settings: Settings) -> None:
    shards_of(param)  # refuses what is not sharded by rows
    if param.is_complex():
        raise ValueError(
            f"Frugal does not take complex parameters (shape {tuple(param.shape)}): pass their real view"
        )
    if settings.rounding == "stochastic" and param.dtype == torch.float16:
        raise ValueError(
            "rounding='stochastic' is for bfloat16 weights; float16 has 'nearest', 'kahan'"
        )


def _check_grad(param: Tensor) -> None:
    grad = cast(Tensor, param.grad)
    if grad.layout != torch.strided:
        raise ValueError("Frugal does not take sparse gradients: use sparse=False in the embedding")
