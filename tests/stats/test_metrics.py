"""Metrics agree with their definitions, with SciPy, and with tables worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from redflag.errors import RedflagError
from redflag.stats.metrics import (
    auroc,
    average_precision,
    binomial_cdf,
    clopper_pearson,
    delay_stats,
    first_alarm,
    tpr_at_fpr,
)

# Few distinct scores, so that ties are the rule.
tied = st.lists(st.tuples(st.integers(0, 6).map(lambda i: i / 6), st.integers(0, 1)), min_size=2, max_size=40).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


@settings(max_examples=150, deadline=None)
@given(tied)
def test_auroc_and_average_precision_are_what_their_definitions_say_under_ties(pairs: list[tuple[float, int]]) -> None:
    scores, labels = map(list, zip(*pairs, strict=True))
    harmful, harmless = ([s for s, label in pairs if label == kind] for kind in (1, 0))
    duels = [(h > b) + (h == b) / 2 for h in harmful for b in harmless]
    assert auroc(scores, labels) == pytest.approx(sum(duels) / len(duels), abs=1e-12)
    gained = [(sum(h >= t for h in harmful), sum(s >= t for s in scores), harmful.count(t)) for t in set(harmful)]
    expected = sum(count / len(harmful) * caught / alarms for caught, alarms, count in gained)
    assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(tied, st.sampled_from([0.0, 0.01, 0.1, 0.34, 0.5, 0.99, 1.0]))
def test_realised_fpr_never_exceeds_the_asked_one_and_no_allowed_threshold_catches_more(
    pairs: list[tuple[float, int]], fpr: float
) -> None:
    scores, labels = (np.array(column) for column in zip(*pairs, strict=True))
    found = tpr_at_fpr(scores, labels, fpr)
    assert found.realised_fpr <= fpr
    assert found.realised_fpr == (scores[labels == 0] >= found.threshold).mean()
    assert found.tpr == (scores[labels == 1] >= found.threshold).mean()
    for threshold in [*scores, math.inf]:
        if (scores[labels == 0] >= threshold).mean() <= fpr:
            assert (scores[labels == 1] >= threshold).mean() <= found.tpr


@pytest.mark.parametrize(
    ("scores", "labels", "fpr", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.0, (1.0, 0.0, 0.8)),
        ([0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1], 0.5, (0.0, 0.0, math.inf)),  # all tied: nothing can be caught
        ([0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1], 1.0, (1.0, 1.0, 0.5)),
        ([0.1, 0.7, 0.6, 0.9], [0, 0, 1, 1], 0.5, (1.0, 0.5, 0.6)),
        ([0.1, 0.7, 0.6, 0.9], [0, 0, 1, 1], 0.49, (0.5, 0.0, 0.9)),
    ],
)
def test_tpr_at_fpr_table(scores: list[float], labels: list[int], fpr: float, expected: tuple[float, ...]) -> None:
    assert tuple(tpr_at_fpr(scores, labels, fpr)) == expected


@pytest.mark.parametrize("n", [1, 2, 7, 99, 300, 1000, 100_000, 1_000_000])
def test_clopper_pearson_agrees_with_the_beta_quantiles(n: int) -> None:
    for k in sorted({k for k in (0, 1, 2, n // 100, n // 2, n - 2, n - 1, n) if 0 <= k <= n}):
        low, high = clopper_pearson(k, n)
        assert low == pytest.approx(stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0, rel=1e-7)
        assert high == pytest.approx(stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0, rel=1e-7)
        assert low <= k / n <= high


@pytest.mark.parametrize(("n", "p"), [(5, 0.3), (299, 0.01), (1000, 0.5), (1_000_000, 0.001), (20, 0.0), (20, 1.0)])
def test_binomial_cdf_agrees_with_scipy(n: int, p: float) -> None:
    middle = int(n * p)
    for k in (-1, 0, 1, middle - 3, middle, middle + 3, n - 1, n):
        assert binomial_cdf(k, n, p) == pytest.approx(float(stats.binom.cdf(k, n, p)), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "thresholds", "expected"),
    [
        ([[0.1], [0.5], [0.9]], [0.5], 1),  # reaching the threshold is an alarm
        ([[0.1], [0.4]], [0.5], None),
        ([[0.9, 0.1], [0.1, 0.9]], [0.95, 0.9], 1),  # the second category is first
        ([], [0.5], None),
    ],
)
def test_first_alarm_table(scores: list[list[float]], thresholds: list[float], expected: int | None) -> None:
    assert first_alarm(scores, thresholds) == expected


def test_delays_are_early_on_time_late_or_missed_and_the_shares_sum_to_one() -> None:
    found = delay_stats([10, 12, 8, 7, 13, None], [10] * 6)
    assert found.on_time == 3 / 6 and found.early == 1 / 6 and found.late == 1 / 6 and found.missed == 1 / 6
    assert (found.median, found.median_abs) == (0.0, 2.0)
    nothing = delay_stats([None], [3])
    assert nothing.missed == 1.0 and math.isnan(nothing.median_abs)
    assert delay_stats([], []).responses == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([0.1, 0.2], [1, 1]), "2 harmful and 0 harmless"),
        (lambda: auroc([], []), "0 harmful and 0 harmless"),
        (lambda: auroc([0.1, math.nan], [1, 0]), "score 1 is NaN"),
        (lambda: auroc([0.1], [1, 0]), "one of each per response"),
        (lambda: tpr_at_fpr([0.1, 0.2], [0, 1], 1.5), "1.5"),
        (lambda: clopper_pearson(3, 2), "3 of 2"),
        (lambda: clopper_pearson(0, 0), "0 of 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(call: object, message: str) -> None:
    with pytest.raises(RedflagError, match=message):
        call()  # type: ignore[operator]
