"""Buffers that come back from anywhere, also from the middle of the pool's own methods.

A stored tensor gives its buffer back in ``__del__``, which the garbage collector may run at any allocation of memory:
on a thread that holds the pool's lock, with the pool's books half written. So what comes back is put in a queue, by an
append that nothing can interrupt, and entered in the books by whoever has the lock: at once where it is free, else by
its holder when he lets go. Either way those who wait for room are told.

Nothing is missed: who finds the lock taken has queued his buffer before, and every holder looks at the queue after he
let go, also one who lets go only to wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Returns"]


class Returns:
    """The queue in front of ``lock``, which is not re-entrant. Use ``with returns, lock:``, and it looks at its end.

    Args:
        lock: the pool's.
        enter: told one thing that came back; called with the lock held.
    """

    def __init__(self, lock: threading.Lock, enter: Callable[[Any], None]) -> None:
        self._lock = lock
        self._enter = enter
        self._queue: deque[Any] = deque()
        self.changed = threading.Condition(_LetGo(lock, self.settle))  # type: ignore[arg-type]
        """Told of what came back."""

    def give(self, thing: Any) -> None:
        """Take something back; never waits, and may be called while this thread holds the lock."""
        self._queue.append(thing)
        self.settle()

    def settle(self) -> None:
        """Enter what came back in the books, unless somebody has the lock, who does it then."""
        while self._queue and self._lock.acquire(blocking=False):
            try:
                self.enter_all()
            finally:
                self._lock.release()

    def enter_all(self) -> None:
        """As :meth:`settle`, called with the lock held."""
        if self._queue:
            self.changed.notify_all()
        while self._queue:
            self._enter(self._queue.popleft())

    def __enter__(self) -> None:
        """Nothing: the lock comes after this in the ``with``."""

    def __exit__(self, *_: object) -> None:
        self.settle()


class _LetGo:
    """The lock as a condition takes it: who waits lets go of it, and does what was left to its holder."""

    def __init__(self, lock: threading.Lock, settle: Callable[[], None]) -> None:
        self._lock = lock
        self._settle = settle
        self.acquire = lock.acquire

    def release(self) -> None:
        self._lock.release()
        self._settle()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
