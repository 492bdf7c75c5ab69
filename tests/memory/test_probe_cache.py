from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

from memopt.memory.probe_cache import FORMAT, ProbeCache

KEY = {"machine": "a", "num_cpus": 8, "torch": "2.13.0", "name": "GPU", "driver": "580.65.06"}
NAMES = ("d2h", "h2d")
RATES = {"d2h": 55.1e9, "h2d": 54.9e9}


@pytest.fixture
def cache(tmp_path) -> ProbeCache:
    return ProbeCache(directory=tmp_path / "cache" / "memopt")


def test_what_was_stored_is_loaded(cache):
    path = cache.store("link", KEY, RATES)
    kept = ProbeCache(directory=cache.directory).load("link", dict(reversed(KEY.items())), NAMES)
    assert dict(kept.rates) == RATES
    assert kept.path == str(path)
    assert kept.provenance == f"kept by memopt probe on {kept.measured_at[:10]}"
    assert list(cache.directory.iterdir()) == [path]
    assert cache.notes == []


def test_nothing_kept_is_nothing_said(cache):
    assert cache.load("link", KEY, NAMES) is None
    assert cache.notes == []


@pytest.mark.parametrize("name", list(KEY))
def test_a_change_in_the_key_is_a_miss(cache, name):
    cache.store("link", KEY, RATES)
    changed = {**KEY, name: 4 if name == "num_cpus" else "other"}
    assert cache.load("link", changed, NAMES) is None
    assert cache.load("ssd", KEY, NAMES) is None
    assert cache.notes == []
    assert cache.load("link", KEY, NAMES) is not None


DAMAGE = {
    "half a file": (lambda text: text[: len(text) // 2], "is ignored"),
    "nothing": (lambda text: "", "is ignored"),
    "no text": (lambda text: b"\xff\xfe\x00", "is ignored"),
    "another thing": (lambda text: "[1, 2]", "it holds a list"),
    "an old version": (lambda text: text.replace(FORMAT, "memopt-probe-0"), "'memopt-probe-0'"),
    "no key": (lambda text: text.replace('"key"', '"yek"'), "it has no 'key'"),
    "another key": (lambda text: text.replace("580.65", "575.51"), "its key is not the one"),
    "no number": (lambda text: text.replace("55100000000.0", '"fast"'), "is ignored"),
    "a negative rate": (lambda text: text.replace("55100000000.0", "-1"), "no rates"),
    "not a number": (lambda text: text.replace("55100000000.0", "NaN"), "no rates"),
    "a rate less": (lambda text: text.replace('"h2d"', '"d3h"'), "it has no 'h2d'"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_is_ignored_with_a_note_and_replaced(cache, damage):
    change, message = DAMAGE[damage]
    path = cache.store("link", KEY, RATES)
    text = change(path.read_text())
    assert text != path.read_text()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cache.load("link", KEY, NAMES) is None
    assert len(cache.notes) == 1
    assert str(path) in cache.notes[0]
    assert message in cache.notes[0]
    again = ProbeCache(directory=cache.directory)
    again.store("link", KEY, RATES)
    assert dict(again.load("link", KEY, NAMES).rates) == RATES
    assert again.notes == []


def hammer(directory: Path, worker: int, num_rounds: int, begin) -> None:
    cache = ProbeCache(directory=directory)
    begin.wait()
    for index in range(num_rounds):
        rate = float(worker * num_rounds + index + 1)
        # Long enough that a file written in place would be seen half written.
        cache.store(
            "link", KEY, {**dict.fromkeys(map(str, range(2000)), rate), "d2h": rate, "h2d": rate}
        )
        kept = cache.load("link", KEY, (*map(str, range(2000)), *NAMES))
        assert kept is not None, cache.notes
        assert len(set(kept.rates.values())) == 1, "two writers' figures in one file"
    assert cache.notes == []


def test_two_processes_at_once_see_whole_files_only(cache):
    spawn = multiprocessing.get_context("spawn")
    begin = spawn.Barrier(2)
    workers = [
        spawn.Process(target=hammer, args=(cache.directory, index, 40, begin)) for index in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(cache.directory.iterdir())) == 1, "temporary files are left"


def test_the_old_file_stays_when_writing_fails(cache, monkeypatch):
    cache.store("link", KEY, RATES)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    assert cache.store("link", KEY, {"d2h": 1.0, "h2d": 1.0}) is None
    assert "the figures are not kept" in cache.notes[0]
    assert dict(cache.load("link", KEY, NAMES).rates) == RATES
    assert len(list(cache.directory.iterdir())) == 1


def test_a_directory_that_cannot_be_written_is_a_note(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = ProbeCache(directory=tmp_path / "file" / "memopt")
    assert cache.store("link", KEY, RATES) is None
    assert "the figures are not kept" in cache.notes[0]
    assert cache.load("link", KEY, NAMES) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory_is_a_note(tmp_path):
    tmp_path.chmod(0o500)
    cache = ProbeCache(directory=tmp_path)
    assert cache.store("link", KEY, RATES) is None
    assert "Permission denied" in cache.notes[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_read_only_directory_as_another_user():
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        directory = Path(base) / "cache"
        path = ProbeCache(directory=directory).store("link", KEY, RATES)
        path.chmod(0o444)
        directory.chmod(0o555)
        read, write = os.pipe()
        child = os.fork()  # not a new interpreter: other users may not be allowed to start this one
        if child == 0:
            os.setuid(65534)
            cache = ProbeCache(directory=directory)
            stored = cache.store("link", {**KEY, "name": "new"}, RATES)
            loaded = cache.load("link", KEY, NAMES)
            os.write(write, json.dumps([stored is None, loaded is not None, cache.notes]).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            refused, loaded, notes = json.loads(pipe.read())
        os.waitpid(child, 0)
    assert refused
    assert loaded
    assert len(notes) == 1
    assert "Permission denied" in notes[0]


@pytest.mark.parametrize(
    ("environment", "directory"),
    [
        ({"MEMOPT_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/memopt"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/memopt"),
        ({"MEMOPT_CACHE": "", "HOME": "/h"}, "/h/.cache/memopt"),
        ({"MEMOPT_CACHE": "off", "HOME": "/h"}, None),
        ({"MEMOPT_CACHE": "OFF"}, None),
        ({}, None),
    ],
)
def test_where_the_cache_is(environment, directory):
    cache = ProbeCache.from_environment(environment)
    assert cache.directory == (None if directory is None else Path(directory))
    assert bool(cache.notes) == (environment == {})


def test_a_cache_that_is_off_keeps_nothing():
    cache = ProbeCache(directory=None)
    assert cache.store("link", KEY, RATES) is None
    assert cache.load("link", KEY, NAMES) is None
    assert cache.notes == []
