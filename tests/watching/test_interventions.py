from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.trace import Alarm, Done, Escalation, Halt, Reflection, Resume, Step, Text
from redflag.watching.policy import Policy, Reflect
from redflag.watching.replay import replay
from redflag.watching.session import Review, Session
from redflag.watching.thresholds import Thresholds

W = "weapons"


def session_of(policy, categories=(W,), decode=lambda token_id: None):
    return Session(Thresholds.manual(0.5, categories), policy, categories, decode)


def feed(session, *probs):
    """Feeds one token per probability, numbered on; returns the events of the last one."""
    events = []
    for p in probs:
        events = session.feed(Step(len(session.trace.token_ids), (p,)))
    return events


REFLECT = Policy(default="reflect")
ESCALATE = Policy(default="escalate")


def test_an_alarm_that_is_reviewed_shows_nothing_until_there_is_a_verdict():
    session = session_of(Policy(default="reflect", hold_back=1))
    assert feed(session, 0.1, 0.2, 0.9) == [Alarm(2, W, 0.9, 0.5, "reflect")]
    assert session.pending == Review("reflect", 2, W, 64)
    assert session.released == 1 and not session.finished
    for call in (lambda: feed(session, 0.1), lambda: session.finish("stop")):
        with pytest.raises(RuntimeError, match="review is pending"):
            call()
    assert session.answer(0.2, token_ids=[7, 8], text="fine") == [
        Reflection(2, (7, 8), "harmless", 0.2, "fine"),
        Resume(3),
        Text(1, (1,), ""),
    ]
    assert session.pending is None and session.trace.waited == 2
    assert feed(session, 0.9) == [Text(2, (2,), "")]  # muted
    assert session.finish("stop") == [Text(3, (3,), ""), Done(4, "stop")]


@pytest.mark.parametrize(
    ("policy", "harm", "expected"),
    [
        (REFLECT, 0.9, [Reflection(1, (5,), "harmful", 0.9), Halt(1, "alarm", W)]),
        (REFLECT, 0.5, [Reflection(1, (5,), "harmful", 0.5), Halt(1, "alarm", W)]),
        (REFLECT, 0.49, [Reflection(1, (5,), "harmless", 0.49), Resume(2), Text(1, (1,), "")]),
        (
            Policy(default="reflect", reflect=Reflect(limit=0.1)),
            0.2,
            [Reflection(1, (5,), "harmful", 0.2), Halt(1, "alarm", W)],
        ),
        (
            Policy(default="reflect", confirmed="replace", replacement="Sorry."),
            1,
            [Reflection(1, (5,), "harmful", 1.0), Halt(1, "alarm", W, text="Sorry.")],
        ),
        (REFLECT, None, [Reflection(1, (5,), "unanswered", 1.0), Halt(1, "alarm", W)]),
    ],
)
def test_a_reflection_halts_or_resumes(policy, harm, expected):
    session = session_of(policy)
    feed(session, 0.1, 0.9)
    assert session.answer(harm, token_ids=[5]) == expected


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (0.9, [Escalation(2, "harmful", 0.9, "S1"), Halt(1, "alarm", W)]),
        (0.1, [Escalation(2, "harmless", 0.1, "S1"), Resume(2), Text(1, (1,), "")]),
        (None, [Escalation(2, "unanswered", 1.0, "S1"), Halt(1, "alarm", W)]),
    ],
)
def test_a_second_judge_halts_or_resumes_and_without_an_answer_the_alarm_stands(harm, expected):
    session = session_of(ESCALATE)
    assert feed(session, 0.1, 0.9) == [Alarm(1, W, 0.9, 0.5, "escalate")]
    assert session.answer(harm, detail="S1") == expected


@pytest.mark.parametrize("harm", [math.nan, -0.1, 1.1, math.inf, "0.1", (0.1,)])
def test_a_verdict_that_is_no_probability_fails_closed(harm):
    session = session_of(REFLECT)
    feed(session, 0.1, 0.9)
    (halt,) = session.answer(harm)
    assert isinstance(halt, Halt) and halt.reason == "fault" and session.finished


def test_an_answer_that_nobody_asked_for_is_an_error():
    with pytest.raises(RuntimeError, match="no review is pending"):
        session_of(REFLECT).answer(0.1)


def test_the_engine_may_be_lost_during_a_review():
    session = session_of(REFLECT)
    feed(session, 0.1, 0.9)
    assert session.fault("lost") == [Halt(1, "fault", detail="lost")]
    assert session.pending is None and session.finished


