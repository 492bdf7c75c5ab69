"""From a trace to the plan in force."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import Module

from memopt._resources import Resources
from memopt.plan import predict, solve_greedy, uniform_plan
from memopt.types.plan import Placement, Plan, RegionPlan
from memopt.types.trace import StepTrace


def first_plan(regions: Sequence[tuple[str, Module]], where: Placement) -> Plan:
    """Return the safest plan: everything recomputed, inputs off the device when they can be."""
    return Plan(
        regions=tuple(RegionPlan(name=name, input=where) for name, _ in regions),
        solver="first step",
    )


def make_plan(trace: StepTrace, asked: str | Plan, resources: Resources, *, exact: bool) -> Plan:
    """Return the plan for the steps after the traced one."""
    if not trace.regions:
        return asked if isinstance(asked, Plan) else Plan(solver="no regions")
    hardware = resources.hardware()
    if isinstance(asked, Plan):
        return _predicted(trace, asked, hardware)
    if asked != "auto":
        return _predicted(trace, uniform_plan(trace, asked), hardware)
    return solve_greedy(
        trace,
        hardware,
        device_bytes=resources.budget.device_bytes - resources.staging_bytes,
        host_bytes=resources.budget.host_bytes,
        ssd_bytes=resources.budget.ssd_bytes,
        exact=exact,
    )


def _predicted(trace: StepTrace, plan: Plan, hardware: object) -> Plan:
    from dataclasses import replace

    return replace(plan, predicted=predict(trace, plan, hardware))  # type: ignore[arg-type]
