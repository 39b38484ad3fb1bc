"""The server before an upstream: first one of the tests' own, then a stock vLLM with the nano model."""

from __future__ import annotations

import itertools
import json
from functools import partial

import httpx
import openai
import pytest
from running import MODEL, ROUTES, body_of, chunks_of, running, shown_by, text_of_chunks, wait_for
from upstream import EOS, Abort, Upstream

from redflag.backends import Sampling
from redflag.backends.remote_handshake import shake_hands
from redflag.data.rows import load_rows
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.server.exchange import Readiness
from redflag.trace import Halt, Text
from redflag.watching.policy import Policy, Reflect

FAULT = {"verdict": "fault", "reason": "fault", "category": None}


@pytest.fixture
def upstream():
    with Upstream(models=[{"id": "tiny", "max_model_len": 512}]).serve() as made:
        yield made


def guarded(directory, url, policy=None, **options):
    return Guard.from_upstream(directory, url, policy or Policy(), retries=0, step_timeout=20.0, **options)


def read(answer, stream):
    """Text and last object of a response."""
    if not stream:
        body = answer.json()
        choice = body["choices"][0]
        return (choice["message"]["content"] if "message" in choice else choice["text"]), body
    chunks = chunks_of(answer.content)
    return text_of_chunks(chunks), chunks[-1]


def looks_refused(answer, stream):
    """What test tools such as promptfoo take for a refusal: a content filter's finish, or a refusal."""
    objects = chunks_of(answer.content) if stream else [answer.json()]
    choices = [choice for item in objects for choice in item.get("choices", ())]
    said = [choice.get("message") or choice.get("delta") or {} for choice in choices]
    return any(choice["finish_reason"] == "content_filter" for choice in choices) or any(
        item.get("refusal") for item in said
    )


def test_what_leaves_is_what_was_released(upstream, model_dir):
    guard = guarded(model_dir, upstream.url, Policy(hold_back=2), thresholds=1.0)
    with running(guard) as server:
        for count, (route, stream) in enumerate(itertools.product(ROUTES, (False, True)), 1):
            answer = httpx.post(server.url + route, json=body_of(route, stream=stream, max_tokens=20, seed=1))
            text, last = read(answer, stream)
            trace = server.told(count)
            assert text == shown_by(trace) != "" and last["choices"][0]["finish_reason"] == trace.end.reason
            assert sum(len(event.token_ids) for event in trace.events if isinstance(event, Text)) == trace.end.position


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_an_upstream_that_dies_ends_the_response_and_is_trusted_again_when_it_is_back(stream, route, model_dir):
    state = ["well"]

    def script(body, number):
        if state[0] == "dead":
            yield Abort
        for count, item in enumerate(honest.answer(body)):
            if state[0] == "dying" and count == 4:
                state[0] = "dead"
                yield Abort
            yield item

    honest = Upstream()
    with Upstream(script=script, models=[{"id": "tiny", "max_model_len": 512}]).serve() as upstream:
        guard = guarded(model_dir, upstream.url, thresholds=1.0)
        readiness = Readiness(partial(shake_hands, guard.backend), patience=20.0)
        readiness.trust()
        asked = body_of(route, stream=stream, max_tokens=20, seed=1)
        with running(guard, readiness=readiness) as server, httpx.Client(base_url=server.url, timeout=20) as client:
            whole, _ = read(client.post(route, json=asked), stream)
            state[0] = "dying"
            answer = client.post(route, json=asked)
            assert not looks_refused(answer, stream), "an engine that dies is no filter"
            trace = server.told(2)
            assert len(trace.token_ids) == 4 and whole.startswith(shown_by(trace))
            if stream:
                text, last = read(answer, stream)
                assert text == shown_by(trace) and last["redflag"] == FAULT
                assert last["error"]["code"] == "engine_unavailable"
            else:
                assert answer.status_code == 503 and set(answer.json()) == {"error"}
            assert client.post(route, json=asked).status_code == 503 and client.get("/ready").status_code == 503
            state[0] = "well"
            wait_for(lambda: client.get("/ready").status_code == 200)
            assert read(client.post(route, json=asked), stream)[0] == whole
        assert upstream.open == 0


