"""How far a figure can be trusted: intervals for ranks, rates and medians of responses that may hang together.

Answers to one request, or rows made from one seed, are not independent: they share a *group*, and all that follows
takes whole groups as its units; ungrouped rows are units of one. Scores and labels are as in `redflag.stats.metrics`,
one per response. Three methods, each chosen by the coverage measured in
`tests/calibrating/test_coverage.py`:

- **AUROC**: the variance of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988), summed over groups as Obuchowski
  (Biometrics 53, 1997) does, on the logit scale, which keeps its coverage near 1 where a percentile bootstrap is too
  short. Where the classes do not overlap that variance is zero, and Newcombe's method 5, a score interval (Statistics
  in Medicine 25, 2006), takes its place.
- **Rates** (a threshold that is given beforehand): Clopper and Pearson's exact interval; with groups on the effective
  number of responses (Korn and Graubard, Survey Methodology 24, 1998).
- **Everything else**: the bootstrap, within classes, so that no resample lacks one. For the TPR at an FPR, the ROC and
  medians the quantiles of the resamples; the threshold that keeps an FPR is derived anew in every resample, so that
  its own uncertainty counts. For the average precision their standard deviation, on the logit scale as above. Where
  all harmful responses are caught, or none, the resamples all but agree, and the exact interval of that share counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError
from redflag.stats.metrics import (
    Bools,
    Floats,
    Labels,
    Scores,
    average_precision,
    clopper_pearson,
    split_classes,
    tpr_at_fpr,
)

Interval = tuple[float, float]
Counts = npt.NDArray[np.int64]
Groups = Sequence[str | None] | Counts  # per response its group; None: it is by itself

# So many counts are held at a time: a chunk of resamples stays inside the processor's cache and a few megabytes.
CHUNK = 1_000_000
# A standard error below this is a zero that was rounded.
ROUNDING = 1e-12
# Every interval is one of 95%: the shares of the resamples below its ends, and the normal quantile.
_TAILS = [(1.0 - 0.95) / 2.0, (1.0 + 0.95) / 2.0]
_Z = NormalDist().inv_cdf(_TAILS[1])


class RankingIntervals(NamedTuple):
    """Intervals that one set of resamples gives."""

    average_precision: Interval
    tpr: list[Interval]  # per FPR, of the TPR at the best threshold that keeps it, derived anew in every resample


def auroc_interval(scores: Scores, labels: Labels, groups: Groups | None = None) -> Interval:
    """Interval of the AUROC: DeLong's variance over groups on the logit scale; Newcombe's method 5 without overlap.

    Example:
        >>> low, high = auroc_interval([0.1, 0.2, 0.3, 0.4, 0.35, 0.5, 0.6, 0.7], [0, 0, 0, 0, 1, 1, 1, 1])
        >>> round(low, 3), round(high, 3)
        (0.438, 0.997)
    """
    units = unit_of(groups, len(labels))
    area, influence = _influences(scores, labels)
    truth = np.asarray(labels).astype(bool)
    variance = _variance(influence, truth, units)
    if area in (0.0, 1.0) or variance <= ROUNDING**2:
        return _score_interval(area, len(np.unique(units[truth])), len(np.unique(units[~truth])))
    return _logit_interval(area, math.sqrt(variance))


def auroc_difference(
    first: Scores, second: Scores, labels: Labels, groups: Groups | None = None
) -> tuple[float, Interval]:
    """AUROC of the first scores less that of the second, of the same responses, with DeLong's paired interval."""
    (one, first_influence), (other, second_influence) = _influences(first, labels), _influences(second, labels)
    variance = _variance(
        first_influence - second_influence, np.asarray(labels).astype(bool), unit_of(groups, len(labels))
    )
    spread = _Z * math.sqrt(max(0.0, variance))
    return one - other, (one - other - spread, one - other + spread)


def rate_interval(hits: Sequence[bool] | Bools, groups: Groups | None = None) -> Interval:
    """Interval of the share of responses that hit: exact without groups, on the effective number with them.

    Without a hit, or without a miss, how alike a group's responses are cannot be seen: then a group counts once.

    Args:
        hits: N outcomes under a threshold that was not derived from them.

    Raises:
        RedflagError: There is no outcome.

    Example:
        >>> low, high = rate_interval([True] * 3 + [False] * 97)
        >>> round(low, 4), round(high, 4)
        (0.0062, 0.0852)
    """
    outcomes = np.asarray(hits, dtype=np.float64)
    count = len(outcomes)
    units = unit_of(groups, count)
    number = int(units.max()) + 1 if count else 0
    if number == count:
        return clopper_pearson(int(outcomes.sum()), count)
    rate = float(outcomes.mean())
    if rate in (0.0, 1.0) or number < 2:
        return clopper_pearson(rate * number, number)
    sums = np.bincount(units, outcomes - rate)
    variance = number / (number - 1) * float(sums @ sums) / count**2
    effective = float(count)
    if variance > ROUNDING**2:
        effective = min(effective, max(1.0, rate * (1.0 - rate) / variance))
    return clopper_pearson(rate * effective, effective)


