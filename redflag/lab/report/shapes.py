"""Shapes of figures: what a part of a report may hold. Each section declares those of the figures that it shows.

A dict with names is an object; `{str: x}` is any number of named x; `[x]` is a list of x. What is not named is not
looked at. Everything may be null or missing, which reads "not measured", unless it is `Needed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redflag.errors import RedflagError

Check = Callable[[Any, str], None]


def is_a(kind: str, holds: Callable[[Any], bool]) -> Check:
    """A shape by a rule; `kind` says in an error what is taken."""

    def check(value: Any, path: str) -> None:
        if not holds(value):
            raise refusal(path, value, kind)

    return check


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _interval(value: Any) -> bool:
    # A bound that a data set is too small to give is null.
    if not (isinstance(value, Sequence) and len(value) == 2 and all(x is None or _number(x) for x in value)):
        return False
    return None in value or bool(value[0] <= value[1])


NUMBER = is_a("a number", _number)
RATE = is_a("a share between 0 and 1", lambda x: _number(x) and 0 <= x <= 1)
COUNT = is_a("a whole number from 0 up", lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0)
TEXT = is_a("a text", lambda x: isinstance(x, str))
TRUTH = is_a("true or false", lambda x: isinstance(x, bool))
INTERVAL = is_a("an interval [low, high]", _interval)
ANY = is_a("anything", lambda x: True)


class Needed:
    """A part that may be neither missing nor null; all others may, which reads "not measured"."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def curve(axis: str, parts: Mapping[str, Any]) -> Check:
    """An object of lists, each of which has a value for every one of `axis`."""

    def check(value: Any, path: str) -> None:
        check_shape(value, dict(parts), path)
        for key, values in value.items():
            if isinstance(values, list) and len(values) != len(value[axis]):
                kind = f"one value for each of the {len(value[axis])} of {axis}"
                raise refusal(f"{path}.{key}", f"{len(values)} values", kind)

    return check


def check_shape(value: Any, spec: Any, path: str) -> None:
    """Refuses what is not of a shape; `path` names its place in the report."""
    if isinstance(spec, Needed):
        if value is None:
            raise refusal(path, value, "a value that is not null")
        spec = spec.inner
    if value is None:
        return
    if isinstance(spec, dict):
        if not isinstance(value, Mapping):
            raise refusal(path, value, "an object")
        named = spec.get(str)
        for key in value if named is not None else spec:
            check_shape(value.get(key), named or spec[key], f"{path}.{key}".lstrip("."))
    elif isinstance(spec, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise refusal(path, value, "a list")
        for number, item in enumerate(value):
            check_shape(item, spec[0], f"{path}[{number}]")
    else:
        spec(value, path)


def refusal(path: str, value: Any, kind: str) -> RedflagError:
    """What is wrong with the part at `path`."""
    shown = "missing or null" if value is None else value if isinstance(value, str) else repr(value)
    return RedflagError(
        f"the report's {path or 'whole'} is {str(shown)[:80]}, but it takes {kind}, so nothing was written: mend what "
        "makes the report (null stands for what was not measured)"
    )
