"""Whoever leaves, whatever ends: nothing of a stream stays behind, and others are what they would be alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from turn_engine import SAMPLING, Engine, Gate, read, run, until, whole

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.backends.scripted import ScriptedBackend
from redflag.backends.turns import Depth, Turns
from redflag.errors import RedflagError
from redflag.trace import Step


@pytest.mark.parametrize("taken", range(6))
@pytest.mark.parametrize("how", ["aclose", "cancel", "drop", "throw"])
def test_whoever_leaves_at_whatever_step_leaves_nothing_behind(taken, how):
    async def main():
        engine = Engine(5)
        turns = Turns(engine, active=2, buffer=2)
        other = asyncio.create_task(read(turns.astream([2], SAMPLING)))
        got = []
        stream = turns.astream([1], SAMPLING)

        async def consume():
            for _ in range(taken):
                got.append((await anext(stream)).token_id)
            await asyncio.Event().wait()

        if how == "cancel":
            task = asyncio.create_task(consume())
            await until(lambda: len(got) == min(taken, 5))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await stream.aclose()
        else:
            for _ in range(min(taken, 5)):
                got.append((await anext(stream)).token_id)
            if how == "aclose":
                await stream.aclose()
                await stream.aclose()
            elif how == "throw":
                with contextlib.suppress(ZeroDivisionError):
                    await stream.athrow(ZeroDivisionError())
        stream = None
        gc.collect()
        assert got == whole(1, 5)[:taken]
        assert await other == whole(2, 5)
        await until(lambda: engine.open == 0 and turns.depth() == (0, 0))
        assert len(engine.threads) == 1  # closed where they ran
        await turns.aclose()

    run(main())


@pytest.mark.parametrize("place", ["computing", "waiting", "before the first step", "with steps unread"])
def test_a_consumer_cancelled_in_any_place_is_gone_before_the_next_step_of_others(place):
    async def main():
        begin, gate = Gate(), Gate()
        held = {"computing": (1, 2), "waiting": (2, 0), "before the first step": (1, 0), "with steps unread": (2, 3)}
        names = (2, 1) if place == "waiting" else (1, 2)
        gates = {(names[0], 0): begin, held[place]: gate}
        engine = Engine(8, lambda name, index: gates.get((name, index), lambda: None)())
        turns = Turns(engine, active=1 if place == "waiting" else 2)
        tasks = {}
        for name in names:
            tasks[name] = asyncio.create_task(read(turns.astream([name], SAMPLING)))
            await asyncio.sleep(0)
        assert sum(turns.depth()) == 2
        begin.opened.set()
        await until(gate.reached.is_set)
        tasks[1].cancel()
        begun = time.monotonic()
        await asyncio.gather(tasks[1], return_exceptions=True)
        assert tasks[1].cancelled() and time.monotonic() - begun < 5  # although the engine is stuck
        assert turns.depth() == Depth(active=1, waiting=0)
        made = engine.diary.count(1) + (place in ("computing", "before the first step"))
        gate.opened.set()
        assert await tasks[2] == whole(2, 8)
        assert engine.diary.count(1) == made and engine.open == 0
        assert (1 in engine.opened) == (place != "waiting")
        await turns.aclose()

    run(main())


@pytest.mark.parametrize("closers", [1, 3])
def test_closing_in_the_middle_ends_every_stream_with_an_error_and_the_thread(closers):
    async def main():
        gate = Gate()
        engine = Engine(1000, lambda name, index: gate() if index == 20 else None)
        turns = Turns(engine, active=2, waiting=3, buffer=50)
        tasks = [asyncio.create_task(read(turns.astream([name], SAMPLING))) for name in range(1, 6)]
        await until(gate.reached.is_set)
        closing = [asyncio.create_task(turns.aclose()) for _ in range(closers)]
        ends = await asyncio.gather(*tasks, return_exceptions=True)  # the engine is stuck: nobody waits for it
        assert [type(end) for end in ends] == [ConnectionError] * 5
        with pytest.raises(ConnectionError, match="shut down"):
            await read(turns.astream([6], SAMPLING))
        closing[0].cancel()  # who stops waiting for the end does not spoil it for the others
        gate.opened.set()
        await asyncio.gather(*closing, return_exceptions=True)
        await turns.aclose()
        assert engine.open == 0 and turns.depth() == (0, 0) and len(engine.threads) == 1

    run(main())


def test_closing_what_was_never_used_starts_nothing():
    async def main():
        turns = Turns(Engine())
        assert threading.active_count() == before
        await turns.aclose()
        with pytest.raises(ConnectionError):
            await read(turns.astream([1], SAMPLING))

    before = threading.active_count()
    run(main())


def test_a_thread_that_dies_fails_every_stream_closed(monkeypatch, caplog):
    async def main():
        gate = Gate()
        engine = Engine(100, lambda name, index: gate() if index == 3 else None)
        turns = Turns(engine, active=2)
        tasks = [asyncio.create_task(read(turns.astream([name], SAMPLING))) for name in (1, 2, 3)]
        await until(gate.reached.is_set)
        monkeypatch.setattr(turns._worker, "_next", lambda: 1 // 0)
        gate.opened.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [ConnectionError] * 3
        assert "ZeroDivisionError" in str(ends[0])
        with pytest.raises(ConnectionError, match="ZeroDivisionError"):
            await read(turns.astream([4], SAMPLING))
        await turns.aclose()
        assert engine.open == 0

    run(main())
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_an_event_loop_that_is_closed_early_stops_the_streams_and_another_can_go_on(new_loop):
    gate = Gate()
    engine = Engine(10**6, lambda name, index: gate() if index == 5 else None)
    turns = Turns(engine, active=2, waiting=2, buffer=10)
    loop = new_loop()
    streams = [turns.astream([name], SAMPLING) for name in range(1, 5)]

    async def begin():
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await tasks[0]
        await until(gate.reached.is_set)
        for task in tasks[1:]:
            task.cancel()

    loop.run_until_complete(begin())
    loop.close()  # without ending its generators
    gate.opened.set()

    async def main():
        assert await read(turns.astream([7], SAMPLING)) == whole(7, 8)

    engine.length = 8
    engine.at_step = lambda name, index: None
    asyncio.run(main())
    for _ in range(1000):
        if engine.open == 0:
            break
        time.sleep(0.005)
    assert engine.open == 0
    asyncio.run(turns.aclose())
    assert not turns._worker.thread.is_alive()
    with contextlib.suppress(RuntimeError):
        for stream in streams:
            stream.aclose().close()


def test_two_event_loops_may_share_an_engine():
    engine = Engine(200)
    turns = Turns(engine, active=3)
    results = {}

    def one(name):
        async def main():
            results[name] = await asyncio.gather(*(read(turns.astream([name + i], SAMPLING)) for i in range(5)))

        asyncio.run(main())

    threads = [threading.Thread(target=one, args=(name,)) for name in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [whole(name + i, 200) for i in range(5)] for name in (10, 20)}
    asyncio.run(turns.aclose())


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_two_hundred_streams_at_once(runner):
    async def main():
        engine = Engine(20)
        turns = Turns(engine, active=8, waiting=192)

        async def one(name):
            got = []
            async for step in turns.astream([name], SAMPLING):
                got.append(step.token_id)
                if name % 3 == 0:
                    await asyncio.sleep(0.001)
                if name % 7 == 0 and len(got) == name % 20:
                    return got
            return got

        results = await asyncio.gather(*(one(name) for name in range(1, 201)))
        for name, got in enumerate(results, 1):
            assert got == whole(name, name % 20 if name % 7 == 0 and name % 20 else 20)
        await until(lambda: engine.open == 0)
        assert turns.depth() == (0, 0)
        await turns.aclose()

    run(main(), runner)


def test_an_engine_that_is_dropped_without_closing_ends_its_thread():
    async def main():
        turns = Turns(Engine(3))
        assert await read(turns.astream([1], SAMPLING)) == whole(1, 3)
        thread = turns._worker.thread
        gone = weakref.ref(turns)
        del turns
        gc.collect()
        assert gone() is None
        await until(lambda: not thread.is_alive())

    run(main())


def test_a_stream_that_failed_keeps_nothing_of_it_in_memory():
    class Cache:
        pass

    caches = []

    class Failing(Engine):
        def _steps(self, name):
            cache = Cache()
            caches.append(weakref.ref(cache))
            yield Step(1, (0.1,))
            raise ConnectionError("lost")

    async def main():
        turns = Turns(Failing())
        gc.disable()
        try:
            with contextlib.suppress(ConnectionError):
                await asyncio.create_task(read(turns.astream([1], SAMPLING)))
            await asyncio.sleep(0.02)
            assert caches[0]() is None
        finally:
            gc.enable()
        await turns.aclose()

    run(main())


def test_a_process_ends_although_nobody_closed_the_engine():
    code = """
