"""Summary of a file of scored rows as one plain dictionary, for the tables of the demo and the recipes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from redflag.stats.intervals import auroc_interval
from redflag.stats.metrics import auroc, average_precision, clopper_pearson, delay_stats, tpr_at_fpr
from redflag.watching.monitor import Monitor, MonitorConfig
from redflag.watching.thresholds import Thresholds

FEW = 20


def summarise(
    rows: Iterable[Mapping[str, Any]],
    thresholds: Thresholds | None = None,
    target_fprs: Sequence[float] = (0.001, 0.01, 0.05),
    *,
    monitor: MonitorConfig | None = None,
    categories: Sequence[str] | None = None,
    firsts: Sequence[int] = (8, 32),
    tolerance: int = 2,
) -> dict[str, Any]:
    """Measures scored rows.

    A response's score is the highest that its monitor reached in any category. Rows cut before their onset hold no
    harm; they are counted and left out.

    Args:
        rows: Rows as `redflag score` writes them.
        thresholds: Thresholds whose rates and delays are added.
        target_fprs: False-alarm rates at which to report what is caught.
        monitor: How probabilities become scores; None = the thresholds' monitor, or else the highest probability.
        categories: Categories in the order of `flag_probs`; needed with thresholds of several categories.
        firsts: Numbers of first tokens for which the AUROC is computed, to show how early detection comes.
        tolerance: Tokens by which an alarm may miss the onset and still count as on time.

    Returns:
        Plain JSON values: `counts`; `overall` and `sources` (per source) with `harmful`, `harmless`, `few` (fewer than
        20 of a class: read with care) and, where both classes are there, `auroc`, `average_precision`, `tpr` (rate ->
        `tpr`, `realised_fpr`, `threshold`) and, overall, `auroc_interval`, `first` (tokens -> AUROC); with thresholds
        `in_force` (`tpr`, `realised_fpr`, each with a 95% interval) and `delay`.
    """
    config = monitor or (thresholds.monitor if thresholds is not None else MonitorConfig())
    used, cut = [], 0
    for row in rows:
        if row["onset"] is not None and row["onset"] >= len(row["flag_probs"]):
            cut += 1
        else:
            used.append(row)
    tables = [_scores(config, row) for row in used]
    peaks = np.array([max((max(step) for step in table), default=0.0) for table in tables])
    labels = np.array([row["category"] is not None for row in used], dtype=bool)
    harmful, harmless = int(labels.sum()), int((~labels).sum())

    overall = ranking(peaks, labels, target_fprs)
    if harmful and harmless:
        overall["auroc_interval"] = list(auroc_interval(peaks, labels))
        steps = [[max(step) for step in table] for table in tables]
        overall["first"] = {str(k): auroc([max(step[:k], default=0.0) for step in steps], labels) for k in firsts}
    sources: dict[str, Any] = {}
    for source in sorted({row["source"] for row in used if row.get("source") is not None}):
        inside = np.array([row.get("source") == source for row in used])
        sources[source] = ranking(peaks[inside], labels[inside], target_fprs)
    result: dict[str, Any] = {
        "counts": {
            "rows": len(used) + cut,
            "harmful": harmful,
            "harmless": harmless,
            "cut_before_onset": cut,
            "truncated": sum(bool(row.get("truncated")) for row in used) + cut,
            "categories": dict(sorted(Counter(row["category"] for row in used if row["category"] is not None).items())),
        },
        "overall": overall,
        "sources": sources,
    }
    if thresholds is not None:
        order = list(categories) if categories is not None else list(thresholds.values)
        values = [thresholds.values[category] for category in order]
        result |= _in_force(used, tables, labels, order, values, tolerance)
    return result


def _scores(config: MonitorConfig, row: Mapping[str, Any]) -> list[tuple[float, ...]]:
    # With the steps that end the turn, as in the stream: an alarm there counts.
    steps = [*row["flag_probs"], *row.get("tail_probs", ())]
    if not len(steps):
        return []
    fold = Monitor(config, len(steps[0]))
    return [fold.feed(step) for step in steps]


def ranking(peaks: Any, labels: Any, target_fprs: Sequence[float]) -> dict[str, Any]:
    """How well N peaks tell N labels apart, as plain JSON values; without a class only the counts."""
    harmful, harmless = int(labels.sum()), int((~labels).sum())
    result: dict[str, Any] = {"harmful": harmful, "harmless": harmless, "few": min(harmful, harmless) < FEW}
    if harmful and harmless:
        result["auroc"] = auroc(peaks, labels)
        result["average_precision"] = average_precision(peaks, labels)
        result["tpr"] = {}
        for rate in target_fprs:
            point = tpr_at_fpr(peaks, labels, rate)
            # JSON has no infinity: null = no threshold.
            threshold = point.threshold if math.isfinite(point.threshold) else None
            result["tpr"][f"{rate:g}"] = {"tpr": point.tpr, "realised_fpr": point.realised_fpr, "threshold": threshold}
    return result


def _in_force(
    rows: Sequence[Mapping[str, Any]],
    tables: Sequence[list[tuple[float, ...]]],
    labels: Any,
    categories: Sequence[str],
    values: Sequence[float],
    tolerance: int,
) -> dict[str, Any]:
    alarms: list[int | None] = []
    right = 0
    for row, table in zip(rows, tables, strict=True):
        crossed = ((t, k) for t, step in enumerate(table) for k in range(len(values)) if step[k] >= values[k])
        first = next(crossed, None)
        alarms.append(first[0] if first else None)
        right += first is not None and categories[first[1]] == row["category"]
    raised = np.array([alarm is not None for alarm in alarms], dtype=bool)
    force: dict[str, Any] = {}
    for name, selected in (("tpr", labels), ("realised_fpr", ~labels)):
        count = int(selected.sum())
        if count:
            hits = int((raised & selected).sum())
            force[name] = hits / count
            force[f"{name}_interval"] = list(clopper_pearson(hits, count))
    if len(values) > 1 and (raised & labels).any():
        force["right_category"] = right / int((raised & labels).sum())
    harmful = [int(i) for i in np.flatnonzero(labels)]
    stats = delay_stats([alarms[i] for i in harmful], [rows[i]["onset"] or 0 for i in harmful], tolerance)
    delay = {k: (None if isinstance(v, float) and math.isnan(v) else v) for k, v in stats._asdict().items()}
    return {"in_force": force, "delay": {**delay, "tolerance": tolerance}}
