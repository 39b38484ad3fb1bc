"""The replay of many responses at once gives, bit by bit, what the monitor gives step by step."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redflag.calibrating import replay
from redflag.errors import RedflagError
from redflag.scoring.recording import Recording
from redflag.stats.metrics import first_alarm
from redflag.watching.monitor import Monitor, MonitorConfig, UnjudgedError

CONFIGS = st.one_of(
    st.just(MonitorConfig("first")),
    st.builds(
        MonitorConfig,
        aggregation=st.sampled_from(["max", "ema", "run", "cusum"]),
        window=st.integers(1, 9),
        decay=st.floats(0.01, 1),
        prior=st.floats(1e-9, 0.999),
        drift=st.floats(0, 3),
        warm_up=st.integers(0, 6),
    ),
)
# Ties, certainties, values below the clip and everything between.
PROBABILITY = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-7, 0.25]), st.floats(0, 1, width=32))
# From one response at a time to all at once.
BLOCKS = st.sampled_from([1, 40, replay.BLOCK])


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    flags = draw(st.integers(1, 3))
    step = st.lists(PROBABILITY, min_size=flags, max_size=flags)
    responses = draw(st.lists(st.tuples(st.lists(step, max_size=14), st.lists(step, max_size=2)), max_size=7))
    rows = [{"flag_probs": probs, "tail_probs": tail} for probs, tail in responses]
    return Recording.of([f"flag {k}" for k in range(flags)], rows)


def step_by_step(config: MonitorConfig, recording: Recording) -> list[tuple[Any, tuple[float, ...]]]:
    """Scores and peak of every response."""
    found = []
    for i in range(len(recording)):
        monitor = Monitor(config, len(recording.categories))
        found.append(([monitor.feed(step) for step in recording.steps(i).tolist()], monitor.peak))
    return found


@settings(max_examples=200)
@given(config=CONFIGS, recording=recordings(), size=BLOCKS)
def test_scores_and_peaks_equal_those_of_the_monitor(config: MonitorConfig, recording: Recording, size: int) -> None:
    expected = step_by_step(config, recording)
    flat = [score for scores, _ in expected for score in scores]
    with patch.object(replay, "BLOCK", size):
        assert replay.scores(config, recording).tolist() == [list(score) for score in flat]
        assert replay.peaks(config, recording).tolist() == [list(peak) for _, peak in expected]


@settings(max_examples=60)
@given(config=CONFIGS, recording=recordings(), data=st.data())
def test_alarms_equal_the_first_score_that_reaches_its_threshold(
    config: MonitorConfig, recording: Recording, data: st.DataObject
) -> None:
    expected = step_by_step(config, recording)
    # A threshold that some score reaches exactly is the case that a last bit decides.
    reached = sorted({score for scores, _ in expected for step in scores for score in step}) or [0.5]
    replay_in = patch.object(replay, "BLOCK", data.draw(BLOCKS))
    one = [data.draw(st.sampled_from(reached)) for _ in recording.categories]
    first = [first_alarm(scores, one) for scores, _ in expected]
    numbers = [-1 if step is None else step for step in first]
    with replay_in:
        assert replay.alarms(config, recording, one).tolist() == numbers
    assert replay.first_alarms(replay.scores(config, recording), recording, one).tolist() == numbers
    own = np.array([[data.draw(st.sampled_from(reached)) for _ in one] for _ in expected]).reshape(-1, len(one))
    first = [first_alarm(scores, limits) for (scores, _), limits in zip(expected, own, strict=True)]
    assert replay.alarms(config, recording, own).tolist() == [-1 if step is None else step for step in first]


@settings(max_examples=60)
@given(configs=st.lists(CONFIGS, min_size=1, max_size=4), recording=recordings(), data=st.data())
def test_several_monitors_and_some_responses_are_each_as_if_alone(
    configs: list[MonitorConfig], recording: Recording, data: st.DataObject
) -> None:
    among = data.draw(st.lists(st.integers(0, len(recording) - 1), max_size=6) if len(recording) else st.just([]))
    alone = [replay.peaks(config, recording) for config in configs]
    assert np.array_equal(replay.peaks_of(configs, recording), alone)
    assert np.array_equal(replay.peaks_of(configs, recording, among), [peaks[among] for peaks in alone])
    limits = [0.4] * len(recording.categories)
    whole = replay.alarms(configs[0], recording, limits)
    assert np.array_equal(replay.alarms(configs[0], recording, limits, among), whole[among])


@settings(max_examples=60)
@given(config=CONFIGS, responses=st.lists(st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2)), max_size=5))
@example(MonitorConfig(), [[], [[0.1, 0.2]]])
def test_gathered_lists_keep_double_precision(config: MonitorConfig, responses: list[Any]) -> None:
    gathered = replay.Steps.of(responses, 2)
    for i, response in enumerate(responses):
        monitor = Monitor(config, 2)
        for step in response:
            monitor.feed(step)
        assert tuple(replay.peaks(config, gathered)[i]) == monitor.peak


@pytest.mark.parametrize("own", [False, True], ids=["C library's", "numpy's own"])
def test_the_logarithm_is_that_of_the_stream_whichever_numpy_has(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log = np.log
    if own:  # off by a last bit at one value in a hundred, as an implementation of numpy's may be
        monkeypatch.setattr(np, "log", lambda x: np.where(x * 1e6 % 1 < 0.01, np.nextafter(log(x), 9), log(x)))
    monkeypatch.setattr(replay, "_logarithm", replay._logarithm.__wrapped__)
    probs = np.random.default_rng(0).random(3000)
    config = MonitorConfig(aggregation="cusum", prior=0.5, drift=0.0)
    found = replay.scores(config, replay.Steps(probs[:, None], np.arange(3001)))
    assert found[:, 0].tolist() == [Monitor(config, 1).feed([p])[0] for p in probs.tolist()]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-7, 1.0000002])
def test_a_recorded_probability_that_is_none_is_refused_by_response_and_step(bad: float) -> None:
    rows = [{"flag_probs": [[0.5, 0.5]] * 3}, {"flag_probs": []}, {"flag_probs": [[0.5, 0.5], [0.1, bad]]}]
    recording = Recording.of(["a", "b"], rows)
    for call in (
        lambda: replay.scores(MonitorConfig(), recording),
        lambda: replay.peaks(MonitorConfig(), recording),
        lambda: replay.alarms(MonitorConfig(), recording, [0.5, 0.5]),
    ):
        with pytest.raises(UnjudgedError, match=r"response 2 cannot be judged at step 1: a flag probability must be"):
            call()


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ([[0.5, math.nan]], r"a flag probability must be .*got nan"),
        ([[0.5, 0.5], [0.5, 1.5]], r"a flag probability must be .*got 1\.5"),
        ([[0.5]], r"the flag probabilities of a step must be 2 numbers .got 1"),
        ([[0.5, 0.5], [0.5]], r"the flag probabilities of a step must be 2 numbers .got 1"),
        ([[0.5, 0.5], None], "the flag probabilities of a step must be 2 numbers"),
        ([["high", 0.5]], "the flag probabilities of a step must be 2 numbers"),
        (np.full((3, 3), 0.5, np.float32), r"the flag probabilities of a step must be 2 numbers .got 3"),
        (0.5, "it is not T steps of 2 numbers"),
    ],
)
def test_a_gathered_response_is_refused_in_the_words_of_the_monitor(response: Any, message: str) -> None:
    with pytest.raises(RedflagError, match=rf"harmless response 1 cannot be judged: .*{message}"):
        replay.Steps.of([[[0.1, 0.1]], response], 2, "harmless")


def test_no_responses_and_no_steps_give_nothing_and_zeros() -> None:
    nothing = Recording.of(["a"], [])
    assert replay.peaks(MonitorConfig(), nothing).shape == (0, 1)
    assert replay.scores(MonitorConfig(), nothing).shape == (0, 1)
    assert replay.alarms(MonitorConfig(), nothing, [0.5]).tolist() == []
    silent = Recording.of(["a"], [{"flag_probs": []}, {"flag_probs": []}])
    assert replay.peaks(MonitorConfig(aggregation="ema"), silent).tolist() == [[0.0], [0.0]]
    assert replay.alarms(MonitorConfig(), silent, [0.5]).tolist() == [-1, -1]
