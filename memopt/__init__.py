"""memopt: place every byte of a training step so that it fits the budgets you name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from memopt.report import RunReport
    from memopt.session import Session, optimize, start
    from memopt.types.budget import Budget
    from memopt.types.errors import (
        BudgetError,
        ConfigError,
        MemoptError,
        RecomputeMismatchError,
        RoundTripError,
        SavedOutputChangedError,
    )
    from memopt.types.hardware import Hardware
    from memopt.types.plan import Plan
    from memopt.types.trace import StepTrace

_HOMES = {
    "optimize": "memopt.session",
    "start": "memopt.session",
    "Session": "memopt.session",
    "Budget": "memopt.types.budget",
    "BudgetError": "memopt.types.errors",
    "ConfigError": "memopt.types.errors",
    "MemoptError": "memopt.types.errors",
    "RecomputeMismatchError": "memopt.types.errors",
    "RoundTripError": "memopt.types.errors",
    "SavedOutputChangedError": "memopt.types.errors",
    "Hardware": "memopt.types.hardware",
    "Plan": "memopt.types.plan",
    "RunReport": "memopt.report",
    "StepTrace": "memopt.types.trace",
}

__all__ = [
    "Budget",
    "BudgetError",
    "ConfigError",
    "Hardware",
    "MemoptError",
    "Plan",
    "RecomputeMismatchError",
    "RoundTripError",
    "RunReport",
    "SavedOutputChangedError",
    "Session",
    "StepTrace",
    "__version__",
    "optimize",
    "start",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import memopt` stays light."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'memopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
