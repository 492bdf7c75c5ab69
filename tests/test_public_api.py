"""The public surface, spelled out: a change here is a change for users, and belongs into CHANGELOG.md."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

import memopt

NAMES = [
    "Budget",
    "BudgetError",
    "ConfigError",
    "Hardware",
    "MemoptError",
    "Plan",
    "RecomputeMismatchError",
    "RoundTripError",
    "RunReport",
    "SavedOutputChangedError",
    "Session",
    "StepTrace",
    "__version__",
    "optimize",
    "start",
]

SETTINGS = ["budget", "plan", "regions", "exact", "strict", "engine", "update"]

FIELDS = {
    "Budget": "device host ssd ssd_endurance",
    "RunReport": (
        "device budget predicted measured baseline num_steps num_planned_steps first_step_s exposed_s moved "
        "wear placements resident_bytes device_reserved_bytes device_context_bytes plan notes versions"
    ),
}


def test_names():
    assert sorted(memopt.__all__) == NAMES
    assert sorted(dir(memopt)) == NAMES
    for name in NAMES:
        assert getattr(memopt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = memopt.optimise


@pytest.mark.parametrize("name", ["optimize", "start"])
def test_settings(name):
    function = getattr(memopt, name)
    parameters = inspect.signature(function).parameters
    assert list(parameters) == ["model", "optimizer", *SETTINGS]
    assert parameters["optimizer"].default is None
    with pytest.raises(TypeError, match="budgte"):
        function(torch.nn.Linear(2, 2), budgte=memopt.Budget())
    assert all(parameters[setting].kind is inspect.Parameter.KEYWORD_ONLY for setting in SETTINGS)
    assert all(setting in inspect.getdoc(memopt.optimize) for setting in SETTINGS)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    assert [field.name for field in dataclasses.fields(getattr(memopt, name))] == FIELDS[
        name
    ].split()


@pytest.mark.parametrize("name", ["Budget", "Hardware", "Plan", "RunReport", "StepTrace"])
def test_values_are_frozen_and_keyword_only(name):
    cls = getattr(memopt, name)
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))


def test_version_is_one_and_in_the_changelog():
    from importlib.metadata import version

    assert version("memopt") == memopt.__version__
    changelog = (Path(__file__).resolve().parents[1] / "CHANGELOG.md").read_text()
    release = re.sub(r"\.dev\d+$", "", memopt.__version__)
    assert f"## {release}" in changelog
