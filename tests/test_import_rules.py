"""Who may import whom inside memopt, and how long files and functions may grow.

The table is the design's: packages are seams, and a seam holds only as long as nothing reaches around it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "memopt"
EVERYTHING = None

# package -> the memopt packages it may import beside itself; "" is the top: memopt/*.py
MAY_IMPORT: dict[str, set[str] | None] = {
    "types": set(),
    "trace": {"types"},
    "plan": {"types", "layout"},
    "layout": {"types"},
    "activations": {"types", "memory", "io", "ops"},
    "states": {"types", "memory", "io"},
    "optim": {"types", "ops"},
    "memory": {"types"},
    "io": {"types"},
    "ops": {"types"},
    "integrations": {
        "",
        "types",
        "memory",
        "io",
    },  # one may stand in for another library's storage engine alone
    "report": EVERYTHING,
    "cli": EVERYTHING,
    "": EVERYTHING,
}
KNOW_NOTHING_OF_TORCH = ("types", "layout", "io")

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60

FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported_modules(source: str, package: str) -> list[str]:
    """Every module that a file names in an import: at the top, in functions, under TYPE_CHECKING, by import_module."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in memopt/{package}: write the whole name"
            modules.append(node.module)
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            modules += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return modules


def violations(source: str, package: str) -> list[str]:
    allowed = MAY_IMPORT[package]
    found = []
    for module in imported_modules(source, package):
        root, _, rest = module.partition(".")
        if root == "torch" and package in KNOW_NOTHING_OF_TORCH:
            found.append(module)
        if root != "memopt" or allowed is EVERYTHING:
            continue
        first = rest.split(".")[0]
        target = first if (PACKAGE / first).is_dir() and first else ""
        if target != package and target not in allowed:
            found.append(module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    assert package_of(path) in MAY_IMPORT, f"package {package_of(path)} is not in the design"
    found = violations(path.read_text(), package_of(path))
    assert not found, f"memopt/{package_of(path)} must not import {found}"


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("types", "import torch"),
        ("types", "from memopt.memory import host"),
        ("io", "from torch import nn"),
        ("io", "def f():\n    import memopt.memory.host"),
        ("memory", "import memopt"),
        ("memory", "from memopt import memory, io"),
        ("report", None),
        ("activations", "import importlib\nimportlib.import_module('memopt.plan.greedy')"),
        ("plan", "from memopt.session import Session"),
    ],
)
def test_the_rule_sees_a_violation(package, line):
    if line is None:
        assert violations("from memopt.session import Session", package) == []
    else:
        assert violations(line, package)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        num_lines = node.end_lineno - node.lineno + 1
        assert num_lines <= MAX_FUNCTION_LINES, f"{node.name} has {num_lines} lines"
