"""Tokens shown before a halt, by formula: exactly what a session releases, whatever the policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.calibrating import replay
from redflag.events import Done, Step, Text, Trace
from redflag.lab.evaluating.exposure import exposed, exposure, released, released_sentences
from redflag.lab.report.method import Exposed
from redflag.scoring.recording import Recording
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.replay import replay as replayed
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

PIECES = ["It", " is", " so", ".", "\n", " 3", ".5", "!", " \"Yes.\"", "。", "", "\nThen", " So"]  # fmt: skip
MONITORS = [MonitorConfig(), MonitorConfig("run", window=2), MonitorConfig("ema", decay=0.5), MonitorConfig(warm_up=3)]
LEVELS = [0.0, 0.25, 0.5, 0.75, 1.0]

# A response: probabilities of two flags and the text of each token; the last 0 to 2 steps end the turn.
responses = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(LEVELS), st.sampled_from(LEVELS), st.sampled_from(PIECES)), min_size=2, max_size=16
    ),
    st.integers(0, 2),
)


def recorded(found: Any) -> tuple[Recording, list[str]]:
    steps, tail = found
    length = len(steps) - tail
    probs = [[a, b] for a, b, _ in steps]
    row = {"flag_probs": probs[:length], "tail_probs": probs[length:], "token_ids": list(range(length))}
    return Recording.of(["x", "y"], [row]), [piece for *_, piece in steps[:length]]


@settings(max_examples=80, deadline=None)
@given(responses, st.sampled_from(MONITORS), st.sampled_from([0.3, 0.6, 1.0]), st.integers(0, 9))
def test_the_formula_is_what_a_session_releases(found: Any, config: MonitorConfig, threshold: float, hold: int) -> None:
    recording, texts = recorded(found)
    length = len(texts)
    thresholds = Thresholds({"x": threshold, "y": 0.5}, monitor=config)
    alarms = replay.first_alarms(replay.scores(config, recording), recording, [threshold, 0.5])

    steps = [Step(i, tuple(map(float, probs))) for i, probs in enumerate(recording.steps(0))]
    trace = Trace(
        id="r",
        categories=("x", "y"),
        token_ids=[step.token_id for step in steps],
        flag_probs=[step.flag_probs for step in steps],
        events=[Done(len(steps), "stop")],
    )
    for release, formula in (
        ("steps", released(alarms, recording.lengths, hold)),
        ("end", released(alarms, recording.lengths, None)),
    ):
        again = replayed(trace, thresholds, Policy(hold_back=hold, release=release))
        shown = sum(len(event.token_ids) for event in again.events if isinstance(event, Text))
        assert min(shown, length) == formula[0]

    # By sentence a session needs the texts; the tokens that end the turn have none.
    policy = Policy(hold_back=hold, release="sentence")
    session = Session(thresholds, policy, ["x", "y"], lambda token: texts[token] if token < length else "")
    for step in steps:
        if not session.finished:
            session.feed(step)
    if not session.finished:
        session.finish("stop")
    assert min(session.released, length) == released_sentences(alarms, recording.lengths, [texts], hold)[0]


@pytest.mark.parametrize(
    ("alarm", "hold_back", "shown"),
    [
        (-1, 0, 10),  # no alarm: all of it, whatever is held meanwhile
        (-1, 8, 10),
        (-1, None, 10),
        (0, 0, 0),
        (5, 0, 5),  # tokens 0 to 4 have been judged and shown
        (5, 4, 1),
        (5, 8, 0),
        (10, 0, 10),  # the alarm comes when the turn ends
        (10, 4, 6),
        (11, 4, 7),
        (5, None, 0),
    ],
)
def test_released_table(alarm: int, hold_back: int | None, shown: int) -> None:
    assert released(np.array([alarm]), np.array([10]), hold_back).tolist() == [shown]


def test_whole_sentences_table() -> None:
    texts = ["It", " is", " so", ".", " Then", " it", " ends", "."]
    alarms = np.array([2, 4, 5, 7, -1])
    # The full stop is a sentence's end only once " Then" has been judged, which is step 4.
    found = released_sentences(alarms, np.full(5, 8), [texts] * 5)
    assert found.tolist() == [0, 0, 4, 4, 8]


def test_exposure_table() -> None:
    """Onset 4 of 10 tokens; alarms at 6, at 4, at 2, at none."""
    alarms, onsets, lengths = np.array([6, 4, 2, -1]), np.full(4, 4), np.full(4, 10)
    assert exposed(released(alarms, lengths, 0), onsets).tolist() == [2, 0, 0, 6]
    found = exposure(alarms, onsets, lengths, hold_backs=(0, 2, 40))
    assert found["0"] == Exposed(mean=2.0, median=1.0, p90=6.0, none=0.5)
    assert found["2"] == Exposed(mean=1.5, median=0.0, p90=6.0, none=0.75)
    # A response that never alarms is shown whole under every policy.
    assert found["40"] == found["end"] == found["2"]
    assert "sentence" not in found and exposure(alarms[:0], onsets[:0], lengths[:0]) == {}
