"""Checks of host memory: what this process may use, what can be page-locked, and how far it is from the GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from memopt.cli.checks.base import Check, Context, Gpu, Status
from memopt.types.sizes import format_bytes

_LOCK_BYTES = 256 << 20
_QUICK_LOCK_BYTES = 4 << 20
_LITTLE_BYTES = 2 << 30


def memory(context: Context) -> Sequence[Check]:
    """What the cgroup allows and leaves, beside what the machine has."""
    import psutil

    from memopt.memory import host

    proc = context.root / "proc/self"
    machine_bytes = int(psutil.virtual_memory().total)
    facts = host.host_facts(proc=proc, root=context.root)
    version = host.cgroup_version(proc=proc, root=context.root)
    limited = facts.limit_bytes < machine_bytes
    figures = {
        "machine_bytes": machine_bytes,
        "limit_bytes": facts.limit_bytes,
        "free_bytes": facts.free_bytes,
        "cgroup_version": version,
        "limited_by_cgroup": limited,
    }
    left = f"{format_bytes(facts.free_bytes)} left"
    if version is None:
        found = f"no cgroup seen; the machine has {format_bytes(machine_bytes)}, {left}"
    elif limited:
        found = (
            f"cgroup v{version} allows {format_bytes(facts.limit_bytes)} of the machine's "
            f"{format_bytes(machine_bytes)}, {left}"
        )
    else:
        found = f"cgroup v{version} sets no limit; the machine has {format_bytes(machine_bytes)}, {left}"
    little = facts.free_bytes < max(_LITTLE_BYTES, facts.limit_bytes // 20)
    todo = (
        "end other programs or raise the memory limit (docker run --memory, Slurm --mem): "
        "the kernel kills at the limit"
        if little
        else ""
    )
    status: Status = "weak" if little else "ok"
    return [Check(name="host memory", status=status, found=found, todo=todo, figures=figures)]


def page_locking(context: Context) -> Sequence[Check]:
    """Limits on locked memory, and whether CUDA really locks some."""
    from memopt.memory.host import host_facts

    soft, hard = _memlock_limits()
    wsl = _is_wsl(context)
    figures: dict[str, Any] = {"memlock_soft_bytes": soft, "memlock_hard_bytes": hard, "wsl": wsl}
    limit = "no limit" if soft is None else f"limit {format_bytes(soft)}"
    where = f"RLIMIT_MEMLOCK {limit}" + (", WSL" if wsl else "")
    left = host_facts(proc=context.root / "proc/self", root=context.root).free_bytes
    figures["host_free_bytes"] = left  # locked pages count against the cgroup as all others do
    if not context.gpus:
        found = f"nothing is page-locked without CUDA ({where})"
        return [Check(name="page-locked memory", status="absent", found=found, figures=figures)]
    import torch

    from memopt.memory.rates import measure_page_locking

    context.progress("page-locking", 0.0)
    nbytes = _QUICK_LOCK_BYTES if context.quick or left < 4 * _LOCK_BYTES else _LOCK_BYTES
    rate = measure_page_locking(torch.device("cuda", context.gpus[0].index), nbytes)
    figures |= {"locked_bytes": 0 if rate.reason else nbytes, "bytes_per_s": rate.bytes_per_s}
    return [
        _judge_locking(rate.reason, nbytes, where, wsl=wsl, quick=context.quick, figures=figures)
    ]


def _judge_locking(
    reason: str, nbytes: int, where: str, *, wsl: bool, quick: bool, figures: dict[str, Any]
) -> Check:
    name = "page-locked memory"
    if reason:
        todo = (
            "copies will not run beside compute; raise the limits (ulimit -l unlimited, docker run "
            "--ulimit memlock=-1, a larger memory cgroup)"
        )
        if wsl:
            todo += "; WSL allows only part of memory to be page-locked: give it more in .wslconfig, or use Linux"
        return Check(
            name=name, status="weak", found=f"{reason} ({where})", todo=todo, figures=figures
        )
    speed = "" if quick else f" at {figures['bytes_per_s'] / 1e9:.3g} GB/s"
    found = f"{format_bytes(nbytes)} locked{speed} ({where})"
    if wsl:
        todo = "WSL allows only part of memory to be page-locked: name a small host budget"
        return Check(name=name, status="weak", found=found, todo=todo, figures=figures)
    return Check(name=name, status="ok", found=found, figures=figures)


def _memlock_limits() -> tuple[int | None, int | None]:
    """Return the soft and hard limit in bytes; None: no limit."""
    import resource

    return tuple(  # type: ignore[return-value]  # two in, two out
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )


def _is_wsl(context: Context) -> bool:
    return "microsoft" in (context.read("proc/sys/kernel/osrelease") or "").lower()


def numa(context: Context) -> Sequence[Check]:
    """Whether the CPUs that this process may use are on the GPU's own node."""
    nodes = _nodes(context)
    allowed = _allowed_cpus()
    figures: dict[str, Any] = {
        "nodes": {str(node): sorted(cpus) for node, cpus in nodes.items()},
        "allowed_cpus": sorted(allowed),
        "mems_allowed": _status_field(context, "Mems_allowed_list"),
    }
    if not nodes:
        found = f"the system shows no NUMA nodes; {len(allowed)} CPUs may be used"
        return [Check(name="NUMA", status="absent", found=found, figures=figures)]
    if not context.gpus or len(nodes) == 1:
        used = [node for node, cpus in nodes.items() if cpus & allowed]
        where = ", ".join(map(str, used))
        found = f"{_count(len(nodes), 'node')}; {_count(len(allowed), 'CPU')} on node {where} may be used"
        return [Check(name="NUMA", status="ok", found=found, figures=figures)]
    return [
        _judge_numa(gpu, _node_of(context, gpu), nodes, allowed, figures) for gpu in context.gpus
    ]


