"""Checks of plain values. Options and policies need no more, so a command line can ask them without importing torch."""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT_QUERIES = 128  # rank the rows of a whole context where not all of its queries can be kept
MAX_WINDOW = 4096  # the selection kernel keeps a row in registers, and 4096 is the largest that does not spill


def check_count(name: str, value: object, low: int, high: int) -> int:
    """Checks for an int, not a bool, in ``low..high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low}..{high}, got {value}")
    return value


def check_number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:  # also false for NaN
        raise ValueError(f"{name}: expected {low}..{high}, got {value}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
