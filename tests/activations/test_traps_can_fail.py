"""The trap programs can fail: each does under the engine without rules, in at least one placement."""

from __future__ import annotations

import pytest
from _bitwise import compare, plain_run, train
from _naive_engine import naive
from _traps import INNOCENT, TRAPS

POLICIES = (
    *("recompute", "device", "copy", "mix-0", "mix-1"),
    *(f"{word}-{position}" for position in range(30) for word in ("only", "not")),
)
# Right already without rules, under every policy; kept because an engine's own rule could break them.
EXACT_WITHOUT_RULES: set[str] = {"12-penalty"}


def outcome(name: str, policy: str) -> str:
    """What the naive engine did: "exact", or how it failed."""
    program = INNOCENT if name == "innocent" else TRAPS[name]
    plain = plain_run(program)  # outside the try: a program that the plain loop refuses is no trap
    try:
        record = train(program, lambda model, optimizer: naive(model, policy, program.regions))
        compare(plain, record)
    except AssertionError as error:
        return f"silently wrong: {str(error)[:70]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:70]}"
    return "exact"


def test_naive_engine_is_exact_where_no_rule_is_needed():
    assert {policy: outcome("innocent", policy) for policy in POLICIES} == dict.fromkeys(
        POLICIES, "exact"
    )


@pytest.mark.parametrize("name", TRAPS)
def test_trap_fails_without_its_rule(name):
    if name in EXACT_WITHOUT_RULES:
        assert {policy: outcome(name, policy) for policy in POLICIES} == dict.fromkeys(
            POLICIES, "exact"
        )
        return
    for policy in POLICIES:
        result = outcome(name, policy)
        if result != "exact":
            print(f"{name} under {policy}: {result}")
            return
    pytest.fail("no placement of the naive engine falls into this trap")
