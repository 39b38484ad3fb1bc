from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.watching.monitor import AGGREGATIONS, Aggregation, Monitor, MonitorConfig, UnjudgedError, peaks
from redflag.watching.options import MonitorOptions

INPUT = (0.5, 0.0, 1.0, 0.25)
LOGIT_CEILING = math.log((1 - 1e-6) / 1e-6)

TABLE = [
    ("max is the probability itself", {"aggregation": "max"}, INPUT, (0.5, 0.0, 1.0, 0.25)),
    ("first is what stands before the response", {"aggregation": "first"}, INPUT, (0.5, 0, 0, 0)),
    ("run of one is max", {"aggregation": "run", "window": 1}, INPUT, (0.5, 0.0, 1.0, 0.25)),
    ("run of two is the lower of two", {"aggregation": "run", "window": 2}, (0.5, 0.4, 1.0, 0.7), (0.0, 0.4, 0.4, 0.7)),
    ("run forgets what left the window", {"aggregation": "run", "window": 2}, (0.1, 0.8, 0.9), (0.0, 0.1, 0.8)),
    ("run of three", {"aggregation": "run", "window": 3}, (0.9, 0.8, 0.7, 0.9), (0.0, 0.0, 0.7, 0.7)),
    ("run longer than the response", {"aggregation": "run", "window": 9}, INPUT, (0.0, 0.0, 0.0, 0.0)),
    (
        "ema starts from the prior",
        {"aggregation": "ema", "decay": 0.5, "prior": 0.25},
        (1.0, 0.0, 0.25),
        (0.625, 0.3125, 0.28125),
    ),
    ("ema of weight one is max", {"aggregation": "ema", "decay": 1.0}, INPUT, INPUT),
    (
        "ema at the prior stays there",
        {"aggregation": "ema", "decay": 0.5, "prior": 0.125},
        (0.125, 0.125),
        (0.125, 0.125),
    ),
    (  # logit(0.9) = ln 9, logit(0.1) = -ln 9, prior one half = 0 nats
        "cusum adds up and never goes below 0",
        {"aggregation": "cusum", "prior": 0.5, "drift": 0.5},
        (0.9, 0.9, 0.1, 0.1, 0.9),
        (math.log(9) - 0.5, 2 * math.log(9) - 1.0, math.log(9) - 1.5, 0.0, math.log(9) - 0.5),
    ),
    (
        "cusum counts from the prior",
        {"aggregation": "cusum", "prior": 0.1, "drift": 0.0},
        (0.1, 0.5, 0.1),
        (0.0, math.log(9), math.log(9)),
    ),
    (
        "cusum takes certainty for strong, not infinite, evidence",
        {"aggregation": "cusum", "prior": 0.5, "drift": 0.0},
        (1.0, 1.0, 0.0),
        (LOGIT_CEILING, 2 * LOGIT_CEILING, LOGIT_CEILING),
    ),
    ("warm-up hides scores", {"aggregation": "max", "warm_up": 2}, INPUT, (0.0, 0.0, 1.0, 0.25)),
    (
        "warm-up feeds the state: run",
        {"aggregation": "run", "window": 2, "warm_up": 2},
        (0.5, 0.4, 1.0),
        (0.0, 0.0, 0.4),
    ),
    (
        "warm-up feeds the state: ema",
        {"aggregation": "ema", "decay": 0.5, "prior": 0.25, "warm_up": 1},
        (1.0, 0.0),
        (0.0, 0.3125),
    ),
    (
        "warm-up feeds the state: cusum",
        {"aggregation": "cusum", "prior": 0.5, "drift": 0.5, "warm_up": 1},
        (0.9, 0.9),
        (0.0, 2 * math.log(9) - 1.0),
    ),
]


