"""Sizes in bytes as people write and read them: "24GiB", "1.5TB", "80%".

Binary units (KiB, MiB, ...) are powers of 1024, decimal ones (KB, MB, ...) powers of 1000. A bare "24G" means the
one to some tools and the other to others, seven percent apart at that size, so it is refused.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from memopt.types.errors import ConfigError

UNITS: dict[str, int] = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in UNITS.items()}
_TEXT = re.compile(r"\s*([+-]?\d+(?:\.\d+)?|[+-]?\.\d+)\s*([A-Za-z]*|%)\s*", re.ASCII)


def _reject(name: str, size: object, problem: str) -> ConfigError:
    return ConfigError(
        f'{name}={size!r}: {problem}; write bytes as an int, or text such as "24GiB", "1.5TB" or "80%"'
    )


def parse_size(size: object, *, name: str) -> int | Fraction:
    """Return bytes as an int, or a percentage as an exact fraction of a whole that is not known here.

    Args:
        size: bytes (int), or text: a number with a unit of `UNITS` (any case) or with "%".
        name: what the size is for; the error message begins with it.

    Raises:
        ConfigError: not a number, unknown or missing unit, zero, negative, or more than 100 %.

    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise _reject(name, size, f"{type(size).__name__} is not a size")
    if isinstance(size, int):
        number, factor, unit = Fraction(size), 1, "B"
    else:
        number, factor, unit = _parse_text(size, name)
    if number < 0:
        raise _reject(name, size, "a size cannot be negative")
    if number == 0:
        raise _reject(name, size, "a size cannot be zero (leave the argument out for its default)")
    if unit == "%":
        if number > 100:
            raise _reject(name, size, "a share cannot be above 100%")
        return number / 100
    num_bytes = math.floor(number * factor)
    if num_bytes == 0:
        raise _reject(name, size, "this is less than one byte")
    return num_bytes


def _parse_text(size: str, name: str) -> tuple[Fraction, int, str]:
    matched = _TEXT.fullmatch(size)
    if matched is None:
        raise _reject(name, size, "this is not a number with a unit")
    number, unit = Fraction(matched[1]), matched[2]
    if unit == "%":
        return number, 1, unit
    if not unit:
        raise _reject(name, size, "the unit is missing (text needs one)")
    if unit.lower() not in _BY_LOWER_CASE:
        raise _reject(name, size, f"unknown unit {unit!r} (known: {', '.join(UNITS)}, %)")
    return number, _BY_LOWER_CASE[unit.lower()], unit


def format_bytes(num_bytes: int) -> str:
    """Return bytes in the largest binary unit that leaves at least 1, with three significant digits ("24.0 GiB")."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{num_bytes} B"
    num_decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{num_decimals}f} {unit}"
