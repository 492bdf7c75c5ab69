"""Ctrl-C at every call inside of a submission: what the kernel was given keeps its memory, and nothing hangs."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
import weakref

import numpy as np
import pytest

from memopt.io import ExtentStore, RawBuffer, Transfer, create_unlinked, threads
from tests.io.conformance import on_disk
from tests.io.test_interrupted_close import Interrupt, _quiet, every_point, make  # noqa: F401 - a fixture

NBYTES = 3 * 4096 + 100


class Owner:
    """Memory that goes with its owner."""

    def __init__(self) -> None:
        self.memory = np.frombuffer(os.urandom(NBYTES + 4096), dtype=np.uint8).copy()
        begin = -self.memory.ctypes.data % 4096
        self.bytes = self.memory[begin : begin + NBYTES]

    def buffer(self) -> RawBuffer:
        return RawBuffer(address=self.bytes.ctypes.data, nbytes=NBYTES, owner=self)


@pytest.fixture(params=["threads", "io_uring"])
def engine(request):
    with make(request.param) as engine:
        yield engine


@contextlib.contextmanager
def held(engine, monkeypatch):
    """Nothing ends."""
    if engine.name == "io_uring":
        engine.inject(-errno.EAGAIN, count=2**31)
        try:
            yield
        finally:
            engine.inject()
        return
    gate, real = threading.Event(), threads._call

    def call(*arguments, **named):
        gate.wait()
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(threads, "_call", call)
        try:
            yield
        finally:
            gate.set()


@pytest.mark.parametrize("prepared", [False, True])
def test_engine(engine, tmp_path, monkeypatch, prepared):
    if prepared and not engine.defers:
        pytest.skip("the threads engine does not defer")
    file = create_unlinked(tmp_path)

    def give(interrupt: Interrupt) -> tuple[bytes, weakref.ref]:
        owner = Owner()
        write = Transfer(kind="write", file=file, offset=0, buffer=owner.buffer(), padded=True)
        interrupt.during(
            lambda: engine.prepare([write]).release() if prepared else engine.submit([write])
        )
        return owner.bytes.tobytes(), weakref.ref(owner)

    def attempt(interrupt: Interrupt) -> None:
        os.ftruncate(file.buffered_fd, 0)
        with held(engine, monkeypatch):
            expected, alive = give(interrupt)
            gc.collect(1)
            began = bool(engine._in_flight)
            assert began == (alive() is not None), interrupt.where
            if began and file.is_direct:
                assert engine.bounces.num_in_use > 0, interrupt.where
        for ticket in engine._snapshot():
            ticket.cancel()  # nobody would release it
        engine.drain()
        engine._reap(max_busy=None)
        gone = prepared or not began
        assert on_disk(file, 0, NBYTES) in (expected, *[b""] * gone), interrupt.where
        gc.collect(1)
        assert alive() is None, interrupt.where

    assert every_point(attempt) > 20
    engine.detach(file)
    file.close()


def test_store(engine, tmp_path, monkeypatch):
    """The space of an extent is not given away under a write that nobody has in hand, nor its bytes taken for good."""
    store = ExtentStore([(tmp_path, 4 * 4096)], engine)

    def attempt(interrupt: Interrupt) -> None:
        extent, other = store.alloc(NBYTES), bytes(range(256)) * 64
        store.write(extent, b"o" * NBYTES).wait()
        with held(engine, monkeypatch):
            interrupt.during(lambda: store.write(extent, b"n" * NBYTES))
            began = bool(engine._in_flight)
            assert not began or extent.pending, interrupt.where
        if extent.written_bytes:
            back = bytearray(NBYTES)
            store.read(extent, back).wait()
            assert back == (b"n" if began else b"o") * NBYTES, interrupt.where
        store.free(extent)
        again = store.alloc(4 * 4096)
        store.write(again, other).wait()
        engine.drain()
        back = bytearray(len(other))
        store.read(again, back).wait()
        assert back == other, interrupt.where
        store.free(again)

    assert every_point(attempt) > 40
    store.close()
