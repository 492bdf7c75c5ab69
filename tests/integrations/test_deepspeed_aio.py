from __future__ import annotations

import contextlib
import functools
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memopt.integrations.deepspeed_aio import LockedTensors, TensorAioHandle, op_modules
from memopt.memory.pinned import HostPoolFull
from tests.io.test_faults import disk  # noqa: F401 - a fixture

MIB = 1 << 20


@pytest.fixture
def locked():
    locked = LockedTensors(8 * MIB, register=False)
    yield locked
    locked.close()


@pytest.fixture
def handle(locked):
    handle = TensorAioHandle(1 << 20, 8, False, True, 1, locked=locked)
    yield handle
    handle.close()


def test_locked_tensors(handle, locked):
    tensor = handle.new_cpu_locked_tensor(1000, torch.empty(0, dtype=torch.bfloat16))
    assert (tensor.shape, tensor.dtype, tensor.data_ptr() % 4096) == ((1000,), torch.bfloat16, 0)
    tensor.fill_(3)
    assert handle.is_pinned(tensor)
    assert handle.is_pinned(tensor.narrow(0, 10, 20))
    assert not handle.is_pinned(torch.empty(1000))
    assert not handle.is_pinned(torch.empty(4, device="meta"))
    whole = torch.frombuffer((locked._buffers[tensor.data_ptr()]).memoryview, dtype=torch.uint8)
    assert whole.numel() == 2000  # exact
    assert handle.free_cpu_locked_tensor(tensor) is True
    assert handle.free_cpu_locked_tensor(tensor) is False
    assert not handle.is_pinned(tensor)
    with pytest.raises(HostPoolFull):
        handle.new_cpu_locked_tensor(9 * MIB, torch.empty(0, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("numel", [1, 333, 4096, 300_001])
def test_round_trip_of_tensors(handle, tmp_path, dtype, numel):
    source = (torch.rand(numel) * 200).to(dtype)
    path = str(tmp_path / "tensor.swp")
    assert handle.async_pwrite(source, path, 0) == 0
    assert handle.wait() == 1
    target = handle.new_cpu_locked_tensor(numel, source)
    assert handle.async_pread(target, path, 0) == 0
    assert handle.wait() == 1
    assert torch.equal(source, target)


def test_a_dropped_tensor_is_written_whole(handle, tmp_path):
    expected = torch.arange(MIB, dtype=torch.int32)
    handle.async_pwrite(expected.clone(), str(tmp_path / "x"))
    for _ in range(10):
        torch.full((MIB,), -1, dtype=torch.int32)  # would land in the freed memory
    assert handle.wait() == 1
    assert torch.equal(torch.from_file(str(tmp_path / "x"), size=MIB, dtype=torch.int32), expected)


def test_what_cannot_be_is_refused(handle, tmp_path):
    with pytest.raises(ValueError, match="not contiguous"):
        handle.async_pwrite(torch.zeros(4, 4).t()[:, :2], str(tmp_path / "x"))
    with pytest.raises(ValueError, match="on meta"):
        handle.async_pwrite(torch.zeros(4, device="meta"), str(tmp_path / "x"))


def test_modules_offer_what_deepspeed_calls(locked, tmp_path):
    async_io, pin_memory = op_modules(locked, engine="threads")
    handle = async_io.aio_handle(
        block_size=MIB,
        queue_depth=8,
        single_submit=False,
        overlap_events=True,
        intra_op_parallelism=1,
    )
    tensor = handle.new_cpu_locked_tensor(100, torch.empty(0))
    assert pin_memory.pin_handle().is_pinned(tensor)  # one set of locked tensors for both
    assert pin_memory.pin_handle().free_cpu_locked_tensor_by_ptr(tensor.data_ptr())
    for name in ("async_pread", "async_pwrite"):
        assert list(inspect.signature(getattr(handle, name)).parameters) == [
            "buffer",
            "filename",
            "file_offset",
        ]
    handle.close()


def test_deepspeeds_own_swap_functions_take_the_handle(handle, tmp_path):
    utils = pytest.importorskip("deepspeed.runtime.swap_tensor.utils")
    tensors = [torch.randn(n) for n in (262_144, 300_001)]
    paths = [str(tmp_path / f"{i}.tensor.swp") for i in range(2)]
    utils.swap_out_tensors(handle, tensors, paths)
    assert handle.wait() == 2
    backs = [handle.new_cpu_locked_tensor(t.numel(), t) for t in tensors]
    utils.swap_in_tensors(handle, backs, paths)
    assert handle.wait() == 2
    assert all(torch.equal(a, b) for a, b in zip(tensors, backs, strict=True))


def _swapper(handle, monkeypatch):
    """DeepSpeed's own AsyncTensorSwapper (gradients and fragments go out through it), without a process group."""
    module = pytest.importorskip("deepspeed.runtime.swap_tensor.async_swapper")
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    swapper = module.AsyncTensorSwapper(aio_handle=handle, numel_alignment=1024, timers=None)
    swapper.add_buffers([handle.new_cpu_locked_tensor(MIB // 4, torch.empty(0)) for _ in range(3)])
    return swapper


def test_deepspeeds_async_swapper_writes_through_the_handle(handle, tmp_path, monkeypatch):
    swapper = _swapper(handle, monkeypatch)
    tensors = [torch.randn(n * 1024) for n in (100, 256, 33, 1, 200, 180)]
    paths = [str(tmp_path / f"{i}.tensor.swp") for i in range(len(tensors))]
    swapper.swap_out_tensors(tensors, paths)
    swapper.release_buffers()
    for tensor, path in zip(tensors, paths, strict=True):
        assert torch.equal(torch.from_file(path, size=tensor.numel()), tensor)


def test_a_full_disk_stops_deepspeeds_async_swapper(handle, disk, monkeypatch):  # noqa: F811
    """DeepSpeed's own handle reports these as written."""
    small = disk("ext4", 2 * MIB)
    swapper = _swapper(handle, monkeypatch)
    tensors = [torch.randn(MIB // 4) for _ in range(6)]

    def swap_out() -> None:
        swapper.swap_out_tensors(tensors, [str(small.path / str(i)) for i in range(6)])
        swapper.release_buffers()

    with pytest.raises(OSError, match="No space left"):
        swap_out()
    with contextlib.suppress(OSError):
        handle.wait()


@pytest.fixture(scope="module")
def zero_3(tmp_path_factory):
    """Run the script and return what it printed, by its first words."""
    pytest.importorskip("deepspeed")
    script = Path(__file__).with_name("_zero3.py")

    @functools.cache
    def run(how: str) -> dict[str, str]:
        command = [sys.executable, str(script), str(tmp_path_factory.mktemp(how)), how]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "swapper"),
    [("nvme", "PartitionedOptimizerSwapper"), ("pipelined", "PipelinedOptimizerSwapper")],
)
def test_zero_3_trains_on_nvme_through_the_handle(zero_3, how, swapper):
    """A ZeRO-3 run with optimizer and parameters on disk gives the losses of the run without offloading."""
    without, offloaded = zero_3("none"), zero_3(how)
    assert offloaded["losses"] == without["losses"]
    assert (without["swapper"], offloaded["swapper"]) == ("NoneType", swapper)
    assert int(without["written"]) == 0
    assert int(offloaded["written"]) > 10 * MIB
