"""The time left is said now and then, and short steps say nothing."""

from __future__ import annotations

import pytest

from redflag.scoring import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_countdown_says_every_fifteen_seconds_how_long_the_step_still_takes(clock, capsys):
    countdown = progress.Countdown("reading", 4000, "tokens")
    for seconds, done in ((1, 100), (16, 1000), (20, 1500), (40, 2000), (80, 4000)):
        clock[0] = 100.0 + seconds
        countdown(done)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 1,000/4,000 tokens, 48 s left",
        "reading: 2,000/4,000 tokens, 40 s left",
        "reading: 4,000/4,000 tokens, 80 s",
    ]


def test_a_short_step_says_nothing(clock, capsys):
    countdown = progress.Countdown("reading", 10, "rows")
    countdown(0)
    clock[0] += 1.0
    countdown(10)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_one_line_changes(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    countdown = progress.Countdown("reading", 10, "rows")
    clock[0] += 5.0
    countdown(5)
    clock[0] += 5.0
    countdown(10)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.count("\r") == 2 and "5 s left" in said
