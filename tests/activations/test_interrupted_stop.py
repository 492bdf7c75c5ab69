"""Ctrl-C while a session stops, in its storage or in its pools: stopping again leaves nothing behind."""

from __future__ import annotations

import os
import sys

import pytest
from _traps import Net, Sines
from test_disk_faults import Left, wide_step

import memopt
from memopt.session import Session
from tests.io.test_interrupted_close import Interrupt
from tests.io.test_uring import make_engine

PACKAGES = {name: os.sep.join(("memopt", name, "")) for name in ("io", "memory")}


def stop_interrupted(tmp_path, engine: str, interrupt: Interrupt) -> None:
    left, model = Left(), Net(Sines)
    budget = memopt.Budget(ssd=f"{tmp_path}:64MiB")
    run = memopt.start(model, plan="ssd", regions=["layers"], budget=budget, engine=engine)
    for i in range(2):
        wide_step(model, i)
    interrupt.during(run.stop)
    run.stop()
    del run
    left.check(model)


@pytest.mark.parametrize("where", ["report", "_note_unstepped", "_check_seen"])
def test_ctrl_c_before_anything_is_closed(tmp_path, monkeypatch, where):
    """A `with` leaves once only: what is interrupted before the closing must not stand in its way."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    left, model = Left(), Net(Sines)
    budget = memopt.Budget(ssd=f"{tmp_path}:64MiB")

    def loop() -> None:
        with memopt.optimize(model, plan="ssd", regions=["layers"], budget=budget) as run:
            runs.append(run)
            wide_step(model, 0)
            monkeypatch.setattr(Session, where, interrupted)

    runs: list[memopt.Session] = []
    with pytest.raises(KeyboardInterrupt):
        loop()
    monkeypatch.undo()
    left.check(model)
    with pytest.raises(memopt.ConfigError, match="interrupted while it stopped"):
        runs[0].report()
    runs[0].stop()  # nothing more to do


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["threads", "io_uring"])
@pytest.mark.parametrize("package", PACKAGES)
def test_ctrl_c_while_stopping(tmp_path, monkeypatch, package, engine):
    """At every seventh call inside of the storage and of the pools."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # an interrupt inside of a __del__
    if engine == "io_uring":
        make_engine().close()
    for point in range(1, 10_000, 7):
        interrupt = Interrupt(point, PACKAGES[package])
        stop_interrupted(tmp_path, engine, interrupt)
        if not interrupt.where:
            break
    assert point > 50
