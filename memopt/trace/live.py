"""The live tracer's step level: figures of the whole traced step, put together as a StepTrace."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.types.trace import RegionTrace, StepTrace


@dataclass(kw_only=True)
class StepFigures:
    """What the session notes while a step goes by; bytes and seconds as in StepTrace."""

    shapes: str = ""
    num_roots: int = 0
    resident_bytes: int = 0
    grad_bytes_at_start: int = 0
    outside_saved_bytes: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    optimizer_peak_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of the model's and optimizer's own tensors, shared storages counted once."""

    param_bytes: int
    grad_bytes: int
    buffer_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.param_bytes + self.grad_bytes + self.buffer_bytes + self.optimizer_bytes


def build_step_trace(
    device: str,
    figures: StepFigures,
    regions: tuple[RegionTrace, ...],
    before: States,
    after: States,
    peaks: tuple[int, int],
    outside_standing_bytes: int | None,
) -> StepTrace:
    """Return the StepTrace of a step.

    Args:
        device: "cuda" or "cpu".
        figures: noted while the step ran.
        regions: as observed.
        before: states at the first root forward.
        after: states after the step, gradients at their fullest.
        peaks: (outside_peak_bytes, peak_bytes).
        outside_standing_bytes: what was saved outside regions before the last region ended.
    """
    new_state = max(0, after.optimizer_bytes - before.optimizer_bytes)
    return StepTrace(
        device=device,
        shapes=figures.shapes,
        param_bytes=after.param_bytes,
        grad_bytes=after.grad_bytes,
        buffer_bytes=after.buffer_bytes,
        optimizer_bytes=after.optimizer_bytes,
        grad_bytes_at_start=figures.grad_bytes_at_start,
        resident_bytes=figures.resident_bytes + new_state,
        outside_saved_bytes=figures.outside_saved_bytes,
        outside_peak_bytes=peaks[0],
        optimizer_peak_bytes=figures.optimizer_peak_bytes,
        peak_bytes=peaks[1],
        outside_standing_bytes=outside_standing_bytes,
        regions=regions,
        forward_s=figures.forward_s,
        backward_s=figures.backward_s,
        optimizer_s=figures.optimizer_s,
        num_micro_batches=max(1, figures.num_roots),
    )
