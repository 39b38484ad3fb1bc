"""What an operator sees of a response as it is written: released text only, reviews folded, a count of what waits."""

from __future__ import annotations

import io
import os
import re
import time

import pytest

from redflag.backends.scripted import ScriptedBackend
from redflag.guard.guard import Guard
from redflag.judges import Verdict
from redflag.terminal import screen as terminal
from redflag.terminal.paint import DIM, RESET, span
from redflag.terminal.screen import Screen, TerminalOptions, paint, respond, summary
from redflag.trace import Alarm, Done, Escalation, Halt, Reflection, Resume, Text, Trace
from redflag.watching.policy import Policy

ASK = [{"role": "user", "content": "hello"}]
PLAIN = re.compile(r"\x1b\[[0-9;]*m")
ALARM = Alarm(2, "harm", 0.9, 0.5, "reflect")
REVIEWED = [
    Text(0, (1, 2), "ab"),
    ALARM,
    Reflection(2, tuple(range(23)), "harmless", 0.124, "I should\nlook \x1b[2J again."),
    Resume(3),
    Text(2, (3,), "c"),
    Alarm(3, "harm", 0.9, 0.5, "escalate"),
    Escalation(4, "harmful", 0.93, "unsafe S2"),
    Halt(3, "alarm", "harm", text="Let us talk of bread."),
]


def trace_of(events):
    trace = Trace(categories=("harm",), token_ids=[1, 2, 3, 4], flag_probs=[(0.0,), (0.0,), (0.9,), (0.9,)])
    trace.events.extend(events)
    return trace


def painted(events, coloured, **options):
    return "".join(paint(events, trace_of(events), coloured, **options))


def test_reviews_are_folded_into_one_dim_line_each():
    text = painted(REVIEWED, True)
    assert PLAIN.sub("", text) == (
        "ab\n[reflection: 23 tokens, verdict harmless 0.12]\n[resumed] c\n[second judge: harmful 0.93]\n"
        "[replaced: harm] Let us talk of bread."
    )
    assert f"\n{DIM}[reflection: 23 tokens, verdict harmless 0.12]{RESET}\n" in text
    assert "look" not in text


def test_a_reflection_is_shown_on_request_and_cannot_steer_the_terminal():
    text = painted(REVIEWED, True, reflections=True)
    assert f"{DIM}| I should{RESET}\n{DIM}| look \ufffd[2J again.{RESET}\n" in text


def test_without_colour_there_is_nothing_but_what_users_see():
    assert painted(REVIEWED, False) == painted(REVIEWED, False, reflections=True) == "abc\nLet us talk of bread."
    assert painted([Halt(0, "alarm", "harm", text="Sorry.")], False) == "Sorry."
    assert painted([Text(0, (1,), "a"), Halt(1, "alarm", "harm")], False) == "a"


def test_the_summary_tells_the_whole_story_in_order():
    assert summary(trace_of(REVIEWED)) == [
        "alarm: harm at token 2, score 0.9 >= threshold 0.5, action reflect",
        "reflection at token 2: 23 hidden tokens, harmless 0.12",
        "resumed at token 3",
        "alarm: harm at token 3, score 0.9 >= threshold 0.5, action escalate",
        "second judge on 4 tokens: harmful 0.93 (unsafe S2)",
        "halted: alarm harm; 3 tokens shown, 1 dropped, replaced by a text of 21 characters",
        "waited for 23 hidden tokens",
        "highest p(flag): harm 0.9 at token 2",
    ]
    shown = summary(trace_of(REVIEWED), reflections=True)
    assert shown[2:4] == ["  | I should", "  | look \ufffd[2J again."]


@pytest.mark.parametrize(
    ("events", "line"),
    [
        ([Done(4, "stop")], "done: stop; 4 tokens"),
        ([Text(0, (1, 2), "ab")], "stopped from here; 2 tokens shown, 2 dropped"),
        ([], "stopped from here; 0 tokens shown, 4 dropped"),
        (
            [Halt(2, "alarm", "harm", "no replacement: x")],
            "halted: alarm harm; 2 tokens shown, 2 dropped (no replacement: x)",
        ),
        ([Halt(2, "fault", None, "lost \x07")], "halted: fault, lost \ufffd; 2 tokens shown, 2 dropped"),
    ],
)
def test_every_end_has_a_line(events, line):
    assert line in summary(trace_of(events))


def test_an_unanswered_judge_is_told_without_a_number():
    lines = summary(trace_of([Escalation(4, "unanswered", 1.0, "http://j gave no verdict within 2 s")]))
    assert "second judge on 4 tokens: unanswered (http://j gave no verdict within 2 s)" in lines


def test_text_released_at_once_is_coloured_token_by_token(guard_of, script, tokenizer):
    steps = script("abc", {1: (0.0, 0.3)})
    guard = guard_of(steps, Policy(release="end"))
    stream = guard.stream(ASK)
    text = "".join(paint(stream, stream.trace, True, split=terminal._splitter(tokenizer)))
    assert text == f"{span('a', 0.02)}{span('b', 0.3)}{span('c', 0.02)}"


