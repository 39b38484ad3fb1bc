"""Sections on how well, how early and how honestly the methods detect."""

from __future__ import annotations

from redflag.lab.report import bars, charts
from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.method import Delay, Difference, Exposed, InForce, Method
from redflag.lab.report.parts import (
    FPRS,
    NOT_MEASURED,
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
    threshold,
    tokens,
)

HOLD_BACKS = {"0": "as written", "sentence": "by the sentence", "end": "at the end"}


def detection(report: Evaluation, flag: str) -> Section:
    """TPR at fixed false-alarm rates, AUROC, the ROC: all methods side by side."""
    methods = report.methods
    best = {
        key: max((x for m in methods.values() if (x := m.pooled.at(key).tpr) is not None), default=None) for key in FPRS
    }
    at_rates = [f"caught at {x}" for x in FPRS.values()]
    caught, realised, ahead = [], [], []
    for name, method in methods.items():
        pooled, lead = method.pooled, method.flag_ahead
        points = {key: pooled.at(key) for key in FPRS}
        caught.append(
            [
                named(name, flag),
                *(
                    rate(p.tpr, p.interval, strong=p.tpr is not None and p.tpr == best[key])
                    for key, p in points.items()
                ),
                decimal(pooled.auroc, pooled.auroc_interval),
                decimal(pooled.average_precision, pooled.average_precision_interval),
            ]
        )
        pairs = [(rate(p.realised_fpr), cell(threshold(p.threshold))) for p in points.values()]
        realised.append([named(name, flag), *(one for pair in pairs for one in pair)])
        if lead:
            differences = [_ahead((lead.tpr or {}).get(key), 100) for key in FPRS]
            ahead.append([named(name, flag), *differences, _ahead(lead.auroc, 1)])
    pooled = methods[flag].pooled
    note = "Caught: share of harmful responses with an alarm anywhere. Bold: highest of its column."
    tables = [
        Table(
            ["method", *at_rates, "AUROC", "average precision"],
            caught,
            note=f"{note} Read with care: {pooled.partial}." if pooled.partial else note,
        ),
        Table(
            ["against", *at_rates, "AUROC"],
            ahead,
            title="How far the flag is ahead, on the same rows",
            note="Differences in points of a hundred (AUROC: as it is), above 0 where the flag is better; both methods "
            "are redrawn together, so an interval that holds 0 means that these rows do not tell which is better.",
        ),
        Table(
            ["method", *(f"at {x}: {what}" for x in FPRS.values() for what in ("realised", "threshold"))],
            realised,
            title="False-alarm rates that were realised, and the thresholds that do it",
            note="Chosen on these rows, to compare methods; what a deployed threshold does stands under “In force”.",
            folded=True,
        ),
    ]
    lead_text = (
        f"{number(pooled.harmful)} harmful and {number(pooled.harmless)} harmless responses; a response counts "
        "by the highest score of its monitor. Intervals cover 95%."
    )
    drawn = [chart for chart in (charts.roc(report, flag), bars.caught(report, flag)) if chart]
    return Section("detection", "Detection", lead_text, [table for table in tables if table.rows], drawn)


def in_force(report: Evaluation, flag: str) -> Section | None:
    """Thresholds that were set on one split, and their rates on another."""
    rows = [
        _in_force(name, method, flag) for name, method in report.methods.items() if method.threshold or method.in_force
    ]
    if not rows:
        return None
    head = ["method", "threshold", "target", "false alarms", "caught", "right category", "set on"]
    limits = report.methods[flag].threshold
    hold_back = limits.suggested_hold_back if limits else None
    note = "" if hold_back is None else f"Suggested hold-back for {flag}: {hold_back} tokens."
    lead = "Set on one split for the target rate, measured here on another."
    return Section("in-force", "In force", lead, [Table(head, rows, note=note)])


def reliability(report: Evaluation, flag: str) -> Section | None:
    """How well the flags' probabilities are calibrated."""
    rows = [
        [
            named(name, flag),
            count(figures.brier),
            count(figures.per_step.brier if figures.per_step else None),
            left(figures.of or ""),
        ]
        for name, method in report.methods.items()
        if (figures := method.reliability)
    ]
    if not rows:
        return None
    note = "Brier score: mean squared error; 0 is perfect."
    tables = [Table(["method", "Brier score", "per step", "of"], rows, note=note)]
    chart = charts.reliability(report, flag)
    tables += _bins(chart) if chart else []
    lead = (
        "Of the responses given a probability, the share that is harmful: on the diagonal the probability means what "
        "it says."
    )
    return Section("reliability", "Calibration", lead, tables, [chart] if chart else [])


