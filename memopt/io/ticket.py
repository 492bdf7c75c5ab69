"""What an engine returns for a batch: something to ask, to wait for, and to be told by what went wrong."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memopt.io.engine import Engine
    from memopt.io.pieces import Piece

__all__ = ["Ticket", "fresh"]


class Ticket(ABC):
    """A batch in flight. It keeps the buffers of its transfers alive until the last of them is finished."""

    def __init__(self, engine: Engine, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.nbytes = sum(piece.payload_bytes for piece in pieces)
        self.error: OSError | None = None
        self.claimed = False
        self._engine = engine

    @property
    @abstractmethod
    def begun(self) -> bool:
        """Whether the engine was given the batch: true as soon as, and only if, :meth:`begin` did that."""

    @abstractmethod
    def begin(self) -> None:
        """Give the engine the batch, in one step that an interrupt cannot divide.

        Raises:
            OSError: the engine does not take it.
        """

    @property
    def released(self) -> bool:
        """Whether it was queued; false only for a batch that was prepared, or never begun."""
        return self.begun

    def release(self) -> None:  # noqa: B027 - an ordinary batch is queued already
        """Queue a prepared batch. A second call does nothing."""

    def release_call(self) -> tuple[int, int]:
        """Return the addresses of a C function ``void (*)(void *)`` and of its argument that do the same as release.

        The function may be called from any thread, never blocks on the disk and takes no Python lock. Whoever asks must
        see to it that it is called once; that may be long after the ticket and the engine are gone.
        """
        raise ValueError("only a prepared batch can be released")

    def cancel(self) -> bool:
        """End a batch that was not released; return whether that was so: :meth:`wait` then raises ECANCELED."""
        return False

    @abstractmethod
    def _finished(self, timeout_s: float | None) -> bool:
        """Wait up to ``timeout_s`` (None: for ever, 0: not at all) for the end of every piece; sets ``error``."""

    def done(self) -> bool:
        """Return whether the batch is finished, successfully or not. Never blocks, never raises a transfer's error."""
        finished = self._finished(0.0)
        if finished:
            self._engine._settle(self)
        return finished

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the batch is finished.

        Raises:
            OSError: the first failure of the batch, with errno, path and offset; raised again on every call.
            TimeoutError: ``timeout_s`` passed first; the batch goes on and can be waited for again.
            IoEngineUnavailable: this is a forked child, where nothing ends.
        """
        self._engine._check_process()
        if not self._finished(timeout_s):
            raise TimeoutError(
                f"{self._engine.name}: a batch of {self.nbytes} bytes is not finished after {timeout_s} s"
            )
        self._engine._settle(self)
        self.claimed = True
        if self.error is not None:
            raise fresh(self.error)


def fresh(error: OSError) -> OSError:
    """Return a copy to raise: what is kept must not collect tracebacks, whose frames hold what the error is about."""
    copied = copy.copy(error)
    copied.__traceback__ = copied.__context__ = copied.__cause__ = None
    return copied
