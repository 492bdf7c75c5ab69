"""Disks that fail under a whole session: one clear error, a model that can be saved, and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from _traps import Net, Sines, batch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import memopt
from tests.io.conformance import MIB, open_fds, soon
from tests.io.test_faults import EXT4_IOC_SHUTDOWN, disk, disk_is_empty  # noqa: F401 - a fixture
from tests.io.test_uring import make_engine

ENGINES = pytest.mark.parametrize("engine", ["threads", "io_uring"])


@pytest.fixture(autouse=True)
def _can_run(request):
    if "engine" in request.fixturenames and request.getfixturevalue("engine") == "io_uring":
        make_engine().close()


def wide_step(model, i):
    """A step whose tensors are pages large, so that direct I/O carries them."""
    loss = model(batch(i, 9001, 12)).square().mean()
    loss.backward()
    return loss.detach()


class Left:
    """What a session may not leave behind."""

    def __init__(self) -> None:
        self.fds, self.num_threads = open_fds(), threading.active_count()

    def check(self, model: torch.nn.Module) -> None:
        gc.collect()
        assert _get_current_dispatch_mode_stack() == []
        assert not [name for name, m in model.named_modules() if "forward" in m.__dict__]
        assert soon(lambda: not [f for f in open_fds() - self.fds if "spill" in f or "uring" in f])
        assert soon(lambda: threading.active_count() <= self.num_threads)
        torch.save(model.state_dict(), io.BytesIO())


def run_until(model, budget: str, engine: str, fault, num_steps: int = 6):
    """Train with `fault` before the third step; return the session, the error and the step it came at."""
    at, session, error = (
        -1,
        memopt.optimize(
            model, plan="ssd", regions=["layers"], budget=memopt.Budget(ssd=budget), engine=engine
        ),
        None,
    )
    run = None
    try:
        with session as run:
            for at in range(num_steps):
                if at == 2:
                    fault()
                wide_step(model, at)
    except OSError as caught:
        error = caught.with_traceback(None)
    return run, error, at


@ENGINES
def test_a_file_system_that_shuts_down(disk, engine):  # noqa: F811
    """Every transfer fails from then on (EIO from the kernel): the step says so, once."""
    disk = disk("ext4", 64 * MIB)
    (disk.path / "spill").mkdir()
    left, model = Left(), Net(Sines)

    def shut_down() -> None:
        root = os.open(disk.path, os.O_RDONLY)
        try:
            fcntl.ioctl(root, EXT4_IOC_SHUTDOWN, (2).to_bytes(4, "little"))
        except OSError as error:
            pytest.skip(f"this ext4 cannot be shut down: {error}")
        finally:
            os.close(root)

    _, error, at = run_until(model, f"{disk.path}/spill:32MiB", engine, shut_down)
    assert error is not None
    assert error.errno == errno.EIO
    assert str(disk.path) in str(error)
    assert at == 2
    assert error.__context__ is None, "one error, not one that came while another was handled"
    assert error.__cause__ is None
    left.check(model)


@ENGINES
def test_a_disk_that_another_process_fills(disk, engine):  # noqa: F811
    """Nothing is reserved yet when the disk is full: the step goes on without it, and the report names the disk."""
    disk = disk("ext4", 64 * MIB)
    left, model = Left(), Net(Sines)
    budget = memopt.Budget(ssd=f"{disk.path}:32MiB")
    with memopt.optimize(
        model, plan="ssd", regions=["layers"], budget=budget, engine=engine
    ) as run:
        disk.fill()
        for i in range(3):
            wide_step(model, i)
    assert f"the disk was full (No space left on device: {disk.path}" in " ".join(
        run.report().notes
    )
    left.check(model)
    (disk.path / "other").unlink()
    disk_is_empty(disk)
    plain = Net(Sines)
    plain.load_state_dict(model.state_dict())
    for i in range(3):
        wide_step(plain, i)
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


@ENGINES
def test_a_disk_with_room_for_the_budget_alone(disk, engine, measured_anew):  # noqa: F811
    """The rates are measured inside of the budget, so a session asks the disk for nothing more."""
    assert measured_anew
    disk = disk("ext4", 64 * MIB)
    stat = os.statvfs(disk.path)
    room = stat.f_bavail * stat.f_frsize // MIB - 1
    run, error, at = run_until(Net(Sines), f"{disk.path}:{room}MiB", engine, lambda: None)
    assert (error, at) == (None, 5)
    assert run.report().to_dict()["measured"]["ssd_bytes"] < 8 * MIB, "measuring is no peak"


@ENGINES
def test_a_removed_directory_and_a_remount(disk, engine):  # noqa: F811
    """The file has no name: the first changes nothing; the kernel refuses the second while it is open."""
    disk = disk("ext4", 64 * MIB)
    where = disk.path / "spill"
    where.mkdir()
    remount = ["mount", "-o", "remount,ro", str(disk.path)]
    refused = []

    def fault() -> None:
        shutil.rmtree(where)
        refused.append(subprocess.run(remount, capture_output=True, check=False).returncode != 0)

    left, model = Left(), Net(Sines)
    run, error, at = run_until(model, f"{where}:32MiB", engine, fault)
    assert (error, at, refused) == (None, 5, [True])
    assert run.report().to_dict()["measured"]["ssd_bytes"] > MIB
    left.check(model)
    assert subprocess.run(remount, capture_output=True, check=False).returncode == 0


@ENGINES
def test_a_device_that_loses_blocks_between_forward_and_backward(disk, engine):  # noqa: F811
    """Several reads ahead fail with EIO of the block device: backward raises one, and closing adds none."""
    disk = disk("ext4", 64 * MIB)
    left, model = Left(), Net(Sines)
    session = memopt.optimize(
        model,
        plan="ssd",
        regions=["layers"],
        budget=memopt.Budget(ssd=f"{disk.path}:32MiB"),
        engine=engine,
    )

    def body() -> None:
        with session as run:
            for i in range(3):
                wide_step(model, i)
            loss = model(batch(3, 9001, 12)).square().mean()
            run._resources.transfers.finish()
            os.truncate(disk.image, MIB)
            try:
                loss.backward()
            finally:
                os.truncate(disk.image, 64 * MIB)

    with pytest.raises(OSError, match="read at offset") as caught:
        body()
    assert (caught.value.errno, caught.value.__context__) == (errno.EIO, None)
    del caught
    left.check(model)


def test_the_program_may_go_on_after_a_failed_step(tmp_path, monkeypatch):
    """The loop catches the error, skips the batch and trains on in the same context."""
    from memopt.io import threads

    real, broken = threads._call, []

    def call(*args, **named):
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **named)

    monkeypatch.setattr(threads, "_call", call)
    left, model, failed, ended = Left(), Net(Sines), [], []
    budget = memopt.Budget(ssd=f"{tmp_path}:64MiB")
    with memopt.optimize(
        model, plan="ssd", regions=["layers"], budget=budget, engine="threads", strict=True
    ):
        for i in range(8):
            broken[:] = [True] if i == 3 else []
            try:
                wide_step(model, i)
            except OSError as error:
                failed.append((i, error.errno))
                torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
            else:
                ended.append(i)
            model.zero_grad()
    assert failed in (
        [(3, errno.EIO)],
        [(3, errno.EIO), (4, errno.EIO)],
    )  # found out one step later
    assert ended[-3:] == [5, 6, 7]
    left.check(model)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_region_that_raised_is_placed_as_before(tmp_path):
    """The ops that it did not come to made it one whose ops change, of which only the input was moved from then on."""

    class Failing(Sines):
        fails = False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("a batch that the model refuses")
            return super().forward(x)

    model, written = Net(Failing), []
    budget = memopt.Budget(ssd=f"{tmp_path}:64MiB")
    with memopt.optimize(model, plan="ssd", regions=["layers"], budget=budget) as run:
        for i in range(8):
            model.layers[1].fails = i == 4
            try:
                wide_step(model, i)
            except RuntimeError:
                assert i == 4
            model.zero_grad()
            written.append(run.report().moved.ssd_write_bytes)
    assert not [note for note in run.report().notes if "op list" in note]
    assert written[7] - written[6] == written[3] - written[2] > 0


def test_a_failure_that_only_closing_finds(tmp_path, monkeypatch):
    """The last step's writes fail and nobody asks for them: the context raises that, and everything is undone."""
    from memopt.io import threads

    model, left = Net(Sines), Left()
    real, broken = threads._call, []

    def call(piece, *args, **named):
        if broken and piece.kind == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(piece, *args, **named)

    monkeypatch.setattr(threads, "_call", call)
    session = memopt.optimize(
        model,
        plan="ssd",
        regions=["layers"],
        budget=memopt.Budget(ssd=f"{tmp_path}:64MiB"),
        engine="threads",
    )

    def body() -> None:
        with session:
            for i in range(3):
                wide_step(model, i)
            broken.append(True)
            model(batch(4, 9001, 12)).sum()

    with pytest.raises(OSError, match="No space left") as caught:
        body()
    assert caught.value.errno == errno.ENOSPC
    del caught
    left.check(model)


def test_a_directory_that_is_missing_leaves_no_thread(tmp_path):
    left, model = Left(), Net(Sines)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    budget = memopt.Budget(ssd=(f"{tmp_path}/one:8MiB", f"{tmp_path}/two:8MiB"))
    session = memopt.optimize(model, plan="ssd", budget=budget, engine="threads")
    (tmp_path / "two").rmdir()
    with pytest.raises((OSError, memopt.ConfigError), match="two"), session:
        pass
    left.check(model)


def test_two_sessions_of_two_processes_share_a_directory(tmp_path):
    """Neither sees the other's bytes: both give the losses of a run alone."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _SESSION, str(tmp_path), "5"], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    out = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert out[0] == out[1] != ""
    assert list(tmp_path.iterdir()) == []


_SESSION = """
import sys, torch, memopt
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), 1e-2)
budget = memopt.Budget(ssd=f"{sys.argv[1]}:64MiB")
with memopt.optimize(model, optimizer, budget=budget, plan="ssd", strict=True, engine="threads"):
    for i in range(int(sys.argv[2])):
        loss = model(torch.randn(2048, 64)).square().mean()
        print(loss.item().hex())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""
