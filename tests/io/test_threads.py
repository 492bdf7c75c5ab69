from __future__ import annotations

import contextlib
import os
import threading

import pytest

from memopt.io import threads
from memopt.io.threads import ThreadsEngine
from tests.io.conformance import EngineConformance


class TestThreadsEngine(EngineConformance):
    @pytest.fixture(autouse=True)
    def _patch(self, monkeypatch):
        self._real = threads._call
        self._max_bytes = 0
        self._faults: list[int | None] = []
        self._gate = threading.Event()
        self._gate.set()
        self._lock = threading.Lock()
        monkeypatch.setattr(threads, "_call", self._call)

    def _call(self, piece, part, offset, *, direct):
        self._gate.wait()
        with self._lock:
            fault = self._faults.pop(0) if self._faults else None
        if fault is not None and fault < 0:
            raise OSError(-fault, os.strerror(-fault))
        if fault is not None:
            return fault
        if self._max_bytes:
            part = part.part(0, min(part.nbytes, self._max_bytes))
        return self._real(piece, part, offset, direct=direct)

    def make(self, queue_depth: int = 8):
        return ThreadsEngine(queue_depth=queue_depth)

    def cap(self, engine, max_bytes):
        self._max_bytes = max_bytes

    def fail(self, engine, result, *, skip=0, count=1):
        self._faults = [None] * skip + [result] * count

    @contextlib.contextmanager
    def held(self, engine):
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()


def test_a_worker_survives_an_unexpected_exception(monkeypatch, tmp_path):
    def broken(*_args, **_kwargs):
        raise RuntimeError("bug")

    from memopt.io import create_unlinked

    with (
        ThreadsEngine(queue_depth=1) as engine,
        contextlib.closing(create_unlinked(tmp_path)) as file,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(threads, "_call", broken)
            with pytest.raises(OSError, match="RuntimeError: bug"):
                engine.write(file, 0, b"1").wait(timeout_s=20)
        engine.write(file, 0, b"1").wait(timeout_s=20)


@pytest.mark.parametrize("depth", [0, -1, 5000])
def test_queue_depth_is_checked(depth):
    with pytest.raises(ValueError, match=f"queue_depth={depth}"):
        ThreadsEngine(queue_depth=depth)