def _judge_numa(
    gpu: Gpu,
    node: int | None,
    nodes: dict[int, frozenset[int]],
    allowed: frozenset[int],
    figures: dict[str, Any],
) -> Check:
    name = f"NUMA of GPU {gpu.index}"
    figures = {**figures, "gpu_node": node}
    if node is None or node not in nodes:
        found = f"{len(nodes)} nodes; the system does not say which one the GPU is on (virtual machines hide it)"
        return Check(name=name, status="absent", found=found, figures=figures)
    near = allowed & nodes[node]
    figures["near_cpus"] = sorted(near)
    found = f"GPU on node {node}; {len(near)} of the {len(allowed)} CPUs that may be used are there"
    if near:
        return Check(name=name, status="ok", found=found, figures=figures)
    todo = (
        f"copies cross the link between sockets: run with numactl --cpunodebind={node} --membind={node}, "
        "or ask the scheduler for CPUs near the GPU"
    )
    return Check(name=name, status="weak", found=found, todo=todo, figures=figures)


def _nodes(context: Context) -> dict[int, frozenset[int]]:
    """Return the CPUs of each node, as /sys tells them."""
    nodes = {}
    for path in sorted((context.root / "sys/devices/system/node").glob("node[0-9]*")):
        text = context.read(f"sys/devices/system/node/{path.name}/cpulist")
        if text is not None:
            nodes[int(path.name[4:])] = parse_cpulist(text)
    return nodes


def _node_of(context: Context, gpu: Gpu) -> int | None:
    text = context.read(f"sys/bus/pci/devices/{gpu.pci}/numa_node") if gpu.pci else None
    return int(text) if text is not None and int(text) >= 0 else None


def parse_cpulist(text: str) -> frozenset[int]:
    """Return the numbers in the kernel's list format ("0-3,8,10-11")."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _allowed_cpus() -> frozenset[int]:
    try:
        cpus: Iterable[int] = os.sched_getaffinity(0)
    except (AttributeError, OSError):  # not Linux
        cpus = range(os.cpu_count() or 1)
    return frozenset(cpus)


def _status_field(context: Context, name: str) -> str | None:
    found = re.search(rf"^{name}:\s*(\S+)$", context.read("proc/self/status") or "", re.MULTILINE)
    return found[1] if found else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