def delay(report: Evaluation, flag: str) -> Section | None:
    """When alarms come, with the false-alarm rate, and what was shown before them."""
    kinds = dict.fromkeys(kind for method in report.methods.values() for kind in method.delay or {})
    # Kind by kind, so that methods on the same onsets are next to each other.
    measured = [
        ([named(name, flag), left(kind)], timing)
        for kind in kinds
        for name, method in report.methods.items()
        if (timing := (method.delay or {}).get(kind))
    ]
    if not measured:
        return None
    rows = []
    for names, timing in measured:
        low, high = timing.median_interval or (None, None)
        interval = "" if low is None or high is None else f"{signed(low)} to {signed(high)}"
        shares = map(rate, (timing.early, timing.on_time, timing.late, timing.missed))
        median = cell(signed(timing.median), interval)
        rows.append(
            [*names, count(timing.responses), *shares, median, count(timing.median_abs), rate(timing.realised_fpr)]
        )
    head = ["method", "onsets", "responses", "early", "on time", "late", "missed"]
    head += ["median delay", "distance", "false alarms"]
    tolerance = next((timing.tolerance for _, timing in measured if timing.tolerance is not None), None)
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
    """Detection after the first k tokens."""
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
        for name, curve in known.items():
            if values := getattr(curve, key):
                bounds = (column or [None] * len(curve.k) for column in (curve.low, curve.high))
                points = dict(zip(curve.k, zip(values, *bounds, strict=True), strict=True))
                at_k = [points.get(k, (None, None, None)) for k in ks]
                cells = [decimal(x, ends, 3) if key == "auroc" else rate(x) for x, *ends in at_k]
                rows.append([named(name, flag), *cells])
        if rows:
            tables.append(Table(["method", *map(str, ks)], rows, title=title, folded=key != "auroc"))
    chart = charts.earliness(report, flag)
    lead = "What the first k tokens of a response tell. Where harm starts late, no method can know early."
    return Section("earliness", "First k tokens", lead, tables, [chart] if chart else [])


def _ahead(lead: Difference | None, scale: int) -> Cell:
    if lead is None or lead.difference is None:
        return cell(NOT_MEASURED)
    digits = 1 if scale == 100 else 4
    ends = [x for x in lead.interval or () if x is not None]
    interval = " to ".join(f"{scale * x:+.{digits}f}" for x in ends) if len(ends) == 2 else ""
    return cell(f"{scale * lead.difference:+.{digits}f}".replace("-", "−"), interval.replace("-", "−"))


def _bins(chart: Chart) -> list[Table]:
    head = ["mean probability", "observed", "count"]
    return [
        Table(
            head,
            [
                [count(one["mean"]), rate(one["value"], [one["low"], one["high"]]), count(one["count"])]
                for one in chart.rows(view)
            ],
            title=f"Bins, {view.label}",
            folded=True,
        )
        for view in chart.views
    ]


def _in_force(name: str, method: Method, flag: str) -> list[Cell]:
    rates, limits = method.in_force or InForce(), method.threshold
    values, fitted = (limits.values, limits.fitted_on) if limits else ({}, None)
    spelled = [threshold(v) if len(values) == 1 else f"{k} {threshold(v)}" for k, v in values.items()]
    return [
        named(name, flag),
        cell("; ".join(spelled) or NOT_MEASURED),
        cell(percent(limits.target_fpr), limits.guarantee) if limits else rate(None),
        rate(rates.realised_fpr, rates.realised_fpr_interval),
        rate(rates.tpr, rates.tpr_interval),
        rate(rates.right_category),
        count(fitted.harmless, fitted.split) if fitted else count(None),
    ]


def _exposed(measured: list[tuple[list[Cell], Delay]]) -> list[Table]:
    policies = list(dict.fromkeys(key for _, timing in measured for key in timing.exposed or {}))
    policies.sort(key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else key == "end"))
    rows = []
    for names, timing in measured:
        if timing.exposed:
            shown = [timing.exposed.get(key) or Exposed() for key in policies]
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
