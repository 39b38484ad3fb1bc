"""The pieces of a report, and the format of its numbers.

Markdown and page are made from the same `Section`s, so both show the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redflag.lab.report.evaluation import AttackLine, JudgedRate, Rate
from redflag.lab.report.method import InForce, Slice

NOT_MEASURED = "not measured"
FEW = 20  # as everywhere in `redflag.lab.evaluating`
FPRS = {"0.001": "0.1%", "0.01": "1%", "0.05": "5%"}  # as in a `Slice`, and as shown

Ends = Sequence[float | None] | None  # of an interval


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    small: str = ""  # shown more quietly after it: an interval, a count
    left: bool = False  # a text, aligned to the left
    quiet: bool = False  # in a muted colour: nothing measured, or too few rows
    strong: bool = False  # the best of its column, or the row that matters
    mark: str = ""  # a short word in a frame after it, such as "adaptive"


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class View:
    """One way to look at a chart's data: a Vega-Lite specification without data."""

    label: str
    spec: dict[str, Any]
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart: rows of data, and one or more views of them."""

    name: str
    title: str
    data: list[dict[str, Any]]
    views: Sequence[View]

    def rows(self, view: View) -> list[dict[str, Any]]:
        """The rows of a view, where views have rows of their own."""
        return [row for row in self.data if row["view"] == view.label]


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading."""

    name: str
    title: str
    lead: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


def percent(x: float | None) -> str:
    """A share as a percentage: never rounded to 0% or 100% unless it is.

    >>> [percent(x) for x in (0.0, 0.0069, 0.887, 0.9998, 1.0, None)]
    ['0%', '0.69%', '88.7%', '99.98%', '100%', 'not measured']
    """
    if x is None:
        return NOT_MEASURED
    if x in (0, 1):
        return f"{100 * x:.0f}%"
    digits = 2 if x < 0.01 else 1
    while digits < 6 and float(f"{100 * x:.{digits}f}") in (0.0, 100.0):
        digits += 1
    return f"{100 * x:.{digits}f}%"


def between(interval: Ends, scale: float = 100.0, digits: int = 1) -> str:
    """An interval, in percent by default; empty where there is none.

    >>> between([0.841, 0.92]), between([0.0002, 0.091]), between([0.9994, 1.0], scale=1, digits=4), between(None)
    ('84.1–92.0', '<0.1–9.1', '0.9994–1', '')
    """
    if interval is None or None in interval:
        return ""
    low, high = (scale * x for x in interval if x is not None)
    digits = 2 if scale == 100 and high < 5 else digits
    least = 10.0**-digits

    def bound(x: float) -> str:
        if x in (0.0, scale):
            return f"{x:.0f}"
        if scale == 100 and (x < least / 2 or x >= scale - least / 2):
            return f"<{least:.{digits}f}" if x < least / 2 else f">{scale - least:.{digits}f}"
        return f"{x:.{digits}f}"

    return "–".join(map(bound, (low, high)))


def number(x: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits and separators of thousands.

    >>> [number(x) for x in (1234567, 0.01234, 2.0, 12.34, None)]
    ['1,234,567', '0.0123', '2', '12.3', 'not measured']
    """
    if x is None:
        return NOT_MEASURED
    if float(x).is_integer():
        return f"{int(x):,}"
    if abs(x) >= 10**digits:
        return f"{x:,.0f}"
    return f"{x:.{digits}g}"


def tokens(x: float | None) -> str:
    """A mean number of tokens.

    >>> tokens(4.55), tokens(0)
    ('4.5', '0.0')
    """
    return NOT_MEASURED if x is None else f"{x:.1f}"


def big(x: float | None) -> str:
    """A large number with its unit.

    >>> [big(x) for x in (512, 28_588, 14_772_856, 3.2e9)]
    ['512', '28.6 k', '14.8 M', '3.2 G']
    """
    if x is None:
        return NOT_MEASURED
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= unit:
            return f"{x / unit:.3g}{name}"
    return number(x)


def threshold(x: float | None) -> str:
    """A threshold; one close to 1 is shown by its distance from 1.

    >>> [threshold(x) for x in (0.75, 0.999994, 5.25, None)]
    ['0.75', '1 − 6e-06', '5.25', 'not measured']
    """
    if x is not None and 0.999 < x < 1:
        return f"1 − {1 - x:.2g}"
    return number(x, 4)


def signed(x: float | None) -> str:
    """Tokens after (+) or before (−) the onset."""
    if x is None:
        return NOT_MEASURED
    return f"{'+' if x > 0 else '−' if x < 0 else ''}{number(abs(x))}"


def cell(text: str, small: str = "", **more: Any) -> Cell:
    """A cell that is quiet where nothing was measured."""
    return Cell(text, small, **{"quiet": text == NOT_MEASURED, **more})


def left(text: str, **more: Any) -> Cell:
    """A cell of text."""
    return Cell(text, left=True, **more)


def named(name: str, flag: str) -> Cell:
    """The cell that names a method; the flag stands out."""
    return left(name, strong=name == flag)


def count(value: float | None, small: str = "") -> Cell:
    """A cell with a number."""
    return cell(number(value), small)


def rate(value: float | None, interval: Ends = None, **more: Any) -> Cell:
    """A cell with a share and its interval."""
    return cell(percent(value), between(interval), **more)


def decimal(value: float | None, interval: Ends = None, digits: int = 4) -> Cell:
    """A cell with an AUROC or the like and its interval."""
    return cell(NOT_MEASURED if value is None else f"{value:.{digits}f}", between(interval, 1, digits))


def rated(value: Rate | None) -> Cell:
    """A cell of a share of requests, with its maximum if some have no verdict."""
    if value is None:
        return rate(None)
    most = value.at_most if isinstance(value, JudgedRate) else None
    unsure = f"≤ {percent(most)}" if value.rate is not None and most is not None and most > value.rate else ""
    return cell(percent(value.rate), " · ".join(filter(None, (between(value.interval), unsure))))


def point(one: Slice | None, in_force: bool) -> tuple[float | None, Ends]:
    """The share caught in a part of the rows, and its interval: at the part's own 1%, or at the threshold in force."""
    if one is None:
        return None, None
    if in_force:
        forced = one.in_force or InForce()
        return forced.tpr, forced.tpr_interval
    return one.at("0.01").tpr, one.at("0.01").interval


def few(one: Slice, in_force: bool) -> bool:
    """Whether a part has few rows; at the threshold in force only its harmful ones count."""
    return one.harmful < FEW if in_force else bool(one.few)


def by_force(parts: Mapping[str, Slice]) -> bool:
    """Whether most parts have no rate of their own at 1% (no harmless rows), but one at the threshold in force."""
    own, forced = (sum(point(one, way)[0] is not None for one in parts.values()) for way in (False, True))
    return own < forced


def attack_name(attack: AttackLine) -> str:
    """Name and setting of an attack; "none" are plain requests, to compare with."""
    name = "no attack" if attack.name == "none" else attack.name
    return f"{name}, {attack.setting}" if attack.setting else name