def ranking_intervals(
    scores: Scores,
    labels: Labels,
    groups: Groups | None = None,
    *,
    fprs: Scores = (0.001, 0.01, 0.05),
    resamples: int = 1000,
    seed: int = 0,
) -> RankingIntervals:
    """Bootstrap intervals of the average precision and of the TPR at each FPR, all from the same resamples.

    Args:
        fprs: False-positive rates that must not be exceeded.
    """
    rates = np.asarray(fprs, dtype=np.float64)
    precisions, tprs = _resampled_figures(scores, labels, groups, rates, resamples, seed)
    average = average_precision(scores, labels)
    spread = float(precisions.std())
    harmful = [True] * int(np.sum(labels))
    inside = None if groups is None else [g for g, label in zip(groups, labels, strict=True) if label]
    whole = rate_interval(harmful, inside)
    if average < 1.0 and spread > ROUNDING:
        precision = _logit_interval(average, spread)
    else:
        precision = min(average, whole[0]), 1.0
    bounds = []
    for rate, low, high in zip(rates.tolist(), *np.quantile(tprs, _TAILS, axis=0).tolist(), strict=True):
        tpr = tpr_at_fpr(scores, labels, rate).tpr
        bounds.append((min(low, whole[0]) if tpr == 1.0 else low, max(high, 1.0 - whole[0]) if tpr == 0.0 else high))
    return RankingIntervals(precision, bounds)


def tpr_differences(
    first: Scores,
    second: Scores,
    labels: Labels,
    groups: Groups | None = None,
    *,
    fprs: Scores = (0.001, 0.01, 0.05),
    resamples: int = 1000,
    seed: int = 0,
) -> list[tuple[float, Interval]]:
    """TPR of the first scores less that of the second at each FPR, of the same responses, drawn together.

    Each side's threshold is derived anew in every resample. Arguments as `auroc_difference` and `ranking_intervals`.
    """
    rates = np.asarray(fprs, dtype=np.float64)
    one, other = (_resampled_figures(scores, labels, groups, rates, resamples, seed)[1] for scores in (first, second))
    lows, highs = np.quantile(one - other, _TAILS, axis=0)
    differences = [tpr_at_fpr(first, labels, float(f)).tpr - tpr_at_fpr(second, labels, float(f)).tpr for f in rates]
    return [(d, (float(low), float(high))) for d, low, high in zip(differences, lows, highs, strict=True)]


