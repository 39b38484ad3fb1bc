"""Intervals: hand-worked values, what groups change, and what must hold for any sample."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from redflag.errors import RedflagError
from redflag.stats.intervals import (
    auroc_difference,
    auroc_interval,
    median_interval,
    ranking_intervals,
    rate_interval,
    tpr_differences,
    unit_of,
)
from redflag.stats.metrics import auroc, average_precision, clopper_pearson, tpr_at_fpr

# Few distinct scores, so that ties are the rule; both classes are there.
rows = st.lists(
    st.tuples(st.integers(0, 5).map(lambda i: i / 5), st.booleans(), st.sampled_from([None, "a", "b", "c"])),
    min_size=2,
    max_size=30,
).filter(lambda found: len({label for _, label, _ in found}) == 2)


def sample(harmful: int, harmless: int, shift: float = 1.0, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(harmful + harmless) < harmful
    return np.round(rng.normal(size=len(labels)) + shift * labels, 1), labels


@settings(max_examples=40, deadline=None)
@given(rows)
def test_intervals_hold_their_estimate_and_stay_in_range(found: list[Any]) -> None:
    scores, labels, groups = (list(column) for column in zip(*found, strict=True))
    low, high = auroc_interval(scores, labels, groups)
    assert 0.0 <= low <= auroc(scores, labels) + 1e-9 and auroc(scores, labels) <= high + 1e-9 and high <= 1.0
    bounds = ranking_intervals(scores, labels, groups, fprs=(0.0, 0.3, 1.0), resamples=40)
    low, high = bounds.average_precision
    assert 0.0 <= low <= average_precision(scores, labels) + 1e-9 and average_precision(scores, labels) <= high + 1e-9
    assert all(0.0 <= low <= high <= 1.0 for low, high in bounds.tpr)
    # At an FPR of 1 everything is caught in every resample: the exact interval of that share counts.
    assert bounds.tpr[-1][0] < 1.0 and bounds.tpr[-1][1] == 1.0
    low, high = rate_interval(labels, groups)
    assert 0.0 <= low <= np.mean(labels) <= high <= 1.0


def test_the_auroc_interval_is_delongs_on_the_logit_scale() -> None:
    """Worked out by hand: harmful 2, 3, 5 against harmless 1, 2, 4."""
    # Shares of the other class that each stands right to: 1.5/3, 2/3, 3/3 and 3/3, 2.5/3, 1/3.
    harmful, harmless = np.array([1.5, 2.0, 3.0]) / 3.0, np.array([3.0, 2.5, 1.0]) / 3.0
    area = 6.5 / 9.0
    error = math.sqrt(harmful.var(ddof=1) / 3.0 + harmless.var(ddof=1) / 3.0)
    middle, spread = math.log(area / (1 - area)), 1.959964 * error / (area * (1 - area))
    expected = [1.0 / (1.0 + math.exp(-(middle + side * spread))) for side in (-1.0, 1.0)]
    assert auroc_interval([2, 3, 5, 1, 2, 4], [1, 1, 1, 0, 0, 0]) == pytest.approx(expected, abs=1e-6)


def test_the_bootstrap_agrees_with_delong_where_both_hold() -> None:
    scores, labels = sample(150, 200)
    rng = np.random.default_rng(1)
    areas = []
    for _ in range(500):
        picks = np.concatenate([rng.integers(0, 150, 150), rng.integers(150, 350, 200)])
        areas.append(auroc(scores[picks], labels[picks]))
    assert auroc_interval(scores, labels) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=0.012)


def test_repeating_every_row_in_its_group_changes_no_interval_of_a_rank() -> None:
    """Five copies of an answer are one answer: without groups the interval would shrink."""
    scores, labels = sample(60, 80)
    copies = np.repeat(np.arange(140), 5)
    alone, again = auroc_interval(scores, labels), auroc_interval(scores[copies], labels[copies], copies)
    assert again == pytest.approx(alone, abs=1e-12)
    forgetful = auroc_interval(scores[copies], labels[copies])
    assert forgetful[1] - forgetful[0] < 0.6 * (alone[1] - alone[0])
    # Bootstrap: the same units in the same order are drawn the same number of times.
    assert np.allclose(
        ranking_intervals(scores[copies], labels[copies], copies, resamples=50).tpr,
        ranking_intervals(scores, labels, np.arange(140), resamples=50).tpr,
    )


def test_both_classes_in_one_group_are_drawn_together() -> None:
    """A shift that a pair shares moves both of its scores: paired, AUROC is known better than without the pairs."""
    rng = np.random.default_rng(2)
    shared = rng.normal(size=100) * 3.0
    scores = np.concatenate([shared + 2.0 + rng.normal(size=100), shared + rng.normal(size=100)])
    labels, groups = np.arange(200) < 100, [f"pair {i % 100}" for i in range(200)]
    paired, alone = auroc_interval(scores, labels, groups), auroc_interval(scores, labels)
    assert paired[1] - paired[0] < 0.75 * (alone[1] - alone[0])


def test_resamples_that_agree_up_to_rounding_do_not_pass_for_certainty() -> None:
    scores = [0.0, 0.0, 0.0, 0.0, 0.2, 0.2]
    labels, groups = [0, 0, 0, 1, 1, 1], [None, None, "a", "a", None, None]
    low, high = ranking_intervals(scores, labels, groups, resamples=3).average_precision
    assert low < 0.5 and high == 1.0


def test_paired_differences_agree_with_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(4)
    labels = np.arange(300) < 120
    hard = rng.normal(size=300)
    first, second = (hard + rng.normal(size=300) * 0.5 + shift * labels for shift in (1.5, 1.0))
    areas, tprs = [], []
    for _ in range(400):
        picks = np.concatenate([rng.integers(0, 120, 120), rng.integers(120, 300, 180)])
        areas.append(auroc(first[picks], labels[picks]) - auroc(second[picks], labels[picks]))
        each = [tpr_at_fpr(scores[picks], labels[picks], 0.1).tpr for scores in (first, second)]
        tprs.append(each[0] - each[1])
    difference, bounds = auroc_difference(first, second, labels)
    assert difference == pytest.approx(auroc(first, labels) - auroc(second, labels))
    assert bounds == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=0.01)
    ((difference, bounds),) = tpr_differences(first, second, labels, fprs=(0.1,))
    assert bounds == pytest.approx(tuple(np.quantile(tprs, [0.025, 0.975])), abs=0.04)
    # Far shorter than if the two had been measured on different rows.
    apart = [auroc_interval(scores, labels) for scores in (first, second)]
    _, (low, high) = auroc_difference(first, second, labels)
    assert high - low < 0.7 * np.hypot(*(b - a for a, b in apart))


@pytest.mark.parametrize(("harmful", "harmless"), [(10, 10), (100, 30), (30, 1000)])
def test_perfect_separation_leaves_room_below_one(harmful: int, harmless: int) -> None:
    """Newcombe's method 5: about z^2 / 2 responses of doubt per class; the published 10 by 10 gives 0.79 or so."""
    labels = np.arange(harmful + harmless) < harmful
    low, high = auroc_interval(labels.astype(float), labels)
    assert high == 1.0 and 1.0 - 4.0 / min(harmful, harmless) < low < 1.0 - 0.9 / max(harmful, harmless)
    t = low
    extra = (harmful + harmless) / 2 - 1
    variance = t * (1 - t) * (1 + extra * (1 - t) / (2 - t) + extra * t / (1 + t)) / (harmful * harmless)
    assert (1.0 - t) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)
    bounds = ranking_intervals(labels.astype(float), labels, resamples=20)
    assert bounds.average_precision == bounds.tpr[0] == clopper_pearson(harmful, harmful)


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 100), (1, 1), (50, 50), (499, 500)])
def test_ungrouped_rates_have_exact_intervals(hits: int, count: int) -> None:
    outcomes = np.arange(count) < hits
    expected = stats.binomtest(hits, count).proportion_ci(method="exact")
    for groups in (None, [None] * count, [str(i) for i in range(count)]):
        assert rate_interval(outcomes, groups) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(
    ("outcomes", "groups", "same_as"),
    [
        # Ten groups of ten that agree within: ten outcomes, not a hundred.
        ([g < 3 for g in range(10) for _ in range(10)], [str(g) for g in range(10) for _ in range(10)], (2.7, 9.0)),
        # No hit at all: each group counts once.
        ([False] * 100, [str(i // 10) for i in range(100)], (0, 10)),
        ([True] * 100, [str(i // 10) for i in range(100)], (10, 10)),
        # Groups that are no more alike than chance count in full.
        ([i % 2 == 0 for i in range(100)], [str(i // 10) for i in range(100)], (50, 100)),
        ([True, False, False, False], ["one"] * 4, (0.25, 1)),
    ],
)
def test_rates_over_groups_count_effective_responses(outcomes: Any, groups: Any, same_as: tuple[float, float]) -> None:
    assert rate_interval(outcomes, groups) == pytest.approx(clopper_pearson(*same_as), abs=1e-9)


def test_effective_numbers_need_not_be_whole() -> None:
    low, high = clopper_pearson(0.4, 7.5)
    assert low == pytest.approx(stats.beta.ppf(0.025, 0.4, 8.1), rel=1e-9)
    assert high == pytest.approx(stats.beta.ppf(0.975, 1.4, 7.1), rel=1e-9)


def test_every_resample_derives_its_threshold_anew() -> None:
    """With the threshold held fast the interval would be far too short: most of the doubt is where it lies."""
    scores, labels = sample(2000, 100, shift=1.5, seed=3)
    ((low, high),) = ranking_intervals(scores, labels, fprs=(0.05,)).tpr
    found = tpr_at_fpr(scores, labels, 0.05)
    assert low < found.tpr < high
    fixed = rate_interval(scores[labels] >= found.threshold)
    assert high - low > 2.0 * (fixed[1] - fixed[0])


@settings(max_examples=30, deadline=None)
@given(rows, st.integers(0, 3))
def test_a_resample_is_a_sample_like_any_other(found: list[Any], seed: int) -> None:
    """Every resample's figures are what the metrics give on its rows, laid out one by one."""
    from redflag.stats import intervals

    scores, labels, groups = (np.array(column) for column in zip(*found, strict=True))
    units = unit_of(list(groups), len(groups))
    drawn = np.concatenate(list(intervals._resampled(units, labels, 3, seed)))
    precisions, tprs = [], []
    for counts in drawn:
        rows = np.repeat(np.arange(len(scores)), counts)
        precisions.append(average_precision(scores[rows], labels[rows]))
        tprs.append([tpr_at_fpr(scores[rows], labels[rows], fpr).tpr for fpr in (0.0, 0.2, 0.5)])
    bounds = ranking_intervals(scores, labels, list(groups), fprs=(0.0, 0.2, 0.5), resamples=3, seed=seed)
    for k, (low, high) in enumerate(np.quantile(tprs, [0.025, 0.975], axis=0).T):
        tpr = tpr_at_fpr(scores, labels, (0.0, 0.2, 0.5)[k]).tpr
        if 0.0 < tpr < 1.0:
            assert bounds.tpr[k] == pytest.approx((low, high))
    area = average_precision(scores, labels)
    if np.std(precisions) > 1e-9 and area < 1.0:
        slope = 1.959964 * np.std(precisions) / (area * (1.0 - area))
        middle = math.log(area / (1.0 - area))
        assert bounds.average_precision == pytest.approx(
            [1.0 / (1.0 + math.exp(-(middle + side * slope))) for side in (-1, 1)], abs=1e-6
        )


def test_the_median_of_every_resample_is_numpys() -> None:
    from redflag.stats import intervals

    values = np.array([3.0, -1.0, 4.0, 4.0, 10.0, 2.0])
    drawn = np.concatenate(list(intervals._resampled(np.arange(6), np.zeros(6, dtype=bool), 200, 4)))
    medians = [np.median(np.repeat(values, counts)) for counts in drawn]
    assert median_interval(values, resamples=200, seed=4) == pytest.approx(tuple(np.quantile(medians, [0.025, 0.975])))
    assert median_interval([7.0]) == (7.0, 7.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    scores, labels = sample(40, 60)
    first, again = (ranking_intervals(scores, labels, resamples=50, seed=1) for _ in range(2))
    assert first == again != ranking_intervals(scores, labels, resamples=50, seed=2)


def test_a_thousand_resamples_of_five_thousand_rows_take_seconds() -> None:
    scores, labels = sample(2000, 3000)
    begun = time.process_time()
    ranking_intervals(scores, labels, fprs=np.linspace(0.0, 1.0, 100))
    auroc_interval(scores, labels)
    assert time.process_time() - begun < 5.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc_interval([0.1, 0.2], [1, 1]), "2 harmful and 0 harmless"),
        (lambda: ranking_intervals([0.1, math.nan], [1, 0]), "score 1 is NaN"),
        (lambda: rate_interval([]), "0 of 0"),
        (lambda: rate_interval([True], ["a", "b"]), r"groups must be one per response, or None \(got 2 for 1\)"),
        (lambda: median_interval([]), "median must be at least one"),
    ],
)
def test_what_has_no_interval_is_refused_in_one_sentence(call: Any, message: str) -> None:
    with pytest.raises(RedflagError, match=message):
        call()
