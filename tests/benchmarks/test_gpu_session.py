"""The session script, with a stand-in for Python that records how it was called."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_session.sh"


@pytest.fixture
def python(tmp_path):
    stand_in = tmp_path / "python"
    calls = tmp_path / "calls"
    script = [
        "#!/bin/sh",
        f'echo "$PYTHONPATH | $*" >> {calls}',
        'case "$*" in "-m pytest"*sleep*) exec sleep 20;; "-m pytest"*) exit 3;; esac',
    ]
    stand_in.write_text("\n".join(script) + "\n")
    stand_in.chmod(0o755)
    return stand_in


def session(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_parts_run_only_when_asked(python, tmp_path):
    done = session(python, str(tmp_path / "out"))
    assert done.returncode == 0
    assert "nothing was asked for" in done.stdout
    assert not (tmp_path / "calls").exists()


def test_wheels_come_first_and_only_for_this_session(python, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").touch()
    out = tmp_path / "out"
    done = session(
        python,
        str(out),
        "--wheels",
        str(wheels),
        "--activations",
        "--rows 128:plain",
        "--mode-cost",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    install, activations, mode_cost = (tmp_path / "calls").read_text().splitlines()
    assert "--no-index --no-deps" in install
    assert str(wheels / "a.whl") in install
    site = install.split("--target ")[1].split()[0]
    assert activations.startswith(f"{site}:{SCRIPT.parents[1]}")
    assert f"--out {out}/activations.json" in activations
    assert activations.endswith("--rows 128:plain")
    assert f"--out {out}/mode_cost.json" in mode_cost
    assert not Path(site).exists(), "the temporary folder is left"
    for part in ("install", "activations", "mode-cost"):
        assert any(line.startswith(part) and " ok " in line for line in done.stdout.splitlines())


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(python, tmp_path):
    out = str(tmp_path / "out")
    done = session(python, out, "--pytest", "tests", "--activations", "")
    assert done.returncode == 3
    assert "failed (3)" in done.stdout
    assert "bench_activations.py" in (tmp_path / "calls").read_text()
    done = session(python, out, "--pytest", "sleep", "--pytest-limit", "1", "--activations", "")
    assert done.returncode == 124
    assert "ended at its limit, 1 s" in done.stdout
    assert (tmp_path / "calls").read_text().count("bench_activations.py") == 2


@pytest.mark.parametrize(
    "arguments", [[], ["--pytest", "tests"], ["out", "--nosuch", "x"], ["out", "--wheels"]]
)
def test_wrong_arguments_are_refused(python, tmp_path, arguments):
    done = session(python, *(str(tmp_path / a) if a == "out" else a for a in arguments))
    assert done.returncode == 2
    assert "gpu_session.sh:" in done.stderr
    assert "--activations" in done.stderr
