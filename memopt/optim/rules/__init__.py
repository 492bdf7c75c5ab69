"""Rules: how the chosen part (state-full) and the rest (state-free) are updated.

A new one is a file with a subclass and a `register_...` call.
"""

from __future__ import annotations

from memopt.optim.rules.adamw import AdamW
from memopt.optim.rules.base import (
    Hyper,
    Moment,
    StateFreeRule,
    StateFullRule,
    WholeRule,
)
from memopt.optim.rules.free import ColumnNormalized, NoUpdate, Sgd, Sign
from memopt.optim.rules.joint import Both, JointRule
from memopt.optim.rules.lion import Lion
from memopt.optim.rules.sgdm import Sgdm

_FULL: dict[str, StateFullRule] = {rule.name: rule for rule in (AdamW(), Lion(), Sgdm())}
_FREE: dict[str, StateFreeRule] = {
    rule.name: rule for rule in (Sign(), Sgd(), ColumnNormalized(), NoUpdate())
}


def _find(
    kind: str, rules: dict[str, StateFullRule] | dict[str, StateFreeRule], name: str
) -> object:
    if name not in rules:
        raise ValueError(f"{kind}={name!r} is not known: choose one of {', '.join(rules)}")
    return rules[name]


def state_full_rule(name: str) -> StateFullRule:
    """Return the rule that `Frugal(state_full=name)` uses."""
    rule = _find("state_full", _FULL, name)
    assert isinstance(rule, StateFullRule)
    return rule


def state_free_rule(name: str) -> StateFreeRule:
    """Return the rule that `Frugal(state_free=name)` uses."""
    rule = _find("state_free", _FREE, name)
    assert isinstance(rule, StateFreeRule)
    return rule


def register_state_full(rule: StateFullRule) -> None:
    """Make a rule available as `Frugal(state_full=rule.name)`."""
    _FULL[rule.name] = rule


def register_state_free(rule: StateFreeRule) -> None:
    """Make a rule available as `Frugal(state_free=rule.name)`."""
    _FREE[rule.name] = rule


__all__ = [
    "Both",
    "Hyper",
    "JointRule",
    "Moment",
    "StateFreeRule",
    "StateFullRule",
    "WholeRule",
    "register_state_free",
    "register_state_full",
    "state_free_rule",
    "state_full_rule",
]