def test_a_muted_alarm_is_armed_again_when_the_score_has_fallen():
    session = session_of(Policy(default="reflect", rearm=0.5))
    feed(session, 0.9)
    session.answer(0.0)
    for p in (0.9, 0.3, 0.6, 0.25, 0.9):  # 0.25 is not below half of 0.5
        assert not any(isinstance(event, Alarm) for event in feed(session, p)), p
    feed(session, 0.24)
    assert feed(session, 0.5) == [Alarm(7, W, 0.5, 0.5, "reflect")]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_score_that_stays_high_alarms_again_after_the_limit(limit):
    session = session_of(Policy(default="reflect", mute_limit=limit))
    feed(session, 0.9)
    session.answer(0.0)
    for _ in range(limit):
        assert [type(event) for event in feed(session, 0.9)] == [Text]
    assert feed(session, 0.9) == [Alarm(1 + limit, W, 0.9, 0.5, "reflect")]


def test_only_the_reviewed_category_is_muted():
    session = session_of(Policy(actions={"fraud": "halt"}, default="reflect"), (W, "fraud"))
    session.feed(Step(0, (0.9, 0.1)))
    session.answer(0.0)
    assert session.feed(Step(1, (0.9, 0.9)))[-1] == Halt(1, "alarm", "fraud")


@pytest.mark.parametrize(
    ("policy", "after", "action"),
    [
        (Policy(default="reflect", max_interventions=0), 0, "halt"),
        (Policy(default="reflect", max_interventions=1, mute_limit=0), 1, "halt"),
        (Policy(default="escalate", max_interventions=1, mute_limit=0), 1, "halt"),
        (Policy(default="reflect", max_wait_tokens=0), 0, "halt"),
        (Policy(default="reflect", max_wait_tokens=3, mute_limit=0, max_interventions=9), 1, "halt"),
        (Policy(default="reflect", max_wait_tokens=0, reflect=Reflect(max_tokens=0)), 0, "reflect"),
    ],
)
def test_when_a_budget_is_spent_an_alarm_halts(policy, after, action):
    session = session_of(policy)
    for _ in range(after):
        feed(session, 0.9)
        session.answer(0.0, token_ids=[1, 2, 3] if session.pending.kind == "reflect" else [])
    events = feed(session, 0.9)
    assert events[0].action == action
    assert isinstance(events[-1], Halt) == (action == "halt")


def test_a_second_reflection_gets_what_is_left_of_the_tokens():
    session = session_of(Policy(default="reflect", max_wait_tokens=70, mute_limit=0))
    feed(session, 0.9)
    assert session.pending.tokens == 64
    session.answer(0.0, token_ids=range(64))
    feed(session, 0.9)
    assert session.pending.tokens == 6


@pytest.mark.parametrize(
    ("actions", "done"),
    [
        (("reflect", "halt", "replace"), "halt"),
        (("reflect", "escalate", "replace"), "replace"),
        (("reflect", "escalate", "continue"), "escalate"),
        (("continue", "reflect", "continue"), "reflect"),
    ],
)
def test_the_severest_action_of_one_step_is_done(actions, done):
    categories = ("a", "b", "c")
    policy = Policy(actions=dict(zip(categories, actions, strict=True)), replacement="Sorry.")
    session = session_of(policy, categories)
    events = session.feed(Step(0, (0.9, 0.9, 0.9)))
    assert [event.action for event in events[:3]] == list(actions)
    if done in ("halt", "replace"):
        assert events[3:] == [
            Halt(0, "alarm", categories[actions.index(done)], text="Sorry." if done == "replace" else "")
        ]
    else:
        assert session.pending.kind == done and session.pending.category == categories[actions.index(done)]


def test_a_replacement_is_shown_in_place_of_the_rest():
    session = session_of(Policy(default="replace", replacement=lambda trace: f"({len(trace.token_ids)})", hold_back=1))
    assert feed(session, 0.1, 0.1, 0.9)[-1] == Halt(1, "alarm", W, text="(3)")


def test_a_replacement_that_cannot_be_made_still_halts():
    def broken(trace):
        raise OSError("no file")

    (_, halt) = feed(session_of(Policy(default="replace", replacement=broken)), 0.9)
    assert (halt.reason, halt.category, halt.text) == ("alarm", W, "") and "no file" in halt.detail


def test_staying_with_a_reflection_takes_the_token_back_and_shows_nothing_before_the_score_has_fallen():
    stay = Policy(default="reflect", reflect=Reflect(stay=True), mute_limit=3)
    session = session_of(stay)
    feed(session, 0.1, 0.9)
    assert session.answer(0.9, token_ids=[7]) == [Reflection(1, (7,), "harmful", 0.9), Resume(1)]
    assert session.trace.token_ids == [0] and len(session.trace.scores) == len(session.trace.flag_probs) == 1
    assert session.feed(Step(50, (0.8,))) == []
    assert session.feed(Step(51, (0.2,))) == [Text(1, (50, 51), "")]
    assert session.finish("stop") == [Done(3, "stop")]