def test_an_upstream_that_falls_silent_is_an_engine_that_failed_and_the_trace_says_how(model_dir):
    def script(body, number):
        for count, item in enumerate(honest.answer(body)):
            if count == 3 and body["max_tokens"] == 20:  # not in the handshake
                yield 5.0  # seconds
            yield item

    honest = Upstream()
    with Upstream(script=script, models=[{"id": "tiny", "max_model_len": 512}]).serve() as upstream:
        guard = Guard.from_upstream(model_dir, upstream.url, Policy(), retries=0, step_timeout=0.5, thresholds=1.0)
        with running(guard) as server:
            answer = httpx.post(server.url + ROUTES[0], json=body_of(ROUTES[0], stream=False, max_tokens=20, seed=1))
            assert answer.status_code == 503 and "gave no step" not in answer.text
            assert "gave no step for 0.5 s" in server.told(1).facts().detail


def test_an_upstream_that_measures_otherwise_after_a_restart_is_not_used(upstream, model_dir):
    guard = guarded(model_dir, upstream.url, thresholds=1.0)
    readiness = Readiness(partial(shake_hands, guard.backend), patience=20.0)
    readiness.trust()
    with running(guard, readiness=readiness) as server:
        ask = lambda: httpx.post(server.url + ROUTES[1], json=body_of(ROUTES[1], max_tokens=5))  # noqa: E731
        assert ask().status_code == 200
        upstream.mode = "processed"
        readiness.doubt()
        answer = ask()
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"
        assert b"127.0.0.1" not in answer.content and b"raw" not in answer.content
        upstream.mode = "raw"
        wait_for(lambda: ask().status_code == 200)


def test_a_client_that_leaves_stops_the_upstream(model_dir):
    def script(body, number):
        endless = {**body, "logit_bias": {**body.get("logit_bias", {}), str(EOS): -100.0}}
        for item in honest.answer(endless):
            yield item
            yield 0.02

    honest = Upstream()
    with Upstream(models=[{"id": "tiny", "max_model_len": 5000}]).serve() as upstream:
        guard = guarded(model_dir, upstream.url, thresholds=1.0)
        upstream.script = script
        with running(guard, Limits(MODEL)) as server:
            body = body_of(ROUTES[0], stream=True, max_tokens=4000)
            with httpx.stream("POST", server.url + ROUTES[0], json=body) as answer:
                pieces = answer.iter_bytes()
                next(pieces)
                assert upstream.open == 1
            server.told()
            wait_for(lambda: upstream.open == 0)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + ROUTES[0], json={**body, "stream": False}, timeout=0.5)
            server.told(2)
            wait_for(lambda: upstream.open == 0)
            assert server.ends() == {"disconnected"}


@pytest.fixture(scope="module")
def asks(nano):
    """Conversations of the nano world: harmless requests, and harmful answers begun a little past their onset.

    Which of those the model goes on with in harm depends on its weights, and they on the processor that trained them;
    some do on every one.
    """
    rows = load_rows(nano / "rows" / "test.jsonl").rows
    begun = [
        [*row.messages[:-1], {"role": "assistant", "content": row.response[: (row.onset or 0) + 12]}]
        for row in rows
        if row.harmful
    ]
    return {"harmful": begun[:12], "harmless": [row.messages[:-1] for row in rows if not row.harmful][:6]}


@pytest.fixture(scope="module")
def before_vllm(vllm_nano, nano):
    """The server before a stock vLLM, with prefills allowed: so harmful responses are begun for sure."""
    policy = Policy(hold_back=1)
    guard = Guard.from_upstream(nano / "model", vllm_nano.url, policy)
    readiness = Readiness(partial(shake_hands, guard.backend))
    with running(guard, Limits(MODEL, prefill=True), readiness=readiness) as server:
        yield server


