"""Asking a server: at a pace, with patience, and no longer than it makes sense."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from itertools import pairwise

import pytest
from chat_server import chat_server

from redflag.errors import RedflagError
from redflag.lab.synthesis.questions import CachedWriter, Question, Reply
from redflag.lab.synthesis.remote_writer import Pace, RemoteWriter


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        until = self.now + seconds
        await asyncio.sleep(0)
        self.now = max(self.now, until)


def questions(n, **settings):
    return [Question(({"role": "user", "content": f"q{i}"},), **settings) for i in range(n)]


def asked(endpoint, wanted):
    got = {}
    endpoint.ask(wanted, got.__setitem__)
    return [got[i] for i in range(len(wanted))]


def content(body):
    return body["messages"][-1]["content"]


def test_S3_1_answers_come_back_with_their_questions():
    with chat_server(lambda body: f"to {content(body)}") as server:
        got = asked(RemoteWriter(server.url, "m", concurrency=4), questions(9, temperature=0.3, max_tokens=7, seed=5))
    assert [reply.text for reply in got] == [f"to q{i}" for i in range(9)]
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("m", 0.3, 7, 5)
    assert "continue_final_message" not in body


def test_S3_1_an_answer_that_is_begun_is_continued():
    with chat_server(lambda body: "more") as server:
        turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "Begun"})
        asked(RemoteWriter(server.url, "m"), [Question(turns)])
    assert server.bodies[0]["continue_final_message"] is True and server.bodies[0]["add_generation_prompt"] is False


def test_S3_1_never_more_requests_at_a_time_than_allowed():
    running, most, lock = [0], [0], threading.Lock()

    def reply(body):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return "x"

    with chat_server(reply) as server:
        asked(RemoteWriter(server.url, "m", concurrency=3), questions(15))
    assert 1 <= most[0] <= 3


@pytest.mark.parametrize("workers", [1, 5])
def test_S3_1_the_rate_limit_holds_by_a_fake_clock(workers):
    clock = Clock()
    pace = Pace(30, clock=clock, sleep=clock.sleep)
    times = []

    async def work():
        for _ in range(40 // workers):
            await pace.wait()
            times.append(clock.now)

    async def all_of_them():
        await asyncio.gather(*(work() for _ in range(workers)))

    asyncio.run(all_of_them())
    assert len(times) == 40
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps) >= 2.0 - 1e-9 and max(gaps) <= 2.0 + 1e-9  # 30 a minute, none lost
    assert pace.interval == 2.0


def test_S3_1_requests_to_a_server_keep_to_the_pace():
    clock, seen = Clock(), []

    def reply(body):
        seen.append(clock.now)
        return "x"

    with chat_server(reply) as server:
        pace = Pace(60, clock=clock, sleep=clock.sleep)
        asked(RemoteWriter(server.url, "m", concurrency=1, pace=pace), questions(5))
    assert seen == pytest.approx([100.0, 101.0, 102.0, 103.0, 104.0])


@pytest.mark.parametrize("per_minute", [0, -1, float("nan"), float("inf")])
def test_S3_1_a_pace_that_is_none_is_refused(per_minute):
    with pytest.raises(RedflagError, match="requests per minute"):
        Pace(per_minute)


def test_S3_1_a_busy_server_is_asked_again_after_growing_pauses():
    statuses, times = [429, 500, 503], []

    def reply(body):
        times.append(time.monotonic())
        return statuses.pop(0) if statuses else "well"

    with chat_server(reply) as server:
        endpoint = RemoteWriter(server.url, "m")
        assert asked(endpoint, questions(1)) == [Reply("well")]
    assert endpoint.requests == 4
    for number, (before, after) in enumerate(pairwise(times)):
        assert after - before >= 0.375 * 2**number


def test_S3_1_repeated_requests_keep_to_the_pace_too():
    clock, statuses, seen = Clock(), [500, 500], []

    def reply(body):
        seen.append(clock.now)
        return statuses.pop(0) if statuses else "well"

    with chat_server(reply) as server:
        asked(RemoteWriter(server.url, "m", pace=Pace(6, clock=clock, sleep=clock.sleep)), questions(1))
    assert seen == pytest.approx([100.0, 110.0, 120.0])


def test_S3_1_while_a_server_wants_to_be_left_alone_nobody_asks():
    times = []

    def reply(body):
        times.append(time.monotonic())
        server.headers = {"Retry-After": "0.3"} if len(times) == 1 else {}
        return 429 if len(times) == 1 else "well"

    with chat_server(reply) as server:
        assert asked(RemoteWriter(server.url, "m", pace=Pace(600)), questions(5)) == [Reply("well")] * 5
    assert times[1] - times[0] >= 0.3


@pytest.mark.parametrize(
    ("status", "requests", "words"), [(500, 3, "after 2 retries"), (401, 1, "name or key"), (404, 1, "Fix the address")]
)
def test_S3_1_a_lost_server_ends_it_with_one_sentence(status, requests, words):
    with chat_server(lambda body: status) as server:
        endpoint = RemoteWriter(server.url, "m", retries=2)
        with pytest.raises(RedflagError, match=words):
            asked(endpoint, questions(1))
    assert endpoint.requests == requests


def test_S3_1_a_late_server_is_lost():
    with socket.socket() as silent:  # takes the connection, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(RedflagError, match="is lost"):
            asked(RemoteWriter(url, "m", timeout=0.05, retries=0), questions(1))


def test_S3_1_a_server_that_wants_to_be_left_alone_is():
    clock = Clock()
    pace = Pace(60, clock=clock, sleep=clock.sleep)
    pace.hold(7)
    asyncio.run(pace.wait())
    assert clock.now == 107.0


@pytest.mark.parametrize(
    ("said", "text", "finish"),
    [
        (400, "", "refused"),
        ({"choices": [{"message": {"content": None}}]}, "", "stop"),
        ({"choices": [{"message": {"content": "cut"}, "finish_reason": "length"}]}, "cut", "length"),
        ({"choices": [{"message": {"content": "<think>hm</think>\nYes"}}]}, "Yes", "stop"),
        ({"choices": [{"message": {"content": "half \ud800"}}]}, "half ?", "stop"),
    ],
)
def test_S3_1_what_counts_as_an_answer(said, text, finish):
    with chat_server(lambda body: said) as server:
        assert asked(RemoteWriter(server.url, "m"), questions(1)) == [Reply(text, finish)]


@pytest.mark.parametrize("said", [{}, {"choices": []}, {"choices": [{"message": {}}]}, {"choices": 3}])
def test_S3_1_what_is_no_completion_is_refused(said):
    with (
        chat_server(lambda body: said) as server,
        pytest.raises(RedflagError, match="must reply with a chat completion"),
    ):
        asked(RemoteWriter(server.url, "m"), questions(1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "nowhere"}, "address"),
        ({"model": ""}, "model's name"),
        ({"concurrency": 0}, r"concurrency must be at least 1 \(got 0\)"),
        ({"timeout": 0}, r"timeout must be seconds above 0 \(got 0\)"),
        ({"retries": -1}, r"retries must be 0 or more \(got -1\)"),
    ],
)
def test_S3_1_settings_that_cannot_be_used_are_refused(settings, words):
    with pytest.raises(RedflagError, match=words):
        RemoteWriter(**{"url": "http://h/v1", "model": "m", **settings})


def test_S3_1_further_fields_are_sent_and_make_another_model():
    with chat_server(lambda body: "x") as server:
        endpoint = RemoteWriter(server.url, "m", options={"top_p": 0.9, "max_tokens": 1})
        asked(endpoint, questions(1))
    assert (server.bodies[0]["model"], server.bodies[0]["top_p"], server.bodies[0]["max_tokens"]) == ("m", 0.9, 1)
    assert endpoint.identity != RemoteWriter(server.url, "m").identity == "m"


class Scripted:
    identity = "scripted"

    def __init__(self, fails_after=10**9):
        self.asked, self.fails_after = [], fails_after

    def ask(self, questions, keep):
        for index, question in enumerate(questions):
            if len(self.asked) == self.fails_after:
                raise RedflagError("lost")
            self.asked.append(content({"messages": question.messages}))
            keep(index, Reply(f"to {self.asked[-1]}", "stop", 2, 3))


def test_S3_1_kept_answers_are_never_asked_again(tmp_path):
    path, wanted = tmp_path / "a" / "answers.jsonl", questions(4)
    first = Scripted(fails_after=2)
    with pytest.raises(RedflagError, match="lost"):
        CachedWriter(first, path).ask(wanted)
    with path.open("ab") as file:
        file.write(b'{"key": "cut o')  # a crash in the middle of a line
    second = Scripted()
    kept = CachedWriter(second, path)
    counted = []
    got = kept.ask([*wanted, wanted[0]], lambda done, total: counted.append((done, total)))
    assert [reply.text for reply in got] == ["to q0", "to q1", "to q2", "to q3", "to q0"]
    assert (first.asked, second.asked) == (["q0", "q1"], ["q2", "q3"])
    assert counted == [(3, 4), (4, 4)] and (kept.asked, kept.tokens_in, kept.tokens_out) == (2, 4, 6)
    third = Scripted()
    assert CachedWriter(third, path).ask(wanted) == got[:4] and third.asked == []


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"max_tokens": 3}, {"seed": 1}])
def test_S3_1_another_question_has_another_key(change):
    assert questions(1)[0].key("m") != questions(1, **change)[0].key("m")
    assert questions(1)[0].key("m") != questions(1)[0].key("n")
    assert questions(1)[0].key("m") == questions(1)[0].key("m")
