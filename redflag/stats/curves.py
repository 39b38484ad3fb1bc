"""The curves of a report as lists of numbers: ROC, detection by the first tokens, reliability, delays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from redflag.stats.intervals import Groups, auroc_interval, ranking_intervals, rate_interval, unit_of
from redflag.stats.metrics import Bools, Floats, Labels, Scores, auroc, split_classes

Indices = npt.NDArray[np.int64]

MOST_POINTS = 200
# FPRs whose points are always kept: tables and readers ask for them.
NAMED_FPRS = (0.0, 0.001, 0.01, 0.05, 0.1)


def roc(
    scores: Scores, labels: Labels, groups: Groups | None = None, *, resamples: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """The ROC curve in at most 200 of its own points, each with an interval of its TPR.

    Points are kept at even steps of FPR, of its logarithm (where thresholds are chosen) and of TPR: none is moved, and
    none lies off the curve. The interval is pointwise: 95% at each FPR by itself, not for the curve as a whole.

    Returns:
        `fpr`, `tpr` (both from 0 to 1, never falling), `low`, `high` (around `tpr`).
    """
    harmful, harmless = (np.sort(part) for part in split_classes(scores, labels))
    thresholds = np.unique(np.concatenate([harmful, harmless]))[::-1]
    caught = len(harmful) - np.searchsorted(harmful, thresholds, side="left")
    false = len(harmless) - np.searchsorted(harmless, thresholds, side="left")
    tpr = np.concatenate([[0.0], caught / len(harmful)])
    fpr = np.concatenate([[0.0], false / len(harmless)])
    wanted_fprs = np.concatenate([NAMED_FPRS, np.geomspace(1e-4, 1.0, 60), np.linspace(0.0, 1.0, 60)])
    at_fpr = np.searchsorted(fpr, wanted_fprs, side="right") - 1
    at_tpr = np.searchsorted(tpr, np.linspace(0.0, 1.0, 60), side="left")
    points = np.unique(np.concatenate([[0, len(fpr) - 1], at_fpr, at_tpr]))
    if len(fpr) <= MOST_POINTS:
        points = np.arange(len(fpr))
    fpr, tpr = fpr[points], tpr[points]
    rates, place = np.unique(fpr, return_inverse=True)
    bounds = ranking_intervals(scores, labels, groups, fprs=rates, resamples=resamples, seed=seed).tpr
    low, high = np.array(bounds)[place].T
    # Where the curve rises steeply, several points share the FPR of the one that the interval is of.
    return {
        "fpr": fpr.tolist(),
        "tpr": tpr.tolist(),
        "low": np.minimum(low, tpr).tolist(),
        "high": np.maximum(high, tpr).tolist(),
    }


def running_peaks(scores: Floats, starts: Indices, firsts: Sequence[int]) -> Floats:
    """The highest score of each response among its first steps: N x F peaks, 0 where there is no step.

    Args:
        scores: S scores, response after response; response i has those from `starts[i]` to `starts[i + 1]`.
        firsts: F ascending numbers of steps.
    """
    counts = np.diff(starts)
    peaks = np.zeros((len(counts), len(firsts)))
    padded = np.append(scores, 0.0)
    so_far, seen = np.zeros(len(counts)), 0
    for column, first in enumerate(firsts):
        has = counts > seen
        begin, end = starts[:-1][has] + seen, starts[:-1][has] + np.minimum(counts[has], first)
        if len(begin):
            # Every second piece is the gap between two responses; a response that ends at S has none behind it.
            bounds = np.stack([begin, end], axis=1).ravel()
            pieces = np.maximum.reduceat(padded, bounds)[::2]
            so_far[has] = np.maximum(so_far[has], pieces)
        peaks[:, column] = so_far
        seen = first
    return peaks


def earliness(
    scores: Floats, starts: Indices, labels: Bools, groups: Groups | None = None, alarms: Indices | None = None
) -> dict[str, list[Any]]:
    """What the first tokens alone tell.

    After k tokens the steps before tokens 0 to k - 1 have been judged: an alarm at step a counts from k = a + 1 on.

    Args:
        scores, starts: As for `running_peaks`; of several flags the highest score.
        alarms: Per response the step of its first alarm at the thresholds in force, -1 for none; None: no thresholds.

    Returns:
        `k` (1, 2, 4, ... until the longest response is whole), `auroc` of the running peak with `low` and `high`,
        `detected` and `false_alarms`: shares of harmful and harmless responses that alarmed by then (None without
        `alarms`).
    """
    longest = int(np.diff(starts).max(initial=1))
    firsts = [2**i for i in range(math.ceil(math.log2(max(longest, 1))) + 1)]
    peaks = running_peaks(scores, starts, firsts)
    bounds = [auroc_interval(column, labels, groups) for column in peaks.T]
    raised = [None if alarms is None else (alarms >= 0) & (alarms < k) for k in firsts]
    return {
        "k": firsts,
        "auroc": [auroc(column, labels) for column in peaks.T],
        "low": [low for low, _ in bounds],
        "high": [high for _, high in bounds],
        "detected": [None if hits is None else float(hits[labels].mean()) for hits in raised],
        "false_alarms": [None if hits is None else float(hits[~labels].mean()) for hits in raised],
    }


def reliability(probs: Floats, truth: Bools, groups: Groups | None = None, bins: int = 10) -> dict[str, Any]:
    """Whether a probability of p comes true in a share p of cases.

    Returns:
        `bins` (equal parts of [0, 1], each with its upper end; empty ones are left out): `low`, `high`, `count`, `mean`
        of the probabilities, `rate` of the outcomes and its 95% `interval`; `brier`: mean squared distance of both.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.searchsorted(edges[1:-1], probs)
    units = unit_of(groups, len(probs))
    filled = []
    for i in np.unique(place):
        inside = place == i
        filled.append(
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "count": int(inside.sum()),
                "mean": float(probs[inside].mean()),
                "rate": float(truth[inside].mean()),
                "interval": rate_interval(truth[inside], units[inside]),
            }
        )
    return {"bins": filled, "brier": float(np.mean((probs - truth) ** 2)) if len(probs) else None}


def delay_histogram(delays: Sequence[int] | Indices, missed: int, tolerance: int) -> dict[str, Any]:
    """Delays in bins that show what is on time.

    Args:
        delays: First alarm - onset, in tokens, of the responses that alarmed.
        missed: Responses that did not.
        tolerance: Tokens by which an alarm may miss the onset and still be on time.

    Returns:
        `edges` (halves, so that no delay lies on one) and `counts` of the bins between: one token wide while on time,
        then twice as wide each, as far as there are delays; `missed`.
    """
    values = np.asarray(delays, dtype=np.float64)
    edges = [i - 0.5 for i in range(-tolerance, tolerance + 2)]
    width = 2.0
    while len(values) and (values.min() < edges[0] or values.max() > edges[-1]):
        if values.min() < edges[0]:
            edges.insert(0, edges[0] - width)
        if values.max() > edges[-1]:
            edges.append(edges[-1] + width)
        width *= 2.0
    counts, _ = np.histogram(values, edges)
    return {"edges": edges, "counts": counts.tolist(), "missed": missed}
