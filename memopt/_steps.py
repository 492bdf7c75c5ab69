"""Steps going by: when they begin and end, how long they take, what their peaks are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn import Module
from torch.utils import _pytree as pytree

from memopt._states import expected_grad_bytes, gradients, measure_states
from memopt.activations.observe import RegionObserver
from memopt.memory.meter import CpuMeter, Meter
from memopt.trace.live import States, StepFigures, build_step_trace
from memopt.types.trace import RegionTrace, StepTrace


class Steps:
    """Marks of the step in progress and figures of those that ended.

    Args:
        meter: memory and clock of the device.
        model, optimizer: whose states are counted.
        beside_bytes: device bytes now that are no tensor's (staging buffers on a CPU).
        written_bytes: bytes written to SSD so far.
    """

    def __init__(
        self,
        meter: Meter,
        model: Module,
        optimizer: torch.optim.Optimizer | None,
        beside_bytes: Callable[[], int],
        written_bytes: Callable[[], int],
    ) -> None:
        self._meter = meter
        self._beside_bytes = beside_bytes
        self._written_bytes = written_bytes
        self._written_before = 0
        self._writes: list[int] = []
        self._model = model
        self._optimizer = optimizer
        self.figures = StepFigures()
        self.saw_backward = False
        self.num_steps = 0
        self.first_of_plan = 0
        """The first step that ran wholly under the plan in force; 0 while that is the traced step's."""
        self.first_step_s: float | None = None
        self.peak_bytes = 0
        self.last_shapes = ""
        """Of the tensors that the last step's first forward was given."""
        self.last_step_peak_bytes = 0
        """Of the step that ended last, where the meter can tell single steps (on a CPU)."""
        self._step_peak_bytes = 0
        self._states: States | None = None
        self._times: list[float] = []
        self._last_s = 0.0
        self._spans: list[tuple[Any, Any]] = []
        self._begin: Any = None
        self._end: Any = None
        self._root: Any = None
        self._forward: list[tuple[Any, Any]] = []
        self._backward: list[tuple[Any, Any]] = []
        self._optimizer_mark: Any = None
        self.on_backward_end: Callable[[], None] | None = None
        self._backward_task: int | None = None
        self._backward_mark: Any = None

    # - Root forward

    def begin_root(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A root forward with gradients begins."""
        figures = self.figures
        figures.grad_bytes_at_start = max(figures.grad_bytes_at_start, self.grad_bytes())
        self._root = self._meter.mark()
        if figures.num_roots == 0:
            self._begin = self._root
            figures.resident_bytes = self._meter.current_bytes()
            if self._states is None:
                self._states = measure_states(self._model, self._optimizer)
            shapes = [
                tuple(v.shape) for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)
            ]
            figures.shapes = ", ".join(map(str, shapes))
        figures.num_roots += 1

    def grad_bytes(self) -> int:
        """Bytes of gradients alive now."""
        return sum(g.nbytes for g in gradients(self._model))

    @property
    def begun(self) -> bool:
        """Whether a forward of the step in progress was seen."""
        return self._begin is not None

    def plan_begins(self) -> None:
        """Another plan comes into force at this root forward, which may be a later one of its step."""
        self.first_of_plan = self.num_steps + self.begun

    def end_root(self) -> None:
        """It returned or raised."""
        self._end = self._meter.mark()
        self._forward.append((self._root, self._end))

    def watch(self, output: Any) -> None:
        """Notice when backward reaches the model's output."""
        for leaf in _tensors_of(output):
            if leaf.requires_grad and leaf.grad_fn is not None:
                leaf.register_hook(self._hook)

    def _hook(self, _: Tensor) -> None:
        self.backward_begins()

    def backward_begins(self) -> None:
        """Called at the first sign of a backward, any number of times in one."""
        self.saw_backward = True
        task = torch._C._current_graph_task_id()
        if task in (-1, self._backward_task):
            return
        self._backward_task = task
        self._backward_mark = self._meter.mark()
        Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._end = self._meter.mark()
        self._backward.append((self._backward_mark, self._end))
        if self.on_backward_end is not None:
            self.on_backward_end()

    # - Optimizer and step

    def begin_optimizer(self) -> None:
        """`optimizer.step()` begins."""
        self.peak_bytes = max(self.peak_bytes, self._peak())
        self._optimizer_mark = self._meter.mark()
        if self.begun and not self.saw_backward:  # the root returned nothing that could be watched
            self.saw_backward = next(gradients(self._model), None) is not None

    def end_optimizer(self) -> None:
        """It ended."""
        self._end = self._meter.mark()
        if self._states is not None and self.num_steps == 0:
            self.figures.optimizer_peak_bytes = self._peak()

    def end_step(self, *, final: bool = False) -> None:
        """Close the step; `final` closes one only if its backward ran."""
        if self._begin is None or (final and not self.saw_backward):
            return
        self._spans.append((self._begin, self._end))
        self._note_writes()
        self.peak_bytes = max(self.peak_bytes, self._peak())
        self.num_steps += 1
        self.last_step_peak_bytes, self._step_peak_bytes = self._step_peak_bytes, 0
        self.last_shapes = self.figures.shapes
        self.figures = StepFigures()
        self.saw_backward = False
        self._begin = None
        self._forward, self._backward, self._optimizer_mark = [], [], None
        if len(self._spans) > 256:
            self._resolve()

    def _note_writes(self) -> None:
        """Keep what this step wrote; the first one, in another plan, is only subtracted."""
        written = self._written_bytes()
        if self.num_steps:
            self._writes.append(written - self._written_before)
        self._written_before = written

    def finish(self) -> None:
        """Read the peak once more."""
        self.peak_bytes = max(self.peak_bytes, self._peak())

    def _peak(self) -> int:
        """Peak of the phase that ends; PyTorch's counters are reset in the traced step only."""
        own = isinstance(self._meter, CpuMeter)
        peak = self._meter.take_peak() if own or self.num_steps == 0 else self._meter.peak()
        peak += self._beside_bytes()
        self._step_peak_bytes = max(self._step_peak_bytes, peak if own else 0)
        return peak

    # - Results

    def trace(
        self,
        observer: RegionObserver,
        device: str,
        *,
        coming: tuple[int, int] | None = None,
        regions: tuple[RegionTrace, ...] | None = None,
    ) -> StepTrace:
        """Return the StepTrace of the step that just ended.

        Args:
            observer: saw its regions.
            device: "cuda" or "cpu".
            coming: bytes of state that the optimizer's step will make, and what it will hold above
                what is alive now, where it did not run yet.
            regions: what is known of them in a step that is on its way; None: all of it.
        """
        seconds = self._meter.seconds
        figures = self.figures
        figures.forward_s = sum(seconds(a, b) for a, b in self._forward)
        figures.backward_s = sum(seconds(a, b) for a, b in self._backward)
        if self._optimizer_mark is not None:
            figures.optimizer_s = seconds(self._optimizer_mark, self._end)
        after = measure_states(self._model, self._optimizer)
        grads = max(after.grad_bytes, expected_grad_bytes(self._model))
        after = States(
            param_bytes=after.param_bytes,
            grad_bytes=grads,
            buffer_bytes=after.buffer_bytes,
            optimizer_bytes=after.optimizer_bytes + (coming[0] if coming else 0),
        )
        assert self._states is not None
        if coming is not None:
            figures.optimizer_peak_bytes = self._meter.current_bytes() + coming[1]
        peak = max(self.peak_bytes, observer.peak_bytes, figures.optimizer_peak_bytes)
        if coming is None:  # the observer took the peaks of this step's regions
            seen = observer.peak_bytes + self._beside_bytes()
            self.peak_bytes = max(self.peak_bytes, seen)
        regions = observer.region_traces() if regions is None else regions
        return build_step_trace(
            device,
            figures,
            regions,
            self._states,
            after,
            (observer.outside_peak_bytes + observer.turning_bytes, peak),
            observer.outside_standing_bytes,
        )

    def last_step_s(self) -> float:
        """Return the seconds of the last step that ended."""
        self._resolve()
        return self._last_s

    def step_times(self) -> tuple[float | None, float | None, int]:
        """Return seconds of the first step, the median of those under the plan in force, and how many these are.

        Only they are what is predicted. Where there are none, the median is of all but the first.
        """
        self._resolve()
        times = self._of_plan(self._times)
        median = statistics.median(times or self._times) if self._times else None
        return self.first_step_s, median, len(times)

    def step_writes(self) -> int | None:
        """Return the bytes that a step writes to SSD: the median of the same steps."""
        writes = self._of_plan(self._writes) or self._writes
        return round(statistics.median(writes)) if writes else None

    def _of_plan(self, figures: list[Any]) -> list[Any]:
        """Return those of steps wholly under the plan in force, of figures of all steps but the first."""
        return figures[self.first_of_plan - 1 :] if self.first_of_plan else []

    def _resolve(self) -> None:
        for begin, end in self._spans:
            seconds = self._last_s = self._meter.seconds(begin, end)
            if self.first_step_s is None:
                self.first_step_s = seconds
            else:
                self._times.append(seconds)
        self._spans.clear()


def _tensors_of(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """Yield the tensors in what a model returns: containers, dataclasses, objects with attributes."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and not isinstance(leaf, (Module, type)):
            yield from _tensors_of(list(getattr(leaf, "__dict__", {}).values()), depth - 1)
