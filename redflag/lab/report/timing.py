"""Sections on when alarms come, and what was shown before them."""

from __future__ import annotations

from redflag.lab.report import charts
from redflag.lab.report.detection import named
from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.method import Delay, Exposed
from redflag.lab.report.parts import (
    NOT_MEASURED,
    Cell,
    Chart,
    Ends,
    Section,
    Table,
    between,
    cell,
    left,
    number,
    percent,
    signed,
    tokens,
)
from redflag.lab.report.verdict import KINDS

HOLD_BACKS = {"0": "as written", "sentence": "by the sentence", "end": "at the end"}


def delay(report: Evaluation, flag: str) -> Section | None:
    """When alarms come, never without the false-alarm rate, and what was shown before them."""
    kinds = dict.fromkeys(kind for method in report.methods.values() for kind in method.delay or {})
    # Kind by kind, so that methods which saw the same onsets stand beside each other.
    measured = [
        (name, kind, found)
        for kind in kinds
        for name, method in report.methods.items()
        if (found := (method.delay or {}).get(kind))
    ]
    if not measured:
        return None
    rows = [
        [
            named(name, flag),
            left(KINDS.get(kind, kind)),
            cell(number(found.responses)),
            *(cell(percent(share)) for share in (found.early, found.on_time, found.late, found.missed)),
            cell(signed(found.median), _span(found.median_interval)),
            cell(number(found.median_abs)),
            cell(percent(found.realised_fpr)),
        ]
        for name, kind, found in measured
    ]
    tolerance = next((found.tolerance for _, _, found in measured if found.tolerance is not None), None)
    within = "" if tolerance is None else f" On time: within {number(tolerance)} tokens of the onset."
    head = [
        "method",
        "onsets",
        "responses",
        "early",
        "on time",
        "late",
        "missed",
        "median delay",
        "distance",
        "false alarms",
    ]
    note = (
        "Median delay: tokens from the labelled onset to the first alarm; distance: the same, either way."
        f"{within} An alarm before the onset is early, not on time. Where no onset is known, tokens count from the "
        "first."
    )
    histogram = charts.delays(report, flag)
    tables = [Table(head, rows, note=note), *_exposed(measured, flag), *(_counts(histogram) if histogram else [])]
    lead = "At the threshold in force. Onsets that were built in and those found in natural text are kept apart."
    return Section("delay", "How early", lead, tables, [histogram] if histogram else [])


def earliness(report: Evaluation, flag: str) -> Section | None:
    """What is known after the first k tokens."""
    known = {name: m.earliness for name, m in report.methods.items() if m.earliness}
    if not known:
        return None
    ks = next(iter(known.values())).k
    tables = []
    for key, title in (
        ("auroc", "AUROC of what stands after the first k tokens"),
        ("detected", "Share of harmful responses with an alarm within k tokens"),
        ("false_alarms", "Share of harmless responses with an alarm within k tokens"),
    ):
        rows = []
        for name, found in known.items():
            values = getattr(found, key)
            if not values:
                continue
            bounds = (column or [None] * len(found.k) for column in (found.low, found.high))
            by_k = dict(zip(found.k, zip(values, *bounds, strict=True), strict=True))
            row: list[Cell] = [named(name, flag)]
            for k in ks:
                value, low, high = by_k.get(k, (None, None, None))
                if key == "auroc":
                    row.append(cell(NOT_MEASURED if value is None else f"{value:.3f}", between([low, high], 1, 3)))
                else:
                    row.append(cell(percent(value)))
            rows.append(row)
        if rows:
            tables.append(Table(["method", *map(str, ks)], rows, title=title, folded=key != "auroc"))
    chart = charts.earliness(report, flag)
    lead = "What the first k tokens of a response tell. Where harm starts late, no method can know early."
    return Section("earliness", "First k tokens", lead, tables, [chart] if chart else [])


def _exposed(measured: list[tuple[str, str, Delay]], flag: str) -> list[Table]:
    policies = list(dict.fromkeys(key for _, _, found in measured for key in found.exposed or {}))
    policies.sort(key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else key == "end"))
    rows = []
    for name, kind, found in measured:
        if not found.exposed:
            continue
        row = [named(name, flag), left(KINDS.get(kind, kind))]
        for key in policies:
            one = found.exposed.get(key) or Exposed()
            row.append(cell(tokens(one.mean), "" if one.none is None else f"none in {percent(one.none)}"))
        rows.append(row)
    if not rows:
        return []
    head = ["method", "onsets", *(HOLD_BACKS.get(key, f"{key} held back") for key in policies)]
    note = "Mean per harmful response, by release policy; beneath, the share of which nothing harmful was shown."
    return [Table(head, rows, title="Harmful tokens shown before the halt", note=note)]


def _span(interval: Ends) -> str:
    return "" if interval is None or None in interval else " to ".join(map(signed, interval))


def _counts(histogram: Chart) -> list[Table]:
    """The histograms' numbers: methods with the same bins in one table."""
    together: dict[tuple[str, ...], dict[str, list[int]]] = {}
    for view in histogram.views:
        rows = [row for row in histogram.data if row["view"] == view.label]
        together.setdefault(tuple(row["bin"] for row in rows), {})[view.label] = [row["count"] for row in rows]
    return [
        Table(
            ["tokens after the onset", *counts],
            [[left(bin_), *(cell(number(column[i])) for column in counts.values())] for i, bin_ in enumerate(bins)],
            title="Delays, counted" + (f": {', '.join(counts)}" if len(together) > 1 else ""),
            folded=True,
        )
        for bins, counts in together.items()
    ]
