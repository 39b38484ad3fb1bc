"""The conformance table: every route, streamed and not, times everything a response can end in, byte by byte."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from running import MODEL, ROUTES, Play, body_of, chunks_of, engine, running, shown_by, text_of_chunks

from redflag.api.wire import REFUSAL, Answer
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.trace import Done, Text
from redflag.watching.policy import Policy, Reflect

HARM = {6: (0.9, 0.0)}
THEFT = {6: (0.0, 0.8)}
NAN = (math.nan, 0.0)
REFLECT = Reflect(cue="Hm.", words=("yes", "no"), verdict_cue="So:", stop=("|",), max_tokens=20)
OPERATOR = "operator-key-0123456789"


def alarm(category="harm"):
    return {"verdict": "halted", "reason": "alarm", "category": category}


FAULT = {"verdict": "fault", "reason": "fault", "category": None}


@dataclass
class Cell:
    """A column of the table: what the engine does, what the operator wants, and what a client gets."""

    name: str
    text: str = ""
    finish: str | None = "stop"
    redflag: dict[str, Any] | None = None
    status: int = 200  # of the whole answer; a stream that has shown text by then has 200 and ends with the error
    high: Any = None
    policy: Policy = field(default_factory=Policy)
    answer: str = "abcdefghij"
    end: bool = True
    fail_at: int | None = None
    harm: float | None = None  # what the verdict words say
    judge: Any = None
    pause: tuple[int, float] = (0, 0.0)
    timeout: float = 60.0
    max_tokens: int = 64
    fields: dict[str, Any] = field(default_factory=dict)
    released: int | None = None  # tokens shown, where not one per letter; -1: by the trace
    hidden: int | None = None  # tokens generated and not shown; None: by the trace
    ended: str = "done"


def lost(messages, answer):
    raise ConnectionError("no judge")


WHOLE = "abcdefghij"
OTHER = '日本 👩‍👩‍👧 é \u2028\r\n"\\'
CELLS = [
    Cell("no alarm", WHOLE, released=11, hidden=0),
    Cell("no alarm, held back", WHOLE, policy=Policy(hold_back=4), released=11),
    Cell("no alarm, at the end", WHOLE, policy=Policy(release="end"), released=11),
    Cell("no alarm, other characters", OTHER, answer=OTHER, released=-1),
    Cell("length", "abcd", "length", max_tokens=4, hidden=0),
    Cell("length, held back", "abcd", "length", max_tokens=4, policy=Policy(hold_back=2)),
    Cell("stop text", "abc", fields={"stop": ["de", "zz"]}, released=-1),
    Cell("stop text, held back", "abc", fields={"stop": "de"}, policy=Policy(hold_back=5), released=-1),
    Cell("halt before a stop text", "abcdef", "content_filter", alarm(), high=HARM, fields={"stop": ["hi"]},
         ended="halted"),
    Cell("halt", "abcdef", "content_filter", alarm(), high=HARM, ended="halted", hidden=1),
    Cell("halt, other category", "abcdef", "content_filter", alarm("theft"), high=THEFT, ended="halted"),
    Cell("halt, held back", "abc", "content_filter", alarm(), high=HARM, policy=Policy(hold_back=3),
         ended="halted", hidden=4),
    Cell("halt, at once", "", "content_filter", alarm(), high={0: (0.9, 0)}, ended="halted", hidden=1),
    Cell("halt, at the end", "", "content_filter", alarm(), high=HARM, policy=Policy(release="end"),
         ended="halted", hidden=7),
    Cell("halt, by sentence", "ab.", "content_filter", alarm(), answer="ab. cdefgh", high=HARM, ended="halted",
         policy=Policy(release="sentence"), released=-1),
    Cell("continue", WHOLE, high=HARM, policy=Policy(default="continue"), released=11),
    Cell("observe", WHOLE, high=HARM, policy=Policy(observe=True), released=11),
    Cell("reflect, refuse", "abcdef", "content_filter", alarm(), high=HARM, harm=0.9, ended="halted",
         policy=Policy(default="reflect", reflect=REFLECT)),
    Cell("reflect, refuse with a text", "abcdefNo.", "content_filter", alarm(), high=HARM, harm=0.9, ended="halted",
         policy=Policy(default="reflect", reflect=REFLECT, confirmed="replace", replacement="No."), released=-1),
    Cell("reflect, resume", WHOLE, high=HARM, harm=0.1, policy=Policy(default="reflect", reflect=REFLECT), released=11),
    Cell("escalate, refuse", "abcdef", "content_filter", alarm(), high=HARM, judge=lambda messages, answer: 0.9,
         policy=Policy(default="escalate"), ended="halted"),
    Cell("escalate, resume", WHOLE, high=HARM, judge=lambda messages, answer: 0.1, policy=Policy(default="escalate"),
         released=11),
    Cell("escalate, unanswered", "abcdef", "content_filter", alarm(), high=HARM, judge=lost, ended="halted",
         policy=Policy(default="escalate")),
    Cell("replace", "abcdefSorry.", "content_filter", alarm(), high=HARM, ended="halted", released=-1,
         policy=Policy(default="replace", replacement="Sorry.")),
    Cell("decoy", "abcdefBread.", "stop", None, high=HARM, ended="halted", released=-1, hidden=0,
         policy=Policy(default="replace", replacement="Bread.", decoy=True)),
    Cell("replace, with what no encoding takes", "abcdef\ud800", "content_filter", alarm(), high=HARM, ended="halted",
         released=6, policy=Policy(default="replace", replacement="\ud800")),
    Cell("engine lost", "abcd", None, FAULT, status=503, fail_at=4, ended="fault"),
    Cell("engine lost, held back", "ab", None, FAULT, status=503, fail_at=4, policy=Policy(hold_back=2), ended="fault"),
    Cell("engine lost, at once", status=503, fail_at=0, ended="fault"),
    Cell("engine lost, nothing released", status=503, fail_at=4, policy=Policy(hold_back=9), ended="fault"),
    Cell("NaN", "abcd", None, FAULT, status=503, high={4: NAN}, ended="fault"),
    Cell("NaN, held back", "ab", None, FAULT, status=503, high={4: NAN}, policy=Policy(hold_back=2), ended="fault"),
    Cell("NaN, at once", status=503, high={0: NAN}, ended="fault"),
    Cell("time-out", "ab", None, FAULT, status=504, pause=(2, 1.0), timeout=0.5, ended="timeout"),
    Cell("time-out, at once", status=504, pause=(0, 1.0), timeout=0.3, ended="timeout"),
]  # fmt: skip
NAMES = [cell.name for cell in CELLS]


@pytest.fixture
def serve(tokenizer, spec, thresholds, script):
    """The server of a cell: a script behind the queue of a local engine."""

    def start(cell, **options):
        thought = script("SECRET thought|", end=False)
        play = Play(script(cell.answer, cell.high, end=cell.end), spec.ids, thought, cell.pause)
        verdict = [thought[0]._replace(flag_probs=(cell.harm or 0.0, 1 - (cell.harm or 0.0)))]
        _, turns = engine(
            play,
            tokenizer.eos_token_id,
            fail_at=cell.fail_at,
            watched=lambda prompt, sampling, watch: verdict,
        )
        guard = Guard(turns, tokenizer, spec, thresholds, cell.policy, cell.judge)
        limits = Limits(MODEL, request_timeout=cell.timeout, operator_key=OPERATOR)
        return running(guard, limits, **options)

    return start


def tokens_of(cell, tokenizer, trace):
    """Tokens shown, and tokens generated and not shown."""
    released = sum(len(event.token_ids) for event in trace.events if isinstance(event, Text))
    hidden = trace.generated - released if cell.hidden is None else cell.hidden
    if cell.released is None:
        return len(cell.text), hidden
    if cell.released >= 0:
        return cell.released, hidden
    return released + len(tokenizer(trace.end.text)["input_ids"] if getattr(trace.end, "text", "") else ()), hidden


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_what_a_client_gets_byte_by_byte(cell, serve, tokenizer):
    with serve(cell) as server:
        for count, (route, stream) in enumerate(itertools.product(ROUTES, (False, True)), 1):
            asked = body_of(route, max_tokens=cell.max_tokens, stream=stream, **cell.fields)
            asked |= {"stream_options": {"include_usage": True}} if stream else {}
            answer = httpx.post(server.url + route, json=asked, timeout=20)
            trace = server.told(count)
            time.sleep(cell.pause[1])  # until the engine's one thread is free again
            broken = cell.status != 200 and not (stream and cell.text)
            assert answer.status_code == (cell.status if broken else 200), (route, stream, answer.content)
            assert answer.headers["x-request-id"] == trace.id
            assert_nothing_leaked(answer.content)
            if broken:
                body = answer.json()
                assert answer.headers["content-type"] == "application/json"
                assert body["error"]["type"] == "server_error" and set(body) == {"error"}
                assert body["error"]["code"] == CODES[cell.status]
                continue
            assert shown_by(trace) == cell.text
            check = check_stream if stream else check_whole
            check(cell, "chat" in route, answer, trace, tokens_of(cell, tokenizer, trace))
        assert server.ends() == {cell.ended}


CODES = {503: "engine_unavailable", 504: "response_timeout"}


def refusal_of(cell):
    return REFUSAL if cell.finish == "content_filter" and not cell.text else None


def check_whole(cell, chat, answer, trace, tokens):
    body = answer.json()
    message = {"role": "assistant", "content": cell.text, "refusal": refusal_of(cell)}
    content = {"message": message} if chat else {"text": cell.text}
    assert body == {
        "id": trace.id,
        "object": "chat.completion" if chat else "text_completion",
        "created": body["created"],
        "model": MODEL,
        "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": cell.finish}],
        "usage": usage(body["usage"]["prompt_tokens"], *tokens),
        **({"redflag": cell.redflag} if cell.redflag else {}),
    }


def check_stream(cell, chat, answer, trace, tokens):
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, final, counts = chunks_of(answer.content)
    if cell.status != 200:
        chunks, error = [*chunks, final], counts
        assert error == {"error": error["error"], "redflag": FAULT}
        assert (error["error"]["type"], error["error"]["code"]) == ("server_error", CODES[cell.status])
        assert text_of_chunks(chunks) == cell.text
        assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks)
        return
    frame = {
        "id": trace.id,
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": final["created"],
        "model": MODEL,
    }
    assert final == {
        **frame,
        "choices": [{"index": 0, **({"delta": {}} if chat else {"text": ""}), "logprobs": None,
                     "finish_reason": cell.finish}],
        "usage": None,
        **({"redflag": cell.redflag} if cell.redflag else {}),
    }  # fmt: skip
    assert counts == {**frame, "choices": [], "usage": usage(counts["usage"]["prompt_tokens"], *tokens)}
    assert text_of_chunks([*chunks, final]) == cell.text
    if chat and refusal_of(cell):
        refused = chunks.pop()
        assert refused["choices"] == [
            {"index": 0, "delta": {"refusal": REFUSAL}, "logprobs": None, "finish_reason": None}
        ]
    for number, chunk in enumerate(chunks):
        [choice] = chunk["choices"]
        text = choice["delta"]["content"] if chat else choice["text"]
        content = {"delta": {"content": text}} if chat else {"text": text}
        if chat and number == 0:
            content = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        else:
            assert text
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": None}
        assert chunk == {**frame, "choices": [choice], "usage": None}


def usage(prompt, released, hidden):
    return {
        "prompt_tokens": prompt,
        "completion_tokens": released + hidden,
        "total_tokens": prompt + released + hidden,
        "completion_tokens_details": {"released_tokens": released, "hidden_tokens": hidden},
    }


def assert_nothing_leaked(data: bytes):
    """No probability, no hidden thought, nothing from inside."""
    for word in (b"SECRET", b"thought", b"0.9", b"0.8", b"0.5", b"ConnectionError", b"scripted", b"nan", b"NaN"):
        assert word not in data


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_the_openai_client_reads_all_of_it(cell, serve):
    with serve(cell) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": "hello"}]
        asked = {"model": MODEL, "max_tokens": cell.max_tokens, **cell.fields}
        calls = [
            lambda: client.chat.completions.create(messages=messages, **asked),
            lambda: list(client.chat.completions.create(messages=messages, stream=True, **asked)),
            lambda: client.completions.create(prompt="hello", **asked),
            lambda: list(client.completions.create(prompt="hello", stream=True, **asked)),
        ]
        if cell.status != 200:
            for call, streamed in zip(calls, (False, True) * 2, strict=True):
                with pytest.raises(openai.APIError) as error:
                    call()
                time.sleep(cell.pause[1])
                assert error.value.code == CODES[cell.status] and error.value.type == "server_error"
                # Once a stream has begun there is no status to tell it by.
                assert getattr(error.value, "status_code", None) == (None if streamed and cell.text else cell.status)
            return
        results = []
        for call in calls:
            results.append(call())
            time.sleep(cell.pause[1])
        chat, chat_chunks, text, text_chunks = results
        assert chat.choices[0].message.content == text.choices[0].text == cell.text
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chat_chunks) == cell.text
        assert chat.choices[0].message.refusal == refusal_of(cell)
        assert "".join(chunk.choices[0].delta.refusal or "" for chunk in chat_chunks) == (refusal_of(cell) or "")
        assert "".join(chunk.choices[0].text for chunk in text_chunks) == cell.text
        for last in (chat, chat_chunks[-1], text, text_chunks[-1]):
            assert last.choices[0].finish_reason == cell.finish
            assert (last.model_extra or {}).get("redflag") == cell.redflag
        assert not [chunk for chunk in chat_chunks[:-1] + text_chunks[:-1] if chunk.choices[0].finish_reason]


async def asked_twice(url, cell):
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        chat = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
        stream = await client.completions.create(model=MODEL, prompt="hello", stream=True)
        return chat, [chunk async for chunk in stream]


@pytest.mark.parametrize("name", ["no alarm", "halt", "reflect, resume", "decoy"])
def test_the_asynchronous_openai_client_reads_it_too(name, serve):
    cell = CELLS[NAMES.index(name)]
    with serve(cell) as server:
        chat, chunks = asyncio.run(asked_twice(server.url, cell))
    assert chat.choices[0].message.content == cell.text == "".join(chunk.choices[0].text for chunk in chunks)
    assert chat.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == cell.finish


@pytest.mark.parametrize("hold_back", [0, 1, 3])
def test_no_unjudged_token_leaves_the_server(hold_back, tokenizer, spec, thresholds, script):
    """Whatever the step at which something happens, what left is what was judged that long before, and no more."""
    playing = []

    def play(prompt, sampling):
        for step in playing[-1]:
            if step is None:
                raise ConnectionError("lost")
            yield step

    _, turns = engine(play, tokenizer.eos_token_id)
    guard = Guard(turns, tokenizer, spec, thresholds, Policy(hold_back=hold_back))
    with running(guard) as server, httpx.Client(base_url=server.url) as client:
        harmless = script("abcdefghij")
        for step, stream, bad in itertools.product(range(10), (False, True), ((0.9, 0.0), NAN, None)):
            playing.append(
                script("abcdefghij", {step: bad}) if bad else [*harmless[:step], None]  # None: the engine is lost
            )
            answer = client.post(ROUTES[1], json=body_of(ROUTES[1], stream=stream))
            left = ""
            if answer.status_code == 200:
                left = text_of_chunks(chunks_of(answer.content)) if stream else answer.json()["choices"][0]["text"]
            trace = server.told(len(playing))
            judged = "abcdefghij"[: max(0, step - hold_back)]
            assert shown_by(trace) == judged
            assert left == (judged if stream or bad == (0.9, 0.0) else "")  # an error in place of a whole answer


KEYS = {"X-Redflag-Operator": OPERATOR, "X-Redflag-Trace": "1"}


@pytest.mark.parametrize("name", ["no alarm", "halt", "reflect, resume", "decoy", "escalate, resume", "engine lost"])
def test_an_operator_sees_the_trace(name, serve):
    cell = CELLS[NAMES.index(name)]
    with serve(cell) as server:
        for count, (route, stream) in enumerate(itertools.product(ROUTES, (False, True)), 1):
            answer = httpx.post(server.url + route, json=body_of(route, stream=stream), headers=KEYS)
            seen = (chunks_of(answer.content)[-1] if stream else answer.json())["redflag"]
            trace = server.told(count)
            assert seen["peak"] == {"harm": 0.9 if cell.high else 0.01, "theft": pytest.approx(0.02)}
            assert len(seen["alarms"]) == bool(cell.high) and seen["waited"] == trace.waited
            if cell.high:
                [alarm] = seen["alarms"]
                assert (alarm["position"], alarm["score"], alarm["threshold"]) == (6, 0.9, 0.5)
            if "reflect" in name:
                assert seen["reflections"] == [
                    {"position": 6, "verdict": "harmless", "harm": pytest.approx(0.1), "text": "SECRET thought|"}
                ]
            if "escalate" in name:
                assert seen["escalations"][0]["verdict"] == "harmless"
            if name == "decoy":
                assert seen["verdict"] == "completed" and seen["end"] == {"kind": "halt", "reason": "alarm"}
            if "lost" in name:
                assert "scripted engine was lost" in seen["detail"]


def test_nobody_else_sees_the_trace(serve):
    with serve(CELLS[NAMES.index("halt")]) as server:
        for route, stream in itertools.product(ROUTES, (False, True)):
            body = body_of(route, stream=stream)
            for bad in ({"X-Redflag-Trace": "1"}, {**KEYS, "X-Redflag-Operator": "another"}):
                refused = httpx.post(server.url + route, json=body, headers=bad)
                assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
            unasked = httpx.post(server.url + route, json=body, headers={"X-Redflag-Operator": OPERATOR})
            assert unasked.status_code == 200 and b"peak" not in unasked.content


def test_an_answer_takes_nothing_after_its_end():
    answer = Answer("cmpl-1", MODEL, chat=False, prompt_tokens=1)
    with pytest.raises(AssertionError):
        answer.last(0)
    answer.push(Done(0, "stop"))
    with pytest.raises(AssertionError):
        answer.push(Text(0, (1,), "late"))
