from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from memopt.cli import main
from memopt.cli.probe import format_rate, parse_directories
from memopt.types.errors import ConfigError
from memopt.types.hardware import Hardware

MIB = 1 << 20


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "spill").mkdir()
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(main, ["probe", "--device", "cpu", *arguments])


def test_json_is_one_document(home):
    asked = ("--ssd", f"{home / 'spill'}:4MiB", "--engine", "threads", "--json")
    done = run(*asked)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    hardware = Hardware.from_dict(document["hardware"])
    assert hardware.ssd_write_bytes_per_s == document["ssd"][0]["rates"]["write_bytes_per_s"] > 0
    assert document["kept_in"] == str(home / "cache")
    assert document["link_provenance"] == "measured now"
    assert len(list((home / "cache").iterdir())) == 2
    kept = json.loads(run(*asked).stdout)
    assert "kept" in kept["link_provenance"]
    assert json.loads(run(*asked, "--fresh").stdout)["link_provenance"] == "measured now"


def test_people_get_a_table(home, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")  # a row is one line, however long the directory's name
    done = run("--ssd", f"{home / 'spill'}:4MiB", "--engine", "threads")
    assert done.exit_code == 0, done.output
    assert "copies in host memory" in done.output
    assert "(threads, 8 in flight)" in " ".join(done.output.split())
    assert "note: nothing is page-locked without CUDA" in done.output


def test_a_path_stays_what_it_is(home, monkeypatch):
    """Rich takes [b] for a style and :abc: for a picture."""
    monkeypatch.setenv("COLUMNS", "240")
    odd = home / "[b]a:abc:"
    odd.mkdir()
    monkeypatch.setenv("MEMOPT_CACHE", str(odd / "cache"))
    output = run("--ssd", f"{odd}:4MiB", "--engine", "threads").output
    assert f"write {odd} (threads" in output
    assert f"kept in {odd}/cache" in output


def test_a_cache_that_is_off_is_told(home, monkeypatch):
    monkeypatch.setenv("MEMOPT_CACHE", "off")
    assert "not kept: the cache is off" in run().output
    assert not (home / "cache").exists()


def test_a_cache_that_cannot_be_written_is_not_said_to_keep_anything(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("MEMOPT_CACHE", str(home / "file" / "cache"))
    output = run().output
    assert "kept in" not in output
    assert "the cache is off" not in output
    assert "the figures are not kept: " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--ssd", "/no/such/place"),
            "--ssd /no/such/place: /no/such/place does not exist; create",
        ),
        (("--ssd", "/proc/self/stat"), "--ssd /proc/self/stat: /proc/self/stat is not a directory"),
        (("--ssd", "/no/such/place:1GiB"), "/no/such/place does not exist; create it first"),
        (("--ssd", "/:24G"), "--ssd /:24G: SIZE='24G': unknown unit 'G'"),
        (("--ssd", ""), "--ssd '' names no directory; write DIR or DIR:SIZE"),
        (("--device", "tpu"), "no device"),
        (("--device", "meta"), "there is cpu here, and"),
        (("--device", "cuda:99"), "there is cpu here, and"),
        (("--engine", "libaio"), "'libaio' is not one of"),
    ],
)
def test_mistakes_end_with_status_2(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"free_bytes": 4 * 4095}, "--ssd {0}: the disk is full (16380 bytes are free); free some"),
        ({"is_read_only": True}, "--ssd {0}: {0} is on a file system that is mounted read-only"),
        ({"is_writable": False}, "--ssd {0}: no permission to write in {0}"),
    ],
)
def test_an_unusable_directory_is_told_in_the_words_of_the_command(
    home, monkeypatch, facts, message
):
    import memopt.memory.host as host

    real = host.inspect_directory
    monkeypatch.setattr(
        host, "inspect_directory", lambda path: dataclasses.replace(real(path), **facts)
    )
    with pytest.raises(ConfigError) as caught:
        parse_directories([str(home / "spill")])
    assert str(caught.value).startswith(message.format(home / "spill"))


def test_a_disk_that_fails_ends_with_status_1(home, monkeypatch):
    import memopt._probing as probing

    def fail(*arguments, **more):
        raise OSError(5, "Input/output error", "/disk")

    monkeypatch.setattr(probing, "measure_disk", fail)
    done = run("--ssd", f"{home / 'spill'}:4MiB", "--engine", "threads")
    assert done.exit_code == 1
    assert "Input/output error" in done.output


def test_directories(tmp_path, monkeypatch):
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path)
    for request, path in (("a:b", "a:b"), ("a:b:7MiB", "a:b"), (".", ".")):
        ((found, size),) = parse_directories([request])
        assert found == str((tmp_path / path).resolve())
        assert size == 7 * MIB if "7MiB" in request else 0 < size <= 512 * MIB
    with pytest.raises(ConfigError, match="given twice"):
        parse_directories([".", "."])
    assert parse_directories([]) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    ((found, size),) = parse_directories(["~/a:b"])
    assert found == str((tmp_path / "a:b").resolve())
    assert size > 1 * MIB


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(0.0, "-"), (55.13e9, "55.1 GB/s"), (100.6e9, "101 GB/s"), (512e6, "512 MB/s")],
)
def test_rates(rate, shown):
    assert format_rate(rate) == shown


def test_python_dash_m(home):
    arguments = ["probe", "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "memopt", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["hardware"]["device"] == "cpu"
    assert Path(json.loads(done.stdout)["kept_in"]).is_dir()
