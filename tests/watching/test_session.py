from __future__ import annotations

import math

import pytest

from redflag.errors import RedflagError
from redflag.trace import Alarm, Done, Halt, Step, Text
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.replay import replay
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

W = "weapons"


def letter(token_id: int) -> str:
    return chr(ord("a") + token_id % 26)


def run(probs, policy=None, *, threshold=0.5, monitor=None, reason="stop"):
    """Feeds token t with probs[t]; returns the session and what every call returned."""
    session = Session(Thresholds.manual(threshold, [W], monitor), policy or Policy(), [W], letter)
    returned = []
    for token_id, p in enumerate(probs):
        returned.append(session.feed(Step(token_id, (p,))))
        if session.finished:
            return session, returned
    returned.append(session.finish(reason))
    return session, returned


def alarm(position, score, action="halt", category=W, threshold=0.5):
    return Alarm(position, category, score, threshold, action)


def text(position, *token_ids):
    return Text(position, token_ids, "".join(map(letter, token_ids)))


TABLE = [
    ("no alarm", (0.1, 0.2), Policy(), [[text(0, 0)], [text(1, 1)], [Done(2, "stop")]]),
    (
        "no alarm, one held back",
        (0.1, 0.2),
        Policy(hold_back=1),
        [[], [text(0, 0)], [text(1, 1), Done(2, "stop")]],
    ),
    (
        "no alarm, three held back",
        (0.1,) * 5,
        Policy(hold_back=3),
        [[], [], [], [text(0, 0)], [text(1, 1)], [text(2, 2, 3, 4), Done(5, "stop")]],
    ),
    (
        "no alarm, response shorter than the hold-back",
        (0.1, 0.2),
        Policy(hold_back=3),
        [[], [], [text(0, 0, 1), Done(2, "stop")]],
    ),
    ("alarm at the first token", (0.9,), Policy(), [[alarm(0, 0.9), Halt(0, "alarm", W)]]),
    ("alarm at the first token, held back", (0.9,), Policy(hold_back=3), [[alarm(0, 0.9), Halt(0, "alarm", W)]]),
    (
        "alarm in the middle",
        (0.1, 0.2, 0.9, 0.1),
        Policy(),
        [[text(0, 0)], [text(1, 1)], [alarm(2, 0.9), Halt(2, "alarm", W)]],
    ),
    (
        "alarm in the middle, one held back",
        (0.1, 0.2, 0.9),
        Policy(hold_back=1),
        [[], [text(0, 0)], [alarm(2, 0.9), Halt(1, "alarm", W)]],
    ),
    (
        "alarm in the middle, three held back",
        (0.1, 0.2, 0.3, 0.4, 0.9),
        Policy(hold_back=3),
        [[], [], [], [text(0, 0)], [alarm(4, 0.9), Halt(1, "alarm", W)]],
    ),
    (
        "alarm before the hold-back is full: nothing is shown",
        (0.1, 0.2, 0.9),
        Policy(hold_back=3),
        [[], [], [alarm(2, 0.9), Halt(0, "alarm", W)]],
    ),
    ("a score on the threshold is an alarm", (0.5,), Policy(), [[alarm(0, 0.5), Halt(0, "alarm", W)]]),
    (
        "continue reports every crossing once and goes on",
        (0.9, 0.8, 0.1, 0.7),
        Policy(default="continue"),
        [
            [alarm(0, 0.9, "continue"), text(0, 0)],
            [text(1, 1)],
            [text(2, 2)],
            [alarm(3, 0.7, "continue"), text(3, 3)],
            [Done(4, "stop")],
        ],
    ),
    (
        "observe goes on whatever the policy says, and holds back all the same",
        (0.9, 0.9),
        Policy(actions={W: "halt"}, observe=True, hold_back=1),
        [[alarm(0, 0.9, "continue")], [text(0, 0)], [text(1, 1), Done(2, "stop")]],
    ),
    ("an empty response is done", (), Policy(hold_back=2), [[Done(0, "stop")]]),
]


