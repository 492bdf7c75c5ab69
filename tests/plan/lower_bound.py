"""A lower bound of any plan's step time: the linear relaxation of the planner's own model, solved by HiGHS.

Relaxed: placements become fractions of an output, what is fetched need only fit into the sum of the times that could
hide it, copies on their way count only once. Kept: device bytes at every forward, the turning point and every backward,
the host budget, both directions of the link. Every plan satisfies the relaxed problem with its own numbers, so no
plan is faster than its optimum.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import pulp

from memopt.plan.cost import build


def lower_bound_s(*args, **kwargs):
    """Return the optimum of the relaxation in seconds; see `_solve`."""
    with warnings.catch_warnings():  # PuLP 3 announces PuLP 4 in every call
        warnings.simplefilter("ignore", DeprecationWarning)
        return _solve(*args, **kwargs)


def _solve(trace, hardware, *, usable_device_bytes, host_bytes):
    """Return the optimum of the relaxation in seconds. All regions must have the same ops."""
    model = build(trace, hardware)
    count = len(model.models)
    problem = pulp.LpProblem("least_time", pulp.LpMinimize)
    gib = 1 << 30
    exposed_out = problem_var("exposed_out")
    exposed_back = problem_var("exposed_back")
    kept, host, lost, backward, early = [], [], [], [], []
    for k, m in enumerate(model.models):
        region = m.region
        again = m.recompute_s - sum(
            m.gains_s
        )  # views, writes: run again unless the region is untouched
        away = problem_var(f"input_host_{k}", 1)
        plain = problem_var(f"plain_{k}", 1)
        stands, leaves, loses = (
            [region.input_nbytes / gib * (1 - away)],
            [region.input_nbytes / gib * away],
            [],
        )
        peak = [region.backward_peak_bytes / gib]
        for j, (op, gain) in enumerate(zip(region.ops, m.gains_s, strict=True)):
            on_device, on_host = problem_var(f"device_{k}_{j}", 1), problem_var(f"host_{k}_{j}", 1)
            problem += on_device + on_host <= 1
            # an untouched region keeps exactly what autograd saves; only unsaved outputs cost it nothing
            unsaved = plain if op.saved_nbytes == 0 else 0
            stands.append(op.nbytes / gib * on_device)
            leaves.append(op.nbytes / gib * on_host)
            # where an output is on the device it is taken off the recompute's peak
            peak.append(
                -op.saved_nbytes / gib * on_device + (op.nbytes - op.saved_nbytes) / gib * on_host
            )
            loses.append(gain * (1 - on_device - on_host - unsaved))
            if op.saved_nbytes:
                problem += on_device >= plain
            positive = problem_var(f"lost_{k}_{j}")
            problem += positive >= loses.pop()
            loses.append(positive)
        loses.append(again * (1 - plain))
        kept.append(pulp.lpSum(stands))
        host.append(pulp.lpSum(leaves))
        early.append(problem_var(f"early_{k}"))
        problem += early[k] <= host[k]
        lost.append(pulp.lpSum(loses))
        backward.append(pulp.lpSum(peak))
    device = usable_device_bytes / gib
    base = (model.base_bytes + model.outside_bytes) / gib
    problem += (
        base + pulp.lpSum(kept) + (trace.outside_peak_bytes + model.output_bytes) / gib <= device
    )
    for k in range(count):
        new = (sum(model.grad_bytes[k + 1 :]) + model.outside_grad_bytes) / gib
        entering = (
            model.models[k + 1].region.input_nbytes if k + 1 < count else model.output_bytes
        ) / gib
        ahead = early[k - 1] if k else 0
        problem += base + new + pulp.lpSum(kept[: k + 1]) + backward[k] + entering + ahead <= device
    problem += pulp.lpSum(host) <= host_bytes / gib
    moved = pulp.lpSum(host)
    compute_s = model.plain_s + pulp.lpSum(lost)
    hides_s = 0.0
    for k, m in enumerate(model.models):
        # what the forward so far did not hide is on its way, and has its bytes on the device
        hides_s += m.forward_s
        on_way = problem_var(f"on_way_{k}")
        sent_s = pulp.lpSum(host[: k + 1]) * (gib / hardware.d2h_bytes_per_s)
        problem += sent_s <= hides_s + exposed_out + on_way * (gib / hardware.d2h_bytes_per_s)
        problem += base + pulp.lpSum(kept[: k + 1]) + on_way <= device
    backward_s = sum(m.backward_s for m in model.models) + pulp.lpSum(lost)
    problem += moved * (gib / hardware.h2d_bytes_per_s) <= backward_s + exposed_back
    late = moved - pulp.lpSum(early[:-1])  # nothing can ask ahead for the last region
    problem += late * (gib / hardware.h2d_bytes_per_s) <= exposed_back
    problem += compute_s + exposed_out + exposed_back
    with contextlib.redirect_stdout(io.StringIO()):  # HiGHS prints a banner even with msg=False
        problem.solve(pulp.HiGHS(msg=False))
    assert problem.sol_status == pulp.LpSolutionOptimal
    return pulp.value(problem.objective)


def problem_var(name, upper=None):
    return pulp.LpVariable(name, 0, upper)
