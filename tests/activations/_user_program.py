"""Programs of the tests of users' loops."""

from __future__ import annotations

import functools

import pytest
from _bitwise import Program, some
from _traps import Block, Net, simple_step

EACH = pytest.mark.parametrize("placement", some("recompute", "ssd"))


def program(build, step=simple_step, regions=("layers",), **options):
    """A program over a block class, or over what builds a model."""
    if isinstance(build, type) and issubclass(build, Block):
        build = functools.partial(Net, build)
    return Program(build=build, step=step, regions=list(regions) if regions else None, **options)