def test_staying_with_a_reflection_whose_score_never_falls_halts():
    stay = Policy(default="reflect", reflect=Reflect(stay=True), mute_limit=2, max_interventions=1)
    session = session_of(stay)
    feed(session, 0.1, 0.9)
    session.answer(0.1)
    assert feed(session, 0.9) == [] and feed(session, 0.9) == []
    assert feed(session, 0.9) == [Alarm(3, W, 0.9, 0.5, "halt"), Halt(1, "alarm", W)]
    session = session_of(stay)
    feed(session, 0.1, 0.9)
    session.answer(0.1)
    feed(session, 0.9)
    assert session.finish("stop") == [Halt(1, "alarm", W)]


def test_a_whole_answer_is_released_only_when_it_is_complete():
    session = session_of(Policy(release="end"), decode=str)
    assert feed(session, 0.1, 0.1, 0.1) == []
    assert session.finish("stop") == [Text(0, (0, 1, 2), "012"), Done(3, "stop")]
    session = session_of(Policy(release="end"))
    assert feed(session, 0.1, 0.1, 0.9)[-1] == Halt(0, "alarm", W)


def test_sentences_are_released_whole_and_the_rest_at_the_end():
    words = ["One", ".", " Two", "!", " Thr", "ee"]
    session = session_of(Policy(release="sentence"), decode=words.__getitem__)
    assert [feed(session, 0.1) for _ in words] == [
        [],
        [],
        [Text(0, (0, 1), "One.")],
        [],
        [Text(2, (2, 3), " Two!")],
        [],
    ]
    assert session.finish("length") == [Text(4, (4, 5), " Three"), Done(6, "length")]


@pytest.mark.parametrize("policy", [REFLECT, ESCALATE])
def test_what_comes_of_a_review_cannot_be_replayed(policy):
    session = session_of(Policy(observe=True))
    feed(session, 0.1, 0.9)
    session.finish("stop")
    with pytest.raises(RedflagError, match="live run"):
        replay(session.trace, Thresholds.manual(0.5, [W]), policy)
    assert replay(session.trace, Thresholds.manual(0.95, [W]), policy).end == Done(2, "stop")


POLICIES = st.builds(
    Policy,
    default=st.sampled_from(["continue", "halt", "reflect", "replace", "escalate"]),
    hold_back=st.integers(0, 3),
    release=st.sampled_from(["steps", "sentence", "end"]),
    confirmed=st.sampled_from(["halt", "replace"]),
    replacement=st.just("Sorry."),
    reflect=st.builds(Reflect, stay=st.booleans(), max_tokens=st.integers(0, 5)),
    max_interventions=st.integers(0, 3),
    max_wait_tokens=st.integers(0, 8),
    rearm=st.sampled_from([0.1, 0.5, 1.0]),
    mute_limit=st.integers(0, 4),
    observe=st.booleans(),
)


@given(POLICIES, st.lists(st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.9]), max_size=30), st.data())
def test_whatever_happens_released_tokens_are_judged_and_in_order_and_one_event_is_the_last(policy, probs, data):
    session = session_of(policy, decode=lambda token_id: data.draw(st.sampled_from(["a", ".", " b", "\n", ""])))
    events = []
    alarms = 0
    for token_id, p in enumerate(probs):
        before = session.released
        new = session.feed(Step(token_id, (p,)))
        alarms += sum(isinstance(event, Alarm) and event.action != "continue" for event in new)
        if session.pending is not None:
            assert session.released == before
            assert all(isinstance(event, Alarm) for event in new)
            harm = data.draw(st.sampled_from([0.0, 0.4, 0.6, 1.0, None]))
            new = new + session.answer(harm, token_ids=range(session.pending.tokens))
        events += new
        if session.finished:
            break
    if not session.finished:
        events += session.finish("stop")
    assert session.trace.events == events
    assert [isinstance(event, Halt | Done) for event in events].count(True) == 1
    assert isinstance(events[-1], Halt | Done)
    shown = [i for event in events if isinstance(event, Text) for i in event.token_ids]
    assert shown == session.trace.token_ids[: len(shown)] and len(shown) == session.released
    if isinstance(events[-1], Done):
        assert shown == session.trace.token_ids
    reviews = sum(isinstance(event, Reflection | Escalation) for event in events)
    assert reviews <= policy.max_interventions
    assert session.trace.waited <= policy.max_wait_tokens
    if policy.default in ("halt", "replace") and not policy.observe and alarms:
        assert isinstance(events[-1], Halt)
