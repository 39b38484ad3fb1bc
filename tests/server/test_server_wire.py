"""Whatever events come: what a reader puts together is what was released, and there is exactly one last chunk."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import MODEL, chunks_of, events_of, text_of_chunks, text_of_events

from redflag.api.doors import DOORS
from redflag.api.operator_view import operator_view
from redflag.api.schema import parse
from redflag.api.wire import Answer, ending
from redflag.trace import Alarm, Done, Escalation, Event, Halt, Reflection, Resume, Text, Thought, Trace

TEXTS = st.text(max_size=8) | st.sampled_from(
    ["\n\n", "data: [DONE]\n\n", "\r\n", "\u2028", '"\\', "%the text%", "\x00"]
)
PROBS = st.floats(allow_nan=True, allow_infinity=True)
HIDDEN = st.one_of(
    st.builds(Alarm, st.just(0), st.just("harm"), PROBS, PROBS, st.just("halt")),
    st.builds(Reflection, st.just(0), st.just((1, 2)), st.just("harmful"), PROBS, st.just("SECRET")),
    st.builds(Escalation, st.just(0), st.just("harmless"), PROBS, st.just("SECRET")),
    st.builds(Resume, st.just(0)),
)
ENDS = st.one_of(
    st.builds(Done, st.just(0), st.sampled_from(["stop", "length"])),
    st.builds(Halt, st.just(0), st.just("alarm"), st.just("harm"), st.just("SECRET"), TEXTS),
    st.builds(Halt, st.just(0), st.just("fault"), st.none(), st.just("SECRET")),
)
RELEASED = st.builds(lambda ids, text: Text(0, tuple(ids), text), st.lists(st.integers(0, 9), max_size=4), TEXTS)


@st.composite
def responses(draw) -> list[Event]:
    return [*draw(st.lists(st.one_of(RELEASED, HIDDEN), max_size=12)), draw(ENDS)]


ERROR = {"error": {"message": "lost", "type": "server_error", "param": None, "code": "engine_unavailable"}}
HIDDEN_TOKENS = 7


def answered(events, *, view=None, **options):
    """All bytes of a stream, as the server sends them, and the answer behind them."""
    answer = Answer("id-1", MODEL, prompt_tokens=3, count=len, refusal="REFUSED", **options)
    sent = answer.opening()
    for event in events:
        text = answer.push(event)
        sent += answer.chunk(text) if text else b""
    if answer.failed:
        return sent + answer.breaking(ERROR, view), answer
    return sent + answer.last(generated_in(events), view) + ending([answer]), answer


def generated_in(events):
    """Tokens of the engine's: those that were released, and some that were not."""
    return sum(len(event.token_ids) for event in events if isinstance(event, Text)) + HIDDEN_TOKENS


@given(responses(), st.booleans(), st.booleans(), st.booleans())
def test_whatever_comes_what_is_read_is_what_was_released(events, chat, usage, decoy):
    sent, answer = answered(events, chat=chat, usage=usage, decoy=decoy)
    chunks = chunks_of(sent)
    end = events[-1]
    shown = "".join(event.text for event in events if isinstance(event, Text | Halt))
    if end == Halt(0, "fault", None, "SECRET"):
        assert_broken(chunks, sent, shown)
        return
    body = answer.body(generated_in(events))
    choice = body["choices"][0]
    assert text_of_chunks(chunks) == shown == (choice["message"]["content"] if chat else choice["text"])
    assert b"SECRET" not in sent and "SECRET" not in json.dumps(body)

    if usage:
        counts = chunks.pop()
        extra = len(end.text) if isinstance(end, Halt) else 0
        unseen = 0 if isinstance(end, Halt) and decoy and end.text else HIDDEN_TOKENS
        released = generated_in(events) - HIDDEN_TOKENS + extra
        assert counts["choices"] == [] and counts["usage"] == body["usage"]
        assert body["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": released + unseen,
            "total_tokens": 3 + released + unseen,
            "completion_tokens_details": {"released_tokens": released, "hidden_tokens": unseen},
        }
    finals = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"] is not None]
    assert finals == chunks[-1:] and not any("redflag" in chunk for chunk in chunks[:-1])
    final = chunks[-1]
    assert text_of_chunks([final]) == ""
    assert final["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert final.get("redflag") == body.get("redflag")
    hidden = isinstance(end, Halt) and decoy and end.text and end.reason == "alarm"
    if isinstance(end, Done) or hidden:
        assert "redflag" not in final and choice["finish_reason"] == ("stop" if hidden else end.reason)
    else:
        assert final["redflag"] == {"verdict": "halted", "reason": "alarm", "category": end.category}
        assert choice["finish_reason"] == "content_filter"
    if chat:
        refusals = [chunk["choices"][0]["delta"].get("refusal") for chunk in chunks]
        wanted = "REFUSED" if not shown and choice["finish_reason"] == "content_filter" else None
        assert choice["message"]["refusal"] == wanted
        assert [refusal for refusal in refusals if refusal] == [wanted] * (wanted is not None)


def assert_broken(chunks, sent, shown):
    """A fault is an error, in a stream as in no other way: nothing ends it, and nothing counts as a filter's doing."""
    *pieces, last = chunks
    assert text_of_chunks(pieces) == shown
    assert last == {**ERROR, "redflag": {"verdict": "fault", "reason": "fault", "category": None}}
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in pieces)
    assert b"content_filter" not in sent and b"SECRET" not in sent


