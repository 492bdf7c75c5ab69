"""What can go wrong on the way to SSD and back: a full budget, a corrupted byte, a disk that fails."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from _bitwise import (
    Program,
    compare,
    notes_of,
    plain_run,
    plan_for,
    run_memopt,
    spill_directory,
    trace_of,
    train,
)
from _models import model_program
from _traces import Traces
from _traps import TRAPS, Net, Sines, batch, simple_step

import memopt
from memopt.types.plan import OpPlacement, Plan, RegionPlan

PROGRAM = TRAPS["2-native-dropout"]


def test_a_full_ssd_budget_is_exact_and_noted():
    """What finds no room is kept or recomputed; nothing is lost, and the report says so."""
    program = model_program("llama", dropout=True)
    with spill_directory() as path:
        record = run_memopt(program, "ssd", budget=memopt.Budget(ssd=f"{path}:96KiB"))
    compare(plain_run(program), record)
    assert record.run.report().to_dict()["measured"]["ssd_bytes"] <= 96 << 10
    assert "ssd" in notes_of(record.run)


def test_a_small_ssd_budget_works(measured_anew):
    """Measuring the disk may not need more than the budget: 96 KiB, and the session's own measurement."""
    assert measured_anew
    with spill_directory() as path:
        record = run_memopt(PROGRAM, "ssd", budget=memopt.Budget(ssd=f"{path}:96KiB"))
    compare(plain_run(PROGRAM), record)


def _spill_files(path):
    """Descriptors of this process's (unlinked) files in the spill directory."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith(str(path)):
            found.append(int(link.name))
    return found


@pytest.mark.parametrize("engine", ["threads", "auto"])
def test_spill_files_are_unlinked_at_creation(engine):
    with spill_directory() as path:
        model = PROGRAM.build().train()
        budget = memopt.Budget(ssd=f"{path}:16MiB")
        with memopt.optimize(model, plan="ssd", regions=["layers"], budget=budget, engine=engine):
            for i in range(2):
                simple_step(model, i)
            loss = model(batch(3)).square().mean()
            assert not list(path.iterdir()), "a killed process would leave this"
            assert _spill_files(path), "an open, unlinked extent file"
            loss.backward()


def _flip_every_byte(path):
    seen = set()
    for descriptor in _spill_files(path):
        facts = os.fstat(descriptor)
        if facts.st_ino in seen:  # one file is open twice: with and without O_DIRECT
            continue
        seen.add(facts.st_ino)
        reopened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        try:
            data = np.frombuffer(os.pread(reopened, facts.st_size, 0), dtype=np.uint8)
            os.pwrite(reopened, (data ^ 0x11).tobytes(), 0)
            os.fsync(reopened)
        finally:
            os.close(reopened)


@pytest.mark.parametrize("what", ["input", "op", "outside"])
def test_strict_finds_a_corrupted_byte_and_names_it(what):
    """The file's bytes are changed between forward and backward."""
    regions = tuple(
        RegionPlan(
            name=region.name,
            input="ssd" if what == "input" else "device",
            ops=tuple(
                OpPlacement(position=op.position, op=op.op, placement="ssd", nbytes=op.nbytes)
                for op in region.ops
                if op.placeable and what == "op"
            ),
        )
        for region in trace_of(PROGRAM).regions
    )
    plan = Plan(regions=regions, outside="ssd" if what == "outside" else "device")
    with spill_directory() as path:
        model = PROGRAM.build().train()
        traces = Traces(model)
        budget = memopt.Budget(ssd=f"{path}:1MiB")
        with memopt.optimize(model, plan=plan, regions=["layers"], budget=budget, strict=True):
            for i in range(2):
                simple_step(model, i)
            loss = model(batch(3)).square().mean()
            time.sleep(0.3)  # every write has reached the file
            _flip_every_byte(path)
            with pytest.raises(memopt.RoundTripError) as caught:
                loss.backward()
        text = str(caught.value)
        wanted = {
            "input": ("layers.2", "input"),
            "op": ("layers.2", "aten."),
            "outside": ("outside",),
        }[what]
        assert all(word in text for word in wanted), text
        assert "''" not in text, "no empty name in a message"
        del loss, caught
        model.zero_grad()
        traces.check()


def test_a_failing_disk_surfaces_with_errno_and_leaves_the_model_whole(monkeypatch):
    """Every write fails from the third step on."""
    import memopt.io.threads as threads

    real = os.pwritev
    failing = {"on": False}

    def pwritev(*args):
        if failing["on"]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(threads.os, "pwritev", pwritev)
    with spill_directory() as path:
        model = PROGRAM.build().train()
        traces = Traces(model)
        budget = memopt.Budget(ssd=f"{path}:16MiB")
        with (
            pytest.raises(OSError) as caught,
            memopt.optimize(model, plan="ssd", regions=["layers"], budget=budget, engine="threads"),
        ):
            for i in range(6):
                failing["on"] = i >= 2
                simple_step(model, i)
        assert caught.value.errno == errno.EIO
        del caught
        failing["on"] = False
        model.zero_grad()
        traces.check()
        with memopt.optimize(model, plan="ssd", regions=["layers"], budget=budget):
            for i in range(2):
                simple_step(model, i)


@pytest.mark.parametrize("engine", ["threads", "io_uring"])
def test_both_io_engines_are_exact(engine):
    program = model_program("gpt2", dropout=True)
    try:
        record = run_memopt(program, plan_for(program, "mix-0"), engine=engine)
    except Exception as error:
        if engine == "io_uring" and "io_uring" in str(error):
            pytest.skip(f"io_uring cannot run here: {error}")
        raise
    compare(plain_run(program), record)


def test_several_directories():
    program = model_program("llama", dropout=True)
    with spill_directory() as one, spill_directory() as two:
        budget = memopt.Budget(ssd=(f"{one}:32MiB", f"{two}:32MiB"))
        record = train(
            program,
            lambda model, optimizer: memopt.optimize(
                model, optimizer, plan="ssd", budget=budget, strict=True
            ),
        )
    compare(plain_run(program), record)


def test_large_tensors_take_many_pieces():
    """A region's tensors of several MiB, not multiples of any block size."""

    def step(model, i):
        loss = model(batch(i, 70_001, 12)).square().mean()
        loss.backward()
        return loss

    program = Program(build=lambda: Net(Sines), step=step, regions=["layers"])
    record = run_memopt(program, "ssd", strict=True)
    compare(plain_run(program), record)
    assert record.run.report().to_dict()["measured"]["ssd_bytes"] >= 3 * 70_001 * 12 * 4
    assert torch.isfinite(record.steps[-1].outputs["out"])
