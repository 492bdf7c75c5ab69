from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import sys

import numpy as np
import pytest

from memopt.io.aio_handle import AioHandle
from tests.io.conformance import MIB, open_fds, pages
from tests.io.test_faults import disk  # noqa: F401 - a fixture
from tests.io.test_uring import make_engine


@pytest.fixture(params=["threads", "io_uring"])
def handle(request):
    if request.param == "io_uring":
        make_engine().close()
    handle = AioHandle(block_size=1 << 16, queue_depth=8, overlap_events=True, engine=request.param)
    yield handle
    handle.close()


def test_settings_are_kept_and_checked():
    handle = AioHandle(12345, 7, False, True, 3, engine="threads")
    values = (handle.get_block_size(), handle.get_queue_depth(), handle.get_single_submit())
    assert values == (12345, 7, False)
    assert (handle.get_overlap_events(), handle.get_intra_op_parallelism()) == (True, 3)
    assert handle.get_alignment() == 4096
    handle.close()
    for settings in [{"block_size": 0}, {"queue_depth": 0}, {"intra_op_parallelism": 0}]:
        with pytest.raises(ValueError, match=next(iter(settings))):
            AioHandle(**settings, engine="threads")
    for settings in [{"block_size": 1e6}, {"queue_depth": "8"}, {"intra_op_parallelism": True}]:
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* must be an integer"):
            AioHandle(**settings)
    with pytest.raises(ValueError, match="engine='uring' is unknown"):
        AioHandle(engine="uring")


def test_a_fallback_is_told(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "memopt.io._uring", None)
    AioHandle().close()
    assert "aio_handle uses the threads engine: io_uring: the native part" in caplog.text


def test_the_block_size_reaches_io_uring():
    make_engine().close()
    size = np.int64(70_000)
    with contextlib.closing(AioHandle(block_size=size, engine="io_uring")) as handle:
        assert handle.engine.block_bytes == 73_728


def test_a_setting_without_effect_is_noted(caplog):
    AioHandle(single_submit=True, engine="threads").close()
    assert "single_submit has no effect" in caplog.text


def test_wait_counts_operations(handle, tmp_path):
    data = [pages(n) for n in (4096, 65536, MIB, 3 * MIB)]
    for i, part in enumerate(data):
        assert handle.async_pwrite(part, str(tmp_path / f"{i}.swp")) == 0
    assert handle.wait() == 4
    assert handle.wait() == 0
    backs = [pages(len(part)) for part in data]
    for i, back in enumerate(backs):
        assert handle.async_pread(back, str(tmp_path / f"{i}.swp"), 0) == 0
    assert handle.wait() == 4
    assert backs == data
    assert not [name for name in open_fds() if name.endswith(".swp")]


@pytest.mark.parametrize("nbytes", [1, 100, 511, 4095, 4097, 70_001, MIB + 13])
def test_odd_sizes_are_written_whole(handle, tmp_path, nbytes):
    """DeepSpeed 0.19.8: submit returns 0, wait returns 1, and the file is empty."""
    path, data = tmp_path / "odd.swp", pages(nbytes)
    handle.async_pwrite(data, str(path))
    assert handle.wait() == 1
    assert path.read_bytes() == data
    back = bytearray(nbytes)
    handle.async_pread(back, str(path))
    assert handle.wait() == 1
    assert back == data


def test_a_full_disk_is_an_error(handle, disk, tmp_path):  # noqa: F811
    """DeepSpeed 0.19.8: submit returns 0, wait returns 1, and most of the bytes are gone."""
    small = disk("ext4", 24 * MIB)
    path = str(small.path / "param.swp")
    handle.async_pwrite(pages(64 * MIB), path)
    handle.async_pwrite(pages(8192), str(tmp_path / "checkpoint"))
    with pytest.raises(OSError, match="No space left") as caught:
        handle.wait()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, path)
    assert (tmp_path / "checkpoint").stat().st_size == 8192  # the others were finished
    assert handle.wait() == 0  # and the handle goes on
    os.unlink(path)
    handle.sync_pwrite(pages(MIB), path)


def test_a_short_file_is_an_error_not_an_abort(handle, tmp_path):
    """DeepSpeed 0.19.8: a C assertion ends the process."""
    path = tmp_path / "short.swp"
    path.write_bytes(b"x" * 5000)
    handle.async_pread(bytearray(8192), str(path))
    with pytest.raises(OSError, match="file ends"):
        handle.wait()
    with pytest.raises(FileNotFoundError):
        handle.async_pread(bytearray(1), str(tmp_path / "missing"))
    with pytest.raises(OSError, match="file ends"):
        handle.sync_pread(bytearray(8192), str(path))


def test_the_other_calls_move_the_same_bytes(handle, tmp_path):
    path, data = str(tmp_path / "x"), pages(9000)
    assert handle.sync_pwrite(data, path) == 1
    assert handle.write(data[:10], path, False, 9000) == 1
    assert handle.pwrite(data[:5], path, False, False, 9010) == 1
    assert handle.pwrite(data[:5], path, False, True, 9015) == 0
    assert handle.wait() == 1
    whole = bytes(data) + bytes(data[:10]) + bytes(data[:5]) * 2
    for call in (
        lambda b: handle.sync_pread(b, path),
        lambda b: handle.read(b, path, False),
        lambda b: handle.pread(b, path, True, False),
    ):
        back = bytearray(len(whole))
        assert call(back) == 1
        assert back == whole
    back = bytearray(15)
    assert handle.pread(back, path, False, True, 9000) == 0
    assert handle.wait() == 1
    assert back == whole[9000:9015]


def test_neighbouring_odd_ranges_of_one_file(handle, tmp_path):
    """Many operations in flight on shared pages: no one may put another's bytes back to what they were."""
    rng, path = random.Random(0), str(tmp_path / "shared")
    cuts = sorted({0, 300_000, *(rng.randrange(300_000) for _ in range(60))})
    for _ in range(5):
        data = pages(300_000)
        spans = list(itertools.pairwise(cuts))
        rng.shuffle(spans)
        for begin, end in spans:
            handle.async_pwrite(bytes(data[begin:end]), path, begin)
        assert handle.wait() == len(spans)
        with open(path, "rb") as file:
            assert file.read() == data


def test_close_raises_what_nobody_waited_for(tmp_path):
    fds = open_fds()
    handle = AioHandle(engine="threads")
    (tmp_path / "short").write_bytes(b"x")
    handle.async_pread(bytearray(100), str(tmp_path / "short"))
    with pytest.raises(OSError, match="file ends"):
        handle.close()
    assert open_fds() == fds


def test_an_interrupted_call_keeps_its_file_until_the_bytes_are_there(tmp_path):
    """Closed earlier, its descriptor's number would be the next file's, and that file would get the bytes."""
    make_engine().close()
    handle = AioHandle(block_size=4096, queue_depth=2, engine="io_uring")
    data = pages(MIB)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    handle.engine.inject(-errno.EAGAIN, count=2**31)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            handle.sync_pwrite(data, str(tmp_path / "param.swp"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    others = [(tmp_path / f"other{i}").open("w+b", buffering=0) for i in range(4)]
    handle.engine.inject()
    assert handle.wait() == 1
    assert (tmp_path / "param.swp").read_bytes() == data
    assert [os.fstat(other.fileno()).st_size for other in others] == [0] * 4
    for other in others:
        other.close()
    handle.close()
