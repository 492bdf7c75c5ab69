from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.types.budget import Budget, DirectoryFacts, HostFacts, ResolvedBudget, SsdDirectory
from memopt.types.errors import ConfigError
from memopt.types.sizes import UNITS, format_bytes, parse_size

GIB = 1 << 30
HOST = HostFacts(limit_bytes=100 * GIB, free_bytes=60 * GIB)


def directory(**changes) -> DirectoryFacts:
    facts = {
        "is_directory": True,
        "is_writable": True,
        "is_tmpfs": False,
        "free_bytes": 500 * GIB,
        "file_system": 1,
    }
    return DirectoryFacts(**{**facts, **changes})


def resolve(budget, directories=None, **changes) -> ResolvedBudget:
    facts = {"device_free_bytes": 70 * GIB, "device_total_bytes": 80 * GIB, "host": HOST, **changes}

    def inspect_directory(path):
        if path not in (directories or {}):
            raise FileNotFoundError(path)
        return directories[path]

    return budget.resolve(**facts, inspect_directory=inspect_directory)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1),
        (123456789, 123456789),
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("1.5TB", 1_500_000_000_000),
        ("0.5KiB", 512),
        (".5 MiB", 1 << 19),
        ("7B", 7),
        ("+3MB", 3_000_000),
        ("80%", Fraction(4, 5)),
        ("12.5 %", Fraction(1, 8)),
        ("100%", Fraction(1)),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text, name="device") == expected


BAD_SIZES = [
    ("24", "unit is missing"),
    ("24G", "unknown unit 'G'"),
    ("24GiBs", "unknown unit 'GiBs'"),
    ("ten GiB", "not a number"),
    ("", "not a number"),
    ("1e3MB", "not a number|unknown unit"),
    ("1,5TB", "not a number"),
    (0, "cannot be zero"),
    ("0GiB", "cannot be zero"),
    (-1, "cannot be negative"),
    ("-5GiB", "cannot be negative"),
    ("-5%", "cannot be negative"),
    ("0%", "cannot be zero"),
    ("101%", "above 100%"),
    ("0.1B", "less than one byte"),
    (0.8, "float is not a size"),
    (True, "bool is not a size"),
]


@pytest.mark.parametrize("name", ["device", "host"])
@pytest.mark.parametrize(("size", "message"), BAD_SIZES)
def test_bad_sizes_say_which_and_what_to_write(name, size, message):
    with pytest.raises(ValueError, match=message) as caught:
        Budget(**{name: size})
    assert str(caught.value).startswith(f"{name}={size!r}")
    assert '"24GiB"' in str(caught.value)
    assert isinstance(caught.value, ConfigError)


@given(number=st.integers(1, 10**6), unit=st.sampled_from(sorted(UNITS)))
def test_whole_sizes_are_exact(number, unit):
    assert parse_size(f"{number}{unit}", name="device") == number * UNITS[unit]


@given(st.integers(0, 2**49))
def test_format_keeps_three_digits(num_bytes):
    shown = format_bytes(num_bytes)
    number, unit = shown.split()
    assert abs(float(number) * UNITS[unit] - num_bytes) <= 0.006 * num_bytes
    assert float(number) <= 1000


def test_defaults_are_free_device_memory_and_80_percent_of_what_the_cgroup_leaves():
    resolved = resolve(Budget())
    assert resolved == ResolvedBudget(device_bytes=70 * GIB, host_bytes=48 * GIB)
    assert resolved.ssd_bytes == 0


def test_percentages_are_of_the_whole():
    budget = Budget(device="50%", host="25%", ssd="/ssd:10%")
    resolved = resolve(budget, {"/ssd": directory()})
    assert resolved.device_bytes == 40 * GIB
    assert resolved.host_bytes == 25 * GIB
    assert resolved.ssd == (SsdDirectory(path="/ssd", size_bytes=50 * GIB, is_tmpfs=False),)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(device=80 * GIB + 1), "device=.* more than the device has, 80.0 GiB"),
        (
            Budget(host="101GiB"),
            "host='101GiB' is 101 GiB, more than this process may use, 100 GiB",
        ),
    ],
)
def test_more_than_exists_is_refused(budget, message):
    with pytest.raises(ConfigError, match=message):
        resolve(budget)


def test_more_than_is_free_is_a_note():
    resolved = resolve(Budget(device="75GiB", host="90GiB"))
    assert (resolved.device_bytes, resolved.host_bytes) == (75 * GIB, 90 * GIB)
    assert len(resolved.notes) == 2
    assert "only 70.0 GiB of the device are free" in resolved.notes[0]
    assert "only 60.0 GiB of host memory are free" in resolved.notes[1]


def test_on_the_cpu_a_host_budget_is_ignored_with_a_note():
    resolved = resolve(Budget(host="8GiB"), device_is_host=True)
    assert resolved.host_bytes == 0
    assert "host='8GiB' is ignored" in resolved.notes[0]
    assert resolve(Budget(), device_is_host=True).notes == ()


