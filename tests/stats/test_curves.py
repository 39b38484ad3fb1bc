"""Curves agree with scikit-learn and with tables worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import calibration
from sklearn import metrics as reference

from redflag.stats.curves import delay_histogram, earliness, reliability, roc, running_peaks
from redflag.stats.metrics import auroc, tpr_at_fpr

tied = st.lists(st.tuples(st.integers(0, 6).map(lambda i: i / 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


@settings(max_examples=40, deadline=None)
@given(tied)
def test_a_short_roc_is_scikit_learns(pairs: list[Any]) -> None:
    scores, labels = (np.array(column) for column in zip(*pairs, strict=True))
    found = roc(scores, labels, resamples=5)
    fpr, tpr, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    assert np.allclose(found["fpr"], fpr) and np.allclose(found["tpr"], tpr)
    assert all(low <= y <= high for low, y, high in zip(found["low"], found["tpr"], found["high"], strict=True))


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_a_thinned_roc_keeps_its_corners_and_its_area(shift: float) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(6000) % 3 == 0
    scores = rng.normal(size=6000) + shift * labels
    found = roc(scores, labels, resamples=20)
    points = list(zip(found["fpr"], found["tpr"], strict=True))
    fpr, tpr, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    assert len(points) <= 200 and points[0] == (0.0, 0.0) and points[-1] == (1.0, 1.0)
    assert set(points) <= set(zip(fpr.tolist(), tpr.tolist(), strict=True))
    assert reference.auc(found["fpr"], found["tpr"]) == pytest.approx(auroc(scores, labels), abs=2e-3)
    for rate in (0.001, 0.01, 0.05, 0.1):
        best = tpr_at_fpr(scores, labels, rate).tpr
        assert max(y for x, y in points if x <= rate) == best


def test_running_peaks_table() -> None:
    scores = np.array([0.1, 0.5, 0.2, 0.9, 0.3, 0.3])
    starts = np.array([0, 4, 4, 6])  # the second response is empty
    found = running_peaks(scores, starts, [1, 2, 3, 8])
    assert found.tolist() == [[0.1, 0.5, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3]]


@given(st.lists(st.lists(st.floats(0, 1), max_size=9), min_size=1, max_size=6), st.sets(st.integers(1, 12), min_size=1))
def test_running_peaks_are_those_of_a_plain_loop(responses: list[list[float]], firsts: set[int]) -> None:
    starts = np.concatenate([[0], np.cumsum([len(r) for r in responses])]).astype(np.int64)
    found = running_peaks(np.array([p for r in responses for p in r]), starts, sorted(firsts))
    assert found.tolist() == [[max(r[:k], default=0.0) for k in sorted(firsts)] for r in responses]


def test_earliness_table() -> None:
    """Two harmful responses that show at steps 1 and 4, two harmless ones, one of which alarms at step 2."""
    scores = np.array([0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.8, 0.2, 0.2, 0.7, 0.2, 0.3])
    starts, labels = np.array([0, 5, 10, 14, 15]), np.array([True, True, False, False])
    found = earliness(scores, starts, labels, alarms=np.array([1, 4, 2, -1]))
    assert found["k"] == [1, 2, 4, 8]
    # Peaks after k tokens: 0.1 0.1 | 0.2 0.3; 0.9 0.1 | 0.2 0.3; 0.9 0.1 | 0.7 0.3; 0.9 0.8 | 0.7 0.3.
    assert found["auroc"] == [0.0, 0.5, 0.5, 1.0]
    # An alarm at step 1 is there once two tokens have been judged.
    assert found["detected"] == [0.0, 0.5, 0.5, 1.0] and found["false_alarms"] == [0.0, 0.0, 0.5, 0.5]
    assert all(low <= x <= high for low, x, high in zip(found["low"], found["auroc"], found["high"], strict=True))
    assert earliness(scores, starts, labels)["detected"] == [None] * 4


def test_the_last_point_of_earliness_is_the_whole_response() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    scores, labels = rng.random(starts[-1]), np.arange(40) % 2 == 0
    found = earliness(scores, starts, labels)
    whole = [scores[a:b].max() for a, b in pairwise(starts)]
    assert found["k"][-1] >= lengths.max() and found["auroc"][-1] == auroc(whole, labels)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1) | st.sampled_from(np.linspace(0, 1, 11).tolist()), st.booleans()),
        min_size=1,
        max_size=60,
    )
)
def test_reliability_and_brier_are_scikit_learns(pairs: list[Any]) -> None:
    probs, truth = (np.array(column) for column in zip(*pairs, strict=True))
    found = reliability(probs, truth)
    rates, means = calibration.calibration_curve(truth, probs, n_bins=10)
    assert np.allclose([b["rate"] for b in found["bins"]], rates)
    assert np.allclose([b["mean"] for b in found["bins"]], means)
    assert found["brier"] == pytest.approx(reference.brier_score_loss(truth, probs, labels=[False, True]))
    assert sum(b["count"] for b in found["bins"]) == len(probs)
    for b in found["bins"]:
        assert b["low"] <= b["mean"] + 1e-12 and b["mean"] <= b["high"] + 1e-12
        assert b["interval"][0] <= b["rate"] <= b["interval"][1]


@pytest.mark.parametrize(
    ("delays", "tolerance", "edges", "counts"),
    [
        ([], 2, [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], [0, 0, 0, 0, 0]),
        ([0, 0, 2, -2], 2, [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], [1, 0, 2, 0, 1]),
        ([0, 3, 4, 5], 1, [-1.5, -0.5, 0.5, 1.5, 3.5, 7.5], [0, 1, 0, 1, 2]),
        ([-2, -20], 0, [-30.5, -14.5, -6.5, -2.5, -0.5, 0.5], [1, 0, 0, 1, 0]),
    ],
)
def test_delay_histogram_table(delays: list[int], tolerance: int, edges: list[float], counts: list[int]) -> None:
    assert delay_histogram(delays, 3, tolerance) == {"edges": edges, "counts": counts, "missed": 3}


@given(st.lists(st.integers(-5000, 5000), max_size=30), st.integers(0, 5))
def test_every_delay_is_in_the_histogram(delays: list[int], tolerance: int) -> None:
    found = delay_histogram(delays, 0, tolerance)
    on_time = [k for k, edge in enumerate(found["edges"][:-1]) if abs(edge + 0.5) <= tolerance]
    assert sum(found["counts"]) == len(delays) and len(found["edges"]) < 40 + 2 * tolerance
    assert sum(found["counts"][k] for k in on_time) == sum(abs(d) <= tolerance for d in delays)
    assert not any(math.isnan(edge) for edge in found["edges"])
