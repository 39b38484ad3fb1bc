"""The remote backend in front of servers that are honest, wrong or dying; a real vLLM is in `test_remote_vllm.py`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time

import pytest
from remote_steps import (
    FIRST,
    LAST,
    PROMPT,
    SECOND,
    TOKENS,
    both_ways,
    connect,
    short_pauses,  # noqa: F401# noqa: F401
    tokens,
    wait_until,
)
from upstream import DONE, EOS, FLAG, VOCABULARY, Abort, Status, Upstream, event, log_softmax, logits_of

from redflag.backends import BusyError, Sampling
from redflag.backends import remote as remote_module
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_wire import RefusalError
from redflag.errors import RedflagError
from redflag.trace import Step


def test_steps_carry_the_raw_probabilities_of_the_flags():
    with Upstream().serve() as upstream:
        for temperature in (0.0, 0.7, 2.0):
            steps = both_ways(connect(upstream), sampling=Sampling(max_new_tokens=30, seed=3, temperature=temperature))
            context = list(PROMPT)
            for step in steps:
                assert step.flag_probs == pytest.approx([math.exp(log_softmax(logits_of(context))[FLAG])], abs=1e-12)
                context.append(step.token_id)
            assert FLAG not in tokens(steps)
            assert EOS in tokens(steps)[-1:] or len(steps) == 30


@pytest.mark.parametrize("per_chunk", [2, 3, 7, 100])
def test_a_chunk_of_several_tokens_is_as_many_steps(per_chunk):
    sampling = Sampling(max_new_tokens=25, seed=1)
    with Upstream().serve() as upstream, Upstream(per_chunk=per_chunk).serve() as other:
        assert both_ways(connect(other), sampling=sampling) == both_ways(connect(upstream), sampling=sampling)


def test_watched_ids_are_measured_in_place_of_the_flags_which_stay_banned():
    with Upstream().serve() as upstream:
        steps = list(connect(upstream).stream(PROMPT, Sampling(max_new_tokens=2, temperature=0.0), watch=[9, 7, 9]))
        expected = [math.exp(log_softmax(logits_of(PROMPT))[i]) for i in (9, 7, 9)]
        assert steps[0].flag_probs == pytest.approx(expected)
        assert upstream.bodies[-1]["logit_bias"] == {str(FLAG): -100.0}


def test_model_and_context_are_asked_for_once_and_bound_the_response():
    with Upstream().serve() as upstream:
        backend = connect(upstream)
        assert (backend.model, backend.context_length) == (None, None)
        assert len(list(backend.stream([9] * 60, Sampling(max_new_tokens=50, seed=0)))) <= 4
        assert (backend.model, backend.context_length) == ("tiny", 64)
        assert [(body["model"], body["max_tokens"]) for body in upstream.bodies] == [("tiny", 4)]
        with pytest.raises(RedflagError, match="64 tokens"):
            backend.stream([9] * 64, Sampling())
    assert RemoteBackend("http://x/v1/", [FLAG], [EOS], model="m", context_length=9).url == "http://x"


def test_a_long_prompt_is_refused_at_the_first_step_where_the_context_was_not_known():
    with Upstream().serve() as upstream, pytest.raises(RedflagError, match="64 tokens"):
        next(connect(upstream).stream([9] * 64, Sampling()))


def test_a_server_that_names_no_models_needs_a_name():
    with Upstream(models=None).serve() as upstream:
        with pytest.raises(RedflagError, match="model must be given"):
            list(connect(upstream).stream(PROMPT, Sampling()))
        assert both_ways(connect(upstream, model="mine"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("localhost:8000", [FLAG], [EOS]), "must begin with http:// or https://"),
        (("http://x", [], [EOS]), "the number of flag ids"),
        (("http://x", list(range(200)), [EOS]), "the number of flag ids"),
        (("http://x", [-1], [EOS]), "flag ids must be at least 0 and below"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments, named):
    with pytest.raises(RedflagError, match=named):
        RemoteBackend(*arguments)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(RedflagError, match="flag ids must be at least 0 and below"):
        RemoteBackend("http://x", [70], [EOS], vocab_size=VOCABULARY)
    backend = RemoteBackend("http://x", [FLAG], [EOS], vocab_size=VOCABULARY)
    with pytest.raises(RedflagError, match=r"watched ids must be .*\(got 60\)"):
        backend.stream(PROMPT, Sampling(), watch=[60])
    with pytest.raises(RedflagError, match=r"number of watched ids must be at least 1 and at most 128 .got 129"):
        backend.stream(PROMPT, Sampling(), watch=list(range(129)))


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_refused_connection_is_tried_again_and_then_an_error():
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(ConnectionError, match=url):
        list(RemoteBackend(url, [FLAG], [EOS], model="tiny").stream(PROMPT, Sampling()))


def test_a_connection_that_is_not_made_is_tried_again_and_then_an_error():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(3):  # more than the queue of those who knock holds
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        backend = RemoteBackend(url, [FLAG], [EOS], model="tiny", context_length=64, connect_timeout=0.2, retries=1)
        started = time.monotonic()
        with pytest.raises(ConnectionError, match="Connection timeout"):
            list(backend.stream(PROMPT, Sampling()))
        assert 0.4 <= time.monotonic() - started < 3


def test_a_server_that_comes_up_between_two_tries_answers(monkeypatch):
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE", 0.3)
    port = closed_port()
    backend = RemoteBackend(f"http://127.0.0.1:{port}", [FLAG], [EOS], model="tiny", retries=4)
    found = []
    waiting = threading.Thread(target=lambda: found.extend(backend.stream(PROMPT, Sampling(max_new_tokens=3))))
    waiting.start()
    with Upstream().serve(port):
        waiting.join()
    assert found


BUSY = Status((429, {"error": {"message": "queue full"}}, {}))


@pytest.mark.parametrize(
    "before",
    [
        [BUSY],
        [Status((503, {}, {"Retry-After": "0"}))],
        [Status((502, {}, {})), Status((504, "", {}))],
        [Abort],
        [b""],
        [b": still here\n\n", Abort],
        [b"data: {"],
    ],
)
def test_before_the_first_step_another_try_is_made(before):
    times = len(before) if isinstance(before[0], Status) else 1

    def script(body, number):
        if number <= times:
            return [before[number - 1]] if isinstance(before[0], Status) else before
        return [FIRST, SECOND, LAST]

    with Upstream(script=script).serve() as upstream:
        assert tokens(connect(upstream).stream(PROMPT, Sampling())) == TOKENS
        assert len(upstream.bodies) == times + 1


@pytest.mark.parametrize(
    ("always", "kind", "named", "tries"),
    [
        (BUSY, BusyError, "429: queue full", 3),
        (Status((503, {"message": "loading"}, {})), BusyError, "503: loading", 3),
        (Status((502, "bad gateway", {})), ConnectionError, "502: bad gateway", 3),
        (Abort, ConnectionError, "failed", 3),
        (Status((500, {"error": {"message": "boom"}}, {})), ConnectionError, "500: boom", 1),
        (Status((302, {}, {"Location": "http://x"})), ConnectionError, "302", 1),
        (Status((400, {"error": {"message": "maximum context length is 512"}}, {})), RefusalError, "length is 512", 1),
        (Status((404, {"error": {"message": "no model x"}}, {})), RefusalError, "404: no model x", 1),
        (Status((422, {"detail": [{"loc": ["body"]}]}, {})), RefusalError, "422: .*loc", 1),
        (Status((401, {"error": "Unauthorized"}, {})), RefusalError, "401: Unauthorized", 1),
        (b'data: {"error": {"message": "no such id", "code": 400}}\n\n', RefusalError, "400: no such id", 1),
        (b'data: {"error": {"message": "died", "code": 500}}\n\n', ConnectionError, "died", 1),
    ],
)
def test_what_the_server_says_instead_of_an_answer_is_told(always, kind, named, tries):
    with Upstream(script=lambda body, number: [always]).serve() as upstream:
        with pytest.raises(kind, match=named):
            list(connect(upstream).stream(PROMPT, Sampling()))
        assert len(upstream.bodies) == tries


@pytest.mark.parametrize(
    ("then", "named"),
    [
        ([Abort], "failed"),
        ([], "without a finish_reason"),
        ([DONE], "without a finish_reason"),
        ([b"data: {"], "without a finish_reason"),
        ([b'data: {"\xff"}\n\n'], "invalid JSON"),
        ([event([8], [{8: -1.0}])], "no log-probability of"),
        ([event([8], [{9: -1.0, FLAG: -2.0}])], "token_id:8 is not among them"),
        ([event([8], [{}], logprobs=None)], "without log-probabilities"),
        ([event([FLAG], [{FLAG: -0.1}])], "logit_bias bans"),
        ([event([VOCABULARY], [{FLAG: -0.1}])], "its id is not certain"),
        ([event([8], [{8: -1.0, FLAG: -3.0}], "abort")], "finish_reason 'abort'"),
        ([event([8], [{8: -1.0, FLAG: -3.0}], "stop")], "end-of-sequence ids"),
        ([event([8], [{8: -1.0, FLAG: 2.0}])], "not a log-probability"),
    ],
)
def test_after_the_first_step_every_fault_ends_the_stream_with_an_error(then, named):
    with Upstream(script=lambda body, number: [FIRST, 0.05, *then]).serve() as upstream:
        stream = connect(upstream, vocab_size=VOCABULARY).stream(PROMPT, Sampling())
        assert next(stream) == Step(9, (math.exp(-2),))
        with pytest.raises(ConnectionError, match=named):
            next(stream)
        assert list(stream) == []
        assert len(upstream.bodies) == 1  # never again after the first step


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_step_that_was_not_measured_is_nan_and_ends_the_stream(missing):
    unmeasured = event([8], [{8: -1.0, FLAG: missing}])
    with Upstream(script=lambda body, number: [FIRST, unmeasured, 30.0]).serve() as upstream:
        steps = list(connect(upstream).stream(PROMPT, Sampling()))
        assert tokens(steps) == [9, 8] and math.isnan(steps[1].flag_probs[0])
        wait_until(lambda: upstream.open == 0)


@pytest.mark.parametrize("items", [[30.0], [FIRST, 30.0], [FIRST, *[b": still here\n\n", 0.1] * 100]])
def test_a_step_that_is_late_ends_the_stream_with_an_error(items):
    with Upstream(script=lambda body, number: items).serve() as upstream:
        stream = connect(upstream, step_timeout=0.4).stream(PROMPT, Sampling())
        if items[0] is FIRST:
            next(stream)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"gave no step for 0\.4 s"):
            next(stream)
        assert time.monotonic() - started < 3
        assert len(upstream.bodies) == 1
        wait_until(lambda: upstream.open == 0)


def test_a_consumer_may_be_slower_than_the_time_out():
    with Upstream(script=lambda body, number: [FIRST, SECOND, 0.2, LAST]).serve() as upstream:

        async def collect():
            backend, found = connect(upstream, step_timeout=0.5), []
            async for step in backend.astream(PROMPT, Sampling()):
                found.append(step.token_id)
                await asyncio.sleep(0.7)
            await backend.aclose()
            return found

        assert asyncio.run(collect()) == TOKENS
