"""What all charts share: names of colours, and the pieces of Vega-Lite that recur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Names of colours: the page says what they are in light, in dark and on paper (Okabe and Ito's set).
HARM, CALM, QUIET, INK, PAPER = (f"var(--{name})" for name in ("harm", "calm", "quiet", "ink", "paper"))
SERIES = [f"var(--s{i})" for i in range(8)]
# A dash makes the ninth method differ from the first, and any two in grey print.
DASHES: list[list[int]] = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3], [10, 4], [5, 2, 1, 2, 1, 2]]

Spec = dict[str, Any]


def only(label: str) -> Spec:
    """Keeps the rows of one view."""
    return {"filter": {"field": "view", "equal": label}}


def named(order: Sequence[str]) -> Spec:
    """Names down the side, in this order."""
    return {
        "field": "name",
        "type": "nominal",
        "sort": list(order),
        "title": None,
        "axis": {"ticks": False, "domain": False},
    }


def tip(field: str, form: str | None = None, title: str | None = None) -> Spec:
    """A line of a tooltip."""
    found: Spec = {"field": field, "type": "quantitative" if form else "nominal", "title": title or field}
    return {**found, "format": form} if form else found


def by_method(methods: Any) -> Spec:
    """A colour per method."""
    names = list(methods)
    colours = [SERIES[i % len(SERIES)] for i in range(len(names))]
    return {
        "field": "method",
        "type": "nominal",
        "scale": {"domain": names, "range": colours},
        "legend": {"title": None, "symbolType": "stroke", "symbolOpacity": 1, "symbolSize": 220},
    }


def dashes(methods: Any) -> Spec:
    """A dash per method; its legend is that of the colours."""
    names = list(methods)
    return {
        "field": "method",
        "type": "nominal",
        "legend": {"title": None, "symbolType": "stroke", "symbolOpacity": 1, "symbolSize": 220},
        "scale": {"domain": names, "range": [DASHES[i % len(DASHES)] for i in range(len(names))]},
    }
