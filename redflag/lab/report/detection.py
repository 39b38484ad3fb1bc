"""Sections on how well and how honestly the methods detect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redflag.lab.report import bars, charts
from redflag.lab.report.parts import (
    NOT_MEASURED,
    Cell,
    Section,
    Table,
    between,
    cell,
    get,
    left,
    number,
    percent,
    rate,
    threshold,
)
from redflag.lab.report.shapes import ANY, COUNT, INTERVAL, NUMBER, RATE, TEXT, TRUTH, Needed, curve

FPRS = {"0.001": "0.1%", "0.01": "1%", "0.05": "5%"}

TPR = {"tpr": RATE, "interval": INTERVAL, "realised_fpr": RATE, "threshold": NUMBER}
IN_FORCE = {
    "tpr": RATE,
    "tpr_interval": INTERVAL,
    "realised_fpr": RATE,
    "realised_fpr_interval": INTERVAL,
    "right_category": RATE,
}
SLICE = {
    "harmful": Needed(COUNT),
    "harmless": Needed(COUNT),
    "few": TRUTH,
    "auroc": RATE,
    "auroc_interval": INTERVAL,
    "average_precision": RATE,
    "average_precision_interval": INTERVAL,
    "tpr": {str: TPR},
    "partial": ANY,
    "against": TEXT,
    "in_force": IN_FORCE,
}
BINS = [Needed({"low": NUMBER, "high": NUMBER, "count": COUNT, "mean": RATE, "rate": RATE, "interval": INTERVAL})]
AHEAD = {"difference": NUMBER, "interval": [NUMBER]}
# Of each method, what is shown here.
FIGURES = {
    "pooled": Needed(SLICE),
    "flag_ahead": {"auroc": AHEAD, "tpr": {str: AHEAD}},
    "roc": curve("fpr", {"fpr": Needed([Needed(RATE)]), "tpr": Needed([Needed(RATE)]), "low": [RATE], "high": [RATE]}),
    # The other keys of `thresholds.json` as they are: they were checked when it was made.
    "threshold": {
        "values": Needed({str: NUMBER}),
        "target_fpr": RATE,
        "guarantee": TEXT,
        "fitted_on": {"split": TEXT, "harmless": COUNT},
        "suggested_hold_back": COUNT,
    },
    "in_force": IN_FORCE,
    "reliability": {"bins": BINS, "brier": NUMBER, "of": TEXT, "per_step": {"bins": BINS, "brier": NUMBER}},
}


def detection(report: Mapping[str, Any], flag: str) -> Section:
    """TPR at fixed false-alarm rates, AUROC, the ROC: all methods side by side."""
    methods = report["methods"]
    best = {
        rate: max(
            (x for m in methods.values() if (x := get(m, "pooled", "tpr", rate, "tpr")) is not None), default=None
        )
        for rate in FPRS
    }
    rows = []
    for name, method in methods.items():
        pooled = method["pooled"]
        row = [named(name, flag)]
        for key in FPRS:
            point = get(pooled, "tpr", key) or {}
            strong = point.get("tpr") is not None and point["tpr"] == best[key]
            row.append(rate(point.get("tpr"), point.get("interval"), strong=strong))
        for key in ("auroc", "average_precision"):
            value, interval = pooled.get(key), pooled.get(f"{key}_interval")
            text = NOT_MEASURED if value is None else f"{value:.4f}"
            row.append(cell(text, between(interval, 1, 4)))
        rows.append(row)
    pooled = methods[flag]["pooled"]
    note = "Caught: share of harmful responses with an alarm anywhere. Bold: highest of its column. "
    if pooled.get("partial"):
        note += f"Read with care: {pooled['partial']}. "
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
                    for point in [get(method, "pooled", "tpr", key) or {}]
                    for item in (cell(percent(point.get("realised_fpr"))), cell(threshold(point.get("threshold"))))
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
            [named(name, flag), *(_ahead(get(lead, "tpr", key), 100) for key in FPRS), _ahead(get(lead, "auroc"), 1)]
            for name, method in methods.items()
            if (lead := method.get("flag_ahead"))
        ],
        title="How far the flag is ahead, on the same rows",
        note="Differences in points of a hundred (AUROC: as it is), above 0 where the flag is better; both methods are "
        "redrawn together, so an interval that holds 0 means that these rows do not tell which is better.",
    )
    lead = (
        f"{number(pooled['harmful'])} harmful and {number(pooled['harmless'])} harmless responses; a response counts "
        "by the highest score of its monitor. Intervals cover 95%."
    )
    return Section(
        "detection",
        "Detection",
        lead,
        [caught, *([ahead] if ahead.rows else []), realised],
        [c for c in (charts.roc(report, flag), bars.caught(report, flag)) if c],
    )


def _ahead(found: Mapping[str, Any] | None, scale: int) -> Cell:
    difference, interval = (found or {}).get("difference"), (found or {}).get("interval")
    if difference is None:
        return cell(NOT_MEASURED)
    digits = 1 if scale == 100 else 4
    low_high = "" if not interval or None in interval else " to ".join(f"{scale * x:+.{digits}f}" for x in interval)
    return cell(f"{scale * difference:+.{digits}f}".replace("-", "−"), low_high.replace("-", "−"))


def in_force(report: Mapping[str, Any], flag: str) -> Section | None:
    """Thresholds that were set on one split, and what they do on another."""
    rows = []
    hold_back = None
    for name, method in report["methods"].items():
        limits, found = method.get("threshold"), method.get("in_force")
        if not limits and not found:
            continue
        values = get(limits, "values") or {}
        spelled = [threshold(v) if len(values) == 1 else f"{k} {threshold(v)}" for k, v in values.items()]
        fitted = get(limits, "fitted_on") or {}
        rows.append(
            [
                named(name, flag),
                cell("; ".join(spelled) or NOT_MEASURED),
                cell(percent(get(limits, "target_fpr")), get(limits, "guarantee") or ""),
                rate(get(found, "realised_fpr"), get(found, "realised_fpr_interval")),
                rate(get(found, "tpr"), get(found, "tpr_interval")),
                cell(percent(get(found, "right_category"))),
                cell(number(fitted.get("harmless")), fitted.get("split") or ""),
            ]
        )
        if name == flag:
            hold_back = get(limits, "suggested_hold_back")
    if not rows:
        return None
    head = ["method", "threshold", "target", "false alarms", "caught", "right category", "set on"]
    note = "" if hold_back is None else f"Suggested hold-back for {flag}: {hold_back} tokens."
    lead = "Set on one split for the target rate, measured here on another."
    return Section("in-force", "In force", lead, [Table(head, rows, note=note)])


def reliability(report: Mapping[str, Any], flag: str) -> Section | None:
    """Whether the flag's probability means what it says."""
    rows = []
    for name, method in report["methods"].items():
        found = method.get("reliability")
        if found:
            rows.append(
                [
                    named(name, flag),
                    cell(number(found.get("brier"))),
                    cell(number(get(found, "per_step", "brier"))),
                    left(found.get("of") or ""),
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