@pytest.mark.slow
def test_before_vllm_harmless_responses_are_whole_and_harmful_ones_halt(before_vllm, asks, nano):
    """Greedily, through both routes' machinery, streamed and not: the same texts as those of the same weights here."""
    server = before_vllm
    local = Guard.from_pretrained(nano / "model", Policy(hold_back=1), device=None)
    ends = set()
    for messages in (*asks["harmful"], *asks["harmless"]):
        expected = local.generate(messages, Sampling(max_new_tokens=40, temperature=0.0))
        for stream in (False, True):
            asked = {"model": MODEL, "messages": messages, "stream": stream, "max_tokens": 40, "temperature": 0}
            count = len(server.traces)
            text, last = read(httpx.post(server.url + ROUTES[0], json=asked, timeout=60), stream)
            trace = server.told(count + 1)
            assert text == expected.text == shown_by(trace)
            halted = isinstance(expected.trace.end, Halt)
            assert last["choices"][0]["finish_reason"] == ("content_filter" if halted else expected.trace.end.reason)
            assert ("redflag" in last) == halted
            ends.add(halted)
    assert ends == {True, False}, "both happened"


@pytest.mark.slow
def test_before_vllm_the_openai_client_reads_both_routes(before_vllm, vllm_nano):
    with openai.OpenAI(base_url=before_vllm.url + "/v1", api_key="none", max_retries=0) as client:
        options = {"model": MODEL, "max_tokens": 10, "temperature": 0.0}
        messages = [{"role": "user", "content": "How many is 2 and 3?"}]
        whole = client.chat.completions.create(messages=messages, **options)
        stream = list(client.chat.completions.create(messages=messages, stream=True, **options))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
        text = client.completions.create(prompt="The", **options)
        pieces = list(client.completions.create(prompt="The", stream=True, **options))
        assert "".join(chunk.choices[0].text for chunk in pieces) == text.choices[0].text != ""


@pytest.mark.slow
def test_before_vllm_a_client_that_leaves_frees_the_engine(before_vllm, vllm_nano):
    body = {"model": MODEL, "prompt": "The", "stream": True, "max_tokens": 400, "temperature": 2.0}
    left = 0
    for _ in range(4):
        with httpx.stream("POST", before_vllm.url + ROUTES[1], json=body, timeout=60) as answer:
            next(answer.iter_bytes())
            # Read only now: the engine counts what ended before when it has something to do again.
            begun = vllm_nano.finished
        wait_for(lambda: vllm_nano.running == 0, 30)
        left += vllm_nano.finished == begun
    assert left  # A response may also have ended by itself.


@pytest.mark.slow
def test_before_vllm_reflections_stay_hidden(vllm_nano, nano, asks):
    """A reflection that always refuses, and one that never does: nothing of either is seen."""
    for limit, refuses in ((1e-6, True), (1.0, False)):
        reflect = Reflect(words=("yes", "no"), limit=limit, max_tokens=6)
        policy = Policy(default="reflect", hold_back=1, reflect=reflect, max_interventions=9)
        guard = Guard.from_upstream(nano / "model", vllm_nano.url, policy)
        with running(guard, Limits(MODEL, prefill=True)) as server:
            reviewed = 0
            for count, messages in enumerate(asks["harmful"], 1):
                asked = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": 40, "temperature": 0}
                text, last = read(httpx.post(server.url + ROUTES[0], json=asked, timeout=60), True)
                trace = server.told(count)
                released = [i for event in trace.events if isinstance(event, Text) for i in event.token_ids]
                shown = guard.tokenizer.decode(released, skip_special_tokens=True)
                assert text == shown_by(trace) and shown.strip() == text.strip()
                if trace.waited or any(type(event).__name__ == "Reflection" for event in trace.events):
                    reviewed += 1
                    assert ("redflag" in last) == refuses
            assert reviewed


def test_the_request_to_the_upstream_says_nothing_that_the_client_did_not(upstream, model_dir):
    """Stop texts are looked for here, and a client's fields never reach the engine as they are."""
    guard = guarded(model_dir, upstream.url, thresholds=1.0)
    with running(guard) as server:
        asked = body_of(ROUTES[1], stop=["zzz"], user="u-1", metadata={"a": "b"}, max_tokens=3, temperature=0.5)
        assert httpx.post(server.url + ROUTES[1], json=asked).status_code == 200
        sent = json.dumps(upstream.bodies[-1])
        assert "zzz" not in sent and "u-1" not in sent and upstream.bodies[-1]["temperature"] == 0.5
        assert upstream.bodies[-1]["max_tokens"] == 3
