"""The promised false-alarm rates hold: exactly where that can be counted, and in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from redflag.calibrating.guarantee import fit_threshold, fit_thresholds, required
from redflag.errors import RedflagError


def above(value: float) -> float:
    return math.nextafter(value, math.inf)


@pytest.mark.parametrize(
    ("peaks", "target", "expected"),
    [
        ([0.1, 0.4, 0.2], 0.25, above(0.4)),  # m = 1: just above the highest
        ([0.1, 0.4, 0.2], 0.5, above(0.2)),  # m = 2
        ([0.1, 0.4, 0.4], 0.5, above(0.4)),  # tied: one threshold for both
        ([0.0] * 99, 0.01, above(0.0)),
        ([i / 100 for i in range(99)], 0.01, above(0.98)),
        ([i / 100 for i in range(99)], 0.29, above(0.70)),  # 0.29 * 100 is 29, though not in floating point
        ([1.0, 0.5, 0.2], 0.25, above(1.0)),
    ],
)
def test_expected_threshold_table(peaks: list[float], target: float, expected: float) -> None:
    assert fit_threshold(peaks, target) == expected


@pytest.mark.parametrize(("count", "target", "delta"), [(299, 0.01, 0.05), (500, 0.01, 0.05), (100, 0.1, 0.1)])
def test_high_probability_takes_the_largest_order_statistic_that_is_allowed(
    count: int, target: float, delta: float
) -> None:
    peaks = np.arange(count, 0.0, -1.0)
    beyond = int((peaks >= fit_threshold(peaks, target, "high_probability", delta)).sum())
    assert stats.binom.cdf(beyond, count, target) <= delta < stats.binom.cdf(beyond + 1, count, target)


@pytest.mark.parametrize(
    ("target", "guarantee", "delta", "flags", "expected"),
    [
        (0.01, "expected", 0.05, 1, 99),
        (0.5, "expected", 0.05, 1, 1),
        (0.03, "expected", 0.05, 1, 33),
        (0.01, "expected", 0.05, 4, 399),
        (0.01, "high_probability", 0.05, 1, 299),
        (0.05, "high_probability", 0.05, 1, 59),
        (0.01, "high_probability", 0.05, 2, 736),
    ],
)
def test_required_number_suffices_and_one_fewer_is_refused_by_name(
    target: float, guarantee: str, delta: float, flags: int, expected: int
) -> None:
    assert required(target, guarantee, delta, flags) == expected  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    # Each flag peaks on responses of its own: the worst case for a joint rate.
    peaks = rng.random((expected, flags)) * 0.1
    for flag in range(flags):
        peaks[flag * 5 : flag * 5 + 5, flag] += 0.5
    fit_thresholds(peaks, target, guarantee, delta)  # type: ignore[arg-type]
    if expected > 1:
        with pytest.raises(RedflagError, match=f"{expected - 1} harmless responses .* {expected} are needed"):
            fit_thresholds(peaks[: expected - 1], target, guarantee, delta)  # type: ignore[arg-type]


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_leaving_out_each_response_in_turn_never_gives_more_alarms_than_the_rate_allows(data: st.DataObject) -> None:
    # This is the guarantee itself: exchangeability makes every response of a pool the new one equally often.
    flags = data.draw(st.integers(1, 4))
    rows = data.draw(st.integers(3, 14))
    pool = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 9), min_size=flags, max_size=flags), min_size=rows, max_size=rows)),
        dtype=float,
    )
    target = data.draw(st.sampled_from([0.1, 0.2, 0.34, 0.5, 0.75, 0.9]))
    alarms = 0
    for i in range(rows):
        try:
            thresholds = fit_thresholds(np.delete(pool, i, axis=0), target)
        except RedflagError:
            continue
        alarms += bool((pool[i] >= np.array(thresholds)).any())
    assert alarms <= target * rows + 1e-9


@pytest.mark.parametrize("together", [False, True])
def test_joint_thresholds_are_never_above_bonferroni_and_gain_where_flags_peak_together(together: bool) -> None:
    rng = np.random.default_rng(5)
    base = rng.random((400, 1))
    peaks = np.repeat(base, 4, axis=1) if together else rng.random((400, 4))
    joint = fit_thresholds(peaks, 0.05)
    bonferroni = [fit_threshold(column, 0.05 / 4) for column in peaks.T]
    assert all(a <= b for a, b in zip(joint, bonferroni, strict=True))
    if together:
        # One rank of twenty is all that being careful costs.
        assert joint[0] == above(np.sort(base[:, 0])[-19])


def test_separate_thresholds_are_those_of_each_flag_alone() -> None:
    peaks = np.random.default_rng(1).random((200, 3))
    assert fit_thresholds(peaks, 0.05, joint=False) == tuple(fit_threshold(column, 0.05) for column in peaks.T)


@pytest.mark.parametrize("decimals", [2, 9])
@pytest.mark.parametrize("flags", [1, 3])
def test_expected_rate_is_kept_on_average_over_calibration_sets(flags: int, decimals: int) -> None:
    rng = np.random.default_rng(decimals + flags)
    rates = []
    for _ in range(400):
        scores = np.round(rng.beta(1, 5, size=(200 + 300, flags)), decimals)
        thresholds = np.array(fit_thresholds(scores[:200], 0.05))
        rates.append((scores[200:] >= thresholds).any(axis=1).mean())
    error = np.std(rates) / math.sqrt(len(rates))
    assert np.mean(rates) <= 0.05 + 3 * error
    if decimals == 9:
        assert np.mean(rates) > 0.025, "kept by not firing"


@pytest.mark.parametrize("flags", [1, 3])
def test_high_probability_rate_is_exceeded_in_no_more_trials_than_delta(flags: int) -> None:
    rng = np.random.default_rng(flags)
    exceeded = []
    for _ in range(400):
        thresholds = np.array(fit_thresholds(rng.random((200, flags)), 0.1, "high_probability", 0.1))
        # Uniform scores: the true rate is known, not estimated.
        exceeded.append(1.0 - np.prod(np.minimum(thresholds, 1.0)) > 0.1)
    assert np.mean(exceeded) <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / len(exceeded))
    if flags == 1:
        assert np.mean(exceeded) > 0.02, "kept by not firing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_fpr": 0.0}, r"target_fpr must be .*got 0\.0"),
        ({"target_fpr": 1.0}, r"target_fpr must be .*got 1\.0"),
        ({"target_fpr": math.nan}, r"target_fpr must be .*got nan"),
        ({"delta": 0.0, "guarantee": "high_probability"}, r"delta must be .*got 0\.0"),
        ({"guarantee": "certain"}, r"guarantee must be .*\(got 'certain'"),
        ({"peaks": [0.1, math.nan] * 100}, "peak of harmless response 1 must be"),
        ({"peaks": []}, "0 harmless responses"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(change: dict[str, object], message: str) -> None:
    arguments = {"peaks": [0.1] * 200, "target_fpr": 0.05} | change
    with pytest.raises(RedflagError, match=message):
        fit_threshold(**arguments)  # type: ignore[arg-type]


def test_peaks_that_are_all_alike_do_not_use_up_the_joint_rate() -> None:
    # CUSUM scores are often 0 in every harmless response: the lowest threshold above 0 never alarms on those.
    assert fit_thresholds([[0.0, 0.0]] * 99, 0.01) == (above(0.0), above(0.0))
    assert fit_thresholds([[0.3, 0.0]] + [[0.0, 0.0]] * 198, 0.01) == (above(0.0), above(0.0))
