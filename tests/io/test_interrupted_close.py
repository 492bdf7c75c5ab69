"""Ctrl-C at every call inside of a close: calling close again, or dropping the object, leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memopt.io import Engine, ExtentStore, create_unlinked, open_engine
from tests.io.conformance import MIB, num_threads, pages, soon
from tests.io.test_uring import make_engine

MOST_POINTS = 5000


def num_fds() -> int:
    return sum(1 for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())


class Interrupt:
    """Raise KeyboardInterrupt at the n-th point at which memopt's own code can meet one.

    Python looks for signals when a function begins and when a call has returned; what the standard library does in a
    call is taken as one step.
    """

    def __init__(self, point: int, package: str = os.sep.join(("memopt", "io", ""))) -> None:
        self.package = package
        self.left = point
        self.where = ""

    def __call__(self, frame, event, argument) -> None:
        ours = self.package in frame.f_code.co_filename
        back = frame.f_back
        called = event == "call" and back and self.package in back.f_code.co_filename
        # an object's end, wherever it falls: Python drops what is raised in a weak reference's callback
        called = called and not frame.f_code.co_filename.endswith("_weakrefset.py")
        if not (ours and event in ("call", "return", "c_return")) and not called:
            return
        self.left -= 1
        if self.left == 0:
            sys.setprofile(None)
            called = getattr(argument, "__name__", "")
            self.where = f"{event} {called} in {frame.f_code.co_name}:{frame.f_lineno}"
            raise KeyboardInterrupt

    def during(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            sys.setprofile(self)
            try:
                call()
            finally:
                sys.setprofile(None)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """An interrupt inside of a ``__del__`` goes to this hook, as in any program."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


def every_point(attempt: Callable[[Interrupt], None], **options: str) -> int:
    """Call ``attempt`` with one interrupt after the other until they come too late; return how many struck."""
    last = 0
    for point in range(1, MOST_POINTS):
        interrupt = Interrupt(point, **options)
        attempt(interrupt)
        if interrupt.where:
            last = point
        elif point > 1.2 * last + 5:  # how many points there are depends on what is over already
            return last
    raise AssertionError("close does not come to an end")


def make(name: str) -> Engine:
    return (
        make_engine(queue_depth=4) if name == "io_uring" else open_engine("threads", queue_depth=3)
    )


def fail(engine: Engine, monkeypatch) -> None:
    """Let the next transfer fail."""
    if engine.name == "io_uring":
        engine.inject(-errno.EIO, count=1)
        return

    def broken(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("memopt.io.threads._call", broken)


ENGINES = pytest.mark.parametrize("name", ["threads", "io_uring"])


@ENGINES
@pytest.mark.parametrize("again", [True, False])
def test_engine(name, again, tmp_path):
    make(name).close()
    threads, fds = num_threads(), num_fds()

    def attempt(interrupt: Interrupt) -> None:
        file = create_unlinked(tmp_path)
        engine = make(name)
        for i in range(3):
            engine.write(file, i * 8192, pages(8192))
        interrupt.during(engine.close)
        if again:
            engine.close()
        else:
            engine.drain() if not engine._closed else [t.wait() for t in engine._snapshot()]
            engine._reap()
        assert file.buffered_fd >= 0
        file.close()
        del engine
        assert soon(lambda: num_threads() <= threads), interrupt.where
        assert num_fds() == fds, interrupt.where

    assert every_point(attempt) > 20


@ENGINES
def test_store(name, tmp_path):
    """Its files are closed, and the engine that others share forgets them."""
    make(name).close()
    with make(name) as engine:
        fds = num_fds()

        def attempt(interrupt: Interrupt) -> None:
            store = ExtentStore([(tmp_path, MIB), (tmp_path, MIB)], engine)
            extents = [store.alloc(8192) for _ in range(3)]
            for extent in extents:
                store.write(extent, pages(8192))
            store.free(extents[0])
            interrupt.during(store.close)
            store.close()
            assert num_fds() == fds, interrupt.where

        assert every_point(attempt) > 20
        if name == "io_uring":
            lib, ring = engine._native.lib, engine._ring
            with contextlib.closing(create_unlinked(tmp_path)) as file:
                slots = [lib.memopt_uring_add_file(ring, file.buffered_fd) for _ in range(257)]
                assert slots == [*range(256), -errno.ENFILE]
                for slot in slots[:-1]:
                    lib.memopt_uring_remove_file(ring, slot)


@ENGINES
def test_store_with_an_engine_of_its_own(name, tmp_path):
    make(name).close()
    threads, fds = num_threads(), num_fds()

    def attempt(interrupt: Interrupt) -> None:
        store = ExtentStore([(tmp_path, MIB)], name)
        store.write(store.alloc(8192), pages(8192))
        interrupt.during(store.close)
        store.close()
        assert soon(lambda: num_threads() <= threads), interrupt.where
        assert num_fds() == fds, interrupt.where

    assert every_point(attempt) > 40


@ENGINES
def test_a_dropped_store_closes_its_files(name, tmp_path):
    with make(name) as engine:
        fds = num_fds()

        def attempt(interrupt: Interrupt) -> None:
            store = ExtentStore([(tmp_path, MIB)], engine)
            store.write(store.alloc(8192), pages(8192)).wait()
            interrupt.during(store.close)
            for file in store.files:
                engine.detach(file)
            del file
            del store  # what was left open warns of that
            gc.collect()
            assert num_fds() == fds, interrupt.where

        assert every_point(attempt) > 20


@ENGINES
def test_the_error_that_nobody_saw_is_still_raised(name, tmp_path, monkeypatch):
    """By the second close, unless the first was interrupted while it raised."""
    lost = []

    def attempt(interrupt: Interrupt) -> None:
        with monkeypatch.context() as patch, contextlib.closing(create_unlinked(tmp_path)) as file:
            engine = make(name)
            fail(engine, patch)
            engine.write(file, 0, pages(8192))
            engine._reap(max_busy=None)
            errors = []
            for close in (lambda: interrupt.during(engine.close), engine.close):
                try:
                    close()
                except OSError as error:
                    errors.append(error.errno)
            if errors != [errno.EIO]:
                lost.append((interrupt.where, errors))

    assert every_point(attempt) > 20
    raising = ("_raise_unclaimed:", "fresh:", "copy:", "return  in close:")
    assert [(at, some) for at, some in lost if some or not any(r in at for r in raising)] == []