@pytest.mark.parametrize(("options", "probs", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_scores_are_those_of_the_formula(options, probs, expected):
    monitor = Monitor(MonitorConfig(**options), flags=1)
    scores = [monitor.feed((p,))[0] for p in probs]
    assert scores == pytest.approx(expected, abs=1e-9)
    assert monitor.peak == (max(scores),)
    assert peaks(MonitorConfig(**options), [(p,) for p in probs]) == (max(scores),)


def test_ema_does_not_start_from_the_first_value():
    first_high = [(0.9,), (0.0,), (0.0,)]
    config = MonitorConfig(aggregation="ema", decay=0.2, prior=0.01)
    assert peaks(config, first_high)[0] == pytest.approx(0.8 * 0.01 + 0.2 * 0.9)


@pytest.mark.parametrize("aggregation", ["max", "run", "ema", "cusum", "first"])
def test_every_flag_is_scored_as_if_it_were_alone(aggregation):
    config = MonitorConfig(aggregation=aggregation, window=2, warm_up=int(aggregation != "first"))
    columns = [(0.1, 0.9, 0.8, 0.0), (0.0, 0.0, 0.3, 0.4), (1.0, 1.0, 1.0, 1.0)]
    together = Monitor(config, flags=3)
    scores = [together.feed(step) for step in zip(*columns, strict=True)]
    for k, column in enumerate(columns):
        alone = Monitor(config, flags=1)
        assert [row[k] for row in scores] == [alone.feed((p,))[0] for p in column]


@pytest.mark.parametrize("aggregation", ["max", "run", "ema", "cusum", "first"])
def test_reset_goes_back_to_the_start(aggregation):
    config = MonitorConfig(aggregation=aggregation, window=2, warm_up=int(aggregation != "first"))
    monitor = Monitor(config, flags=1)
    before = [monitor.feed((p,)) for p in INPUT]
    monitor.reset()
    assert monitor.peak == (0.0,)
    assert [monitor.feed((p,)) for p in INPUT] == before


def test_an_empty_response_peaks_at_zero():
    assert peaks(MonitorConfig(), [], flags=2) == (0.0, 0.0)


@pytest.mark.parametrize(
    "bad",
    [
        (math.nan, 0.5),
        (0.5, math.inf),
        (-1e-9, 0.5),
        (0.5, 1.0000001),
        (0.5,),
        (0.5, 0.5, 0.5),
        (),
        None,
        (None, 0.5),
        ("high", 0.5),
        0.5,
        (10**400, 0.5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("aggregation", ["max", "run", "ema", "cusum", "first"])
def test_what_cannot_be_judged_is_refused_and_changes_nothing(aggregation, bad):
    monitor = Monitor(MonitorConfig(aggregation=aggregation, window=2), flags=2)
    twin = Monitor(MonitorConfig(aggregation=aggregation, window=2), flags=2)
    assert monitor.feed((0.5, 0.4)) == twin.feed((0.5, 0.4))
    with pytest.raises(UnjudgedError, match="cannot be judged"):
        monitor.feed(bad)
    assert monitor.feed((0.3, 0.2)) == twin.feed((0.3, 0.2))
    assert monitor.peak == twin.peak


@pytest.mark.parametrize(
    "options",
    [
        {"aggregation": "mean"},
        {"window": 0},
        {"window": 1.5},
        {"window": True},
        {"decay": 0},
        {"decay": 1.1},
        {"decay": math.nan},
        {"decay": "0.1"},
        {"prior": 0},
        {"prior": 1.0},
        {"prior": None},
        {"drift": -0.1},
        {"drift": math.inf},
        {"drift": math.nan},
        {"drift": 10**400},
        {"warm_up": -1},
        {"warm_up": 1, "aggregation": "first"},
    ],
    ids=repr,
)
def test_a_config_outside_its_range_is_refused_by_name(options):
    with pytest.raises(RedflagError, match=next(iter(options))):
        MonitorConfig(**options)


probabilities = st.floats(0, 1)
configs = st.one_of(
    st.just(MonitorConfig("first")),
    st.builds(
        MonitorConfig,
        aggregation=st.sampled_from(["max", "ema", "run", "cusum"]),
        window=st.integers(1, 5),
        decay=st.floats(0.01, 1),
        prior=st.floats(1e-4, 0.9),
        drift=st.floats(0, 3),
        warm_up=st.integers(0, 4),
    ),
)


@given(config=configs, probs=st.lists(st.tuples(probabilities, probabilities), min_size=1, max_size=20), data=st.data())
def test_raising_probabilities_never_lowers_a_score(config, probs, data):
    raised = [tuple(data.draw(st.floats(p, 1)) for p in step) for step in probs]
    low, high = Monitor(config, 2), Monitor(config, 2)
    # The C library's logarithm may be off by one unit in the last place; all else rounds monotonically.
    slack = 1e-9 if config.aggregation == "cusum" else 0.0
    for before, after in zip(probs, raised, strict=True):
        for score_before, score_after in zip(low.feed(before), high.feed(after), strict=True):
            assert score_after >= score_before - slack


@given(config=configs, probs=st.lists(probabilities, min_size=1, max_size=20))
def test_scores_are_finite_and_in_range_and_the_peak_is_their_maximum(config, probs):
    monitor = Monitor(config, 1)
    scores = [monitor.feed((p,))[0] for p in probs]
    top = math.inf if config.aggregation == "cusum" else 1.0
    assert all(math.isfinite(score) and 0.0 <= score <= top for score in scores)
    assert scores[: config.warm_up] == [0.0] * min(config.warm_up, len(scores))
    assert monitor.peak == (max(scores),)


@given(config=configs, probs=st.lists(probabilities, min_size=1, max_size=20), cut=st.integers(0, 20))
def test_scores_do_not_depend_on_what_comes_later(config, probs, cut):
    whole, part = Monitor(config, 1), Monitor(config, 1)
    assert [whole.feed((p,)) for p in probs][:cut] == [part.feed((p,)) for p in probs[:cut]]


def test_the_table_of_aggregations_says_what_the_formulas_do():
    assert tuple(AGGREGATIONS) == get_args(Aggregation)
    for name, facts in AGGREGATIONS.items():
        scores = all_scores(MonitorConfig(name))
        for number, value in {"window": 2, "decay": 0.7, "prior": 0.2, "drift": 1.5}.items():
            changed = all_scores(MonitorConfig(name, **{number: value}))
            assert (changed != scores) == (number in facts.uses), (name, number)
        assert set(facts.tuned) <= set(facts.uses)
        assert facts.bounded == all(score <= 1.0 for (score,) in scores)


def all_scores(config):
    monitor = Monitor(config, 1)
    return [monitor.feed([p]) for p in (0.6, 0.9, 0.3)]


def test_options_of_a_monitor_are_its_fields():
    assert {item.name for item in fields(MonitorOptions)} == {item.name for item in fields(MonitorConfig)}
    assert MonitorOptions().monitor() == MonitorConfig()
    assert MonitorOptions(aggregation="run", window=3, warm_up=1).monitor() == MonitorConfig("run", 3, warm_up=1)
    with pytest.raises(RedflagError, match="window"):
        MonitorOptions(window=0).monitor()
