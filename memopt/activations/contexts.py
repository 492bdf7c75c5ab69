"""The two context managers that `torch.utils.checkpoint` enters around a region.

PyTorch's checkpoint keeps what is hard (autocast, early stop, nesting, graph tasks); these add
what it leaves out: the dispatch modes, the generators of every device, the pre-images of what the
region wrote outside itself, and the region's inputs coming back. Nothing here is thread-local:
CUDA runs backward in autograd's own thread.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.checkpoint import _StopRecomputationError

from memopt.activations.frame import Frame, RngState, swap_in, swap_out
from memopt.activations.modes import RecomputeMode
from memopt.activations.put_back import Undo, undo_all

if TYPE_CHECKING:
    from memopt.activations.skips import Rehearsal


class Host(Protocol):
    """What the contexts need of the engine."""

    device: torch.device

    def forward_mode(self, frame: Frame) -> Any:
        """Return the mode that places this call's outputs."""

    def forward_ended(self, frame: Frame, mode: Any) -> None:
        """Called when the region's forward has returned or raised."""

    def recompute_begins(self, frame: Frame) -> None:
        """Called before a region is recomputed: fetch ahead."""

    def inputs_landed(self) -> None:
        """Called when the region's inputs are on the device again."""

    def recompute_ended(self, frame: Frame) -> None:
        """Called when the recomputation is complete."""


class ForwardContext:
    """Entered once, around the region's forward."""

    def __init__(self, frame: Frame, host: Host) -> None:
        self._frame = frame
        self._host = host
        self._mode: Any = None

    def __enter__(self) -> None:
        """Push the forward mode."""
        self._mode = self._host.forward_mode(self._frame)
        self._mode.__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Pop it."""
        mode, self._mode = self._mode, None
        mode.__exit__(exc_type, exc, traceback)
        self._frame.complete()
        self._host.forward_ended(self._frame, mode)
        self._frame.watch_weights()


class _Entry:
    """What one recomputation must put back when it ends."""

    __slots__ = ("buffers", "generators", "mode", "outer", "rehearsal", "undo")

    def __init__(self, mode: RecomputeMode, outer: RngState) -> None:
        self.mode = mode
        self.outer = outer
        self.buffers: list[tuple[torch.nn.Module, str, Any]] = []
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self.rehearsal: Rehearsal | None = None
        self.undo: Undo = []


class RecomputeContext:
    """Entered once per recomputation: twice with `retain_graph`, and then anew each time."""

    def __init__(self, frame: Frame, host: Host) -> None:
        self._frame = frame
        self._host = host
        self._entries: list[_Entry] = []

    def __enter__(self) -> None:
        """Bring the region's world back to what it was at its forward."""
        frame = self._frame
        frame.check_weights()
        frame.check_buffers()
        self._host.recompute_begins(frame)
        frame.land()
        self._host.inputs_landed()
        outer = RngState.capture(self._host.device)
        frame.rng.restore()
        skip = frame.skips is not None and frame.skips.is_proven(frame)
        mode = RecomputeMode(frame, keep=_keeps_graph() or not frame.completed, skip=skip)
        entry = _Entry(mode, outer)
        for generator, state in frame.generators.items():
            entry.generators.append((generator, generator.get_state()))
            generator.set_state(state)
        entry.buffers = frame.swap_buffers()
        self._entries.append(entry)
        frame.swap_weights(entry.undo)
        try:
            frame.swap_surroundings(entry.undo)
        except BaseException:
            self._restore(self._entries.pop())
            raise
        swap_in(frame.pre_images)
        if frame.skips is not None and not skip:
            entry.rehearsal = frame.skips.rehearsal(frame)
        if entry.rehearsal is not None:
            try:
                entry.rehearsal.run()
            except BaseException:  # an interrupt: nobody will call __exit__
                self._restore(self._entries.pop())
                raise
            frame.swap_buffers()
            frame.swap_weights(entry.undo)
            frame.swap_surroundings(entry.undo)
            frame.rng.restore()
            entry.rehearsal.watch()
        mode.__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the program's world as it was."""
        entry = self._entries.pop()
        entry.mode.__exit__(exc_type, exc, traceback)
        if entry.rehearsal is not None:
            entry.rehearsal.end(whole=exc_type in (None, _StopRecomputationError))
        self._restore(entry)

    def _restore(self, entry: _Entry) -> None:
        self._frame.landed.pop()
        swap_out(self._frame.pre_images)
        for module, name, buffer in entry.buffers:
            module._buffers[name] = buffer
        undo_all(entry.undo)
        for generator, state in entry.generators:
            generator.set_state(state)
        entry.outer.restore()
        self._host.recompute_ended(self._frame)


def _keeps_graph() -> bool:
    """Whether this backward may be followed by another through the same graph."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())
