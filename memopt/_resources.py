"""What a session holds of the machine: budget, meter, transfers; opened together, closed together."""

from __future__ import annotations

import os
import threading
from collections import Counter
from typing import Any

import torch
from torch.nn import Module

from memopt._probing import KeptRates
from memopt._states import (
    expected_grad_bytes,
    measure_states,
    missing_optimizer_bytes,
    optimizer_tensors,
)
from memopt.activations.spill import SpillArea
from memopt.activations.transfers import CpuTransfers, Transfers
from memopt.io import Engine, ExtentStore, open_engine
from memopt.io.depth import LONGEST_QUEUE, depth_for
from memopt.memory._slab import PAGE_BYTES
from memopt.memory.accounting import AccountedMemory
from memopt.memory.host import host_facts, reset_peak_resident, resolve_budget
from memopt.memory.link import measure_hardware
from memopt.memory.malloc import HeapTrimmer
from memopt.memory.meter import CpuMeter, CudaMeter, Meter
from memopt.memory.pinned import HostPool
from memopt.types.budget import Budget, ResolvedBudget
from memopt.types.errors import BudgetError, ConfigError
from memopt.types.hardware import Hardware
from memopt.types.plan import Placement, Plan
from memopt.types.trace import StepTrace

_MIN_STAGING_BYTES = 32 << 20
_MAX_STAGING_BYTES = 256 << 20
_STAGING_SHARE = 16
_USABLE_SHARE = 0.95
"""Of the host memory left: what tensors may take before the step is ended, where the device is the CPU."""
_MOST_STATES = 8
"""No optimizer in use keeps more than this many times the parameters' bytes."""

TRIMS_HOST = False
"""Whether host memory that only an earlier plan needed is unlocked beside the steps of the next one.

Off: it costs no time while it is mapped, and how long a kernel waits while it leaves has not been measured on a device
(tests/memory/test_pinned_gpu.py, test_trimming_beside_compute, measures it)."""


class Resources:
    """Budget, meter and transfers of one session.

    Args:
        device: where the model's parameters are.
        budget: resolved.
        meter: memory and clock.
        transfers: off the device and back.
        host: page-locked blocks on CUDA.
        io: I/O engine and extent store, or None.
        accounted: the accounting mode on CPU.
    """

    def __init__(
        self,
        device: torch.device,
        budget: ResolvedBudget,
        meter: Meter,
        transfers: Transfers,
        host: HostPool | None,
        io: tuple[Engine, ExtentStore] | None,
        accounted: AccountedMemory | None,
    ) -> None:
        self.device = device
        self.budget = budget
        self.meter = meter
        self.transfers = transfers
        self.host = host
        self.spill = transfers.spill
        self.io = io
        self.accounted = accounted
        self.notes: list[str] = list(budget.notes)
        self.probe_notes: list[str] = []
        self.closed = False
        self._trimmer: HeapTrimmer | None = None
        self._thread = threading.get_ident()
        self._fraction: float | None = None
        self._expandable = False

    @property
    def staging_bytes(self) -> int:
        """Staging buffers count against the device budget where the device is host memory."""
        return self.spill.staging.cap_bytes if self.spill is not None else 0

    def beside_bytes(self) -> int:
        """Staging buffers mapped now, where the device is host memory: no tensor, but the device's."""
        if self.accounted is None or self.spill is None:
            return 0
        return self.spill.staging_bytes()[0]

    @property
    def safest_input(self) -> Placement:
        """Where region inputs go in the first step: off the device when there is a place."""
        if self.device.type == "cuda" and self.budget.host_bytes > 0:
            return "host"
        return "ssd" if self.io is not None else "device"

    def hardware(self) -> Hardware:
        """Rates of the ways off the device: kept by `memopt probe`, and measured where it kept none."""
        paths = [directory.path for directory in self.budget.ssd]
        kept = KeptRates.find(self.device, paths, self.io[0].name if self.io else "")
        hardware = kept.hardware(None if kept.complete else self._measure(with_ssd=not kept.ssd))
        self.probe_notes = list(kept.notes)
        if kept.link or kept.ssd:
            self.probe_notes.append(f"transfer rates: {hardware.source}")
        return hardware

    def _measure(self, *, with_ssd: bool) -> Hardware:
        if self.io is None or not with_ssd:
            return measure_hardware(self.device, self.host, None)
        return measure_hardware(self.device, self.host, self.io[1])

    @property
    def is_locking(self) -> bool:
        """Whether host memory for the plan in force is still being locked."""
        return self.host is not None and self.host.is_locking

    def lock(self, plan: Plan, trace: StepTrace) -> None:
        """Begin to lock a plan's host memory, in the background."""
        if self.host is not None:
            self.host.reserve(dict(_sizes_on("host", plan, trace)))

    def is_locked(self, at_most_s: float) -> bool:
        """Wait for what is being locked, for so many seconds; return whether all of it is."""
        return self.host is None or self.host.settle(at_most_s)

    def pageable_notes(self) -> list[str]:
        """Say that CUDA refused to page-lock the session's host memory, where it did."""
        pools = [self.host, self.spill.staging if self.spill is not None else None]
        reasons = [pool.stats().unlocked_reason for pool in pools if pool is not None]
        if self.device.type != "cuda":
            return []
        return [
            f"host memory is pageable, so copies do not run beside compute: {reason}"
            for reason in reasons
            if reason
        ]

    def prepare(self, plan: Plan, trace: StepTrace) -> None:
        """Give back what only the plan before needed; lock what the plan's host memory lacks."""
        if self.spill is not None:
            self.spill.staging.trim()
        if self.io is not None:
            self.io[0].set_queue_depth(self._depth_for(_sizes_on("ssd", plan, trace)))
        if self.host is None:
            return
        torch.cuda.empty_cache()
        self.lock(plan, trace)
        if TRIMS_HOST:
            self.host.trim_beside(_sizes_on("host", plan, trace))

    def _depth_for(self, sizes: Counter[int]) -> int:
        """Return how many blocks fill the disks with tensors of these sizes; all that is on its way is in staging."""
        return depth_for(
            sizes, num_directories=len(self.budget.ssd), in_flight_bytes=self.staging_bytes
        )

    def cap_allocator(self) -> None:
        """Hold the caching allocator at the device budget."""
        if self.device.type != "cuda":
            return
        self._expandable = _allocator_setting("expandable_segments:True")
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        self._fraction = _current_fraction(self.device)
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, self.budget.device_bytes / total), self.device
        )

    def watch_heap(self, accounted: AccountedMemory) -> None:
        """Keep the resident set near what tensors need, where the device is host memory."""
        self._trimmer = HeapTrimmer(accounted)
        self.notes.append(self._trimmer.start())

    def check_thread(self) -> None:
        """Refuse to stop in another thread: its accounting mode can only be popped where it was pushed."""
        if self.accounted is not None and threading.get_ident() != self._thread:
            raise ConfigError(
                "stop() was called in another thread than start(): without CUDA the session counts "
                "tensors in the thread that started it; call stop() there"
            )

    def close(self) -> None:
        """Give everything back."""
        if self.closed:
            return
        self.closed = True
        if self._fraction is not None:
            torch.cuda.set_per_process_memory_fraction(self._fraction, self.device)
        if self._expandable:
            _allocator_setting("expandable_segments:False")
        try:
            self.transfers.close()
        finally:
            try:
                if self.io is not None:
                    self.io[0].close()
            finally:  # a failed write that nobody waited for must not leave the mode on the stack
                if self.accounted is not None:
                    self.accounted.__exit__(None, None, None)
                if self._trimmer is not None:
                    self._trimmer.stop()


