"""Checks of settings, shared by monitors, thresholds and policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from redflag.errors import RedflagError


def is_number(value: Any) -> bool:
    """Whether it is a number, which NaN is not: it fails every comparison, so a threshold would never be reached."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    """Refuses what is not a number, or one for which `holds` is false; `rule` says in words what it asks for."""
    if not is_number(value) or not holds(value):
        raise RedflagError(f"{name} must be {rule} (got {value!r}).")


def check_whole(name: str, value: Any, least: int = 0) -> None:
    """Refuses what is not a whole number of at least `least`; also True and False."""
    if type(value) is not int or value < least:
        raise RedflagError(f"{name} must be a whole number of at least {least} (got {value!r}).")


def check_flag(name: str, value: Any) -> None:
    """Refuses what is not True or False."""
    if type(value) is not bool:
        raise RedflagError(f"{name} must be true or false (got {value!r}).")


def check_one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    """Refuses what is not among the allowed words."""
    if value not in tuple(allowed):
        raise RedflagError(f"{name} must be one of {', '.join(allowed)} (got {value!r}).")