class Stopped:
    """What a door asks of a response."""

    class text:
        stop_text = None


BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9},
}


def through(route, events, decoy):
    """The stream of a door: its bytes, the answer behind it, and what a reader puts together."""
    door = DOORS[route]
    body = parse(door.request, json.dumps({"model": MODEL, **BODIES[route]}).encode())
    names = {"name": f"{door.prefix}1", "model": MODEL, "prompt_tokens": 3, "count": len, "refusal": "REFUSED"}
    answer = door.answer(body, Stopped, decoy=decoy, **names)
    sent = answer.opening()
    for event in events:
        text = answer.push(event)
        if isinstance(event, Thought) and event.text:
            sent += answer.thought_chunk(event.text)
        sent += answer.chunk(text) if text else b""
    if answer.failed:
        sent += answer.breaking(ERROR)
    else:
        sent += answer.last(generated_in(events)) + ending([answer])
    typed = route in ("/v1/responses", "/v1/messages")
    return sent, answer, text_of_events(events_of(sent)) if typed else text_of_chunks(chunks_of(sent))


def text_of_body(body):
    """The text of a whole answer of any door."""
    if "choices" in body:
        choice = body["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"]
    parts = body["content"] if body.get("type") == "message" else body["output"][0]["content"]
    return "".join(part.get("text", "") for part in parts)


ALARMED = {
    "/v1/chat/completions": lambda body: body["choices"][0]["finish_reason"] == "content_filter",
    "/v1/completions": lambda body: body["choices"][0]["finish_reason"] == "content_filter",
    "/v1/responses": lambda body: (body["incomplete_details"] or {}).get("reason") == "content_filter",
    "/v1/messages": lambda body: body["stop_reason"] == "refusal",
}


@given(responses(), st.booleans())
def test_every_door_releases_the_same_judged_text(events, decoy):
    assert set(BODIES) == set(DOORS) == set(ALARMED)
    shown = "".join(event.text for event in events if isinstance(event, Text | Halt))
    end = events[-1]
    alarmed = isinstance(end, Halt) and end.reason == "alarm" and not (decoy and end.text)
    for route in DOORS:
        sent, answer, read = through(route, events, decoy)
        assert read == shown == answer.text, route
        assert b"SECRET" not in sent and sent.isascii() and b"\r" not in sent
        if answer.failed:
            assert isinstance(end, Halt) and end.reason == "fault"
            assert not any(word in sent for word in (b"content_filter", b"REFUSED", b"end_turn", b'"completed"'))
            continue
        body = answer.body(generated_in(events))
        assert text_of_body(body) == shown and b"SECRET" not in json.dumps(body).encode()
        assert ALARMED[route](body) == alarmed == ("redflag" in body)
        says_so = route == "/v1/messages" or (not shown and route != "/v1/completions")
        assert (b"REFUSED" in sent) == (alarmed and says_so)


