from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memopt.io import ExtentStore, ExtentStoreFull, open_engine, threads
from tests.io.conformance import MIB, num_threads, open_fds, pages, soon
from tests.io.test_uring import make_engine

PAGE = 4096


@pytest.fixture(params=["threads", "io_uring"])
def engine(request):
    engine = (
        open_engine("threads", queue_depth=4)
        if request.param == "threads"
        else make_engine(queue_depth=4)
    )
    yield engine
    engine.close()


@pytest.fixture
def two(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    return tmp_path / "a", tmp_path / "b"


def test_round_trip_of_odd_sizes(tmp_path, engine):
    with ExtentStore([(tmp_path, 8 * MIB)], engine) as store:
        sizes = [0, 1, 100, PAGE - 1, PAGE, PAGE + 1, 70_001, MIB + 13]
        data = [pages(n) for n in sizes]
        extents = [store.alloc(n) for n in sizes]
        tickets = [store.write(e, d) for e, d in zip(extents, data, strict=True)]
        for ticket in tickets:
            store.wait(ticket)
        for extent, expected in zip(extents, data, strict=True):
            back = pages(len(expected), fill=bytes(len(expected)))
            store.read(extent, back).wait()
            assert back == expected
        if store.files[0].is_direct:
            assert engine.stats().buffered_bytes == 0
        assert store.stats().asked_bytes == sum(sizes)
        assert store.stats().in_use_bytes == sum(-(-n // PAGE) * PAGE for n in sizes)


def test_batches(tmp_path, engine):
    with ExtentStore([(tmp_path, 8 * MIB)], engine) as store:
        data = [pages(n) for n in range(1, 200_000, 9973)]
        items = [(store.alloc(len(d)), d) for d in data]
        store.write_batch(items).wait()
        backs = [(extent, pages(len(d), fill=bytes(len(d)))) for extent, d in items]
        store.read_batch(backs).wait()
        assert all(back == d for (_, back), d in zip(backs, data, strict=True))


def test_read_waits_for_the_write_in_flight(tmp_path, engine):
    with ExtentStore([(tmp_path, 64 * MIB)], engine) as store:
        for _ in range(10):
            data = pages(3 * MIB)
            extent = store.alloc(3 * MIB)
            store.write(extent, data)
            back = pages(3 * MIB, fill=bytes(3 * MIB))
            store.read(extent, back).wait()
            assert back == data
            store.write(extent, pages(3 * MIB, fill=b"n" * (3 * MIB)))
            store.free(extent)  # its space must not be reused before that write is over
            other, data = store.alloc(3 * MIB), pages(3 * MIB)
            store.write(other, data)
            store.read(other, back).wait()
            assert back == data


def test_space_is_not_reused_under_a_transfer(tmp_path, monkeypatch):
    gate, real = threading.Event(), threads._call

    def held(*args, **kwargs):
        assert gate.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(threads, "_call", held)
    with ExtentStore([(tmp_path, 2 * MIB)], "threads") as store:
        first, data = store.alloc(MIB), pages(MIB)
        store.write(first, pages(MIB))
        store.free(first)
        second = store.alloc(MIB)
        assert second.runs[0].offset != first.runs[0].offset
        assert store.stats().in_use_bytes == 2 * MIB  # the disk is still busy with the first
        threading.Timer(0.2, gate.set).start()
        third = store.alloc(
            MIB
        )  # the budget is used up: waits for that transfer, then takes its place
        assert third.runs == first.runs
        store.write(third, data)
        back = bytearray(MIB)
        store.read(third, back).wait()
        assert back == data


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_failed_write_is_never_read_as_data_and_can_be_repeated(
    tmp_path, monkeypatch, waited_for
):
    def broken(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with ExtentStore([(tmp_path, 2 * MIB)], "threads") as store:
        extent, data, back = store.alloc(MIB), pages(MIB), bytearray(MIB)
        store.write(extent, data).wait()
        with monkeypatch.context() as patch:
            patch.setattr(threads, "_call", broken)
            ticket = store.write(extent, pages(MIB))
            ticket._finished(None)
        if waited_for:
            for call in (
                ticket.wait,
                lambda: store.read(extent, back),
                lambda: store.read(extent, back),
            ):
                with pytest.raises(OSError, match="write at offset"):
                    call()
        with pytest.raises(OSError, match="write at offset"):
            store.write(extent, data[:PAGE], offset=PAGE)  # a part does not mend the rest
        store.write(extent, data).wait()
        store.read(extent, back).wait()
        assert back == data


def test_two_threads_on_one_extent_see_each_others_transfers(tmp_path, engine):
    """A read that begins while another thread is starting a write waits for that write."""
    with ExtentStore([(tmp_path, 8 * MIB)], engine) as store:
        old, new, back = pages(MIB), pages(MIB), bytearray(MIB)
        extent = store.alloc(MIB)
        store.write(extent, old).wait()
        here, go, real = threading.Event(), threading.Event(), store._transfers

        def slow(kind, *arguments):
            if kind == "write":  # what is in flight was looked at; this write is not yet
                here.set()
                assert go.wait(20)
            return real(kind, *arguments)

        store._transfers = slow
        writer = threading.Thread(target=lambda: store.write(extent, new))
        reader = threading.Thread(target=lambda: store.read(extent, back).wait())
        writer.start()
        assert here.wait(20)
        reader.start()
        reader.join(0.2)
        assert reader.is_alive()
        go.set()
        writer.join(20)
        reader.join(20)
        assert back == new


def test_batches_of_many_threads_on_the_same_extents(tmp_path, engine):
    """In every order of the extents; each ends as the bytes of one thread."""
    with ExtentStore([(tmp_path, 8 * MIB)], engine) as store:
        extents = [store.alloc(200_000) for _ in range(3)]
        failures = []

        def work(number: int) -> None:
            try:
                order = random.Random(number).sample(extents, 3)
                content = bytes([number]) * 200_000
                for _ in range(30):
                    store.write_batch([(extent, content) for extent in order]).wait()
                    backs = [(extent, bytearray(200_000)) for extent in reversed(order)]
                    store.read_batch(backs).wait()
                    assert all(len(set(back)) == 1 for _, back in backs)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert not any(worker.is_alive() for worker in workers), "they wait for each other"
        assert failures == []


def test_parts_of_an_extent(tmp_path, engine):
    with ExtentStore([(tmp_path, 8 * MIB)], engine) as store:
        data, extent = pages(50_000), store.alloc(50_000)
        for begin, end in [(0, 8192), (8192, 9000), (9000, 30_000), (30_000, 50_000)]:
            store.write(extent, data[begin:end], offset=begin)
        for begin, end in [
            (0, 50_000),
            (1, 2),
            (8000, 9001),
            (12288, 16384),
            (49_999, 50_000),
            (7, 7),
        ]:
            back = bytearray(end - begin)
            store.read(extent, back, offset=begin).wait()
            assert back == data[begin:end]
        store.write(extent, b"new", offset=10).wait()  # the rest of the page stays
        back = bytearray(50_000)
        store.read(extent, back).wait()
        assert back == bytes(data[:10]) + b"new" + bytes(data[13:])


def test_misuse_is_refused(tmp_path, engine):
    with pytest.raises(ValueError, match="empty"):
        ExtentStore([], engine)
    with pytest.raises(ValueError, match="below one unit"):
        ExtentStore([(tmp_path, 100)], engine)
    with ExtentStore([(tmp_path, MIB)], engine) as store:
        extent = store.alloc(100)
        with pytest.raises(ValueError, match="of which 0 were written"):
            store.read(extent, bytearray(1))
        with pytest.raises(ValueError, match="hole"):
            store.write(extent, b"1", offset=5)
        with pytest.raises(ValueError, match="outside an extent of 100"):
            store.write(extent, bytes(101))
        with pytest.raises(ValueError, match="negative"):
            store.alloc(-1)
        store.free(extent)
        for call in (lambda: store.write(extent, b"1"), lambda: store.free(extent)):
            with pytest.raises(ValueError, match="freed"):
                call()
    with pytest.raises(ValueError, match="closed"):
        store.alloc(1)


def test_budget_is_exact_and_named(tmp_path, engine):
    with ExtentStore([(tmp_path, 10 * PAGE + 100)], engine) as store:
        extents = [store.alloc(PAGE) for _ in range(10)]
        with pytest.raises(ExtentStoreFull, match=r"40960.*raise the ssd budget") as caught:
            store.alloc(1)
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(caught.value)
        assert store.stats().in_use_bytes == 10 * PAGE
        store.free(extents[3])
        store.free(extents[7])
        data, extent = (
            pages(2 * PAGE),
            store.alloc(2 * PAGE),
        )  # two holes apart: the budget counts, not their place
        assert len(extent.runs) == 2
        store.write(extent, data).wait()
        back = bytearray(2 * PAGE)
        store.read(extent, back).wait()
        assert back == data


def test_large_extents_are_striped_and_small_ones_go_round(two, engine):
    with ExtentStore([(two[0], 8 * MIB), (two[1], 8 * MIB)], engine, stripe_bytes=MIB) as store:
        small = [store.alloc(PAGE) for _ in range(4)]
        assert [extent.runs[0].area_index for extent in small] == [0, 1, 0, 1]
        large, data = store.alloc(4 * MIB + 5), pages(4 * MIB + 5)
        assert sorted(run.area_index for run in large.runs) == [0, 1]
        assert max(run.nbytes for run in large.runs) <= 2 * MIB + PAGE
        store.write(large, data).wait()
        back = bytearray(len(data))
        store.read(large, back).wait()
        assert back == data
        sizes = [os.fstat(file.buffered_fd).st_size for file in store.files]
        assert min(sizes) >= 2 * MIB


def test_every_part_of_a_large_extent_is_on_all_disks(two, engine):
    with ExtentStore([(two[0], 64 * MIB), (two[1], 48 * MIB)], engine) as store:
        small = store.alloc(PAGE)
        extent, data = store.alloc(70 * MIB + 5), pages(70 * MIB + 5)
        areas = [run.area_index for run in extent.runs[:16]]
        assert areas in ([0, 1] * 8, [1, 0] * 8)
        assert max(run.nbytes for run in extent.runs) == 4 * MIB
        for index in range(2):  # the disks stay sequential
            own = [run for run in extent.runs if run.area_index == index]
            assert all(a.offset + a.nbytes == b.offset for a, b in itertools.pairwise(own))
        for begin in range(0, len(data), 16 * MIB):
            store.write(extent, data[begin : begin + 16 * MIB], offset=begin)
        back = bytearray(len(data))
        store.read(extent, back).wait()
        assert back == data
        store.free(extent)
        assert store.stats().in_use_bytes == small.allocated_bytes
        assert all(area.free.largest_bytes > 30 * MIB for area in store._areas)  # whole again


def test_a_slow_disk_does_not_keep_the_others_idle(two, monkeypatch):
    """All that is in flight of one tensor must not be on one of them."""
    go, real, done = threading.Event(), threads._call, set()

    def slow(piece, part, offset, **options):
        if piece.file is store.files[0]:
            assert go.wait(20)
        moved = real(piece, part, offset, **options)
        done.add(piece.file)
        return moved

    monkeypatch.setattr(threads, "_call", slow)
    with ExtentStore([(two[0], 96 * MIB), (two[1], 96 * MIB)], "threads") as store:
        ticket = store.write(store.alloc(128 * MIB), pages(128 * MIB, fill=bytes(128 * MIB)))
        try:
            assert soon(lambda: done == {store.files[1]})
        finally:
            go.set()
        ticket.wait()


def test_unequal_directories_are_used_up_to_the_last_byte(two, engine):
    with ExtentStore(
        [(two[0], MIB), (two[1], 5 * MIB)], engine, stripe_bytes=PAGE, growth_bytes=PAGE
    ) as store:
        extent, data = store.alloc(6 * MIB), pages(6 * MIB)
        store.write(extent, data).wait()
        back = bytearray(6 * MIB)
        store.read(extent, back).wait()
        assert back == data
        with pytest.raises(ExtentStoreFull):
            store.alloc(1)


def test_space_is_reserved_before_the_write(tmp_path, engine):
    with ExtentStore([(tmp_path, 64 * MIB)], engine, growth_bytes=8 * MIB) as store:
        assert store.stats().reserved_bytes == 0
        store.alloc(1)
        (file,) = store.files
        assert store.stats().reserved_bytes == 8 * MIB == os.fstat(file.buffered_fd).st_size
        assert os.fstat(file.buffered_fd).st_blocks * 512 >= 8 * MIB


def test_reuse_does_not_grow_the_file(tmp_path, engine):
    with ExtentStore([(tmp_path, 64 * MIB)], engine, growth_bytes=PAGE) as store:
        sizes = [random.Random(0).randrange(1, MIB) for _ in range(20)]
        reserved = None
        for _ in range(8):
            extents = [store.alloc(n) for n in sizes]
            for extent in extents:
                store.write(extent, bytes(extent.nbytes))
            for extent in reversed(extents):
                store.read(extent, bytearray(extent.nbytes)).wait()
                store.free(extent)
            engine.drain()
            reserved = reserved or store.stats().reserved_bytes
            assert store.stats().reserved_bytes == reserved
        assert store.stats().peak_bytes == reserved


def test_close_leaves_no_file_no_thread_no_descriptor(two):
    threads, fds = num_threads(), open_fds()
    store = ExtentStore([(two[0], MIB), (two[1], MIB)], "auto")
    store.write(store.alloc(MIB), pages(MIB))
    assert [list(path.iterdir()) for path in two] == [[], []]  # no name even while it is open
    store.close()
    store.close()
    assert [list(path.iterdir()) for path in two] == [[], []]
    assert soon(lambda: num_threads() <= threads)
    assert open_fds() == fds


def test_missing_directory_leaves_nothing_open(two):
    fds = open_fds()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ExtentStore([(two[0], MIB), (two[1] / "nowhere", MIB)], "threads")
    assert open_fds() == fds


def test_without_o_tmpfile_the_name_is_gone_at_once(tmp_path, engine, monkeypatch):
    from memopt.io import files

    monkeypatch.setattr(
        files, "_O_TMPFILE", os.O_DIRECTORY
    )  # open(2) of a directory for writing: EISDIR
    with ExtentStore([(tmp_path, MIB)], engine) as store:
        assert list(tmp_path.iterdir()) == []
        data, extent = pages(MIB), store.alloc(MIB)
        store.write(extent, data).wait()
        back = pages(MIB)
        store.read(extent, back).wait()
        assert back == data
        assert store.files[0].is_direct == (store.files[0].direct_reason == "")


_NO_STREAMS = """
import os, sys
from memopt.io import ExtentStore, open_file, files
where, tmpfile = sys.argv[1:]
if not int(tmpfile):
    files._O_TMPFILE = os.O_DIRECTORY
for fd in range(3):
    os.close(fd)
with ExtentStore([(where, 1 << 20)], "threads") as store:
    extent = store.alloc(100_000)
    store.write(extent, bytes(100_000)).wait()
    named = open_file(where + "/named", writable=True, create=True)
    for fd in range(3):
        try:
            os.write(fd, b"what a C library prints" * 1000)
        except OSError:
            pass
    back = bytearray(b"x" * 100_000)
    store.read(extent, back).wait()
    os._exit(40 + (back == bytes(100_000)) + (os.stat(where + "/named").st_size == 0))
"""


@pytest.mark.parametrize("tmpfile", [0, 1])
def test_a_process_without_standard_streams_does_not_print_on_its_extents(tmp_path, tmpfile):
    command = [sys.executable, "-c", _NO_STREAMS, str(tmp_path), str(tmpfile)]
    assert subprocess.run(command, check=False).returncode == 42


def test_changing_sizes_near_a_full_budget_neither_refuse_nor_shatter(tmp_path):
    """10,000 allocations at random ages in 98 % of the budget: each finds room, in few runs."""
    rng, live, num_runs = random.Random(0), [], []
    with ExtentStore([(tmp_path, 128 * MIB)], "threads") as store:
        for _ in range(10_000):
            nbytes = rng.randrange(1, MIB)
            while sum(extent.allocated_bytes for extent in live) + nbytes > 125 * MIB:
                store.free(live.pop(rng.randrange(len(live))))
            live.append(store.alloc(nbytes))
            num_runs.append(len(live[-1].runs))
        assert max(num_runs) < 64
        assert sum(num_runs) / len(num_runs) < 4
        live.clear()


class StoreMachine(RuleBasedStateMachine):
    """Random allocations, writes, partial writes, reads and frees against a dict of bytes."""

    engine_name = "threads"
    directory: str

    @initialize()
    def open(self) -> None:
        self.stack = contextlib.ExitStack()
        engine = open_engine(self.engine_name, queue_depth=3)
        self.stack.callback(engine.close)
        places = [(self.directory, 40 * PAGE), (self.directory, 24 * PAGE)]
        self.store = ExtentStore(places, engine, growth_bytes=8 * PAGE, stripe_bytes=4 * PAGE)
        self.stack.callback(self.store.close)
        self.model: dict[object, bytes] = {}
        self.tickets: list[object] = []

    @rule(nbytes=st.one_of(st.integers(0, 9000), st.integers(0, 80_000)))
    def alloc(self, nbytes: int) -> None:
        units = -(-nbytes // PAGE)
        used = sum(-(-extent.nbytes // PAGE) for extent in self.model)
        try:
            extent = self.store.alloc(nbytes)
        except ExtentStoreFull:
            assert used + units > 64
            return
        assert used + units <= 64
        self.model[extent] = b""

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def write(self, data) -> None:
        extent = data.draw(st.sampled_from(list(self.model)))
        before = self.model[extent]
        offset = data.draw(st.one_of(st.just(0), st.integers(0, len(before))))
        nbytes = data.draw(st.integers(0, extent.nbytes - offset))
        content = pages(nbytes, shift=data.draw(st.sampled_from([0, 0, 512, 3])))
        self.tickets.append(self.store.write(extent, content, offset=offset))
        if offset == 0:
            self.model[extent] = bytes(content)
        else:
            self.model[extent] = before[:offset] + bytes(content) + before[offset + nbytes :]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def read(self, data) -> None:
        extent = data.draw(st.sampled_from(list(self.model)))
        size = len(self.model[extent])
        begin = data.draw(st.one_of(st.just(0), st.integers(0, size)))
        end = data.draw(st.one_of(st.just(size), st.integers(begin, size)))
        back = pages(end - begin, fill=bytes(end - begin))
        self.store.read(extent, back, offset=begin).wait()
        assert back == self.model[extent][begin:end]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data) -> None:
        extent = data.draw(st.sampled_from(list(self.model)))
        del self.model[extent]
        self.store.free(extent)

    @invariant()
    def asked_bytes(self) -> None:
        if hasattr(self, "store"):
            assert self.store.stats().asked_bytes == sum(extent.nbytes for extent in self.model)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            for ticket in self.tickets:
                ticket.wait()
            self.stack.close()


def run_machine(name: str, directory, examples: int, steps: int) -> None:
    machine = type("Machine", (StoreMachine,), {"engine_name": name, "directory": str(directory)})
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()


@pytest.mark.parametrize("name", ["threads", "io_uring"])
def test_store_against_model(name, tmp_path):
    if name == "io_uring":
        make_engine().close()
    run_machine(name, tmp_path, examples=10, steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["threads", "io_uring"])
def test_store_against_model_ten_thousand_operations(name, tmp_path):
    if name == "io_uring":
        make_engine().close()
    run_machine(name, tmp_path, examples=200, steps=50)
