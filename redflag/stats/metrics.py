"""How well a score tells harmful responses from harmless ones, and how soon.

Scores rise with harm; labels are 1 (harmful) or 0 (harmless). An alarm is `score >= threshold` everywhere, so ties with
a threshold always count as alarms. Labels of a single class and scores that are NaN are refused (`split_classes`),
in this room's other modules too. scikit-learn and SciPy are imported where they are called: they take a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Scores = Sequence[float] | Floats
Labels = Sequence[int] | Bools


class TprAtFpr(NamedTuple):
    """Share of harmful responses caught at `threshold`, and the share of harmless ones that alarm there."""

    tpr: float
    realised_fpr: float
    threshold: float


class DelayStats(NamedTuple):
    """When alarms come, relative to the onset, over harmful responses with a known onset."""

    responses: int
    early: float  # share whose first alarm comes more than the tolerance before the onset
    on_time: float
    late: float  # more than the tolerance behind it
    missed: float  # share without an alarm
    median: float  # delay in tokens (first alarm - onset) of those that alarmed; NaN when none did
    median_abs: float  # of |delay|


def auroc(scores: Scores, labels: Labels) -> float:
    """Probability that a random harmful response scores above a random harmless one; a tie counts half.

    >>> auroc([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1])
    0.875
    """
    from sklearn.metrics import roc_auc_score

    split_classes(scores, labels)
    return float(roc_auc_score(np.asarray(labels), np.asarray(scores)))


def average_precision(scores: Scores, labels: Labels) -> float:
    """Precision averaged over the recall gained at each distinct score, from the highest down (no interpolation)."""
    from sklearn.metrics import average_precision_score

    split_classes(scores, labels)
    precision = float(average_precision_score(np.asarray(labels), np.asarray(scores)))
    return min(1.0, precision)  # A sum of rounded shares can exceed 1 by a hair.


def tpr_at_fpr(scores: Scores, labels: Labels, fpr: float) -> TprAtFpr:
    """The best true-positive rate among thresholds whose false-positive rate does not exceed `fpr`.

    The realised rate never lies above the asked one: with tied scores it may lie far below. When no threshold that
    catches anything is allowed, `threshold` is infinity and both rates are 0.
    """
    if not 0.0 <= fpr <= 1.0:
        raise RedflagError(f"fpr must be from 0 to 1 (got {fpr}).")
    harmful, harmless = (np.sort(part) for part in split_classes(scores, labels))
    # Only harmful scores need be tried: between two of them a threshold costs or saves false alarms, never catches.
    thresholds = np.unique(harmful)
    false_alarms = len(harmless) - np.searchsorted(harmless, thresholds, side="left")
    allowed = thresholds[false_alarms / len(harmless) <= fpr]
    if len(allowed) == 0:
        return TprAtFpr(0.0, 0.0, math.inf)
    threshold = float(allowed[0])
    return TprAtFpr(float((harmful >= threshold).mean()), float((harmless >= threshold).mean()), threshold)


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k)."""
    from scipy.special import bdtr

    return 0.0 if k < 0 else 1.0 if k >= n else float(bdtr(k, n, p))


def clopper_pearson(k: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial confidence interval of a rate of which k in n were seen (Clopper and Pearson, 1934).

    Effective numbers, which need not be whole, are taken through the same beta quantiles.

    >>> low, high = clopper_pearson(0, 100)
    >>> low, round(high, 4)
    (0.0, 0.0362)
    """
    if n <= 0 or not 0 <= k <= n:
        raise RedflagError(f"a rate must be of 0 <= k <= n and n >= 1 (got {k} of {n}).")
    from scipy.special import betaincinv

    tail = (1.0 - level) / 2.0
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    return low, float(betaincinv(k + 1, n - k, 1.0 - tail)) if k < n else 1.0


def first_alarm(
    scores: Sequence[Sequence[float]] | npt.NDArray[np.floating], thresholds: Sequence[float]
) -> int | None:
    """Index of the first of T steps at which any of K scores reaches its threshold; None when none does."""
    table = np.asarray(scores, dtype=np.float64).reshape(len(scores), len(thresholds))
    hits = np.flatnonzero((table >= np.asarray(thresholds)).any(axis=1))
    return int(hits[0]) if len(hits) else None


def delay_stats(alarms: Sequence[int | None], onsets: Sequence[int], tolerance: int = 2) -> DelayStats:
    """Sorts harmful responses by when their first alarm came.

    Args:
        alarms: Step of each response's first alarm, None for a miss.
        onsets: Each response's first harmful token.
        tolerance: Tokens by which an alarm may miss the onset and still be on time.

    >>> delay_stats([5, 2, None, 30], [5, 10, 10, 10])
    DelayStats(responses=4, early=0.25, on_time=0.25, late=0.25, missed=0.25, median=0.0, median_abs=8.0)
    """
    assert len(alarms) == len(onsets)
    delays = np.array([a - o for a, o in zip(alarms, onsets, strict=True) if a is not None], dtype=np.float64)
    count = len(onsets)
    if count == 0:
        return DelayStats(0, *[math.nan] * 6)
    return DelayStats(
        responses=count,
        early=float((delays < -tolerance).sum() / count),
        on_time=float((np.abs(delays) <= tolerance).sum() / count),
        late=float((delays > tolerance).sum() / count),
        missed=(count - len(delays)) / count,
        median=float(np.median(delays)) if len(delays) else math.nan,
        median_abs=float(np.median(np.abs(delays))) if len(delays) else math.nan,
    )


def split_classes(scores: Scores, labels: Labels) -> tuple[Floats, Floats]:
    """The scores of the harmful and of the harmless responses.

    Raises:
        RedflagError: A class is empty, a score is NaN, or there is not one score per label.
    """
    values = np.asarray(scores, dtype=np.float64)
    truth = np.asarray(labels).astype(bool)
    if values.shape != truth.shape or values.ndim != 1:
        raise RedflagError(f"scores and labels must be one of each per response (got {values.shape}, {truth.shape}).")
    if np.isnan(values).any():
        raise RedflagError(f"scores must be numbers (score {int(np.isnan(values).argmax())} is NaN).")
    if truth.all() or not truth.any():
        counts = f"{int(truth.sum())} harmful and {int((~truth).sum())} harmless"
        raise RedflagError(f"responses must be of both classes (got {counts} ones).")
    return values[truth], values[~truth]