def open_resources(
    model: Module,
    optimizer: torch.optim.Optimizer | None,
    spec: Budget | None,
    io_engine: Any,
    asked_plan: str | Plan,
) -> Resources:
    """Resolve the budget, refuse what cannot work, open files and the accounting mode."""
    device = _device_of(model)
    on_cpu = device.type == "cpu"
    budget = _resolve(spec, device)
    _check_plan(asked_plan, budget, on_cpu=on_cpu)
    _check_states(model, optimizer, budget)
    notes: list[str] = []
    io = None
    if budget.ssd:
        engine = open_engine(
            io_engine,
            queue_depth=depth_for({}, num_directories=len(budget.ssd)),
            max_queue_depth=LONGEST_QUEUE,
            directory=budget.ssd[0].path,
        )
        if engine.reason:
            notes.append(f"I/O engine {engine.name}: {engine.reason}")
        try:
            io = engine, ExtentStore([(d.path, d.size_bytes) for d in budget.ssd], engine)
        except BaseException:
            engine.close()
            raise
    elif io_engine != "auto":
        notes.append(f"engine={io_engine!r} has no effect: the budget names no SSD directory")
    accounted = None
    meter: Meter
    if on_cpu:
        accounted = AccountedMemory()
        _track_states(accounted, model, optimizer)
        accounted.limit_bytes = accounted.current_bytes + int(
            _USABLE_SHARE * host_facts().free_bytes
        )
        meter = CpuMeter(accounted)
    else:
        meter = CudaMeter(device)
    transfers, host = _open_transfers(device, budget, io)
    resources = Resources(device, budget, meter, transfers, host, io, accounted)
    resources.notes.extend(notes)
    if transfers.chain_reason:
        resources.notes.append(f"SSD transfers are driven from Python: {transfers.chain_reason}")
    if accounted is not None:
        accounted.__enter__()
        resources.watch_heap(accounted)
    resources.cap_allocator()
    reset_peak_resident()
    return resources