@pytest.mark.parametrize(("probs", "policy", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_events_are_those_of_the_table(probs, policy, expected):
    session, returned = run(probs, policy)
    assert returned == expected
    flat = [event for events in expected for event in events]
    assert session.trace.events == flat
    assert session.finished
    assert session.released == sum(len(event.token_ids) for event in flat if isinstance(event, Text))
    assert session.trace.token_ids == list(range(len(session.trace.flag_probs)))
    assert session.trace.end == flat[-1]


@pytest.mark.parametrize("hold_back", [0, 1, 3])
@pytest.mark.parametrize("last", [2, 3, 4])
def test_an_alarm_at_the_very_end_drops_what_is_held(hold_back, last):
    session, returned = run([0.1] * last + [0.9], Policy(hold_back=hold_back))
    assert returned[-1] == [alarm(last, 0.9), Halt(max(0, last - hold_back), "alarm", W)]
    assert session.released == max(0, last - hold_back)


def test_warm_up_steps_raise_no_alarm_but_are_released_and_recorded():
    session, returned = run([0.9, 0.9, 0.9], monitor=MonitorConfig(warm_up=2))
    assert returned == [[text(0, 0)], [text(1, 1)], [alarm(2, 0.9), Halt(2, "alarm", W)]]
    assert session.trace.scores == [(0.0,), (0.0,), (0.9,)]
    assert session.trace.flag_probs == [(0.9,)] * 3


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_reason_for_the_end_is_passed_on(reason):
    assert run([0.1], reason=reason)[1][-1] == [Done(1, reason)]


CATEGORIES = ("weapons", "fraud", "slurs")
THRESHOLDS = Thresholds({"slurs": 0.2, "weapons": 0.5, "fraud": 0.8})
POLICY = Policy(actions={"slurs": "continue"})


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ((0.4, 0.7, 0.1), [Text(0, (7,), "")]),
        ((0.1, 0.1, 0.3), [alarm(0, 0.3, "continue", "slurs", 0.2), Text(0, (7,), "")]),
        ((0.1, 0.9, 0.1), [alarm(0, 0.9, "halt", "fraud", 0.8), Halt(0, "alarm", "fraud")]),
        (
            (0.1, 0.9, 0.3),
            [
                alarm(0, 0.9, "halt", "fraud", 0.8),
                alarm(0, 0.3, "continue", "slurs", 0.2),
                Halt(0, "alarm", "fraud"),
            ],
        ),
        (
            (0.6, 0.9, 0.1),
            [
                alarm(0, 0.6, "halt", "weapons", 0.5),
                alarm(0, 0.9, "halt", "fraud", 0.8),
                Halt(0, "alarm", "weapons"),
            ],
        ),
    ],
)
def test_categories_have_their_own_thresholds_and_actions(probs, expected):
    assert Session(THRESHOLDS, POLICY, CATEGORIES).feed(Step(7, probs)) == expected


def test_a_category_that_goes_on_does_not_hide_one_that_halts_later():
    session = Session(THRESHOLDS, POLICY, CATEGORIES)
    session.feed(Step(1, (0.0, 0.0, 0.9)))
    assert session.feed(Step(2, (0.9, 0.0, 0.9))) == [
        alarm(1, 0.9, "halt", "weapons", 0.5),
        Halt(1, "alarm", "weapons"),
    ]


@pytest.mark.parametrize(
    "step",
    [
        Step(3, (math.nan,)),
        Step(3, (math.inf,)),
        Step(3, (-0.1,)),
        Step(3, (1.1,)),
        Step(3, ()),
        Step(3, (0.1, 0.1)),
        Step(3, None),  # type: ignore[arg-type]
        Step(3, (None,)),  # type: ignore[arg-type]
        Step(None, (0.1,)),  # type: ignore[arg-type]
        Step(3.5, (0.1,)),  # type: ignore[arg-type]
        None,
    ],
    ids=repr,
)
@pytest.mark.parametrize("observe", [False, True])
def test_a_step_that_cannot_be_judged_ends_the_response_and_shows_nothing_more(step, observe):
    session = Session(Thresholds.manual(0.5, [W]), Policy(hold_back=1, observe=observe), [W], letter)
    assert session.feed(Step(0, (0.1,))) == []
    assert session.feed(Step(1, (0.1,))) == [text(0, 0)]
    (halt,) = session.feed(step)
    assert isinstance(halt, Halt) and (halt.position, halt.reason, halt.category) == (1, "fault", None)
    assert halt.detail.startswith("step 2: ")
    assert session.finished and session.released == 1
    assert session.trace.token_ids == [0, 1] and len(session.trace.scores) == 2


