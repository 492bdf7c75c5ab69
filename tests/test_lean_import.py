"""`import memopt` costs nothing and touches nothing: no CUDA, no disk, no native library, no big packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "memopt"

# Runs in a new interpreter, so that nothing is imported yet. Python itself reports what it opens, loads and changes.
PROBE = """
import json, os, sys
events = []
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.symlink", "os.link", "shutil.rmtree",
           "tempfile.mkstemp", "tempfile.mkdtemp", "subprocess.Popen", "os.system", "socket.connect"}
def hook(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            events.append(["write", str(path)])
    elif event in ("ctypes.dlopen", "import") and (event == "ctypes.dlopen" or str(args[1]).endswith(".so")):
        events.append(["load", str(args[0] if event == "ctypes.dlopen" else args[1])])
    elif event in CHANGES:
        events.append([event, str(args)])
sys.addaudithook(hook)
STATEMENT
torch = sys.modules.get("torch")
print(json.dumps({
    "events": events,
    "modules": sorted(name for name in sys.modules if "." not in name),
    "cuda": bool(torch and torch.cuda.is_initialized()),
}))
"""


def run_probe(statement: str) -> dict:
    completed = subprocess.run(
        [sys.executable, "-B", "-c", PROBE.replace("STATEMENT", statement)],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return json.loads(completed.stdout.splitlines()[-1])


def test_import_memopt_touches_nothing():
    seen = run_probe("import memopt")
    assert not seen["cuda"]
    assert [event for event in seen["events"] if event[0] != "load"] == []
    loaded = [path for kind, path in seen["events"] if kind == "load"]
    assert [path for path in loaded if "lib-dynload" not in path] == []
    assert "torch" not in seen["modules"]


EXTRAS = {"accelerate", "deepspeed", "highspy", "matplotlib", "peft", "rich", "transformers"}


@pytest.mark.parametrize(
    "name", ["optimize", "Session", "Budget", "Plan", "RunReport", "StepTrace"]
)
def test_public_names_load_no_extra_and_no_cuda(name):
    seen = run_probe(f"from memopt import {name}")
    assert not seen["cuda"]
    assert EXTRAS & set(seen["modules"]) == set()
    ours = [path for kind, path in seen["events"] if kind == "load" and str(PACKAGE) in path]
    assert ours == [], "a native library of memopt was loaded before anything needed it"
    writes = [event for event in seen["events"] if event[0] == "write" and event[1] != "/dev/null"]
    assert writes == []


def test_the_probe_sees_what_it_looks_for(tmp_path):
    seen = run_probe(f"import ctypes; ctypes.CDLL(None); open({str(tmp_path / 'file')!r}, 'w')")
    kinds = [kind for kind, _ in seen["events"]]
    assert "load" in kinds
    assert "write" in kinds