def _sizes_on(placement: Placement, plan: Plan, trace: StepTrace) -> Counter[int]:
    """Count the tensors of each size that the plan's regions place there."""
    inputs = {r.name: r.input_nbytes for r in trace.regions}
    sizes: Counter[int] = Counter()
    for region in plan.regions:
        sizes.update(o.nbytes for o in region.ops if o.placement == placement)
        if region.input == placement and not region.plain:
            sizes[inputs.get(region.name, 0)] += 1
    return sizes


def _open_transfers(
    device: torch.device, budget: ResolvedBudget, io: tuple[Engine, ExtentStore] | None
) -> tuple[Transfers, HostPool | None]:
    spill = None
    host_bytes = budget.host_bytes
    if io is not None:
        base = budget.device_bytes if device.type == "cpu" else host_bytes
        cap = max(_MIN_STAGING_BYTES, min(_MAX_STAGING_BYTES, base // _STAGING_SHARE))
        spill = SpillArea(io[1], HostPool(cap, register=device.type == "cuda"))
        host_bytes = max(0, host_bytes - cap)
    if device.type == "cpu":
        return CpuTransfers(spill, 1 << 30), None
    from memopt.activations.chain import WORDS_BYTES
    from memopt.activations.cuda import CudaTransfers

    if spill is not None:
        host_bytes = max(0, host_bytes - WORDS_BYTES)
    host = HostPool(max(host_bytes, PAGE_BYTES), register=True)
    return CudaTransfers(device, host, spill, 1 << 30), host


def _device_of(model: Module) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    devices = {d for d in devices if d.type != "meta"}
    cuda = [d for d in devices if d.type == "cuda"]
    if not devices:
        raise ConfigError("the model has no parameter or buffer on a device; materialise it first")
    if len(cuda) > 1 or (not cuda and devices != {torch.device("cpu")}):
        raise ConfigError(
            f"the model spans {', '.join(sorted(map(str, devices)))}; a session serves one device, "
            "cuda or cpu"
        )
    return cuda[0] if cuda else torch.device("cpu")


def _resolve(spec: Budget | None, device: torch.device) -> ResolvedBudget:
    if device.type == "cpu":
        facts = host_facts()
        return resolve_budget(
            spec,
            device_free_bytes=facts.free_bytes,
            device_total_bytes=facts.limit_bytes,
            device_is_host=True,
        )
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return resolve_budget(
        spec, device_free_bytes=free + reserved, device_total_bytes=total, device_is_host=False
    )


def _check_plan(plan: str | Plan, budget: ResolvedBudget, *, on_cpu: bool) -> None:
    wanted = {plan} if isinstance(plan, str) else _placements_of(plan)
    if "host" in wanted and on_cpu:
        raise ConfigError(
            "plan='host' is refused without CUDA: the device is host memory already; use 'ssd'"
        )
    if "ssd" in wanted and not budget.ssd:
        raise ConfigError(
            "the plan places tensors on ssd, but the budget names no directory; add "
            "ssd='DIR:SIZE' to memopt.Budget"
        )


def _placements_of(plan: Plan) -> set[str]:
    ops = {o.placement for r in plan.regions for o in r.ops}
    return ops | {r.input for r in plan.regions if not r.plain} | {plan.outside}


def _check_states(
    model: Module, optimizer: torch.optim.Optimizer | None, budget: ResolvedBudget
) -> None:
    """Refuse at entry what parameters, gradients and optimizer state alone exceed."""
    states = measure_states(model, optimizer)
    grads = max(states.grad_bytes, expected_grad_bytes(model))
    need = states.total_bytes - states.grad_bytes + grads
    coming = 0
    if need + _MOST_STATES * states.param_bytes > budget.device_bytes:  # else it need not be known
        coming = missing_optimizer_bytes(optimizer)
    need += coming
    if need > budget.device_bytes:
        raise BudgetError(
            f"the device budget of {budget.device_bytes:,} bytes is below what the model's states "
            f"take: parameters {states.param_bytes:,} + gradients {grads:,} + optimizer state "
            f"{states.optimizer_bytes + coming:,} + buffers {states.buffer_bytes:,} = {need:,} bytes; "
            f"the smallest budget is above {need:,} bytes"
        )


def _track_states(
    accounted: AccountedMemory, model: Module, optimizer: torch.optim.Optimizer | None
) -> None:
    for tensor in (*model.parameters(), *model.buffers(), *optimizer_tensors(optimizer)):
        accounted.track(tensor)
    for parameter in model.parameters():
        if parameter.grad is not None:
            accounted.track(parameter.grad)
    accounted.reset_peak()


def _allocator_setting(setting: str) -> bool:
    """Change a setting of PyTorch's CUDA allocator unless the user set one; return whether it was.

    Expandable segments keep what is reserved near what is allocated: the budget bounds the former.
    """
    asked = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments" in asked:
        return False
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    setter = setter or getattr(torch.cuda.memory, "_set_allocator_settings", None)
    if setter is None:
        return False
    try:
        setter(setting)
    except RuntimeError:
        return False
    return True


def _current_fraction(device: torch.device) -> float:
    getter = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return float(getter(device)) if getter is not None else 1.0
