"""Sections on when alarms come, and what was shown before them."""

from __future__ import annotations

from redflag.lab.report import charts
from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.method import Delay, Exposed
from redflag.lab.report.parts import (
    Cell,
    Chart,
    Section,
    Table,
    cell,
    count,
    decimal,
    left,
    named,
    number,
    percent,
    rate,
    signed,
    tokens,
)

HOLD_BACKS = {"0": "as written", "sentence": "by the sentence", "end": "at the end"}


def delay(report: Evaluation, flag: str) -> Section | None:
    """When alarms come, never without the false-alarm rate, and what was shown before them."""
    kinds = dict.fromkeys(kind for method in report.methods.values() for kind in method.delay or {})
    # Kind by kind, so that methods which saw the same onsets stand beside each other.
    measured = [
        ([named(name, flag), left(kind)], found)
        for kind in kinds
        for name, method in report.methods.items()
        if (found := (method.delay or {}).get(kind))
    ]
    if not measured:
        return None
    rows = []
    for names, found in measured:
        low, high = found.median_interval or (None, None)
        interval = "" if low is None or high is None else f"{signed(low)} to {signed(high)}"
        shares = map(rate, (found.early, found.on_time, found.late, found.missed))
        median = cell(signed(found.median), interval)
        rows.append(
            [*names, count(found.responses), *shares, median, count(found.median_abs), rate(found.realised_fpr)]
        )
    head = ["method", "onsets", "responses", "early", "on time", "late", "missed"]
    head += ["median delay", "distance", "false alarms"]
    tolerance = next((found.tolerance for _, found in measured if found.tolerance is not None), None)
    within = "" if tolerance is None else f" On time: within {number(tolerance)} tokens of the onset."
    note = (
        "Median delay: tokens from the labelled onset to the first alarm; distance: the same, either way."
        f"{within} An alarm before the onset is early, not on time. Where no onset is known, tokens count from the "
        "first."
    )
    histogram = charts.delays(report, flag)
    tables = [Table(head, rows, note=note), *_exposed(measured), *(_counts(histogram) if histogram else [])]
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
            if values := getattr(found, key):
                bounds = (column or [None] * len(found.k) for column in (found.low, found.high))
                points = dict(zip(found.k, zip(values, *bounds, strict=True), strict=True))
                at_k = [points.get(k, (None, None, None)) for k in ks]
                cells = [decimal(x, ends, 3) if key == "auroc" else rate(x) for x, *ends in at_k]
                rows.append([named(name, flag), *cells])
        if rows:
            tables.append(Table(["method", *map(str, ks)], rows, title=title, folded=key != "auroc"))
    chart = charts.earliness(report, flag)
    lead = "What the first k tokens of a response tell. Where harm starts late, no method can know early."
    return Section("earliness", "First k tokens", lead, tables, [chart] if chart else [])


def _exposed(measured: list[tuple[list[Cell], Delay]]) -> list[Table]:
    policies = list(dict.fromkeys(key for _, found in measured for key in found.exposed or {}))
    policies.sort(key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else key == "end"))
    rows = []
    for names, found in measured:
        if found.exposed:
            shown = [found.exposed.get(key) or Exposed() for key in policies]
            none = ["" if one.none is None else f"none in {percent(one.none)}" for one in shown]
            rows.append([*names, *(cell(tokens(one.mean), small) for one, small in zip(shown, none, strict=True))])
    head = ["method", "onsets", *(HOLD_BACKS.get(key, f"{key} held back") for key in policies)]
    note = "Mean per harmful response, by release policy; beneath, the share of which nothing harmful was shown."
    return [Table(head, rows, title="Harmful tokens shown before the halt", note=note)] if rows else []


def _counts(histogram: Chart) -> list[Table]:
    """The histograms' numbers: methods with the same bins in one table."""
    together: dict[tuple[str, ...], dict[str, list[int]]] = {}
    for view in histogram.views:
        rows = histogram.rows(view)
        together.setdefault(tuple(row["bin"] for row in rows), {})[view.label] = [row["count"] for row in rows]
    return [
        Table(
            ["tokens after the onset", *counts],
            [[left(bin_), *(count(column[i]) for column in counts.values())] for i, bin_ in enumerate(bins)],
            title="Delays, counted" + (f": {', '.join(counts)}" if len(together) > 1 else ""),
            folded=True,
        )
        for bins, counts in together.items()
    ]