import asyncio, time
from redflag.backends import Sampling
from redflag.backends.scripted import ScriptedBackend
from redflag.backends.turns import Turns
from redflag.trace import Step
def slow(prompt, sampling):
    while True:
        time.sleep(0.01)
        yield Step(1, (0.1,))
turns = Turns(ScriptedBackend(slow))
async def main():
    stream = turns.astream([1], Sampling(max_new_tokens=10**9))
    await anext(stream)
    print("begun", flush=True)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", "")


@pytest.mark.parametrize(
    ("options", "named"),
    [({"active": 0}, "active"), ({"waiting": -1}, "waiting"), ({"buffer": 0}, "buffer"), ({"patience": 0}, "patience")],
)
def test_numbers_with_which_nothing_could_run_are_refused_by_name(options, named):
    with pytest.raises(RedflagError, match=named):
        Turns(Engine(), **options)


actions = st.lists(
    st.tuples(
        st.integers(0, 12),  # length of the stream
        st.one_of(st.none(), st.integers(0, 12)),  # steps after which its consumer leaves
        st.integers(0, 3),  # turns of the event loop between two steps
        st.one_of(st.none(), st.integers(0, 12)),  # step at which the engine fails
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150)
@given(actions, st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_however_streams_interleave_each_is_what_it_would_be_alone(plan, active, buffer, yields):
    def script(prompt, sampling):
        length, _, _, fail = plan[prompt[0]]
        for index in range(length):
            if yields:
                time.sleep(0)
            if index == fail:
                raise ConnectionError(f"stream {prompt[0]}")
            yield Step(100 * prompt[0] + index, (index / 20,))

    def alone(name):
        steps, end = [], "end"
        try:
            for step in ScriptedBackend(script).stream([name], SAMPLING):
                if plan[name][1] == len(steps):
                    return steps, "left"
                steps.append(step)
        except ConnectionError as error:
            # Whoever left at the failing step has not seen it.
            return steps, "left" if plan[name][1] == len(steps) else str(error)
        return steps, "left" if plan[name][1] == len(steps) else end

    async def together(turns, name):
        _, leave, pause, _ = plan[name]
        steps: list[Step] = []
        stream = turns.astream([name], SAMPLING)
        try:
            while leave != len(steps):
                steps.append(await anext(stream))
                for _ in range(pause):
                    await asyncio.sleep(0)
        except StopAsyncIteration:
            return steps, "end"
        except ConnectionError as error:
            return steps, str(error)
        await stream.aclose()
        return steps, "left"

    async def main():
        backend = ScriptedBackend(script)
        turns = Turns(backend, active=active, buffer=buffer)
        got = await asyncio.gather(*(together(turns, name) for name in range(len(plan))))
        assert got == [alone(name) for name in range(len(plan))]
        await until(lambda: turns.depth() == (0, 0))
        await turns.aclose()
        assert backend.open_streams == 0

    run(main())


def test_a_model_gives_the_same_steps_as_without(built, tokenizer, spec):
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    prompts = [[20 + i, 30, 40, 50 + i] for i in range(6)]
    alone = [list(HFBackend(built["llama"], tokenizer, spec).stream(prompt, sampling)) for prompt in prompts]

    async def main():
        turns = Turns(HFBackend(built["llama"], tokenizer, spec), active=3)

        async def steps(prompt):
            return [step async for step in turns.astream(prompt, sampling)]

        together = await asyncio.gather(*map(steps, prompts))
        for one, other in zip(alone, together, strict=True):
            assert [step.token_id for step in one] == [step.token_id for step in other]
            for left, right in zip(one, other, strict=True):
                assert left.flag_probs == pytest.approx(right.flag_probs, abs=1e-5)
        with pytest.raises(RedflagError, match="at least one token"):
            await read(turns.astream([], sampling))
        await turns.aclose()

    run(main())
