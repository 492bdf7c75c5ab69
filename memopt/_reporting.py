"""From a session's figures to its RunReport."""

from __future__ import annotations

import platform
from collections import Counter

import torch

import memopt
from memopt._resources import Resources
from memopt._steps import Steps
from memopt.memory.host import peak_resident_bytes
from memopt.plan import predict_plain
from memopt.report import RunReport
from memopt.types.budget import ResolvedBudget
from memopt.types.plan import Plan, Prediction
from memopt.types.report import Footprint, Moved, PlacementRow, SsdWear
from memopt.types.trace import StepTrace


def make_report(
    resources: Resources,
    steps: Steps,
    trace: StepTrace | None,
    plan: Plan,
    predicted: Prediction,
    notes: list[str],
) -> RunReport:
    """Return the report of the steps so far; `predicted`: the largest peaks of the plans so far."""
    steps.finish()
    first, median, num_planned = steps.step_times()
    moved = resources.transfers.moved
    on_cuda = resources.device.type == "cuda"
    device = resources.device
    planned = trace is not None and bool(trace.regions)
    return RunReport(
        device=f"{device} {torch.cuda.get_device_name(device)}" if on_cuda else "cpu",
        budget=resources.budget,
        predicted=Footprint(
            device_bytes=predicted.device_bytes,
            host_bytes=predicted.host_bytes,
            ssd_bytes=predicted.ssd_bytes,
            step_s=predicted.step_s,
        )
        if planned
        else Footprint(),
        measured=Footprint(
            device_bytes=steps.peak_bytes,
            host_bytes=resources.transfers.host_bytes()[1] if on_cuda else 0,
            ssd_bytes=resources.transfers.ssd_bytes()[1],
            step_s=median,
        ),
        baseline=Footprint(device_bytes=predict_plain(trace) if planned and trace else None),
        num_steps=steps.num_steps,
        num_planned_steps=num_planned,
        first_step_s=first,
        exposed_s=resources.transfers.exposed_s() / steps.num_steps if steps.num_steps else None,
        moved=Moved(
            d2h_bytes=moved.d2h_bytes,
            h2d_bytes=moved.h2d_bytes,
            ssd_write_bytes=moved.ssd_write_bytes,
            ssd_read_bytes=moved.ssd_read_bytes,
        ),
        wear=_wear(resources.budget, steps.step_writes(), median),
        placements=_placements(trace, plan),
        resident_bytes=peak_resident_bytes(),
        device_reserved_bytes=getattr(resources.meter, "reserved_peak_bytes", None),
        device_context_bytes=_context_bytes(device) if on_cuda else None,
        plan=plan.solver,
        notes=tuple(dict.fromkeys([*notes, *resources.probe_notes, *resources.pageable_notes()])),
        versions={
            "memopt": memopt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def _wear(budget: ResolvedBudget, step_bytes: int | None, step_s: float | None) -> SsdWear | None:
    """Writes per step and day; nothing wears where every directory is memory."""
    if step_bytes is None or all(directory.is_tmpfs for directory in budget.ssd):
        return None
    return SsdWear.at_rate(step_bytes, step_s, budget.ssd_endurance_bytes)


def _placements(trace: StepTrace | None, plan: Plan) -> tuple[PlacementRow, ...]:
    """Count tensors and bytes per kind and placement, for one step."""
    if trace is None:
        return ()
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    plans = {r.name: r for r in plan.regions}
    for region in trace.regions:
        chosen = plans.get(region.name)
        plain = chosen is not None and chosen.plain
        where = {} if chosen is None else {o.position: o.placement for o in chosen.ops}
        rows = [
            (
                "region input",
                "device" if plain or chosen is None else chosen.input,
                region.input_nbytes,
            )
        ]
        rows += [
            (op.op, "device" if plain else where.get(op.position, "recompute"), op.nbytes)
            for op in region.ops
            if op.saved_nbytes or where.get(op.position, "recompute") != "recompute"
        ]
        for kind, placement, nbytes in rows:
            counts[kind, placement] += 1
            sizes[kind, placement] += nbytes
    return tuple(
        PlacementRow(kind=k, placement=p, num_outputs=counts[k, p], size_bytes=sizes[k, p])
        for k, p in sorted(counts, key=lambda key: -sizes[key])
    )


def _context_bytes(device: torch.device) -> int:
    """Bytes on the card that are neither free nor the allocator's."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))
