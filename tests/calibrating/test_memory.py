"""Thresholds calibrated with memory: the same scores as in a session, and a rate that holds for them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.calibrating import replay
from redflag.calibrating.calibrate import calibrate_responses
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.trace import Alarm, Step
from redflag.watching.memory import Memory, raised
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

SPEC = FlagSpec.of("harm", "theft")
MEMORY = Memory(0.5, 0.5)


def world(seed=0, count=400):
    draw = np.random.default_rng(seed)
    responses = [draw.beta(0.5, 8, (int(draw.integers(1, 12)), 2)) for _ in range(count)]
    earlier = [[draw.beta(0.5, 8, (4, 2)) for _ in range(int(draw.integers(0, 4)))] for _ in range(count)]
    return responses, earlier


@given(score=st.floats(0, 1), factor=st.floats(1, 1e13))
def test_arrays_are_raised_bit_by_bit_as_single_scores(score, factor):
    assert replay.raised(np.array([score]), np.array([factor])).tolist() == [raised(score, factor)]


@pytest.mark.parametrize("config", [MonitorConfig(), MonitorConfig("run", window=2), MonitorConfig("ema")])
def test_alarms_are_those_of_sessions_that_remember(config):
    responses, earlier = world(1, 60)
    found = calibrate_responses(
        responses[:30], SPEC, harmful=responses[30:], earlier=earlier, memory=MEMORY, monitor=config, target_fpr=0.2
    )
    assert found.thresholds.memory == MEMORY
    alarmed = []
    for response, turns in zip(responses[30:], earlier[30:], strict=True):
        session = Session(found.thresholds, Policy(observe=True), SPEC.categories)
        peaks = [replay.peaks(config, replay.Steps.of([turn], 2))[0].tolist() for turn in turns]
        session.remember(peaks)
        for probs in response.tolist():
            session.feed(Step(7, tuple(probs)))
        alarmed.append(any(isinstance(event, Alarm) for event in session.trace.events))
    assert sum(alarmed) == found.caught > 0


def test_the_rate_holds_with_memory_and_not_for_thresholds_without():
    responses, earlier = world(2, 4000)
    with_it = calibrate_responses(responses, SPEC, earlier=earlier, memory=MEMORY, target_fpr=0.05, held_out=0.5)
    assert with_it.thresholds.realised_fpr == pytest.approx(0.05, abs=0.02)
    without = calibrate_responses(responses, SPEC, target_fpr=0.05, held_out=0.5)
    assert any(with_it.thresholds.values[name] > without.thresholds.values[name] for name in SPEC.categories)


def test_without_earlier_answers_memory_changes_no_threshold():
    responses, _ = world(3)
    plain = calibrate_responses(responses, SPEC, target_fpr=0.05)
    empty = calibrate_responses(responses, SPEC, earlier=[[]] * len(responses), memory=MEMORY, target_fpr=0.05)
    assert dataclasses.replace(empty.thresholds, memory=None) == plain.thresholds
    assert "memory 0.5 with decay 0.5" in str(empty) and "memory" not in str(plain)


@pytest.mark.parametrize("earlier", [None, [], [[]]], ids=repr)
def test_earlier_answers_have_to_be_there_for_each_response(earlier):
    responses, _ = world(4)
    with pytest.raises(RedflagError, match="earlier"):
        calibrate_responses(responses, SPEC, earlier=earlier, memory=MEMORY, target_fpr=0.05)


def test_a_monitor_without_probabilities_has_no_memory():
    responses, earlier = world(5)
    with pytest.raises(RedflagError, match="memory must be off for the monitor 'cusum'"):
        calibrate_responses(responses, SPEC, earlier=earlier, memory=MEMORY, monitor=MonitorConfig("cusum"))


def test_the_file_says_so_and_files_without_memory_are_read_as_before(tmp_path):
    thresholds = Thresholds.manual(0.5, ["harm"])
    record = thresholds.to_dict()
    assert "memory" not in record and "thoughts" not in record
    thoughts = Thresholds.manual(0.9, ["harm"])
    for memory in (None, MEMORY):
        own = dataclasses.replace(thoughts, memory=memory)
        saved = dataclasses.replace(thresholds, memory=memory, thoughts=own)
        saved.save(tmp_path)
        assert Thresholds.load(tmp_path) == saved
        assert ("memory" in (tmp_path / "thresholds.json").read_text()) == (memory is not None)
    (tmp_path / "thresholds.json").write_text(
        (tmp_path / "thresholds.json").read_text().replace('"decay"', '"delay"', 9)
    )
    with pytest.raises(RedflagError, match=r"thresholds\.json"):
        Thresholds.load(tmp_path)
    with pytest.raises(RedflagError, match="memory"):
        dataclasses.replace(thresholds, memory=MEMORY, thoughts=thoughts)
