"""Buffers that the garbage collector gives back in the middle of the pool's own methods; an interrupted close."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import sys
import threading

import pytest

from memopt.memory import _slab
from memopt.memory.pinned import HostPool
from tests.io.conformance import num_threads, soon
from tests.io.test_interrupted_close import Interrupt, every_point
from tests.memory.test_pinned import MIB, PAGE, FakeCudart, FakeEvent


class AtPoint:
    """Do something at the n-th call or return on this thread, as the garbage collector would."""

    def __init__(self, point: int, action) -> None:
        self.left = point
        self.action = action

    def __call__(self, frame, event, argument) -> None:
        self.left -= 1
        if self.left == 0:
            sys.setprofile(None)
            self.action()

    @property
    def struck(self) -> bool:
        return self.left <= 0

    def during(self, call):
        sys.setprofile(self)
        try:
            return call()
        finally:
            sys.setprofile(None)


def is_whole(pool: HostPool, in_use_bytes: int) -> bool:
    """Whether every mapped byte is free or in use, and the free ones are disjoint."""
    stats = pool.stats()
    holes = sorted((start, nbytes) for nbytes, start in pool._free._by_size)
    disjoint = all(a + n <= b for (a, n), (b, _) in itertools.pairwise(holes))
    adds_up = stats.mapped_bytes == pool._free.free_bytes + stats.in_use_bytes
    return disjoint and adds_up and stats.in_use_bytes == in_use_bytes


CALLS = {
    "take": lambda pool: pool.take(2 * PAGE),
    "try_take": lambda pool: pool.try_take(40 * PAGE, wait=False),
    "reserve": lambda pool: pool.reserve({PAGE: 3}),
    "trim": lambda pool: pool.trim(),
    "trim_beside": lambda pool: pool.trim_beside({PAGE: 1}),
    "stats": lambda pool: pool.stats(),
    "release": lambda pool: pool.take(PAGE).release(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_buffer_comes_back_in_the_middle(name):
    """At every call in a method, on its own thread: no deadlock, no byte lost or given away twice."""
    for point in range(1, 2000):
        with HostPool(64 * PAGE, False, growth_bytes=16 * PAGE) as pool:
            buffers = [pool.take(PAGE) for _ in range(16)]  # one slab
            for index in (5, 8):
                buffers.pop(index).release()
            leaving = [buffers.pop(5) for _ in range(3)]
            at = AtPoint(point, lambda some=leaving: [buffer.release() for buffer in some])
            found = at.during(lambda made=pool: CALLS[name](made))
            if not at.struck:
                assert point > 5
                return
            pool.settle()
            assert soon(lambda made=pool: made._trimmer._thread is None)
            kept = [*buffers, *([found] if name in ("take", "try_take") and found else [])]
            in_use_bytes = sum(buffer.nbytes for buffer in kept)
            assert is_whole(pool, in_use_bytes), (point, pool.stats())
            kept += [pool.take(PAGE) for _ in range(64 - in_use_bytes // PAGE)]
            assert len({buffer.address for buffer in kept}) == len(kept)
    raise AssertionError("the method does not come to an end")


@pytest.fixture
def stuck(monkeypatch):
    """A pool with one page that is mapped, while more is being faulted in and does not come to an end."""
    gate = threading.Event()
    real = _slab.Slab.populate

    def held(*arguments) -> None:
        assert gate.wait(60)
        real(*arguments)

    with HostPool(64 * MIB, False, growth_bytes=PAGE) as pool:
        page = pool.take(PAGE)
        monkeypatch.setattr(_slab.Slab, "populate", held)
        pool.reserve({MIB: 1})
        try:
            yield pool, page
        finally:
            gate.set()


def test_who_waits_is_told_whenever_it_comes_back(stuck):
    """Also when that is the very moment between the last look at the queue and letting go of the lock."""
    pool, page = stuck
    for point in range(1, 2000):
        pages, found = [page], []

        def give(some=pages) -> None:
            with contextlib.suppress(IndexError):
                some.pop().release()

        at = AtPoint(point, give)
        waiter = threading.Thread(
            target=lambda how=at, got=found: got.append(how.during(lambda: pool.take(PAGE)))
        )
        waiter.start()
        waiter.join(0.3)
        never = not at.struck
        if never:
            give()
        waiter.join(10)
        assert found, (point, "it still waits")
        page = found[0]
        if never:
            break
    page.release()
    assert point > 20


def test_who_waits_is_told_by_the_holder_of_the_lock(stuck):
    pool, page = stuck
    found = []
    waiter = threading.Thread(target=lambda: found.append(pool.take(PAGE)))
    waiter.start()
    assert soon(lambda: len(pool._changed._waiters) == 1)
    with pool._returns, pool._lock:
        giver = threading.Thread(target=page.release)
        giver.start()
        giver.join(10)
        assert not giver.is_alive(), "giving back waits for nobody"
        assert not found
    waiter.join(10)
    assert [buffer.nbytes for buffer in found] == [PAGE]
    found[0].release()


@pytest.mark.parametrize("again", [True, False])
def test_an_interrupted_close(again, monkeypatch):
    """Ctrl-C at every call inside: closing again, or dropping the pool, unlocks and frees everything."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # an interrupt inside of a __del__
    HostPool(MIB, False).close()
    threads = num_threads()

    def attempt(interrupt: Interrupt) -> None:
        cudart = FakeCudart()
        pool = HostPool(MIB, True, cudart=cudart, growth_bytes=PAGE)
        event = FakeEvent()
        event.passed.set()
        pool.take(PAGE).release(event)
        kept = pool.take(3 * PAGE)
        interrupt.during(pool.close)
        if again:
            pool.close()
            assert pool.stats().mapped_bytes == 0
        with contextlib.suppress(ValueError):
            kept.release()
        del pool
        if not again:
            gc.collect(1)
        assert cudart.live == {}, interrupt.where
        assert soon(lambda: num_threads() <= threads), interrupt.where

    assert every_point(attempt, package=os.sep.join(("memopt", "memory", ""))) > 10
