"""The remote backend when a stream is left: connections are closed, shared and given back."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time

import pytest
from remote_steps import (
    FIRST,
    LAST,
    PROMPT,
    SECOND,
    connect,
    short_pauses,  # noqa: F401# noqa: F401
    wait_until,
)
from upstream import DONE, EOS, Upstream

from redflag.backends import Sampling


def endless(body, number):
    yield FIRST
    while True:
        yield 0.01
        yield SECOND


@pytest.mark.parametrize("taken", [1, 3])
def test_closing_a_stream_closes_its_connection(taken):
    with Upstream(script=endless).serve() as upstream:
        stream = connect(upstream).stream(PROMPT, Sampling())
        for _ in range(taken):
            next(stream)
        assert upstream.open == 1
        stream.close()
        wait_until(lambda: upstream.open == 0)
        assert list(stream) == []


def test_a_stream_that_is_dropped_closes_its_connection():
    with Upstream(script=endless).serve() as upstream:
        stream = connect(upstream).stream(PROMPT, Sampling())
        next(stream)
        del stream
        gc.collect()
        wait_until(lambda: upstream.open == 0)


def test_closing_before_the_first_step_asks_nothing():
    with Upstream(script=endless).serve() as upstream:
        connect(upstream).stream(PROMPT, Sampling()).close()
        assert upstream.bodies == []


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_cancelling_a_task_closes_its_connection(wait):
    with Upstream(script=lambda body, number: [FIRST, 30.0]).serve() as upstream:

        async def leave():
            backend = connect(upstream)

            async def read():
                async for _ in backend.astream(PROMPT, Sampling()):
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await backend.aclose()

        asyncio.run(leave())
        wait_until(lambda: upstream.open == 0)


def test_an_interrupt_while_a_step_is_waited_for_closes_everything():
    with Upstream(script=lambda body, number: [FIRST, 30.0]).serve() as upstream:
        stream = connect(upstream).stream(PROMPT, Sampling())
        next(stream)
        main = threading.main_thread().ident
        timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        timer.join()
        assert list(stream) == []
        wait_until(lambda: upstream.open == 0)


def test_a_running_loop_is_not_made_to_stand_still():
    with Upstream().serve() as upstream:

        async def wrong():
            next(connect(upstream).stream(PROMPT, Sampling()))

        with pytest.raises(TypeError, match="astream"):
            asyncio.run(wrong())


def test_many_streams_of_a_loop_share_connections_one_after_the_other_and_run_side_by_side():
    with Upstream().serve() as upstream:

        async def run():
            backend = connect(upstream)

            async def one(seed):
                return [step async for step in backend.astream(PROMPT, Sampling(max_new_tokens=5, seed=seed))]

            for seed in range(5):
                await one(seed)
                await asyncio.sleep(0.02)
            one_after_the_other = len(upstream.connections)
            together = await asyncio.gather(*(one(seed) for seed in range(50)))
            await backend.aclose()
            return one_after_the_other, together

        connections, together = asyncio.run(run())
        assert connections == 1
        for seed, steps in enumerate(together):
            assert steps == list(connect(upstream).stream(PROMPT, Sampling(max_new_tokens=5, seed=seed)))


def test_a_stream_left_after_its_last_step_leaves_nothing_behind():
    with Upstream(script=lambda body, number: [FIRST, LAST.removesuffix(DONE), 30.0]).serve() as upstream:

        async def run():
            backend = connect(upstream)
            stream = backend.astream(PROMPT, Sampling())
            started = time.monotonic()
            while (await anext(stream)).token_id != EOS:
                pass
            await stream.aclose()
            assert time.monotonic() - started < 1
            await backend.aclose()

        asyncio.run(run())
        wait_until(lambda: upstream.open == 0)
