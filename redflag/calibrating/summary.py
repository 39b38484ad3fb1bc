"""Summary of a file of scored rows as one plain dictionary, for the tables of the demo and the recipes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from redflag.calibrating import replay
from redflag.calibrating.observed import alarm_categories
from redflag.calibrating.replay import Indices
from redflag.stats.curves import running_peaks
from redflag.stats.intervals import auroc_interval
from redflag.stats.metrics import Bools, auroc, average_precision, clopper_pearson, delay_stats, tpr_at_fpr
from redflag.watching.monitor import MonitorConfig
from redflag.watching.thresholds import Thresholds

FEW = 20
TOLERANCE = 2  # tokens by which an alarm may miss the onset and still count as on time


def summarise(
    rows: Iterable[Mapping[str, Any]],
    thresholds: Thresholds | None = None,
    target_fprs: Sequence[float] = (0.001, 0.01, 0.05),
    *,
    monitor: MonitorConfig | None = None,
    categories: Sequence[str] | None = None,
    firsts: Sequence[int] = (8, 32),
) -> dict[str, Any]:
    """Measures scored rows.

    A response's score is the highest that its monitor reached in any category. Rows cut before their onset hold no
    harm; they are counted and left out.

    Args:
        monitor: How probabilities become scores; None = the thresholds' monitor, or else the highest probability.
        categories: Categories in the order of `flag_probs`; needed with thresholds of several categories.
        firsts: Ascending numbers of first tokens for which the AUROC is computed, to show how early detection comes.

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
    # With the steps that end the turn, as in the stream: an alarm there counts.
    judged = [[*row["flag_probs"], *row.get("tail_probs", ())] for row in used]
    steps = replay.Steps.of(judged, next((len(response[0]) for response in judged if response), 1))
    scores = replay.scores(config, steps)
    highest = scores.max(axis=1, initial=0.0)
    peaks = running_peaks(highest, steps.starts, [len(highest)])[:, 0]
    labels = np.array([row["category"] is not None for row in used], dtype=bool)
    harmful, harmless = int(labels.sum()), int((~labels).sum())

    overall = ranking(peaks, labels, target_fprs)
    if harmful and harmless:
        overall["auroc_interval"] = list(auroc_interval(peaks, labels))
        beginnings = running_peaks(highest, steps.starts, firsts).T
        overall["first"] = {str(k): auroc(column, labels) for k, column in zip(firsts, beginnings, strict=True)}
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
        alarms = replay.first_alarms(scores, steps, values)
        result |= _in_force(used, labels, alarms)
        if len(order) > 1 and (detected := int((labels & (alarms >= 0)).sum())):
            named = alarm_categories(scores, steps.starts, alarms, values, order)
            right = sum(used[i]["category"] == name for i, name in named.items())
            result["in_force"]["right_category"] = right / detected
    return result


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


def _in_force(rows: Sequence[Mapping[str, Any]], labels: Bools, alarms: Indices) -> dict[str, Any]:
    """Rates and delays of N first alarms, -1 = no alarm."""
    raised = alarms >= 0
    force: dict[str, Any] = {}
    for name, selected in (("tpr", labels), ("realised_fpr", ~labels)):
        count = int(selected.sum())
        if count:
            hits = int((raised & selected).sum())
            force[name] = hits / count
            force[f"{name}_interval"] = list(clopper_pearson(hits, count))
    steps = [int(alarm) if alarm >= 0 else None for alarm in alarms[labels]]
    stats = delay_stats(steps, [row["onset"] or 0 for row in rows if row["category"] is not None], TOLERANCE)
    delay = {k: (None if isinstance(v, float) and math.isnan(v) else v) for k, v in stats._asdict().items()}
    return {"in_force": force, "delay": {**delay, "tolerance": TOLERANCE}}