@given(responses(), st.booleans())
def test_typed_events_come_in_order(events, decoy):
    """Numbers without a gap; what is opened is closed; the last event holds what a whole answer would."""
    sent, answer, _ = through("/v1/responses", events, decoy)
    made = events_of(sent)
    kinds = [event["type"].removeprefix("response.") for event in made]
    assert [event["sequence_number"] for event in made] == list(range(len(made)))
    assert kinds[:2] == ["created", "in_progress"]
    last = made[-1]["response"]
    if answer.failed:
        assert kinds[-1] == last["status"] == "failed" and last["error"]["message"] == "lost"
        assert not any(kind.endswith("done") for kind in kinds)
        return
    body = answer.body(generated_in(events))
    assert last == body and kinds[-1] == body["status"]
    what = "refusal" if answer.refusal else "output_text"
    inner = [kind for kind in kinds[4:-1] if kind != f"{what}.delta"]
    assert kinds[2:4] == ["output_item.added", "content_part.added"]
    assert inner == [f"{what}.done", "content_part.done", "output_item.done"]
    assert made[-2]["item"] == body["output"][0] and made[-3]["part"] == body["output"][0]["content"][0]

    sent, answer, _ = through("/v1/messages", events, decoy)
    made = events_of(sent)
    kinds = [event["type"] for event in made if event["type"] != "content_block_delta"]
    blocks = ["content_block_start", "content_block_stop"] if answer.text else []
    assert kinds == ["message_start", *blocks, "message_delta", "message_stop"]
    body = answer.body(generated_in(events))
    assert made[-2]["delta"]["stop_reason"] == body["stop_reason"] and made[-2]["usage"] == body["usage"]


THOUGHTS = st.lists(st.builds(Thought, st.just(0), st.just((1,)), TEXTS), min_size=1, max_size=3)


@given(THOUGHTS, responses(), st.booleans())
def test_a_thought_is_an_item_of_its_own_that_ends_before_the_next_begins(thoughts, events, decoy):
    thought = "".join(event.text for event in thoughts)
    shown = "".join(event.text for event in events if isinstance(event, Text | Halt))
    for route, begin, delta, end, place in (
        ("/v1/responses", "response.output_item.added", "text.delta", "response.output_item.done", "output_index"),
        ("/v1/messages", "content_block_start", "content_block_delta", "content_block_stop", "index"),
    ):
        sent, answer, read = through(route, [*thoughts, *events], decoy)
        found, begun, current = "", 0, None
        for event in events_of(sent):
            if event["type"] == begin:
                assert current is None and event[place] == begun
                begun, current = begun + 1, begun
            elif event["type"].endswith(delta):
                assert event[place] == current
                if "reasoning" in event["type"]:
                    found += event["delta"]
                elif route == "/v1/messages":
                    found += event["delta"].get("thinking", "")
            elif event["type"] == end:
                assert event[place] == current
                current = None
        assert (found, read) == (thought, shown) and (current is None or answer.failed)
        if not answer.failed:
            body = answer.body(generated_in(events))
            items = body["output"] if route == "/v1/responses" else body["content"]
            kinds = [item["type"] for item in items]
            assert len(kinds) == begun and [kind in ("reasoning", "thinking") for kind in kinds[:1]] == (
                [bool(thought)] * bool(kinds)
            )


@given(responses(), st.booleans())
def test_an_operators_view_is_json_whatever_the_numbers(events, chat):
    trace = Trace(categories=("harm",), token_ids=[1], flag_probs=[(0.5,)], scores=[(float("inf"),)], events=events)
    view = operator_view(trace)
    sent, answer = answered(events, chat=chat, decoy=True, view=view)
    seen = chunks_of(sent)[-1]["redflag"]
    other = answer.failure(view) if answer.failed else answer.body(0, view)
    assert seen == other["redflag"] == json.loads(json.dumps(seen, allow_nan=False))
    assert seen["peak"] == {"harm": None} and len(seen["alarms"]) == sum(isinstance(event, Alarm) for event in events)
    assert seen["verdict"] in ("completed", "halted", "fault")


@given(TEXTS)
def test_a_chunk_is_one_line_whatever_its_text(text):
    for chat in (False, True):
        answer = Answer("id-1", MODEL, chat=chat, prompt_tokens=0, usage=True)
        data = answer.chunk(text)
        assert data.startswith(b"data: {") and data.endswith(b"\n\n") and data.count(b"\n") == 2 and b"\r" not in data
        assert data.isascii() and text_of_chunks([json.loads(data[6:])]) == text


def test_an_answer_takes_nothing_after_its_end():
    answer = Answer("id-1", MODEL, chat=False, prompt_tokens=1)
    for early in (answer.last, answer.body, answer.breaking):
        with pytest.raises(AssertionError):
            early(0)
    answer.push(Done(0, "stop"))
    with pytest.raises(AssertionError):
        answer.push(Text(0, (1,), "late"))


def test_a_response_that_failed_has_no_last_chunk_and_no_body():
    answer = Answer("id-1", MODEL, chat=True, prompt_tokens=1)
    answer.push(Halt(0, "fault", None, "lost"))
    assert answer.over and answer.finish_reason is None and answer.failure() == {}
    for late in (lambda: answer.last(0), lambda: answer.body(0), lambda: answer.push(Done(0, "stop"))):
        with pytest.raises(AssertionError):
            late()