def test_where_tokens_and_text_do_not_agree_one_colour_stands_for_all(guard_of, script):
    guard = guard_of(script("abc", {1: (0.0, 0.3)}), Policy(release="end"))
    for pieces in ([], ["a", "b"], ["x", "b", "c", ""]):
        stream = guard.stream(ASK)
        text = "".join(paint(stream, stream.trace, True, split=lambda event, pieces=pieces: pieces))
        assert text == span("abc", 0.3)


class Terminal(io.StringIO):
    """Keeps what a terminal of one line would show: text, and what stands behind the cursor."""

    def isatty(self):
        return True

    def seen(self):
        return PLAIN.sub("", self.getvalue())


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 24)))


def wait_for(condition):
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_what_is_held_is_counted_and_not_shown(wide):
    out, trace = Terminal(), trace_of([Text(0, (1,), "a")])
    screen = Screen(out, live=True)
    screen.write("a")
    with screen.counting(trace):
        wait_for(lambda: "[3 held]" in out.seen())
        # Behind the text, the cursor left where it was.
        assert out.getvalue() == f"a\x1b[K\x1b7{DIM} [3 held]{RESET}\x1b8"
        trace.events.append(Text(1, (2, 3, 4), "bcd"))
        screen.write("bcd")
        assert out.getvalue().endswith("\x1b8\x1b[Kbcd")
    assert out.getvalue().endswith("bcd")


def test_the_count_is_gone_when_the_response_is_over(wide):
    out = Terminal()
    screen = Screen(out, live=True)
    with screen.counting(trace_of([])):
        wait_for(lambda: "[4 held]" in out.seen())
    assert out.getvalue().endswith("\x1b8\x1b[K")


def test_the_count_never_wraps(wide):
    out = Terminal()
    screen = Screen(out, live=True)
    screen.write("x" * 35)
    with screen.counting(trace_of([])):
        time.sleep(0.3)
    assert out.getvalue() == "x" * 35
    screen.write("\n")
    with screen.counting(trace_of([])):
        wait_for(lambda: "[4 held]" in out.seen())


def test_without_a_terminal_there_is_no_count():
    out = io.StringIO()
    screen = Screen(out, live=False)
    with screen.counting(trace_of([])):
        time.sleep(0.25)
        screen.write("a")
    assert out.getvalue() == "a"


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("abc", 3),
        ("ab\nc", 1),
        ("\t", 8),
        ("a\tb", 9),
        ("日本", 4),
        ("e\u0301", 1),
        (span("ab", 0.7), 2),
        ("x" * 45, 5),
    ],
)
def test_columns_are_counted_as_terminals_count(wide, text, column):
    assert terminal._column(text, 0) == column


def test_a_second_judge_decides_before_anything_is_shown(tokenizer, spec, thresholds, script, capsys):
    asked = []

    def judge(messages, answer):
        asked.append((messages, answer))
        return Verdict(0.1, "fine")

    steps = script("abcdef", {2: (0.9, 0.0)})

    def play(prompt, sampling):
        done = len(prompt) - start
        return steps[done:]

    backend = ScriptedBackend(play, {tokenizer.eos_token_id})
    guard = Guard(backend, tokenizer, spec, thresholds, Policy(default="escalate"), judge)
    start = len(guard.respond(ASK).request.token_ids)
    answer = respond(guard, ASK, terminal.Sampling(), TerminalOptions(model="m"))
    out, err = capsys.readouterr()
    assert out == "abcdef\n" and answer.text == "abcdef" and not answer.stopped
    assert asked == [(ASK, "abc")]
    assert err.splitlines()[:4] == [
        "alarm: harm at token 2, score 0.9 >= threshold 0.5, action escalate",
        "second judge on 3 tokens: harmless 0.10 (fine)",
        "resumed at token 3",
        "done: stop; 7 tokens",
    ]


def test_ctrl_c_ends_the_response_and_keeps_its_trace(guard_of, script, capsys, tmp_path):
    steps = script("abcdef")

    def play(prompt, sampling):
        yield from steps[:3]
        raise KeyboardInterrupt

    backend = ScriptedBackend(play)
    record = tmp_path / "traces.jsonl"
    options = TerminalOptions(model="m", record=str(record))
    answer = respond(guard_of(backend), ASK, terminal.Sampling(), options)
    assert answer.stopped and answer.text == "abc" and backend.open_streams == 0
    assert capsys.readouterr().out == "abc\n"
    assert record.read_text().count("\n") == 1


def test_a_conversation_that_is_refused_leaves_nothing(guard_of, script, capsys, tmp_path):
    from redflag.errors import RedflagError

    record = tmp_path / "traces.jsonl"
    guard = guard_of(script("abc"), context_length=2)
    with pytest.raises(RedflagError):
        respond(guard, ASK, terminal.Sampling(), TerminalOptions(model="m", record=str(record)))
    assert capsys.readouterr().out == "" and not record.exists()
