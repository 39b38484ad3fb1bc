"""Bounds of options, which stand beside their fields."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from redflag.errors import RedflagError

# Key in a field's metadata -> what it says of the value, and how that is looked up.
RULES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def check_bounds(options: Any) -> None:
    """Refuses numbers outside the bounds in their fields' metadata; None is not looked at.

    Args:
        options: A dataclass with fields such as `field(default=1, metadata={"help": "...", "least": 1})`.

    Raises:
        RedflagError: Names the first.
    """
    for item in fields(options):
        value = getattr(options, item.name)
        given = [(RULES[key], item.metadata[key]) for key in RULES if key in item.metadata]
        if value is not None and not all(holds(value, bound) for (_, holds), bound in given):  # false for NaN
            rule = " and ".join(f"{words} {bound}" for (words, _), bound in given)
            raise RedflagError(f"{item.name} must be {rule} (got {value}).")
