"""Memory over turns as arithmetic: what earlier responses do to the scores of the next one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.watching.memory import Memory, earlier_peaks, raised
from redflag.watching.monitor import MonitorConfig, UnjudgedError

probabilities = st.floats(0, 1)
pairs = st.tuples(probabilities, probabilities)
memories = st.builds(Memory, weight=st.floats(0, 5), decay=st.floats(0, 1))


def logit(p):
    return math.log(p / (1 - p))


def test_the_offset_is_that_of_the_formula():
    memory = Memory(weight=0.5, decay=0.25)
    (factor,) = memory.factors([(0.5,), (0.2,), (0.001,)], prior=0.01, flags=1)
    evidence = max(0.25**2 * (logit(0.5) - logit(0.01)), 0.25 * (logit(0.2) - logit(0.01)))
    assert math.log(factor) == pytest.approx(0.5 * evidence)
    assert logit(raised(0.3, factor)) == pytest.approx(logit(0.3) + 0.5 * evidence)


def test_decay_0_remembers_the_last_response_alone_and_decay_1_the_highest():
    earlier = [(0.9,), (0.5,), (0.2,)]
    assert Memory(1, 0).factors(earlier, 0.01, 1) == Memory(1, 0.5).factors(earlier[-1:], 0.01, 1)
    assert Memory(1, 1).factors(earlier, 0.01, 1) == Memory(1, 1).factors(earlier[:1], 0.01, 1)
    assert Memory(1, 1).factors(earlier, 0.01, 1) == Memory(1, 1).factors(earlier[::-1], 0.01, 1)


@given(memory=memories, prior=st.floats(1e-4, 0.9), score=probabilities)
def test_without_earlier_responses_a_score_is_the_same_bit_by_bit(memory, prior, score):
    assert [raised(score, factor) for factor in memory.factors([], prior, 2)] == [score, score]


@given(earlier=st.lists(pairs, max_size=5), decay=st.floats(0, 1), prior=st.floats(1e-4, 0.9), score=probabilities)
def test_with_weight_0_a_score_is_the_same_bit_by_bit(earlier, decay, prior, score):
    assert [raised(score, factor) for factor in Memory(0, decay).factors(earlier, prior, 2)] == [score, score]


@given(memory=memories, prior=st.floats(1e-4, 0.9), share=st.lists(pairs, max_size=5))
def test_benign_earlier_responses_change_nothing(memory, prior, share):
    earlier = [(prior * one, prior * other) for one, other in share]
    assert memory.factors(earlier, prior, 2) == (1.0, 1.0)


@given(memory=memories, earlier=st.lists(pairs, min_size=1, max_size=5), score=probabilities, data=st.data())
def test_raising_an_earlier_score_never_lowers_the_next_one(memory, earlier, score, data):
    higher = [tuple(data.draw(st.floats(p, 1)) for p in peak) for peak in earlier]
    # The C library's logarithm and exponential may be off by one unit in the last place.
    for low, high in zip(memory.factors(earlier, 0.01, 2), memory.factors(higher, 0.01, 2), strict=True):
        assert high >= low * (1 - 1e-9)
        assert raised(score, max(low, high)) >= raised(score, low)


@given(memory=memories, earlier=st.lists(pairs, max_size=4), another=pairs)
def test_one_more_response_at_the_beginning_never_lowers_a_score(memory, earlier, another):
    fewer, more = (memory.factors(turns, 0.01, 2) for turns in (earlier, [another, *earlier]))
    assert all(high >= low * (1 - 1e-9) for low, high in zip(fewer, more, strict=True))


@given(score=probabilities, other=probabilities, factor=st.floats(1, 1e13), larger=st.floats(1, 1e13))
def test_a_raised_score_is_monotonic_in_score_and_factor_to_the_last_bit(score, other, factor, larger):
    low, high = sorted((score, other))
    small, large = sorted((factor, larger))
    assert score <= raised(score, factor) <= 1.0
    assert raised(low, factor) <= raised(high, factor)
    assert raised(score, small) <= raised(score, large)
    assert raised(0.0, factor) == 0.0 and raised(1.0, factor) == 1.0


@given(earlier=st.lists(st.tuples(st.just(1.0)), min_size=1, max_size=200))
def test_any_history_gives_a_finite_factor(earlier):
    (factor,) = Memory(1e9, 1.0).factors(earlier, 1e-4, 1)
    assert math.isfinite(factor)


@pytest.mark.parametrize("bad", [(math.nan,), (1.5,), (-0.1,), (0.5, 0.5), (), None, ("high",)], ids=repr)
def test_an_earlier_score_that_cannot_be_judged_is_refused(bad):
    with pytest.raises(UnjudgedError, match="cannot be judged"):
        Memory(0.5).factors([(0.1,), bad], 0.01, 1)


def test_earlier_peaks_are_those_of_a_monitor_for_each_response():
    measured = [[(0.1,), (0.9,), (0.8,)], [(0.9,)]]
    assert earlier_peaks(measured, (3, 1), MonitorConfig(), 1) == [(0.9,), (0.9,)]
    assert earlier_peaks(measured, (3, 1), MonitorConfig("run", window=2), 1) == [(0.8,), (0.0,)]


@pytest.mark.parametrize(
    "measured", [None, [], [[(0.1,)]], [[(0.1,)], [(0.2,)], [(0.3,)]], [[(0.1,)], [(math.nan,)] * 2]]
)
def test_earlier_responses_that_were_not_measured_in_full_are_unjudged(measured):
    with pytest.raises(UnjudgedError):
        earlier_peaks(measured, (1, 2), MonitorConfig(), 1)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": -1},
        {"weight": math.inf},
        {"weight": math.nan},
        {"weight": True},
        {"weight": 10**400},
        {"decay": -0.1},
        {"decay": 1.1},
    ],
    ids=repr,
)
def test_a_memory_outside_its_range_is_refused_by_name(options):
    with pytest.raises(RedflagError, match=next(iter(options))):
        Memory(**options)
