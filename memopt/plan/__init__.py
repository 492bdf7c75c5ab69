"""The planner: StepTrace and Hardware in, Plan out.

- `solve_greedy` finds a plan inside three byte budgets, `smallest_budget` says what it would need;
- `uniform_plan` makes the forced plans;
- `predict` and `predict_plain` say what a plan, or the untouched step, takes;
- `check` judges a plan by code that shares nothing with the solver.
"""

from __future__ import annotations

from memopt.plan.simulate import predict, predict_plain
from memopt.plan.smallest import check_budget, smallest_budget
from memopt.plan.solve import solve_greedy
from memopt.plan.uniform import uniform_plan
from memopt.plan.validate import check

__all__ = [
    "check",
    "check_budget",
    "predict",
    "predict_plain",
    "smallest_budget",
    "solve_greedy",
    "uniform_plan",
]
