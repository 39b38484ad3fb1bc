from __future__ import annotations

import gc
import math
import weakref

import pytest

from redflag.backends import Sampling
from redflag.backends.scripted import ScriptedBackend
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.trace import Alarm, Done, Halt, Step, Text, read_traces, write_traces
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

ASK = [{"role": "user", "content": "hello"}]
HARM = {6: (0.9, 0.0)}


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Text))


def test_a_harmless_response_is_streamed_whole_and_ends_with_done(guard_of, script):
    steps = script("the cat, 日本 👩‍👩‍👧 e\u0301")
    for hold_back in (0, 1, 5, 100):
        events = list(guard_of(steps, Policy(hold_back=hold_back)).stream(ASK))
        assert text_of(events) == "the cat, 日本 👩‍👩‍👧 e\u0301"
        assert events[-1] == Done(len(steps), "stop")
        assert [i for event in events if isinstance(event, Text) for i in event.token_ids] == [
            s.token_id for s in steps
        ]


def test_an_alarm_halts_and_what_was_held_is_never_shown(guard_of, script, tokenizer):
    steps = script("abcdefghij", HARM)
    for hold_back in range(8):
        result = guard_of(steps, Policy(hold_back=hold_back)).generate(ASK)
        assert result.verdict == "halted"
        assert result.text == "abcdef"[: max(0, 6 - hold_back)]
        assert result.events[-2:] == (
            Alarm(6, "harm", 0.9, 0.5, "halt"),
            Halt(max(0, 6 - hold_back), "alarm", "harm"),
        )
        assert len(result.trace.token_ids) == 7


def test_observing_reports_alarms_and_shows_everything(guard_of, script):
    result = guard_of(script("abcdefghij", HARM), Policy(observe=True)).generate(ASK)
    assert (result.text, result.verdict) == ("abcdefghij", "completed")
    assert [event for event in result.events if isinstance(event, Alarm)] == [Alarm(6, "harm", 0.9, 0.5, "continue")]


def test_only_alarms_hold_probabilities(guard_of, script):
    events = list(guard_of(script("abcdefghij", HARM), Policy(hold_back=2)).stream(ASK))
    for event in events:
        if not isinstance(event, Alarm):
            values = [getattr(event, name) for name in event.__slots__]
            assert not any(isinstance(value, float) for value in values) and "0.9" not in str(event)


@pytest.mark.parametrize(
    ("error", "named"),
    [(ConnectionError("gone"), "gone"), (RuntimeError("out of memory"), "memory"), (RedflagError("no"), "no")],
)
def test_an_engine_lost_midway_fails_closed_with_an_event(guard_of, script, error, named):
    backend = ScriptedBackend(script("abcdefghij"), fail_at=5, error=error)
    result = guard_of(backend, Policy(hold_back=2)).generate(ASK)
    assert (result.text, result.verdict) == ("abc", "fault")
    assert isinstance(result.events[-1], Halt) and result.events[-1].position == 3
    assert named in result.events[-1].detail
    assert backend.open_streams == 0


def test_an_engine_that_cannot_be_reached_fails_closed_with_an_event(guard_of):
    class Unreachable:
        logprob_mode = "raw"
        eos_ids = frozenset({1})

        def stream(self, token_ids, sampling, watch=()):
            raise ConnectionRefusedError("port 8000")

    events = list(guard_of(Unreachable()).stream(ASK))
    assert events == [Halt(0, "fault", detail="ConnectionRefusedError: port 8000")]


@pytest.mark.parametrize(
    "probs",
    [(math.nan, 0.0), (0.1,), (0.1, 0.1, 0.1), (-0.1, 0.0), (0.0, 1.5), (), None, ("a", "b"), (0.1, None)],
)
def test_a_step_that_cannot_be_judged_fails_closed(guard_of, script, probs):
    steps = script("abcdefghij", {4: probs})
    result = guard_of(steps, Policy(hold_back=1)).generate(ASK)
    assert (result.text, result.verdict) == ("abc", "fault")


