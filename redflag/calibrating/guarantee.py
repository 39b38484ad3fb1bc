"""From the peaks of harmless responses to thresholds that keep a false-alarm rate: the mathematics, and no model.

The *peak* of a response is the highest score its monitor reached. An alarm is `score >= threshold`, so a response
alarms exactly when its peak reaches the threshold. Everything here rests on one assumption: the responses that will
be served are exchangeable with those calibrated on (same kind of prompts, model, template, monitor). Several answers
to one prompt are worth less than as many answers to different prompts.

**`expected`** (split conformal prediction; Vovk et al., 2005): over the draw of calibration set and new response, the
probability of a false alarm is at most the target a. Let s(1) >= s(2) >= ... be the n peaks. The threshold lies just
above s(m), m = floor(a (n + 1)). A new peak x alarms iff x > s(m), that is iff at most m of the n + 1 peaks, x
included, are >= x. At most m of n + 1 values can be so ranked (ties only lower the count), and by exchangeability the
new one is each of them equally often: P(alarm) <= m / (n + 1) <= a. It needs m >= 1, so n >= 1/a - 1. At most m - 1
calibration peaks reach the threshold.

**`expected`, jointly over K categories**: the same for the event that *any* category alarms. All categories are cut at
the same rank L: the threshold of c lies just above its L-th largest peak. In the pool of all n + 1 responses let
R(i) = min over c of #{j: S(j, c) >= S(i, c)}, and T the largest level with #{i: R(i) <= T} <= a (n + 1). T does not
depend on the order of the pool, so P(R(new) <= T) <= a. The new response alarms at L iff R(new) <= L: it is enough that
L <= T whenever it alarms. If it does so in category c, then every i with pooled rank <= L in c has rank <= L - 1 among
the n (the new one stands above it, or it stands above the new one, which is above s(L)), and in other categories
pooled rank <= L means rank <= L among the n. Hence the largest L with

    max over c of #{i: rank(i, c) <= L - 1, or rank(i, c') <= L for some c' != c}  +  1  <=  floor(a (n + 1))

is safe. With K = 1 this is the rule above; where categories peak on the same responses it costs at most one rank, and
where they never do it is Bonferroni's rule.

**`high_probability`** (binomial order statistic; Wilks, 1941): with probability at least 1 - delta over the draw of the
calibration set, the false-alarm rate of the threshold is at most a. With k the largest integer such that
P(Binomial(n, a) <= k) <= delta, the threshold lies just above s(k + 1). Let q be the smallest value that is exceeded
with probability <= a. The rate is above a iff s(k + 1) < q, that is iff at most k peaks are >= q; each is so with
probability >= a; hence that happens with probability <= delta. It needs (1 - a)^n <= delta. Jointly: each category at
a/K and delta/K (Bonferroni), which is conservative when categories peak together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError
from redflag.stats.metrics import binomial_cdf

Guarantee = Literal["expected", "high_probability"]
Peaks = npt.NDArray[np.float64]


def fit_threshold(
    peaks: Sequence[float] | Peaks, target_fpr: float, guarantee: Guarantee = "expected", delta: float = 0.05
) -> float:
    """The lowest threshold of one flag whose false-alarm rate per response is guaranteed.

    It is the next float above a calibration peak: exact under ties. It can lie above 1 (`calibrate` refuses that where
    such a score cannot occur).

    Args:
        peaks: n highest scores, one per harmless response.
        target_fpr: Share of harmless responses that may alarm.
        guarantee: "expected" or "high_probability"; see the module.
        delta: Probability with which "high_probability" may fail over the draw of the calibration set.

    Raises:
        RedflagError: Too few responses for the rate (the message says how many are needed), or an invalid argument.

    Example:
        >>> fit_threshold([0.1, 0.4, 0.2], target_fpr=0.25)
        0.4000000000000001
    """
    return fit_thresholds(np.asarray(peaks, dtype=np.float64).reshape(-1, 1), target_fpr, guarantee, delta)[0]


def fit_thresholds(
    peaks_NK: Sequence[Sequence[float]] | Peaks,
    target_fpr: float,
    guarantee: Guarantee = "expected",
    delta: float = 0.05,
    joint: bool = True,
) -> tuple[float, ...]:
    """One threshold per flag.

    Args:
        peaks_NK: Highest score of each of n harmless responses in each of K categories.
        target_fpr: Share of harmless responses that may alarm: in any category (`joint`) or in each.
        guarantee: As for `fit_threshold`; likewise `delta`.
        joint: Whether the rate is that of *any* alarm. With one flag it makes no difference.

    Raises:
        RedflagError: As `fit_threshold`.
    """
    peaks = np.asarray(peaks_NK, dtype=np.float64)
    check_rates(target_fpr, guarantee, delta)
    if peaks.ndim != 2 or peaks.shape[1] == 0:
        peaks = peaks.reshape(0, 1)
    count, flags = peaks.shape
    if not np.isfinite(peaks).all():
        bad = int(np.flatnonzero(~np.isfinite(peaks).all(axis=1))[0])
        raise RedflagError(f"the peak of harmless response {bad} must be a finite number (got {peaks[bad].tolist()}).")
    spread = flags if joint else 1
    if guarantee == "expected":
        level = _expected_level(peaks, target_fpr, joint)
    else:
        level = _high_probability_level(count, target_fpr / spread, delta / spread)
    if level < 1:
        how = f"{guarantee}, delta {delta:g}" if guarantee == "high_probability" else guarantee
        how += f", jointly over {flags} flags" if spread > 1 else ""
        raise RedflagError(
            f"{count} harmless responses cannot support a false-alarm rate of {target_fpr:g} ({how}): "
            f"{required(target_fpr, guarantee, delta, spread)} are needed. Add harmless rows or raise target_fpr."
        )
    ordered = -np.sort(-peaks, axis=0)
    return tuple(math.nextafter(float(peak), math.inf) for peak in ordered[level - 1])


def required(target_fpr: float, guarantee: Guarantee = "expected", delta: float = 0.05, flags: int = 1) -> int:
    """Number of harmless responses that is always enough to calibrate.

    Jointly over several flags under "expected", fewer are enough if the flags peak on the same responses.

    >>> required(0.01), required(0.01, "high_probability")
    (99, 299)
    """
    check_rates(target_fpr, guarantee, delta)
    if guarantee == "expected":
        return math.ceil(flags / _exact(target_fpr)) - 1
    rate, risk = target_fpr / flags, delta / flags
    count = max(1, math.ceil(math.log(risk) / math.log1p(-rate)) - 1)
    while binomial_cdf(0, count, rate) > risk:
        count += 1
    return count


def check_rates(target_fpr: float, guarantee: str, delta: float) -> None:
    """Checks rates and guarantee."""
    for name, value in (("target_fpr", target_fpr), ("delta", delta)):
        if not 0.0 < value < 1.0:
            raise RedflagError(f"{name} must be above 0 and below 1 (got {value}). For example 0.01.")
    if guarantee not in get_args(Guarantee):
        raise RedflagError(f"guarantee must be one of {', '.join(get_args(Guarantee))} (got {guarantee!r}).")


def _expected_level(peaks: Peaks, target_fpr: float, joint: bool) -> int:
    count, flags = peaks.shape
    budget = math.floor(_exact(target_fpr) * (count + 1))
    if flags == 1 or not joint:
        return budget
    # Rank 1 is the highest peak; equal peaks all take the worst rank, as the proof asks.
    ranks = np.stack([count - np.searchsorted(np.sort(p), p, side="left") for p in peaks.T], axis=1)

    def cost(level: int) -> int:
        within, inside = ranks <= level, ranks < level
        reached = within.sum(axis=1)
        # Seen from category c: inside in c, or within in some other one.
        return 1 + int(max((inside[:, c] | (reached > within[:, c])).sum() for c in range(flags)))

    low, high = 0, budget
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _high_probability_level(count: int, target_fpr: float, delta: float) -> int:
    """k + 1 for the largest k with P(Binomial(count, target) <= k) <= delta; 0 when there is none."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if binomial_cdf(middle - 1, count, target_fpr) <= delta:
            low = middle
        else:
            high = middle - 1
    return low


def _exact(rate: float) -> Fraction:
    """The rate as the user wrote it: 0.29 is 29/100, so that 0.29 * 100 counts as 29 and not as 28.999."""
    return Fraction(repr(float(rate)))