def median_interval(
    values: Scores,
    groups: Groups | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a median.

    Raises:
        RedflagError: There is no number.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise RedflagError("the values of a median must be at least one (got none).")
    order = np.argsort(array, kind="stable")
    ordered = array[order]
    medians = []
    for counts in _resampled(unit_of(groups, len(array)), np.zeros(len(array), dtype=bool), resamples, seed):
        mass = np.cumsum(counts[:, order], axis=1)
        half = mass[:, -1:] / 2.0
        # Between the two middle ones where their number is even.
        lower, upper = (mass < half).sum(axis=1), (mass <= half).sum(axis=1)
        medians.append((ordered[lower] + ordered[upper]) / 2.0)
    low, high = np.quantile(np.concatenate(medians), _TAILS)
    return float(low), float(high)


def unit_of(groups: Groups | None, count: int) -> Counts:
    """The unit of each of so many responses: one per group, and one for each response without a group.

    Returns:
        N numbers from 0 up, without gaps.
    """
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise RedflagError(f"groups must be one per response, or None (got {len(groups)} for {count}).")
    if isinstance(groups, np.ndarray):
        return np.unique(groups, return_inverse=True)[1].astype(np.int64)
    units: dict[Any, int] = {}
    return np.array(
        [units.setdefault((i,) if g is None else g, len(units)) for i, g in enumerate(groups)], dtype=np.int64
    )


def _influences(scores: Scores, labels: Labels) -> tuple[float, Floats]:
    """The AUROC, and how far each response pulls it from where it is: they sum to zero in each class."""
    harmful, harmless = (np.sort(part) for part in split_classes(scores, labels))
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    m, n = len(harmful), len(harmless)
    # Each response's share of the other class that it stands right to: its placement.
    below = np.searchsorted(harmless, values[truth], "left") + np.searchsorted(harmless, values[truth], "right")
    above = np.searchsorted(harmful, values[~truth], "left") + np.searchsorted(harmful, values[~truth], "right")
    placed = np.empty(len(values))
    placed[truth], placed[~truth] = below / (2.0 * n), 1.0 - above / (2.0 * m)
    area = float(placed[truth].mean())
    return area, np.where(truth, (placed - area) / m, (placed - area) / n)


def _variance(influence: Floats, truth: Bools, units: Counts) -> float:
    parts = [np.bincount(units[side], influence[side], minlength=units.max() + 1) for side in (truth, ~truth)]
    sizes = [len(np.unique(units[side])) for side in (truth, ~truth)]
    # Each class's variance is freed of its bias by itself; what a group shares between the classes, by both.
    free = [size / (size - 1) if size > 1 else 1.0 for size in sizes]
    variance = sum(f * float(p @ p) for f, p in zip(free, parts, strict=True))
    return variance + 2.0 * math.sqrt(free[0] * free[1]) * float(parts[0] @ parts[1])


def _resampled_figures(
    scores: Scores,
    labels: Labels,
    groups: Groups | None,
    rates: Floats,
    resamples: int,
    seed: int,
) -> tuple[Floats, Floats]:
    """Average precision (R) and TPR at each rate (R x F) of R resamples."""
    split_classes(scores, labels)
    values, labelled = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    units = unit_of(groups, len(values))
    order = np.argsort(-values, kind="stable")
    truth = labelled[order]
    # A threshold takes in a score with all that equal it.
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0.0, True))
    precisions, tprs = [], []
    for counts in _resampled(units, labelled, resamples, seed):
        weights = counts[:, order]
        caught = np.cumsum(np.where(truth, weights, 0), axis=1)[:, ends]
        alarms = np.cumsum(weights, axis=1)[:, ends]
        gained = np.diff(caught, axis=1, prepend=0)
        precisions.append((gained * caught / np.maximum(alarms, 1)).sum(axis=1) / caught[:, -1])
        false = (alarms - caught) / (alarms - caught)[:, -1:]
        # The share of false alarms rises from threshold to threshold: the last that is allowed catches most.
        allowed = np.stack([np.searchsorted(row, rates, side="right") for row in false])
        reached = np.take_along_axis(caught, np.maximum(allowed - 1, 0), axis=1) / caught[:, -1:]
        tprs.append(np.where(allowed > 0, reached, 0.0))
    return np.concatenate(precisions), np.concatenate(tprs)


def _resampled(units: Counts, labels: Bools, resamples: int, seed: int) -> Iterator[Counts]:
    """How often each response is drawn, in chunks of resamples x N.

    Units of harmful responses alone, of harmless ones alone and of both are drawn apart, each as often as there are.
    """
    number = int(units.max()) + 1
    has_harmful = np.bincount(units, labels, minlength=number) > 0
    has_harmless = np.bincount(units, ~labels, minlength=number) > 0
    strata = [np.flatnonzero(chosen) for chosen in (has_harmful & ~has_harmless, has_harmless & ~has_harmful,
                                                     has_harmful & has_harmless)]  # fmt: skip
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // len(units))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        draws = np.zeros((rows, number), dtype=np.int64)
        for members in strata:
            if len(members):
                # Each row's picks are moved into a range of their own, so that one count serves all rows.
                picks = rng.integers(0, len(members), (rows, len(members))) + np.arange(rows)[:, None] * len(members)
                times = np.bincount(picks.ravel(), minlength=rows * len(members))
                draws[:, members] = times.reshape(rows, len(members))
        yield draws[:, units]


def _score_interval(area: float, m: int, n: int) -> Interval:
    """Newcombe's method 5: all areas from which the measured one is no more than `_Z` standard errors away."""
    extra = (m + n) / 2.0 - 1.0

    def outside(t: float) -> bool:
        variance = t * (1.0 - t) * (1.0 + extra * (1.0 - t) / (2.0 - t) + extra * t / (1.0 + t)) / (m * n)
        return (t - area) ** 2 > _Z * _Z * variance

    ends = []
    for far in (0.0, 1.0):
        inner, outer = area, far
        for _ in range(60):
            middle = (inner + outer) / 2.0
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        ends.append(inner)
    return ends[0], ends[1]


def _logit_interval(value: float, error: float) -> Interval:
    """Normal on the logit scale, with the standard error carried over by the slope there."""
    middle, spread = math.log(value / (1.0 - value)), _Z * error / (value * (1.0 - value))
    low, high = (0.5 * (1.0 + math.tanh(x / 2.0)) for x in (middle - spread, middle + spread))
    return low, high
