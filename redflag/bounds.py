"""Options as fields of dataclasses, and their bounds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import Any

from redflag.errors import RedflagError

# Key in a field's metadata -> the words of the rule, and its check.
RULES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def option(default: Any, help: str, **bounds: float) -> Any:
    """A field of a dataclass of options; `bounds` have keys of `RULES`, and a list is copied for each instance.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Options:
        ...     folds: int = option(5, "Folds of the cross-validation.", least=2)
        >>> Options().folds
        5
    """
    metadata = {"help": help, **bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuses a value of the option `name` that is not among the allowed ones, with a RedflagError."""
    if value not in allowed:
        raise RedflagError(f"{name} must be one of {', '.join(allowed)} (got {value!r}).")


def check_bounds(options: Any) -> None:
    """Refuses numbers outside the bounds in the metadata of a dataclass's fields; None is not checked.

    Raises:
        RedflagError: A number is out of bounds; the first is named.
    """
    for item in fields(options):
        value = getattr(options, item.name)
        rules = [(RULES[key], item.metadata[key]) for key in RULES if key in item.metadata]
        if value is not None and not all(holds(value, bound) for (_, holds), bound in rules):  # false for NaN
            rule = " and ".join(f"{words} {bound}" for (words, _), bound in rules)
            raise RedflagError(f"{item.name} must be {rule} (got {value}).")
