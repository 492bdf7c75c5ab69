"""What `optimize` and `start` may be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memopt.activations.regions import RegionSpec
from memopt.types.budget import Budget
from memopt.types.errors import ConfigError
from memopt.types.plan import Plan

EngineChoice = Literal["auto", "io_uring", "threads"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `optimize` was asked for; checked on construction."""

    budget: Budget | None = None
    plan: str | Path | Plan = "auto"
    regions: RegionSpec = None
    exact: bool = True
    strict: bool = False
    engine: EngineChoice = "auto"
    update: str = "at_step"

    def __post_init__(self) -> None:
        """Name the value, what is allowed, and what to write instead."""
        if self.update != "at_step":
            raise ConfigError(f"update={self.update!r} is not available; use update='at_step'")
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise ConfigError(
                f"budget={self.budget!r} is not a memopt.Budget; write memopt.Budget(device=...)"
            )
        if self.engine not in ("auto", "io_uring", "threads"):
            raise ConfigError(f"engine={self.engine!r} is not one of auto, io_uring, threads")