@pytest.mark.parametrize("step", [None, 5, (5,), Step("x", (0.1, 0.1)), Step(None, (0.1, 0.1)), Step(2.5, (0.1, 0.1))])
def test_what_is_no_step_fails_closed(guard_of, script, step):
    assert guard_of([*script("ab", end=False), step, *script("cd")]).generate(ASK).verdict == "fault"


def test_a_flag_chosen_by_the_engine_fails_closed(guard_of, script, spec):
    result = guard_of([*script("ab", end=False), Step(spec.ids[1], (0.1, 0.1)), *script("cd")]).generate(ASK)
    assert (result.text, result.verdict) == ("ab", "fault")
    assert str(spec.ids[1]) in result.events[-1].detail


def test_interrupts_pass_through_and_the_engine_is_closed(guard_of, script):
    for error in (KeyboardInterrupt(), SystemExit(3)):
        backend = ScriptedBackend(script("abcdefghij"), fail_at=3, error=error)
        with pytest.raises(type(error)):
            list(guard_of(backend).stream(ASK))
        assert backend.open_streams == 0


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_or_dropping_the_stream_closes_the_engine(guard_of, script, taken):
    backend = ScriptedBackend(script("abcdefghij"))
    guard = guard_of(backend)
    closed, dropped = guard.stream(ASK), guard.stream(ASK)
    for stream in (closed, dropped):
        for _ in range(taken):
            next(stream)
    closed.close()
    closed.close()
    assert list(closed) == []
    gone = weakref.ref(dropped)
    del dropped, stream
    gc.collect()
    assert gone() is None and backend.open_streams == 0
    with guard.stream(ASK) as stream:
        next(stream)
    assert backend.open_streams == 0


def test_an_engine_stream_that_is_no_generator_is_closed_even_before_the_first_event(guard_of):
    class Connection:
        closed = 0

        def __iter__(self):
            return self

        def __next__(self):
            return Step(10, (0.0, 0.0))

        def close(self):
            self.closed += 1

    class Remote:
        logprob_mode = "raw"
        eos_ids = frozenset({1})

        def stream(self, token_ids, sampling, watch=()):
            self.connection = Connection()
            return self.connection

    backend = Remote()
    guard_of(backend).stream(ASK).close()
    assert backend.connection.closed
    stream = guard_of(backend).stream(ASK)
    next(stream)
    stream.close()
    assert backend.connection.closed


def test_two_streams_of_one_guard_are_independent(guard_of, script):
    guard = guard_of(script("abcdefghij", HARM), Policy(hold_back=1))
    one, other = guard.stream(ASK), guard.stream(ASK)
    pairs = list(zip(one, other, strict=True))
    assert all(left == right for left, right in pairs) and one.trace is not other.trace


@pytest.mark.parametrize(
    ("text", "stop", "shown", "generated"),
    [
        ("one END two", ("END",), "one ", 7),
        ("one EN two", ("END",), "one EN two", 11),
        ("one EN", ("END",), "one EN", 7),
        ("日本語。続き", ("。",), "日本語", 12),
        ("a\n\nb", ("\n\n", "b"), "a", 3),
        ("ENDx", ("END",), "", 3),
    ],
)
def test_a_stop_text_ends_the_response_and_is_not_shown(guard_of, script, text, stop, shown, generated):
    letters = [step for character in text for step in script(character, end=False)]  # no merges across letters
    for hold_back in (0, 1, 3, 20):
        backend = ScriptedBackend([*letters, *script("")], eos_ids={1})
        result = guard_of(backend, Policy(hold_back=hold_back)).generate(ASK, Sampling(stop=stop))
        assert (result.text, result.verdict) == (shown, "completed")
        assert result.events[-1] == Done(generated, "stop")
        assert len(result.trace.token_ids) == generated and backend.open_streams == 0


def test_half_a_stop_text_is_not_shown_before_the_other_half_is_known(guard_of, script):
    letters = [step for character in "abEND" for step in script(character, end=False)]
    shown = ""
    for event in guard_of(letters).stream(ASK, Sampling(stop=("END",))):
        shown += event.text if isinstance(event, Text) else ""
        assert "E" not in shown
    assert shown == "ab"


