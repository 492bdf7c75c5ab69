"""Loading state without casting it, and rebuilding what a checkpoint does not carry.

`torch.optim.Optimizer.load_state_dict` casts floating-point state to the parameter's dtype and
gives no way out: with bfloat16 weights it turns uint8 codes and float32 scales into bfloat16, and
the number 20000001 into 20054016. So the loading is done here, with torch's hooks and checks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.optim.bucket import BASIS, BASIS_ROUND, COMPENSATION, Bucket
from memopt.optim.group_state import STEP, GroupState, Keys
from memopt.optim.tensors import local_part

if TYPE_CHECKING:
    from memopt.optim.frugal import Frugal


def load(optimizer: Frugal, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict into an optimizer with the same parameters."""
    loaded = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, loaded)
        loaded = loaded if replaced is None else replaced
    groups, saved_groups = optimizer.param_groups, loaded["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        raise ValueError(
            f"the state has parameter groups of sizes {[len(g['params']) for g in saved_groups]},"
            f" this optimizer {[len(g['params']) for g in groups]}: build it with the same groups"
        )
    before = [dict(group) for group in groups], dict(optimizer.state), optimizer._groups
    try:
        _take(optimizer, loaded["state"], saved_groups)
    except BaseException:  # as if nothing had been loaded
        for group, kept in zip(groups, before[0], strict=True):
            group.clear()
            group.update(kept)
        optimizer.state.clear()
        optimizer.state.update(before[1])
        optimizer._groups = before[2]
        raise
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _take(
    optimizer: Frugal, states: Mapping[Any, Any], saved_groups: Sequence[Mapping[str, Any]]
) -> None:
    by_id: dict[Any, Tensor] = {}
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        by_id.update(zip(saved["params"], group["params"], strict=True))
        missing = sorted(group.keys() - saved.keys() - {"param_names"})
        if missing:
            raise ValueError(f"the state is not one of Frugal: its groups lack {missing}")
        # Copies: an lr may be a tensor, which the saved run's scheduler goes on changing.
        group.update({k: copy.deepcopy(v) for k, v in saved.items() if k != "params"})
        if "param_names" in group and "param_names" not in saved:
            # The choice of every round follows from the names: those that the saved run went by.
            group["param_names"] = position_names(group)
    optimizer.state.clear()
    optimizer._groups = {}
    for key, values in states.items():
        if not isinstance(key, Tensor) and key not in by_id:
            raise ValueError(
                f"the state has values of parameter {key!r}, which is in none of its groups"
            )
        param = by_id[key] if not isinstance(key, Tensor) else key
        optimizer.state[param] = {k: _placed(k, v, param) for k, v in values.items()}
    rebuild_groups(optimizer)


def position_names(group: Mapping[str, Any]) -> list[str]:
    """Return the names of a group's parameters that have none: "group.position"."""
    return [f"{group['number']}.{i}" for i in range(len(group["params"]))]


def _placed(name: str, value: Any, param: Tensor) -> Any:
    """Bring a state tensor to the parameter's device, in its own dtype, as a copy."""
    if not isinstance(value, Tensor):
        return value
    if name in {STEP, BASIS_ROUND}:  # some libraries make tensors of numbers
        return int(value.item())
    return local_part(value).detach().to(device=local_part(param).device, copy=True)


def forget_keys(state: MutableMapping[Tensor, Any], params: Sequence[Tensor]) -> None:
    """Drop what a probing step has shown, before real state takes its place."""
    for param in params:
        if isinstance(state.get(param), Keys):
            del state[param]


@torch.no_grad()
def rebuild_groups(optimizer: Frugal) -> None:
    """Build arenas for the state that an optimizer has (after a load, a copy or an unpickling)."""
    for group in optimizer.param_groups:
        forget_keys(optimizer.state, group["params"])
        members = [param for param in group["params"] if param in optimizer.state]
        if members:
            names = optimizer._names(group)
            optimizer._groups[group["number"]] = GroupState(group, optimizer.state, members, names)


@torch.no_grad()
def regroup(old: GroupState, members: Sequence[Tensor], names: dict[Tensor, str]) -> GroupState:
    """Rebuild a group that has got more parameters; what had state keeps it where it still fits."""
    kept: dict[Tensor, dict[str, Any]] = {}
    for param, (bucket, i) in old.home.items():
        values = old.state.pop(param)
        others = (COMPENSATION, BASIS, BASIS_ROUND, *old.memory_names(bucket.entries[i]))
        kept[param] = {name: values[name] for name in (STEP, *others) if name in values}
    new = GroupState(old.group, old.state, members, names)
    for param, values in kept.items():
        bucket, i = new.home[param]
        basis = values.pop(BASIS, None)
        if basis is not None:
            _keep_basis(bucket, i, basis, values[BASIS_ROUND])
    settings = new.settings()
    for bucket in (*old.buckets, *new.buckets):
        if bucket.generation == 0:
            bucket.restore(settings, old.group["round"], old.group["active_density"])
    new.stepped, new.open = old.stepped, old.open
    for param, values in kept.items():
        step = values.pop(STEP)
        new.state[param].update(values)
        if _carry(old.home[param], new.home[param]):
            new.state[param][STEP] = step
    return new


def _keep_basis(bucket: Bucket, i: int, basis: Tensor, round_: int) -> None:
    stored = bucket.bases[i]
    assert stored is not None
    stored.copy_(basis)
    bucket.basis_rounds[i] = round_


def _carry(source: tuple[Bucket, int], target: tuple[Bucket, int]) -> bool:
    """Bring one parameter's moments from arena to arena within a round; False if there are none."""
    (before, j), (after, i) = source, target
    old, new = before.parts[j], after.parts[i]
    if old is None or new is None or type(old) is not type(new):
        return False
    start, dtype = before.offsets[j], torch.float32 if before.arena.quantized else before.dtype
    moments = before.arena.load(start, start + old.num_slots, dtype)
    if old.num_slots != new.num_slots:  # blocks: the budget has grown
        signs = [moment.signed for moment in before.arena.moments]
        moments = [
            new.carry(old, value, signed=signed)
            for value, signed in zip(moments, signs, strict=True)
        ]
    after.arena.save(after.offsets[i], moments, None)
    return True
