"""A thought before an answer: judged by thresholds of its own, released apart or not at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.trace import Alarm, Done, Halt, Step, Text, Thought
from redflag.watching.first_token import FirstTokenRule
from redflag.watching.monitor import Monitor, MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.replay import replay
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

ONE = ["harm"]


def thresholds(answer, thought=None, monitor=None):
    own = None if thought is None else Thresholds.manual(thought, ONE, monitor)
    return Thresholds({"harm": answer}, monitor or MonitorConfig(), thoughts=own)


def drive(probs, border, limits, policy, end="stop"):
    """A response of tokens 0, 1, ... whose first `border` are its thought (None: all); the session and all events."""
    session = Session(limits, policy, ONE, lambda token: f"{token},", thought=True)
    events = []
    for token, p in enumerate(probs):
        events += session.feed(Step(token, (p,)))
        if session.finished:
            return session, events
        if token + 1 == border:
            events += session.begin_answer(lambda token: f"{token};")
            if session.finished:
                return session, events
    events += session.fault("lost") if end == "fault" else session.finish(end)
    return session, events


def texts(events, kind):
    return "".join(event.text for event in events if isinstance(event, kind))


@pytest.mark.parametrize(
    "probs, border, limits, halted",
    [
        ([0.6, 0.6, 0.1], 2, (0.5, 0.9), None),  # a thought may name harm
        ([0.6, 0.6, 0.1], 2, (0.5, None), 0),  # without thresholds of its own the answer's hold
        ([0.1, 0.95, 0.1], 2, (0.5, 0.9), 1),
        ([0.6, 0.6, 0.6], 2, (0.5, 0.9), 2),  # in the answer its own hold, from its first token on
        ([0.95], None, (0.5, 0.9), 0),
    ],
)
@pytest.mark.parametrize("shown", ["hide", "show"])
def test_each_part_is_judged_by_its_own_thresholds_whether_it_is_shown_or_not(probs, border, limits, halted, shown):
    session, events = drive(probs, border, thresholds(*limits), Policy(thoughts=shown))
    positions = [event.position for event in events if isinstance(event, Alarm)]
    assert positions == ([] if halted is None else [halted])
    assert isinstance(events[-1], Done if halted is None else Halt)
    assert session.trace.thought_tokens == min(len(session.trace.token_ids), border or 1)


def test_a_monitor_begins_anew_at_the_border_so_that_a_thought_is_not_held_against_the_answer():
    monitor = MonitorConfig("cusum", prior=0.1, drift=0.0)
    probs = [0.4, 0.4, 0.4, 0.4]
    session, _ = drive(probs, 2, thresholds(4.0, 4.0, monitor), Policy())
    one = Monitor(monitor, 1)
    expected = [one.feed((p,)) for p in probs[:2]]
    assert session.trace.scores == expected * 2
    assert session.trace.facts().thought_peaks == session.trace.facts().step_peaks == {"harm": expected[1][0]}


def test_an_alarm_that_goes_on_in_the_thought_is_raised_again_in_the_answer():
    _, events = drive([0.9, 0.9, 0.9, 0.9], 2, thresholds(0.5), Policy(default="continue"))
    assert [event.position for event in events if isinstance(event, Alarm)] == [0, 2]


def test_hold_back_and_release_apply_within_a_part():
    policy = Policy(hold_back=2, thoughts="show")
    _, events = drive([0.1] * 7, 4, thresholds(0.5), policy)
    assert [(type(e), e.position, len(e.token_ids)) for e in events if isinstance(e, Text | Thought)] == [
        (Thought, 0, 1),
        (Thought, 1, 1),
        (Thought, 2, 2),  # all of it was judged
        (Text, 4, 1),
        (Text, 5, 2),
    ]
    assert (texts(events, Thought), texts(events, Text)) == ("0,1,2,3,", "4;5;6;")


def test_sentences_are_counted_in_each_part():
    words = ["One.", " Two", ".", " Three", "A.", " B", ".", " C"]
    session = Session(
        thresholds(0.5), Policy(release="sentence", thoughts="show"), ONE, words.__getitem__, thought=True
    )
    released = []
    for token in range(8):
        released.append([(type(e), e.text) for e in session.feed(Step(token, (0.1,)))])
        if token == 3:
            released[-1] += [(type(e), e.text) for e in session.begin_answer(words.__getitem__)]
    assert released[1] == [(Thought, "One.")] and released[3] == [(Thought, " Two."), (Thought, " Three")]
    assert released[5] == [(Text, "A.")] and released[7] == [(Text, " B.")]


def test_a_halt_in_the_answer_does_not_reach_back_into_the_thought_and_holds_back_its_own():
    _, events = drive([0.1, 0.1, 0.1, 0.9], 2, thresholds(0.5), Policy(hold_back=2, thoughts="show"))
    assert texts(events, Thought) == "0,1," and texts(events, Text) == ""
    assert events[-1] == Halt(2, "alarm", "harm")


def test_what_can_not_go_together_is_refused():
    with pytest.raises(RuntimeError, match="begun already"):
        Session(thresholds(0.5), Policy(), ONE).begin_answer(str)
    session, _ = drive([0.1, 0.1], 1, thresholds(0.5), Policy())
    with pytest.raises(RuntimeError, match="over"):
        session.begin_answer(str)
    first = Thresholds.manual(0.5, ONE, MonitorConfig("first"))
    with pytest.raises(RedflagError, match="thinking must be off with a decision before the first token"):
        Session(first, Policy(first_token=FirstTokenRule()), ONE, thought=True)


def test_a_reviewed_alarm_whose_score_never_falls_in_the_thought_ends_the_response_at_the_border():
    session = Session(thresholds(0.5), Policy(default="force", thoughts="show"), ONE, str, thought=True)
    session.feed(Step(1, (0.9,)))
    session.force(str)
    assert session.trace.answer_at is None and session.trace.token_ids == []
    assert session.feed(Step(2, (0.9,))) == []
    assert [type(event) for event in session.begin_answer(str)] == [Halt]


grid = st.integers(0, 10).map(lambda n: n / 10)
limit = grid.filter(bool)
monitors = st.sampled_from(
    [MonitorConfig(), MonitorConfig("ema"), MonitorConfig("run", window=2), MonitorConfig("first")]
)
responses = st.lists(grid, max_size=12)
borders = st.none() | st.integers(1, 12)
policies = st.builds(
    Policy,
    default=st.sampled_from(["halt", "continue"]),
    hold_back=st.integers(0, 4),
    release=st.sampled_from(["steps", "sentence", "end"]),
    thoughts=st.sampled_from(["hide", "show"]),
)


@given(responses, borders, limit, st.none() | limit, monitors, policies, st.sampled_from(["stop", "length", "fault"]))
def test_nothing_crosses_the_border_and_nothing_leaves_unjudged(probs, border, answer, thought, monitor, policy, end):
    limits = thresholds(answer, thought, monitor)
    session, events = drive(probs, border, limits, policy, end)
    trace = session.trace
    # Each token's text says which it is: "," of the thought, ";" of the answer.
    assert set(texts(events, Text)) <= set("0123456789;") and set(texts(events, Thought)) <= set("0123456789,")
    if policy.thoughts == "hide":
        assert not texts(events, Thought)
    shown = [i for event in events if isinstance(event, Text | Thought) for i in event.token_ids]
    assert shown == sorted(set(shown))
    for event in events:
        for i in event.token_ids if isinstance(event, Text | Thought) else ():
            assert (i < trace.thought_tokens) == (event.part == "thought")
    # The independent statement: each part folded by itself, against its own thresholds.
    halting = []
    for part, start, own in (
        (trace.flag_probs[: trace.thought_tokens], 0, limits.of_thoughts),
        (trace.flag_probs[trace.thought_tokens :], trace.thought_tokens, limits),
    ):
        one = Monitor(own.monitor, 1)
        halting += [start + i for i, p in enumerate(part) if one.feed(p)[0] >= own.values["harm"]]
    if policy.default == "halt" and halting:
        first = halting[0]
        begins = 0 if first < trace.thought_tokens else trace.thought_tokens
        assert isinstance(events[-1], Halt) and len(trace.token_ids) == first + 1
        assert all(i < max(begins, first - policy.hold_back) for i in shown)
    elif end != "fault":
        visible = trace.token_ids[0 if policy.thoughts == "show" else trace.thought_tokens :]
        assert shown == visible and isinstance(events[-1], Done)
    assert trace.released == len(shown) and trace.facts().thought_tokens == trace.thought_tokens
    assert [isinstance(event, Halt | Done) for event in events] == [False] * (len(events) - 1) + [True]


@given(responses, borders, limit, st.none() | limit, monitors, policies, st.sampled_from(["stop", "length", "fault"]))
def test_replaying_a_trace_with_a_thought_gives_the_same_trace(probs, border, answer, thought, monitor, policy, end):
    if policy.release == "sentence":  # a replay has no text
        policy = Policy(default=policy.default, thoughts=policy.thoughts)
    limits = thresholds(answer, thought, monitor)
    session = Session(limits, policy, ONE, thought=True)
    for token, p in enumerate(probs):
        session.feed(Step(token, (p,)))
        if not session.finished and token + 1 == border:
            session.begin_answer(lambda token: None)
        if session.finished:
            break
    else:
        session.fault("lost") if end == "fault" else session.finish(end)
    assert replay(session.trace, limits, policy) == session.trace
    recorded, _ = drive(probs, border, thresholds(1.0, 1.0), Policy(default="continue"), end)
    assert replay(recorded.trace, limits, policy).events == session.trace.events


def test_a_step_of_a_thought_that_cannot_be_judged_ends_the_response():
    session = Session(thresholds(0.5), Policy(), ONE, str, thought=True)
    session.feed(Step(1, (0.1,)))
    (event,) = session.feed(Step(2, (math.nan,)))
    assert isinstance(event, Halt) and event.reason == "fault"