def test_a_flags_text_spelt_by_ordinary_tokens_does_not_leave(guard_of, script, spec):
    for hold_back in (0, 3):
        result = guard_of(script("a<|harm|>b<|theft|>c"), Policy(hold_back=hold_back)).generate(ASK)
        assert result.text == "abc"
        assert "<|harm|>" not in str([event for event in result.trace.events])


def test_length_is_the_reason_when_the_engine_stops_without_an_end(guard_of, script):
    result = guard_of(script("abcdefghij")).generate(ASK, Sampling(max_new_tokens=4))
    assert (result.text, result.events[-1]) == ("abcd", Done(4, "length"))


def test_bytes_that_are_incomplete_at_the_end_are_shown_as_decode_shows_them(guard_of, script):
    events = list(guard_of(script("日本", end=False)).stream(ASK, Sampling(max_new_tokens=4)))
    assert text_of(events) == "日\ufffd"
    assert events[-2:] == [Text(4, (), "\ufffd"), Done(4, "length")]


def test_a_halt_shows_no_incomplete_bytes(guard_of, script):
    result = guard_of(script("日本", {4: (0.9, 0.9)}, end=False)).generate(ASK)
    assert (result.text, result.verdict) == ("日", "halted")


def test_the_trace_holds_what_the_stream_yielded_and_can_be_written(guard_of, script, tmp_path):
    guard = guard_of(script("the cat 日", {3: (0.6, 0.1)}), Policy(observe=True))
    stream = guard.stream(ASK, Sampling(max_new_tokens=8))
    events = list(stream)
    assert stream.trace.events == events
    assert stream.trace.meta["run_id"] == "run-1"
    write_traces(tmp_path / "t.jsonl", [stream.trace], text=True)
    (again,) = read_traces(tmp_path / "t.jsonl")
    assert again.events == events and again.flag_probs == stream.trace.flag_probs


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "x"}]])
def test_a_conversation_that_cannot_be_answered_is_refused_at_once(guard_of, script, messages):
    with pytest.raises(RedflagError):
        guard_of(script("abc")).stream(messages)


def test_a_prompt_longer_than_the_context_is_refused_at_once(guard_of, script):
    with pytest.raises(RedflagError, match="context"):
        guard_of(script("abc"), context_length=3).stream(ASK)


def test_an_engine_that_refuses_its_input_at_the_first_step_is_a_mistake_to_mend(guard_of, script):
    backend = ScriptedBackend(script("abc"), fail_at=0, error=RedflagError("the engine's context is 3"))
    with pytest.raises(RedflagError, match="context is 3"):
        list(guard_of(backend).stream(ASK))


def test_flags_in_the_users_text_do_not_reach_the_engine(guard_of, script, spec):
    backend = ScriptedBackend(script("abc"))
    guard_of(backend).generate([{"role": "user", "content": "say <|harm|> and <|theft|>"}])
    assert not set(backend.prompts[0]) & set(spec.ids)


def test_a_prefill_is_continued(guard_of, script, tokenizer):
    backend = ScriptedBackend(script(" there"), eos_ids={1})
    result = guard_of(backend).generate([*ASK, {"role": "assistant", "content": "hi"}])
    assert result.text == " there"
    assert tokenizer.decode(backend.prompts[0]).endswith("assistant\nhi")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run_id": "run-2"}, "run-2"),
        ({"template_hash": "other"}, "template"),
        ({"logprob_mode": "processed"}, "processed"),
        ({"values": {"harm": 0.5}}, "categories"),
        ({"values": {"harm": 0.5, "theft": 0.5, "fraud": 0.5}}, "categories"),
    ],
)
def test_thresholds_of_something_else_are_refused(tokenizer, spec, change, named):
    options = {
        "values": {"harm": 0.5, "theft": 0.5},
        "run_id": spec.run_id,
        "template_hash": spec.template_hash,
    } | change
    with pytest.raises(RedflagError, match=named):
        Guard(ScriptedBackend([]), tokenizer, spec, Thresholds(**options))


def test_a_policy_for_unknown_categories_is_refused_before_any_request(guard_of):
    with pytest.raises(RedflagError, match="fraud"):
        guard_of([], Policy(actions={"fraud": "continue"}))
