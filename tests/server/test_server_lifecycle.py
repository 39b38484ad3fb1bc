"""How a request ends when it does not end by itself: the client leaves, time is over, the engine is full or lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time

import httpx
import pytest
from running import MODEL, ROUTES, Play, body_of, chunks_of, engine, running, shown_by, text_of_chunks, wait_for

from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.server.exchange import Readiness
from redflag.watching.policy import Policy, Reflect

CHAT, TEXT = ROUTES


@pytest.fixture
def guard(tokenizer, spec, thresholds):
    def build(script, policy=None, judge=None, **options):
        backend, turns = engine(script, tokenizer.eos_token_id, **options)
        return backend, Guard(turns, tokenizer, spec, thresholds, policy or Policy(), judge)

    return build


@pytest.fixture
def endless(script):
    """A response that never ends by itself."""

    def play(prompt, sampling):
        for step in itertools.cycle(script("the cat sat ", end=False)):
            time.sleep(0.002)
            yield step

    return play


@pytest.fixture
def free():
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def stuck(script, free):
    """A response whose engine stands still after the third step, until it is freed."""

    def play(prompt, sampling):
        for number, step in enumerate(script("abcdefghij")):
            if number == 3:
                free.wait(20)
            yield step

    return play


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("chunks", [0, 1, 5])
def test_a_client_that_leaves_a_stream_stops_the_engine(chunks, route, guard, endless):
    backend, made = guard(endless)
    with running(made, Limits(MODEL, max_tokens=10**6)) as server:
        with httpx.stream("POST", server.url + route, json=body_of(route, stream=True, max_tokens=10**6)) as answer:
            lines = answer.iter_lines()
            for _ in range(2 * chunks):
                next(lines)
        trace = server.told()
        wait_for(lambda: backend.open_streams == 0)
        assert trace.end is None and server.ends() == {"disconnected"}
        assert not server.server.open


@pytest.mark.parametrize("route", ROUTES)
def test_a_client_that_leaves_without_streaming_stops_the_engine(route, guard, endless):
    backend, made = guard(endless)
    with running(made, Limits(MODEL, max_tokens=10**6)) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + route, json=body_of(route, max_tokens=10**6), timeout=0.3)
        assert server.told().end is None
        wait_for(lambda: backend.open_streams == 0)
        assert server.ends() == {"disconnected"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_for_its_turn_is_forgotten(stream, guard, stuck, free):
    backend, made = guard(stuck, active=1, waiting=5)
    with running(made) as server:
        with httpx.stream("POST", server.url + TEXT, json=body_of(TEXT, stream=True)) as answer:
            lines = answer.iter_lines()  # kept: a dropped one closes the connection
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + TEXT, json=body_of(TEXT, stream=stream), timeout=0.3)
            assert server.told(1).token_ids == [] and len(backend.prompts) == 1
            free.set()
        server.told(2)
        assert server.ends() == {"disconnected"} or server.ends() == {"disconnected", "done"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_during_a_hidden_reflection_stops_it(stream, guard, script, spec):
    thinking = threading.Event()

    def play(prompt, sampling):
        if not set(spec.ids) & set(prompt):
            yield from script("abcdefghij", {6: (0.9, 0.0)})
        for step in itertools.cycle(script("SECRET ", end=False)):
            thinking.set()
            time.sleep(0.002)
            yield step

    policy = Policy(default="reflect", max_wait_tokens=10**6, reflect=Reflect(max_tokens=10**6, words=("yes", "no")))
    backend, made = guard(play, policy)
    with running(made) as server:
        with httpx.Client() as client, pytest.raises((httpx.ReadTimeout, StopIteration)):
            client.post(server.url + TEXT, json=body_of(TEXT, stream=stream), timeout=0.5)
        assert thinking.is_set()
        server.told()
        wait_for(lambda: backend.open_streams == 0)
        assert server.ends() == {"disconnected"}


def test_an_engine_that_is_full_is_busy_and_says_when_to_come_again(guard, stuck, free):
    _, made = guard(stuck, active=1, waiting=0)
    with running(made) as server:
        with httpx.stream("POST", server.url + TEXT, json=body_of(TEXT, stream=True)) as first:
            lines = first.iter_lines()
            next(lines)
            for route, stream in itertools.product(ROUTES, (False, True)):
                answer = httpx.post(server.url + route, json=body_of(route, stream=stream))
                assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["type"] == "rate_limit_error"
            server.told(4)
            assert server.ends() == {"refused"}
            free.set()
        server.told(5)
        wait_for(lambda: httpx.post(server.url + TEXT, json=body_of(TEXT)).status_code == 200)


def test_a_server_that_is_full_is_busy_too(guard, stuck, free):
    _, made = guard(stuck)
    with running(made, Limits(MODEL, max_open=1)) as server:
        with httpx.stream("POST", server.url + TEXT, json=body_of(TEXT, stream=True)) as first:
            lines = first.iter_lines()
            next(lines)
            assert httpx.post(server.url + CHAT, json=body_of(CHAT)).status_code == 429
            free.set()
        server.told(1)
        assert httpx.post(server.url + TEXT, json=body_of(TEXT)).status_code == 200


def test_a_stream_that_has_said_that_it_lives_ends_with_an_error_before_done(guard, script):
    _, made = guard(Play(script("abc"), pause=(0, 0.6)), fail_at=0)
    with running(made, Limits(MODEL, ping=0.2)) as server:
        for route in ROUTES:
            answer = httpx.post(server.url + route, json=body_of(route, stream=True))
            assert answer.status_code == 200 and answer.content.startswith(b": ping")
            last = chunks_of(answer.content)[-1]
            assert last["error"]["code"] == "engine_unavailable"
            assert last["redflag"] == {"verdict": "fault", "reason": "fault", "category": None}
            assert b"content_filter" not in answer.content


def test_a_second_judge_keeps_nobody_else_waiting(guard, script):
    asked, free = threading.Semaphore(0), threading.Event()

    def judge(messages, answer):
        asked.release()
        free.wait(20)
        return 0.0

    steps = script("abcdefghij", {6: (0.9, 0.0)})
    harmless = script("abcdefghij")
    texts = iter([steps] * 3 + [harmless])
    _, made = guard(
        lambda prompt, sampling: next(texts), Policy(default="escalate", hold_back=2, judge_timeout=20), judge
    )
    with running(made) as server:
        answers = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(httpx.post(server.url + TEXT, json=body_of(TEXT), timeout=20))
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert asked.acquire(timeout=20)
        assert httpx.post(server.url + TEXT, json=body_of(TEXT)).json()["choices"][0]["text"] == "abcdefghij"
        texts = itertools.repeat(harmless[7:])
        free.set()
        for thread in threads:
            thread.join(20)
        assert [answer.json()["choices"][0]["text"] for answer in answers] == ["abcdefghij"] * 3


def test_a_client_that_takes_nothing_is_given_up(guard, endless):
    """What it does not take waits in memory for no longer than it is given."""
    backend, made = guard(endless)
    name = "x" * 50_000  # stands in every chunk
    with running(made, Limits(name, max_tokens=10**6, send_timeout=0.5)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps(body_of(TEXT, stream=True, max_tokens=10**6) | {"model": name}).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            slow.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (TEXT.encode(), len(body)))
            slow.sendall(body)
            server.told(seconds=20)
            wait_for(lambda: backend.open_streams == 0)
            assert server.ends() == {"disconnected"}


def test_when_the_server_goes_down_open_responses_end_with_an_error_that_says_so(guard, endless):
    backend, made = guard(endless, Policy(hold_back=3))
    parts = []
    with running(made, Limits(MODEL, max_tokens=10**6)) as server:
        body = body_of(CHAT, stream=True, max_tokens=10**6)
        with httpx.stream("POST", server.url + CHAT, json=body) as answer:
            pieces = answer.iter_bytes()
            parts.append(next(pieces))
            server.stop()
            parts += pieces
        whole = threading.Thread(
            target=lambda: parts.append(httpx.post(server.url + CHAT, json={**body, "stream": False}, timeout=20))
        )
        whole.start()
        wait_for(lambda: len(server.server.open) == 1 and next(iter(server.server.open)).seconds_to_first is not None)
        server.stop()
        whole.join(20)
        chunks = chunks_of(b"".join(parts[:-1]))
        assert text_of_chunks(chunks) == shown_by(server.traces[0]) != ""
        assert chunks[-1]["redflag"] == {"verdict": "fault", "reason": "fault", "category": None}
        assert parts[-1].status_code == 503 and set(parts[-1].json()) == {"error"}
        for error in (chunks[-1]["error"], parts[-1].json()["error"]):
            assert (error["type"], error["code"]) == ("server_error", "shutting_down")
            assert "shutting down" in error["message"]
        assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1])
        server.told(2)
        wait_for(lambda: backend.open_streams == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_had_shown_nothing_when_the_server_went_down_is_503(stream, guard, stuck, free):
    _, made = guard(stuck, Policy(release="end"))
    with running(made) as server:
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(server.url + CHAT, json=body_of(CHAT, stream=stream), timeout=20))
        )
        asking.start()
        wait_for(
            lambda: len(server.server.open) == 1 and len(next(iter(server.server.open)).response.trace.token_ids) == 3
        )
        server.stop()
        asking.join(20)
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "shutting_down"
        assert answers[0].headers["retry-after"] == "1"
        free.set()
        server.told()


class Doubtful:
    """A probe that can be told to fail."""

    def __init__(self):
        self.error, self.asked = None, 0

    async def __call__(self):
        self.asked += 1
        await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error


def test_after_a_fault_the_engine_has_to_prove_itself_before_it_is_used_again(guard, script):
    probe = Doubtful()
    readiness = Readiness(probe)
    readiness.trust()
    lost = ConnectionError("gone")
    answers = iter([script("abc"), lost, script("abc"), script("abc")])

    def play(prompt, sampling):
        steps = next(answers)
        if isinstance(steps, Exception):
            raise steps
        return steps

    _, made = guard(play)
    with running(made, readiness=readiness) as server:
        ask = lambda: httpx.post(server.url + TEXT, json=body_of(TEXT)).status_code  # noqa: E731
        ready = lambda: httpx.get(server.url + "/ready").status_code  # noqa: E731
        assert (ready(), ask(), probe.asked) == (200, 200, 0)
        assert (ask(), probe.asked) == (503, 0)
        server.told(2)
        probe.error = lost
        assert (ask(), ready(), probe.asked) == (503, 503, 1)  # one answer counts for a second
        assert len(server.traces) == 2, "the engine was not asked"
        probe.error = None
        wait_for(lambda: ready() == 200)
        assert (ask(), ask()) == (200, 200)
        assert b"gone" not in httpx.get(server.url + "/ready").content


def test_many_ask_and_one_looks():
    async def all_at_once():
        probe = Doubtful()
        readiness = Readiness(probe)
        assert await asyncio.gather(*(readiness.why_not() for _ in range(50))) == [""] * 50
        readiness.doubt()
        probe.error = RuntimeError("dead")
        assert set(await asyncio.gather(*(readiness.why_not() for _ in range(50)))) == {"RuntimeError: dead"}
        return probe.asked

    assert asyncio.run(all_at_once()) == 2


def test_an_engine_is_asked_again_now_and_then_even_if_nothing_goes_wrong(guard, script):
    probe = Doubtful()
    readiness = Readiness(probe, again=0.05)
    readiness.trust()
    _, made = guard(script("abc"))
    with running(made, readiness=readiness) as server:
        wait_for(lambda: probe.asked >= 2)
        assert httpx.post(server.url + TEXT, json=body_of(TEXT)).status_code == 200
        probe.error = ConnectionError("measures otherwise")
        wait_for(lambda: httpx.post(server.url + TEXT, json=body_of(TEXT)).status_code == 503)


def test_a_probe_that_hangs_is_no_answer():
    async def hangs():
        await asyncio.sleep(60)

    assert "TimeoutError" in asyncio.run(Readiness(hangs, patience=0.05).why_not())


def test_nothing_of_a_defect_is_told(guard, script):
    _, made = guard(script("abc"))
    with running(made) as server:
        server.server.guard.respond = lambda *args: 1 / 0
        for stream in (False, True):
            answer = httpx.post(server.url + TEXT, json=body_of(TEXT, stream=stream))
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
            assert b"Zero" not in answer.content
        assert httpx.get(server.url + "/health").status_code == 200
