"""Shared by all charts: names of colours, and recurring pieces of Vega-Lite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Names of colours, which the page defines for light, dark and paper (Okabe and Ito's set).
HARM, CALM, QUIET, INK, PAPER = (f"var(--{name})" for name in ("harm", "calm", "quiet", "ink", "paper"))
SERIES = [f"var(--s{i})" for i in range(8)]
# Dashes distinguish the ninth method from the first, and any two in grey print.
DASHES: list[list[int]] = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3], [10, 4], [5, 2, 1, 2, 1, 2]]

Spec = dict[str, Any]


def where(field: str, value: str) -> Spec:
    """Keeps the rows that have a value."""
    return {"filter": {"field": field, "equal": value}}


def only(label: str) -> Spec:
    """Keeps the rows of one view."""
    return where("view", label)


def layer(mark: str, encoding: Spec, *transform: Spec, **style: Any) -> Spec:
    """A mark with its style and encoding."""
    return {
        **({"transform": list(transform)} if transform else {}),
        "mark": {"type": mark, **style},
        "encoding": encoding,
    }


def quantity(field: str, title: str | None = None, scale: Spec | Sequence[float] | None = None, **axis: Any) -> Spec:
    """A number along an axis; a `scale` that is a list is its domain."""
    parts = {
        "title": title,
        "scale": scale if isinstance(scale, dict) or not scale else {"domain": scale},
        "axis": axis,
    }
    return {"field": field, "type": "quantitative", **{name: part for name, part in parts.items() if part}}


def named(order: Sequence[str]) -> Spec:
    """Names down the side, in this order."""
    axis = {"ticks": False, "domain": False}
    return {"field": "name", "type": "nominal", "sort": list(order), "title": None, "axis": axis}


def coded(field: str, drawn_as: Mapping[str, Any], *, legend: bool = False) -> Spec:
    """A colour or a shape per name."""
    scale = {"domain": list(drawn_as), "range": list(drawn_as.values())}
    return {"field": field, "scale": scale, "legend": {"title": None} if legend else None}


def by_method(methods: Iterable[str], drawn_as: Sequence[Any] = SERIES) -> Spec:
    """A colour (or, with `DASHES`, a dash) per method."""
    names = list(methods)
    return {
        "field": "method",
        "type": "nominal",
        "scale": {"domain": names, "range": [drawn_as[i % len(drawn_as)] for i in range(len(names))]},
        "legend": {"title": None, "symbolType": "stroke", "symbolOpacity": 1, "symbolSize": 220},
    }


def tip(field: str, form: str | None = None, title: str | None = None) -> Spec:
    """A line of a tooltip."""
    line: Spec = {"field": field, "type": "quantitative" if form else "nominal", "title": title or field}
    return {**line, "format": form} if form else line


def spread(title: str, field: str = "value", form: str = ".1%") -> list[Spec]:
    """The lines of a tooltip that give a figure and its interval."""
    return [tip(field, form, title), tip("low", form, "from"), tip("high", form, "to")]


def measured(value: float, interval: Sequence[float | None] | None, **row: Any) -> dict[str, Any]:
    """A row of data that holds a figure and its interval."""
    low, high = interval or (None, None)
    return {**row, "value": value, "low": low, "high": high}
