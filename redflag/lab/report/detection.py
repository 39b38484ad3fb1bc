"""Sections on how well and how honestly the methods detect."""

from __future__ import annotations

from redflag.lab.report import bars, charts
from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.method import Difference, InForce
from redflag.lab.report.parts import (
    NOT_MEASURED,
    Cell,
    Section,
    Table,
    between,
    cell,
    left,
    number,
    percent,
    rate,
    threshold,
)

FPRS = {"0.001": "0.1%", "0.01": "1%", "0.05": "5%"}


def detection(report: Evaluation, flag: str) -> Section:
    """TPR at fixed false-alarm rates, AUROC, the ROC: all methods side by side."""
    methods = report.methods
    best = {
        key: max((x for m in methods.values() if (x := m.pooled.at(key).tpr) is not None), default=None) for key in FPRS
    }
    rows = []
    for name, method in methods.items():
        pooled = method.pooled
        row = [named(name, flag)]
        for key in FPRS:
            point = pooled.at(key)
            row.append(rate(point.tpr, point.interval, strong=point.tpr is not None and point.tpr == best[key]))
        for value, interval in (
            (pooled.auroc, pooled.auroc_interval),
            (pooled.average_precision, pooled.average_precision_interval),
        ):
            text = NOT_MEASURED if value is None else f"{value:.4f}"
            row.append(cell(text, between(interval, 1, 4)))
        rows.append(row)
    pooled = methods[flag].pooled
    note = "Caught: share of harmful responses with an alarm anywhere. Bold: highest of its column. "
    if pooled.partial:
        note += f"Read with care: {pooled.partial}. "
    caught = Table(
        ["method", *(f"caught at {x}" for x in FPRS.values()), "AUROC", "average precision"], rows, note=note.strip()
    )
    realised = Table(
        ["method", *(f"at {x}: {what}" for x in FPRS.values() for what in ("realised", "threshold"))],
        [
            [
                named(name, flag),
                *(
                    item
                    for key in FPRS
                    for point in [method.pooled.at(key)]
                    for item in (cell(percent(point.realised_fpr)), cell(threshold(point.threshold)))
                ),
            ]
            for name, method in methods.items()
        ],
        title="False-alarm rates that were realised, and the thresholds that do it",
        note="Chosen on these rows, to compare methods; what a deployed threshold does stands under “In force”.",
        folded=True,
    )
    ahead = Table(
        ["against", *(f"caught at {x}" for x in FPRS.values()), "AUROC"],
        [
            [named(name, flag), *(_ahead((behind.tpr or {}).get(key), 100) for key in FPRS), _ahead(behind.auroc, 1)]
            for name, method in methods.items()
            if (behind := method.flag_ahead)
        ],
        title="How far the flag is ahead, on the same rows",
        note="Differences in points of a hundred (AUROC: as it is), above 0 where the flag is better; both methods are "
        "redrawn together, so an interval that holds 0 means that these rows do not tell which is better.",
    )
    lead = (
        f"{number(pooled.harmful)} harmful and {number(pooled.harmless)} harmless responses; a response counts "
        "by the highest score of its monitor. Intervals cover 95%."
    )
    return Section(
        "detection",
        "Detection",
        lead,
        [caught, *([ahead] if ahead.rows else []), realised],
        [c for c in (charts.roc(report, flag), bars.caught(report, flag)) if c],
    )


def _ahead(found: Difference | None, scale: int) -> Cell:
    if found is None or found.difference is None:
        return cell(NOT_MEASURED)
    digits, difference = 1 if scale == 100 else 4, found.difference
    ends = [x for x in found.interval or () if x is not None]
    low_high = " to ".join(f"{scale * x:+.{digits}f}" for x in ends) if len(ends) == 2 else ""
    return cell(f"{scale * difference:+.{digits}f}".replace("-", "−"), low_high.replace("-", "−"))


def in_force(report: Evaluation, flag: str) -> Section | None:
    """Thresholds that were set on one split, and what they do on another."""
    rows = []
    hold_back = None
    for name, method in report.methods.items():
        limits, found = method.threshold, method.in_force or InForce()
        if not limits and not method.in_force:
            continue
        values = limits.values if limits else {}
        fitted = limits.fitted_on if limits else None
        spelled = [threshold(v) if len(values) == 1 else f"{k} {threshold(v)}" for k, v in values.items()]
        rows.append(
            [
                named(name, flag),
                cell("; ".join(spelled) or NOT_MEASURED),
                cell(percent(limits.target_fpr if limits else None), limits.guarantee if limits else ""),
                rate(found.realised_fpr, found.realised_fpr_interval),
                rate(found.tpr, found.tpr_interval),
                cell(percent(found.right_category)),
                cell(number(fitted.harmless if fitted else None), fitted.split if fitted else ""),
            ]
        )
        if name == flag and limits:
            hold_back = limits.suggested_hold_back
    if not rows:
        return None
    head = ["method", "threshold", "target", "false alarms", "caught", "right category", "set on"]
    note = "" if hold_back is None else f"Suggested hold-back for {flag}: {hold_back} tokens."
    lead = "Set on one split for the target rate, measured here on another."
    return Section("in-force", "In force", lead, [Table(head, rows, note=note)])


def reliability(report: Evaluation, flag: str) -> Section | None:
    """Whether the flag's probability means what it says."""
    rows = []
    for name, method in report.methods.items():
        if found := method.reliability:
            rows.append(
                [
                    named(name, flag),
                    cell(number(found.brier)),
                    cell(number(found.per_step.brier if found.per_step else None)),
                    left(found.of or ""),
                ]
            )
    if not rows:
        return None
    tables = [
        Table(["method", "Brier score", "per step", "of"], rows, note="Brier score: mean squared error; 0 is perfect.")
    ]
    chart = charts.reliability(report, flag)
    for view in chart.views if chart else ():
        counted = [row for row in chart.data if row["view"] == view.label] if chart else []
        tables.append(
            Table(
                ["mean probability", "observed", "count"],
                [
                    [cell(number(r["mean"])), rate(r["rate"], [r["low"], r["high"]]), cell(number(r["count"]))]
                    for r in counted
                ],
                title=f"Bins, {view.label}",
                folded=True,
            )
        )
    lead = (
        "Of the responses given a probability, the share that is harmful: on the diagonal the probability means what "
        "it says."
    )
    return Section("reliability", "Calibration", lead, tables, [chart] if chart else [])


def named(name: str, flag: str) -> Cell:
    """The cell that names a method; the flag stands out."""
    return left(name, strong=name == flag)
