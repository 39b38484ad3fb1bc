"""Monitors are chosen where they are best, and a choice among many does not spend the guarantee."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.calibrating import replay, tuning
from redflag.calibrating.groups import folds, split_groups
from redflag.calibrating.guarantee import fit_threshold, fit_thresholds
from redflag.calibrating.tuning import Objective
from redflag.errors import RedflagError
from redflag.scoring.recording import COLUMNS, Recording
from redflag.watching.monitor import MonitorConfig

MONITORS = [MonitorConfig(), MonitorConfig("run", window=3), MonitorConfig("cusum", prior=0.1, drift=0.0)]


def recording(
    probs: npt.NDArray[Any], own: npt.NDArray[Any], flags: tuple[str, ...] = ("harm",), **columns: Any
) -> Recording:
    """N responses of T steps each; `own` -1 is harmless."""
    count, steps = probs.shape[:2]
    known = {name: [None] * count for name in COLUMNS} | columns
    known["category"] = [None if k < 0 else (*flags, "other")[k] for k in own]
    starts = np.arange(0, steps * count + 1, steps)
    return Recording(flags, probs.astype(np.float32).reshape(-1, len(flags)), starts, np.full(count, steps - 1), known)


def planted(best: int, count: int = 400, seed: int = 0) -> Recording:
    """Responses that one monitor tells apart and the others do not."""
    rng = np.random.default_rng(seed)
    probs = rng.uniform(0.0, 0.05, (count, 40, 1))
    own = np.where(np.arange(count) % 4 == 0, 0, -1)
    at = rng.integers(0, 30, count)
    for i, (harmful, start) in enumerate(zip(own == 0, at, strict=True)):
        if best == 0:  # harm is one high step; harmless text has long stretches of half-high ones
            probs[i, start : start + (1 if harmful else 8), 0] = (
                rng.uniform(0.9, 1.0) if harmful else rng.uniform(0.5, 0.8)
            )
        elif best == 1:  # harm is three steps on end; harmless text has as high ones, and more of them, but alone
            probs[i, start : start + 3, 0] = rng.uniform(0.5, 0.6) if harmful else 0.02
            probs[i, ::2, 0] = rng.uniform(0.6, 0.95, 20) if not harmful else probs[i, ::2, 0]
        else:  # harm is weak evidence at every step; harmless text has a short high stretch
            probs[i, :, 0] = rng.uniform(0.1, 0.4, 40) if harmful else probs[i, :, 0]
            probs[i, start : start + 3, 0] = probs[i, start : start + 3, 0] if harmful else rng.uniform(0.3, 0.6)
    return recording(probs, own)


@pytest.mark.parametrize("kind", ["fpr", "recall", "cost"])
@pytest.mark.parametrize("best", [0, 1, 2], ids=[tuning.describe(config) for config in MONITORS])
def test_a_monitor_that_is_best_is_chosen(best: int, kind: Any) -> None:
    objective = Objective(kind, {"fpr": 0.05, "recall": 0.9, "cost": 0.5}[kind], base_rate=0.25)
    choice = tuning.compare(planted(best), MONITORS, objective, seed=1)
    assert choice.best == best
    losses = [candidate.loss for candidate in choice.candidates]
    assert losses[best] < 0.1 and min(loss for i, loss in enumerate(losses) if i != best) > 2 * losses[best]
    if best:
        assert choice.lead == pytest.approx(losses[0] - losses[best])
        assert choice.lead > choice.beyond_chance * choice.lead_error


def test_a_draw_goes_to_the_first_and_its_lead_is_nothing() -> None:
    same = [MonitorConfig(), MonitorConfig("run", window=1), MonitorConfig("ema", decay=1.0)]
    choice = tuning.compare(planted(0), same, Objective(rate=0.05))
    assert (choice.best, choice.lead, choice.lead_error) == (0, 0.0, 0.0)


def test_the_figures_of_a_candidate_are_those_of_thresholds_from_the_other_folds() -> None:
    whole, config, objective = planted(0), MonitorConfig("ema", decay=0.8), Objective(rate=0.3)
    whole.columns["group"] = [f"g{i // 3}" for i in range(len(whole))]
    whole.columns["onset"] = [10 if harmful else None for harmful in whole.harmful]
    found = tuning.compare(whole, [config], objective, parts=4, seed=7).candidates[0].rates
    own, table = tuning.owners(whole), replay.peaks(config, whole)[:, 0]
    fold = folds(whole.columns["group"], 4, 7, own.tolist())
    assert len({(group, f) for group, f in zip(whole.columns["group"], fold, strict=True)}) == len(
        set(whole.columns["group"])
    )
    alarms, caught, delays = 0, 0, []
    for f in range(4):
        value = fit_threshold(table[(fold != f) & (own < 0)], 0.3)
        alarms += int((table[(fold == f) & (own < 0)] >= value).sum())
        caught += int((table[(fold == f) & (own == 0)] >= value).sum())
        scores = replay.scores(config, whole).reshape(len(whole), -1)
        for i in np.flatnonzero((fold == f) & (own == 0)):
            hits = np.flatnonzero(scores[i] >= value)
            delays += [int(hits[0]) - 10] if len(hits) else []
    assert (found.fpr, found.tpr) == (alarms / 300, caught / 100)
    assert (found.median_delay, found.dated) == (np.median(delays), 100)


def test_the_false_alarm_rate_of_a_chosen_monitor_stays_at_the_target() -> None:
    """500 draws: choose on one part, set on the other, and look the rate up on 20,000 fresh responses."""
    configs = [MonitorConfig(), MonitorConfig("run", window=2), MonitorConfig("ema", decay=0.3)]
    rng = np.random.default_rng(0)

    def draw(count: int, harmful: int) -> Recording:
        probs = rng.random((count, 4, 1))
        probs[:harmful, 2:] **= 0.5
        return recording(probs, np.where(np.arange(count) < harmful, 0, -1))

    fresh = replay.peaks_of(configs, draw(20_000, 0))[:, :, 0]
    objective, sure = Objective(rate=0.1), Objective(rate=0.1, guarantee="high_probability", delta=0.2)
    found, expected, broken = [], [], 0
    for seed in range(500):
        whole = draw(110, 30)
        setting, choosing = split_groups(whole.columns["group"], 0.5, seed)
        choice = tuning.compare(whole.select(choosing), configs, objective, parts=2, seed=seed)
        rest = whole.select(setting)
        own = tuning.owners(rest)
        values = tuning.fit(objective, replay.peaks(configs[choice.best], rest), own)
        found.append((fresh[choice.best] >= values[0]).mean())
        values = tuning.fit(sure, replay.peaks(configs[choice.best], rest), own)
        broken += (fresh[choice.best] >= values[0]).mean() > 0.1
        count = int((own < 0).sum())
        expected.append(math.floor(0.1 * (count + 1)) / (count + 1))
    error = float(np.std(np.subtract(found, expected)) / math.sqrt(500))
    # Scores are continuous here, so the rate of `expected` is known exactly, and it is at most the target.
    assert abs(np.mean(found) - np.mean(expected)) < 4 * error and np.mean(found) < 0.1 + 3 * error
    assert broken <= 500 * 0.2 + 3 * math.sqrt(500 * 0.2 * 0.8)


@pytest.mark.parametrize(
    ("guarantee", "peaks", "expected"),
    [  # recall 0.8: floor(0.2 * (n + 1)) - 1 misses are what n responses allow
        ("expected", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 0.2),
        ("expected", [0.9, 0.3, 0.3, 0.3], 0.3),
        ("high_probability", [i / 100 for i in range(1, 15)], 0.01),
    ],
)
def test_a_recall_is_kept_by_the_highest_threshold_that_does(
    guarantee: Any, peaks: list[float], expected: float
) -> None:
    table = np.array([*peaks, 0.05])[:, None]
    own = np.array([0] * len(peaks) + [-1])
    assert tuning.fit(Objective("recall", 0.8, guarantee), table, own) == (expected,)


PEAKS = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), st.sampled_from([0.1, 0.3, 0.5])), min_size=1, max_size=9
)


@settings(max_examples=80)
@given(PEAKS, PEAKS, st.floats(0.1, 20), st.floats(0.05, 0.95), st.booleans())
def test_the_least_cost_is_found(harmless: Any, harmful: Any, cost_miss: float, base_rate: float, joint: bool) -> None:
    objective = Objective("cost", cost_miss=cost_miss, base_rate=base_rate, joint=joint)
    table = np.array(harmless + harmful)
    own = np.array([-1] * len(harmless) + [i % 2 for i in range(len(harmful))])
    if not joint and len(harmful) == 1:
        with pytest.raises(RedflagError, match="must be weighed on harmless and harmful"):
            tuning.fit(objective, table, own)
        return

    def cost(good: Any, bad: Any, limits: Any) -> float:
        alarms, caught = (float((part >= limits).any(axis=1).mean()) for part in (good, bad))
        return base_rate * cost_miss * (1 - caught) + (1 - base_rate) * alarms

    parts = [[0, 1]] if joint else [[0], [1]]
    values = np.array(tuning.fit(objective, table, own))
    for part in parts:
        good, bad = table[own < 0][:, part], table[own >= 0 if joint else own == part[0]][:, part]
        ranked = -np.sort(-good, axis=0)
        tried = [cost(good, bad, np.nextafter(row, np.inf)) for row in ranked]
        assert cost(good, bad, values[part]) == pytest.approx(min(tried))


def test_a_false_alarm_rate_is_that_of_calibration() -> None:
    rng = np.random.default_rng(0)
    table, own = rng.random((300, 2)), np.array([-1] * 250 + [0] * 25 + [1] * 25)
    for joint in (True, False):
        for guarantee in ("expected", "high_probability"):
            expected = fit_thresholds(table[:250], 0.05, guarantee, 0.1, joint)
            assert tuning.fit(Objective("fpr", 0.05, guarantee, 0.1, joint), table, own) == expected


def test_a_harmful_response_belongs_to_the_flag_of_its_category_and_one_flag_stands_for_all() -> None:
    whole = recording(np.zeros((4, 1, 2)), np.array([-1, 0, 1, 2]), ("a", "b"))
    assert tuning.owners(whole).tolist() == [-1, 0, 1, 2]
    assert tuning.owners(recording(np.zeros((3, 1, 1)), np.array([-1, 0, 1]), ("a",))).tolist() == [-1, 0, 0]


def test_rates_are_counted_for_any_flag_and_for_the_own_one() -> None:
    probs = np.array([[[0.9, 0.0]], [[0.0, 0.0]], [[0.9, 0.0]], [[0.0, 0.9]], [[0.0, 0.0]]])
    whole = recording(probs, np.array([-1, -1, 0, 0, 1]), ("a", "b"))
    found = tuning.rates(whole, MonitorConfig(), (0.5, 0.5))
    assert (found.harmless, found.harmful, found.fpr, found.tpr) == (2, 3, 0.5, pytest.approx(2 / 3))
    assert found.own == {"a": 0.5, "b": 0.0} and found.median_delay is None


@given(st.lists(st.one_of(st.none(), st.sampled_from("abcde")), max_size=40), st.integers(2, 5), st.integers(0, 3))
def test_folds_divide_no_group_and_are_of_like_size(groups: list[str | None], count: int, seed: int) -> None:
    found = folds(groups, count, seed)
    assert found.tolist() == folds(groups, count, seed).tolist() and set(found.tolist()) <= set(range(count))
    for name in set(groups) - {None}:
        assert len({int(f) for f, group in zip(found, groups, strict=True) if group == name}) == 1
    largest = max([1, *(groups.count(name) for name in set(groups) - {None})])
    sizes = np.bincount(found, minlength=count)
    assert sizes.max() - sizes.min() <= largest


def test_folds_share_out_harmless_and_harmful_rows_alike() -> None:
    kinds = [i % 5 == 0 for i in range(100)]
    found = folds([None] * 100, 4, 0, kinds)
    assert np.bincount(found[np.array(kinds)]).tolist() == [5] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Objective(rate=0.0), r"target_fpr must be .*got 0\.0"),
        (lambda: Objective("recall", 1.0), r"recall must be .*got 1\.0"),
        (lambda: Objective("cost", base_rate=0.0), r"base_rate must be .*got 0\.0"),
        (lambda: Objective("cost", cost_miss=-1.0), r"cost_miss must be .*got -1\.0"),
        (lambda: Objective("cost", cost_alarm=math.nan), r"cost_alarm must be .*got nan"),
        (lambda: tuning.grid(["mean"]), "aggregations must be among"),
        (lambda: tuning.compare(planted(0), MONITORS, Objective(rate=0.001)), "999 are needed.*3 monitors.*5 folds"),
        (lambda: tuning.compare(planted(0), MONITORS, Objective(), parts=1), "number of folds must be at least 2"),
        (lambda: tuning.compare(planted(0, 3), MONITORS, Objective("recall", 0.9)), "too few for a recall of 0.9"),
        (
            lambda: tuning.compare(planted(0).select([1, 2, 3]), MONITORS, Objective()),
            r"must have harmless and harmful responses \(got 3 and 0\)",
        ),
        (
            lambda: tuning.fit(Objective("recall", 0.5), np.zeros((9, 1)), np.zeros(9, dtype=np.int64)),
            "no threshold above 0 keeps a recall of 0.5",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_sentence(call: Any, message: str) -> None:
    with pytest.raises(RedflagError, match=message):
        call()


def test_the_grid_holds_every_combination_of_what_a_monitor_uses_simple_ones_first() -> None:
    found = tuning.grid(windows=[2], decays=[0.1, 0.2], priors=[0.1, 0.2], drifts=[0.0, 1.0], warm_ups=[0, 2])
    assert len(found) == len(set(found)) == 2 * (1 + 1 + 2 + 4)
    assert tuning.grid(["first"], warm_ups=(0, 3)) == [MonitorConfig("first")]
    assert tuning.describe(MonitorConfig("first")) == "first"
    assert tuning.describe(found[0]) == "max" and tuning.describe(found[-1]) == "cusum prior 0.2 drift 1 warm-up 2"
