"""The time left is shown now and then, short stages show nothing, and a bar leaves results alone."""

from __future__ import annotations

import sys

import pytest
from screen import terminal

from redflag import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_thirty_seconds_with_the_time_left(clock, capsys):
    with progress.Progress("reading", 4000, "tokens") as shown:
        for seconds, done in ((1, 100), (31, 1000), (40, 1500), (80, 2000), (85, 3000), (160, 4000)):
            clock[0] = 100.0 + seconds
            shown(done)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 1,000/4,000 tokens, 93 s left",
        "reading: 2,000/4,000 tokens, 80 s left",
        "reading: 4,000/4,000 tokens, 3 min",
    ]


def test_a_short_stage_shows_nothing(clock, capsys):
    with progress.Progress("reading", 10, "rows") as shown:
        shown(0)
        clock[0] += 1.0
        shown(10)
    assert capsys.readouterr().err == ""


def test_what_was_done_before_does_not_make_the_time_left_shorter(clock, capsys):
    with progress.Progress("reading", 100, "rows", begin=90) as shown:
        clock[0] += 40.0
        shown(95, "12 refusals")
    assert capsys.readouterr().err.splitlines()[0] == "reading: 95/100 rows, 40 s left, 12 refusals"


def test_a_stage_of_unknown_length_says_how_long_it_took(clock, capsys):
    with progress.Progress("judging", None, "rows") as shown:
        clock[0] += 31.0
        shown(70_000)
        shown(80_000)
    assert capsys.readouterr().err.splitlines() == ["judging: 70,000 rows", "judging: 80,000 rows, 31 s"]


def test_a_stage_that_is_broken_off_is_not_said_to_have_ended(clock, capsys):
    with pytest.raises(KeyboardInterrupt), progress.Progress("reading", 10, "rows") as shown:
        clock[0] += 31.0
        shown(4)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["reading: 4/10 rows, 46 s left"]


def test_items_that_are_made_together_are_counted_together(clock, capsys):
    def bursts():
        for index in range(10):
            clock[0] += 40.0 if index % 4 == 0 else 0.0
            yield index

    assert list(progress.track(bursts(), "reading", 10, "rows", 4)) == list(range(10))
    assert capsys.readouterr().err.splitlines() == [
        "reading: 4/10 rows, 60 s left",
        "reading: 8/10 rows, 20 s left",
        "reading: 10/10 rows, 2 min",
    ]


def test_items_are_passed_on_and_counted(clock, capsys):
    def slow():
        for item in "abc":
            clock[0] += 20.0
            yield item

    assert list(progress.track(slow(), "reading", 3, "rows")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == ["reading: 2/3 rows, 20 s left", "reading: 3/3 rows, 60 s"]


def test_on_a_terminal_a_bar_stays_below_what_others_print_and_off_the_results(clock, capsys, monkeypatch):
    screen = terminal(monkeypatch)
    with progress.Progress("[b]reading", 10, "rows") as shown:
        clock[0] += 5.0
        shown(5)
        print("a row is doubtful", file=sys.stderr)
        print("a result")
        clock[0] += 5.0
        shown(10)
    screen = screen.getvalue()
    assert capsys.readouterr().out == "a result\n" and "a result" not in screen
    assert "[b]reading: 5/10 rows, 5 s left" in screen and "a row is doubtful\n" in screen
    assert screen.index("a row is doubtful") < screen.index("[b]reading: 10/10 rows, 10 s")
    assert screen.rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_a_bar_that_is_broken_off_gives_the_cursor_back(clock, monkeypatch):
    screen = terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), progress.Progress("reading", 10, "rows") as shown:
        clock[0] += 5.0
        shown(5)
        raise KeyboardInterrupt
    assert screen.getvalue().rstrip().endswith("\x1b[?25h") and sys.stderr is screen


def test_a_stage_inside_another_has_a_bar_of_its_own(clock, monkeypatch):
    screen = terminal(monkeypatch)
    with progress.Progress("training", 3, "steps") as outer:
        for step in (1, 2, 3):
            clock[0] += 5.0
            outer(step)
            if step == 1:
                with progress.Progress("evaluating", 2, "batches") as inner:
                    for batch in (1, 2):
                        clock[0] += 5.0
                        inner(batch)
    shown = screen.getvalue()
    assert "evaluating: 1/2 batches, 5 s left" in shown and "training: 2/3 steps" in shown
    assert shown.index("evaluating: 1/2") < shown.rindex("training: 3/3 steps") and sys.stderr is screen