@pytest.mark.parametrize(
    ("ssd", "message"),
    [
        ("/ssd", "the size is missing; write .*'?/ssd:200GiB"),
        (":5GiB", "the directory is missing"),
        ("/ssd:5", "unit is missing"),
        ("/ssd:0GiB", "cannot be zero"),
        (["/a:1GiB", "/b"], "ssd='/b': the size is missing"),
        ([5], 'ssd=5: write "DIR:SIZE"'),
        (7, "ssd=7: write"),
    ],
)
def test_bad_ssd_is_refused_at_once(ssd, message):
    with pytest.raises(ConfigError, match=message):
        Budget(ssd=ssd)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "/ssd does not exist; create it"),
        ({"/ssd": directory(is_directory=False)}, "/ssd is not a directory"),
        (
            {"/ssd": directory(is_writable=False, is_read_only=True)},
            "/ssd is on a file system that is mounted read-only",
        ),
        ({"/ssd": directory(is_writable=False)}, "no permission to write in /ssd"),
        ({"/ssd": directory(free_bytes=4 * GIB)}, "asks for 5.00 GiB, but /ssd has 4.00 GiB free"),
    ],
)
def test_bad_directories_are_refused_when_resolved(facts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(Budget(ssd="/ssd:5GiB"), facts)
    assert str(caught.value).startswith("ssd='/ssd:5GiB'")


def test_an_error_of_the_system_is_passed_on_with_its_text():
    def inspect_directory(path):
        raise PermissionError(13, "Permission denied", path)

    with pytest.raises(ConfigError, match="/ssd cannot be used: Permission denied"):
        Budget(ssd="/ssd:5GiB").resolve(
            device_free_bytes=1,
            device_total_bytes=1,
            host=HOST,
            inspect_directory=inspect_directory,
        )


def test_directories_of_one_file_system_share_its_free_space():
    facts = {"/a": directory(free_bytes=10 * GIB), "/b": directory(free_bytes=10 * GIB)}
    assert resolve(Budget(ssd=("/a:5GiB", "/b:5GiB")), facts).ssd_bytes == 10 * GIB
    with pytest.raises(ConfigError, match=r"/b has 4\.00 GiB free after the directories before it"):
        resolve(Budget(ssd=("/a:6GiB", "/b:5GiB")), facts)
    facts["/b"] = directory(free_bytes=10 * GIB, file_system=2)
    assert resolve(Budget(ssd=("/a:6GiB", "/b:5GiB")), facts).ssd_bytes == 11 * GIB


def test_one_directory_twice_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    facts = {str(tmp_path.resolve()): directory()}
    with pytest.raises(ConfigError, match="given twice"):
        resolve(Budget(ssd=[f"{tmp_path}:1GiB", f"{tmp_path}/link:1GiB"]), facts)


def test_a_directory_may_hold_colons():
    resolved = resolve(Budget(ssd="/a:b/c:1GiB"), {"/a:b/c": directory()})
    assert resolved.ssd[0].path == "/a:b/c"


def test_tmpfs_warns_and_counts_as_host():
    facts = {"/shm": directory(is_tmpfs=True, free_bytes=50 * GIB)}
    with pytest.warns(UserWarning, match="/shm is on tmpfs: it is memory, and counts as host"):
        resolved = resolve(Budget(host="40GiB", ssd="/shm:16GiB"), facts)
    assert resolved.host_bytes == 24 * GIB
    assert resolved.ssd[0].is_tmpfs
    assert any("counts as host" in note for note in resolved.notes)
    with (
        pytest.warns(UserWarning, match="tmpfs"),
        pytest.raises(
            ConfigError, match=r"6.00 GiB more than the whole host budget \(host='10GiB'\)"
        ),
    ):
        resolve(Budget(host="10GiB", ssd="/shm:16GiB"), facts)


def test_values_survive_json():
    budget = Budget(device="24GiB", host=5, ssd=["/a:1GiB", "/b:50%"])
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget
    resolved = resolve(Budget(ssd="/a:1GiB", device="75GiB"), {"/a": directory()})
    assert ResolvedBudget.from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved


def test_budgets_are_values():
    assert Budget(ssd="/a:1GiB") == Budget(ssd=["/a:1GiB"])
    assert len({Budget(device=5), Budget(device=5)}) == 1
    with pytest.raises(AttributeError):
        Budget(device=5).device = 6
    with pytest.raises(TypeError):
        Budget("24GiB")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("600TB", 600 * 10**12), ("1.2PB", 1_200 * 10**12), ("500TiB", 500 << 40), (10**15, 10**15)],
)
def test_endurance_is_bytes_in_decimal_and_binary_units(text, expected):
    budget = Budget(ssd="/a:1GiB", ssd_endurance=text)
    resolved = resolve(budget, {"/a": directory()})
    assert resolved.ssd_endurance_bytes == expected
    assert resolved.notes == ()
    assert ResolvedBudget.from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("50%", "a share of what"),
        ("600", "the unit is missing"),
        ("600T", "unknown unit 'T'"),
        (0, "cannot be zero"),
        (-1, "cannot be negative"),
        (1.5, "float is not a size"),
    ],
)
def test_an_endurance_without_sense_is_refused(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        Budget(ssd="/a:1GiB", ssd_endurance=value)
    assert f"ssd_endurance={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("ssd", "why"),
    [(None, "names no ssd directory"), ("/shm:1GiB", "every ssd directory is memory")],
)
@pytest.mark.filterwarnings("ignore:ssd directory /shm is on tmpfs")
def test_an_endurance_without_a_drive_is_noted(ssd, why):
    resolved = resolve(Budget(ssd=ssd, ssd_endurance="600TB"), {"/shm": directory(is_tmpfs=True)})
    assert resolved.ssd_endurance_bytes is None
    assert any("ssd_endurance='600TB' has no effect" in n and why in n for n in resolved.notes)


def test_budgets_saved_before_endurance_was_known_load():
    old = Budget(ssd="/a:1GiB").to_dict()
    del old["ssd_endurance"]
    assert Budget.from_dict(old) == Budget(ssd="/a:1GiB")