def test_a_lost_engine_drops_what_is_held_and_is_told_once():
    session = Session(Thresholds.manual(0.5, [W]), Policy(hold_back=2), [W])
    for token_id in range(3):
        session.feed(Step(token_id, (0.1,)))
    assert session.fault("connection lost") == [Halt(1, "fault", detail="connection lost")]
    assert session.fault("connection lost") == []
    assert session.trace.events == [Text(0, (0,), ""), Halt(1, "fault", detail="connection lost")]


@pytest.mark.parametrize("end", ["alarm", "fault", "stop"])
def test_nothing_is_taken_in_after_the_end(end):
    session = Session(Thresholds.manual(0.5, [W]), Policy(), [W])
    if end == "alarm":
        session.feed(Step(0, (0.9,)))
    elif end == "fault":
        session.fault("lost")
    else:
        session.finish("stop")
    events = list(session.trace.events)
    with pytest.raises(RuntimeError, match="over"):
        session.feed(Step(1, (0.1,)))
    with pytest.raises(RuntimeError, match="over"):
        session.finish("stop")
    assert session.fault("late") == []
    assert session.trace.events == events


def test_decode_sees_the_judged_tokens_in_order_and_may_keep_bytes():
    seen = []

    def decode(token_id):
        seen.append(token_id)
        return [None, "é", "", "!"][token_id]

    session = Session(Thresholds.manual(0.5, [W]), Policy(hold_back=1), [W], decode)
    for token_id in range(3):
        session.feed(Step(token_id, (0.1,)))
    assert seen == [0, 1, 2]
    session.feed(Step(3, (0.9,)))
    assert seen == [0, 1, 2]
    assert [event.text for event in session.trace.events if isinstance(event, Text)] == ["", "é"]


@pytest.mark.parametrize("hold_back", [0, 1])
def test_what_cannot_be_decoded_is_a_fault(hold_back):
    def decode(token_id):
        raise KeyError(token_id)

    session = Session(Thresholds.manual(0.5, [W]), Policy(hold_back=hold_back), [W], decode)
    (halt,) = session.feed(Step(9, (0.1,)))
    assert halt == Halt(0, "fault", detail="token 0 cannot be decoded: KeyError: 9")
    assert session.finished and session.trace.events == [halt]


@pytest.mark.parametrize(
    ("thresholds", "policy", "categories", "says"),
    [
        (["a"], Policy(), ["a", "b"], "thresholds must name exactly the flags"),
        (["a", "b"], Policy(), ["a"], "thresholds must name exactly the flags"),
        (["a"], Policy(), ["a", "a"], "thresholds must name exactly the flags"),
        (["a"], Policy(), [], "thresholds must name exactly the flags"),
        (["a"], Policy(actions={"A": "halt"}), ["a"], r"actions must name flags among .* \(got \['A'\]"),
    ],
)
def test_a_category_that_would_go_unwatched_is_refused(thresholds, policy, categories, says):
    with pytest.raises(RedflagError, match=says):
        Session(Thresholds.manual(0.5, thresholds), policy, categories)


def test_a_halted_trace_cannot_be_replayed_beyond_its_halt():
    session, _ = run([0.1, 0.6], Policy())
    assert replay(session.trace, Thresholds.manual(0.6, [W]), Policy(hold_back=1)).end == Halt(0, "alarm", W)
    with pytest.raises(RedflagError, match="recorded under observe"):
        replay(session.trace, Thresholds.manual(0.7, [W]), Policy())


def test_a_trace_that_its_caller_left_replays_without_an_end():
    session = Session(Thresholds.manual(0.5, [W]), Policy(), [W])
    session.feed(Step(4, (0.1,)))
    assert replay(session.trace, Thresholds.manual(0.5, [W]), Policy()).events == [Text(0, (4,), "")]


def test_work_per_step_does_not_grow_with_the_response():
    class Counting(list):
        copied = 0

        def __getitem__(self, index):
            item = super().__getitem__(index)
            Counting.copied += len(item) if isinstance(index, slice) else 1
            return item

        def __iter__(self):
            raise AssertionError("the whole history was walked through")

    session = Session(Thresholds.manual(0.5, [W]), Policy(hold_back=3), [W])
    for name in ("token_ids", "flag_probs", "scores", "events"):
        setattr(session.trace, name, Counting())
    for token_id in range(500):
        session.feed(Step(token_id, (0.1,)))
    assert Counting.copied == 497 + 500  # every token once when it is decoded and once when it is released
