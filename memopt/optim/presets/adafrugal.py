"""AdaFRUGAL (arXiv 2601.11568): density falls, the gap grows while the validation loss stalls.

    rho(t) = rho_start + (rho_end - rho_start) min(t, S) / S
    every N steps, with L the validation loss:  T <- min(T_max, gamma T)  if |L_prev - L| / L_prev < tau

Both live in the parameter groups and so in every checkpoint; the arena has the largest density's
size, since state that is freed and allocated anew is what fragments memory. A density takes effect
at the next switch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memopt.optim.frugal import Frugal
from memopt.optim.groups import as_groups


class AdaFrugalSchedule:
    """Sets density and gap of an optimizer's split groups.

    Args:
        optimizer: built with `arena_density` of at least `density_start`.
        density_start, density_end: linear from one to the other ...
        density_steps: ... over these steps.
        gap_start, gap_max, gap_factor: T, its bound, and gamma.
        tolerance: tau, the relative change of the loss below which the gap grows.

    Raises:
        ValueError: for densities above what the state was allocated for.
    """

    def __init__(
        self,
        optimizer: Frugal,
        *,
        density_start: float = 0.25,
        density_end: float = 0.05,
        density_steps: int = 200_000,
        gap_start: int = 100,
        gap_max: int = 1000,
        gap_factor: float = 1.5,
        tolerance: float = 0.005,
    ) -> None:
        self.optimizer = optimizer
        self.density_start, self.density_end = density_start, density_end
        self.density_steps, self.gap_max = density_steps, gap_max
        self.gap_factor, self.tolerance = gap_factor, tolerance
        self.last_step, self.last_loss = 0, float("nan")
        for group in self._groups():
            if max(density_start, density_end) > group["arena_density"]:
                raise ValueError(
                    f"density {max(density_start, density_end)} is above arena_density"
                    f" {group['arena_density']}: build Frugal with the largest density"
                )
            group["density"], group["update_gap"] = density_start, gap_start

    def _groups(self) -> list[dict[str, Any]]:
        return [group for group in self.optimizer.param_groups if group["split"]]

    def step(self) -> None:
        """Call once after every `optimizer.step()`."""
        self.last_step += 1
        share = min(self.last_step, self.density_steps) / self.density_steps
        density = self.density_start + (self.density_end - self.density_start) * share
        for group in self._groups():
            group["density"] = density

    def validated(self, loss: float) -> None:
        """Tell a validation loss; the paper does so every 5,000 steps."""
        if abs(self.last_loss - loss) < self.tolerance * abs(self.last_loss):
            for group in self._groups():
                group["update_gap"] = min(self.gap_max, int(self.gap_factor * group["update_gap"]))
        self.last_loss = loss

    def state_dict(self) -> dict[str, float]:
        """Return step and loss; density and gap are in the optimizer's own state."""
        return {"last_step": self.last_step, "last_loss": self.last_loss}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue."""
        self.last_step, self.last_loss = int(state["last_step"]), state["last_loss"]


def adafrugal(
    groups: Iterable[Any],
    lr: float = 1e-3,
    *,
    schedule: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Frugal, AdaFrugalSchedule]:
    """Return AdaFRUGAL over the split groups of `frugal_groups`, and the schedule to step with it.

    Args:
        groups: parameter groups, or parameters: one group, all of it split.
        lr: learning rate.
        schedule: arguments of `AdaFrugalSchedule`; the larger of its densities sizes the state.
        **settings: further arguments of `Frugal`.

    Returns:
        (optimizer, schedule): call `schedule.step()` after every `optimizer.step()`, and
        `schedule.validated(loss)` with each validation loss.
    """
    schedule = schedule or {}
    start = float(schedule.get("density_start", 0.25))
    largest = max(start, float(schedule.get("density_end", 0.05)))
    chosen = [
        {**group, "density": start, "arena_density": largest} if group.get("split", True) else group
        for group in as_groups(groups)
    ]
    optimizer = Frugal(chosen, lr=lr, **settings)
    return optimizer, AdaFrugalSchedule(optimizer, **schedule)
