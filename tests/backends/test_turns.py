"""One thread, many streams: fair, bounded, and nothing left behind, whenever anybody leaves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest
from turn_engine import SAMPLING, Engine, Gate, read, run, until, whole

from redflag.backends import BusyError
from redflag.backends.turns import Depth, Turns
from redflag.errors import RedflagError
from redflag.trace import Step


def test_what_the_backend_says_of_itself_and_all_that_is_asked_is_passed_on():
    async def main():
        engine = Engine()
        turns = Turns(engine)
        assert (turns.eos_ids, turns.logprob_mode, turns.upper_bound) == (engine.eos_ids, "raw", True)
        assert await read(turns.astream((3, 4), SAMPLING, [8, 9])) == whole(3, 5)
        assert engine.asked == [([3, 4], SAMPLING, (8, 9))]
        assert turns.depth() == Depth(active=0, waiting=0)
        await turns.aclose()

    run(main())


def test_a_given_response_is_scored_by_the_thread_in_its_turn():
    async def main():
        engine = Engine(4)
        scored = []

        def score(pairs, *, batch_size):
            scored.append((pairs, threading.get_ident(), len(engine.diary)))
            return ["what it gave"]

        engine.score = score
        turns = Turns(engine, active=1)
        stream = asyncio.create_task(read(turns.astream([1], SAMPLING)))
        await asyncio.sleep(0)
        assert await turns.score((3, 4), (5,)) == "what it gave"
        assert await stream == whole(1, 4)
        assert scored == [([([3, 4], [5])], next(iter(engine.threads)), 4)], "the stream had the place before"
        del engine.score
        with pytest.raises(RedflagError, match="scoring given responses is not supported"):
            await turns.score([3], [4])
        assert turns.depth() == Depth(active=0, waiting=0)
        await turns.aclose()
        with pytest.raises(ConnectionError):
            await turns.score([3], [4])

    run(main())


@pytest.mark.parametrize(
    ("active", "streams", "order"),
    [
        (1, 3, "111222333"),
        (2, 2, "121212"),
        (2, 3, "121212333"),
        (2, 4, "121212343434"),
        (3, 3, "123123123"),
        (3, 4, "123123123444"),
        (9, 4, "123412341234"),
    ],
)
def test_streams_take_turns_one_step_each_and_the_others_wait_in_order(active, streams, order):
    async def main():
        gate = Gate()
        engine = Engine(3, lambda name, index: gate() if name == 1 and index == 0 else None)
        turns = Turns(engine, active=active)
        tasks = []
        for name in range(1, streams + 1):
            tasks.append(asyncio.create_task(read(turns.astream([name], SAMPLING))))
            await asyncio.sleep(0)
        gate.opened.set()
        assert await asyncio.gather(*tasks) == [whole(name, 3) for name in range(1, streams + 1)]
        assert "".join(map(str, engine.diary)) == order
        assert engine.open == 0 and engine.most_open == min(active, streams)
        assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads
        await turns.aclose()

    run(main())


def test_a_stream_that_comes_while_others_run_has_its_share_from_the_next_round_on():
    async def main():
        begin, gate = Gate(), Gate()
        gates = {(1, 0): begin, (1, 2): gate}
        engine = Engine(6, lambda name, index: gates.get((name, index), lambda: None)())
        turns = Turns(engine, active=3)
        first = [asyncio.create_task(read(turns.astream([name], SAMPLING))) for name in (1, 2)]
        await until(lambda: turns.depth() == (2, 0))
        begin.opened.set()
        await until(gate.reached.is_set)
        late = asyncio.create_task(read(turns.astream([3], SAMPLING)))
        await asyncio.sleep(0.01)
        gate.opened.set()
        await asyncio.gather(*first, late)
        assert engine.diary == [1, 2, 1, 2, 1, *[2, 3, 1] * 3, 2, 3, 3, 3]
        await turns.aclose()

    run(main())


def test_beyond_the_queue_is_refused_at_once_and_a_place_that_is_left_can_be_taken():
    async def main():
        gate = Gate()
        engine = Engine(3, gate)
        turns = Turns(engine, active=1, waiting=2)
        tasks = [asyncio.create_task(read(turns.astream([name], SAMPLING))) for name in (1, 2, 3)]
        await until(gate.reached.is_set)
        assert turns.depth() == Depth(active=1, waiting=2)
        for _ in range(3):
            with pytest.raises(BusyError, match="3 responses"):
                await asyncio.create_task(read(turns.astream([4], SAMPLING)))
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        assert turns.depth() == Depth(active=1, waiting=1)
        fourth = asyncio.create_task(read(turns.astream([4], SAMPLING)))
        await asyncio.sleep(0)
        gate.opened.set()
        assert await asyncio.gather(tasks[0], tasks[2], fourth) == [whole(name, 3) for name in (1, 3, 4)]
        assert engine.opened == [1, 3, 4]  # the one that left while it waited was never begun
        await turns.aclose()

    run(main())


def test_a_response_that_has_begun_is_never_refused_and_does_not_wait_again():
    async def main():
        gate = Gate()
        engine = Engine(4, lambda name, index: gate() if (name, index) == (1, 1) else None)
        turns = Turns(engine, active=1, waiting=1)

        async def response() -> list[int]:
            stream = turns.astream([1], SAMPLING)
            first = [(await anext(stream)).token_id]
            await until(gate.reached.is_set)
            await stream.aclose()
            # Its place is taken before it comes back.
            others.append(asyncio.create_task(read(turns.astream([3], SAMPLING))))
            await asyncio.sleep(0)
            assert turns.depth() == Depth(active=1, waiting=1)
            again = asyncio.ensure_future(until(lambda: turns.depth() == (2, 1)))
            again.add_done_callback(lambda _: gate.opened.set())
            return first + await read(turns.astream([9], SAMPLING))

        begun = asyncio.create_task(response())
        await asyncio.sleep(0)
        others = [asyncio.create_task(read(turns.astream([2], SAMPLING)))]
        assert await begun == [1000, *whole(9, 4)]
        await asyncio.gather(*others)
        assert engine.opened == [1, 2, 9, 3]
        assert engine.most_open == 2  # what was left is closed, and its cache free, before anything else is done
        with pytest.raises(BusyError):  # Once per response that is over, not ever after.
            await asyncio.gather(*(read(turns.astream([5], SAMPLING)) for _ in range(3)))
        await turns.aclose()

    run(main())


def test_a_slow_consumer_is_waited_for_in_bounded_memory_and_stalls_nobody():
    async def main():
        engine = Engine(500)
        turns = Turns(engine, active=2, waiting=8, buffer=5)
        slow = [turns.astream([name], SAMPLING) for name in (1, 2)]
        for stream in slow:
            await anext(stream)
        await until(lambda: engine.diary.count(1) == engine.diary.count(2) == 6)  # one taken, five ahead
        # Both places are held by those that lag; the others get theirs all the same.
        assert await asyncio.gather(*(read(turns.astream([name], SAMPLING)) for name in range(3, 9))) == [
            whole(name, 500) for name in range(3, 9)
        ]
        assert engine.diary.count(1) == engine.diary.count(2) == 6
        before = len(engine.diary)
        await asyncio.sleep(0.05)
        assert len(engine.diary) == before
        assert [step.token_id async for step in slow[0]] == whole(1, 500)[1:]  # nothing of it was lost
        await slow[1].aclose()
        await until(lambda: engine.open == 0)
        await turns.aclose()

    run(main())


def test_a_consumer_that_takes_nothing_for_too_long_is_given_up():
    async def main():
        engine = Engine(100)
        turns = Turns(engine, buffer=3, patience=0.05)
        stream = turns.astream([1], SAMPLING)
        await anext(stream)
        await until(lambda: engine.open == 0)
        assert turns.depth() == Depth(0, 0)
        with pytest.raises(TimeoutError, match=r"nothing for 0\.05 seconds"):
            await read(stream)
        await turns.aclose()

    run(main())


def test_while_all_wait_the_thread_sleeps():
    async def main():
        engine = Engine(100)
        turns = Turns(engine, buffer=3)
        stream = turns.astream([1], SAMPLING)
        await anext(stream)
        await until(lambda: len(engine.diary) == 4)
        begun = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - begun < 0.1
        await stream.aclose()
        await turns.aclose()

    run(main())


ERRORS = [
    (ConnectionError("lost"), ConnectionError),
    (RedflagError("too long"), RedflagError),
    (StopIteration(), RuntimeError),
    (StopAsyncIteration(), RuntimeError),
    (asyncio.CancelledError(), RuntimeError),
    (SystemExit(3), RuntimeError),
    (KeyboardInterrupt(), RuntimeError),
    (GeneratorExit(), RuntimeError),
    (MemoryError(), MemoryError),
]


@pytest.mark.parametrize(("error", "seen"), ERRORS, ids=lambda value: getattr(value, "__name__", repr(value)))
@pytest.mark.parametrize("where", ["start", "first", "later"])
def test_an_error_reaches_its_own_consumer_and_nobody_else(error, seen, where):
    class Failing(Engine):
        def stream(self, token_ids, sampling, watch=()):
            if token_ids[0] == 2 and where == "start":
                raise error
            return super().stream(token_ids, sampling, watch)

        def _steps(self, name):
            return Iterate(self, name) if name == 2 else super()._steps(name)

    class Iterate:  # not a generator, in which some of these errors would turn into others
        def __init__(self, engine, name):
            self.engine, self.name, self.index = engine, name, -1
            engine.opened.append(name)

        def __iter__(self):
            return self

        def __next__(self):
            self.index += 1
            if where == "first" or self.index == 2:
                raise error
            return Step(1000 * self.name + self.index, (0.5,))

        def close(self):
            self.engine.closed.append(self.name)

    async def main():
        engine = Failing(6)
        turns = Turns(engine, active=2)
        others = [asyncio.create_task(read(turns.astream([name], SAMPLING))) for name in (1, 3)]
        got = []
        # An iterator that says it is over *is* over, even if there should have been more.
        ends = isinstance(error, StopIteration) and where != "start"
        with contextlib.nullcontext() if ends else pytest.raises(seen) as caught:
            async for step in turns.astream([2], SAMPLING):
                got.append(step.token_id)
        if not ends and seen is not RuntimeError:
            assert caught.value is error
        assert got == (whole(2, 2) if where == "later" else [])
        assert await asyncio.gather(*others) == [whole(1, 6), whole(3, 6)]
        assert engine.open == 0
        assert await asyncio.create_task(read(turns.astream([4], SAMPLING))) == whole(4, 6)
        await turns.aclose()

    run(main())


def test_a_stream_that_cannot_be_closed_disturbs_no_other(caplog):
    class Clinging(Engine):
        def _steps(self, name):
            try:
                yield from super()._steps(name)
            finally:
                if name == 1:
                    raise OSError("secret words")

    async def main():
        engine = Clinging(100)
        turns = Turns(engine, active=2)
        other = asyncio.create_task(read(turns.astream([2], SAMPLING)))
        stream = turns.astream([1], SAMPLING)
        await anext(stream)
        await stream.aclose()
        assert await other == whole(2, 100)
        await until(lambda: engine.open == 0)
        await turns.aclose()

    run(main())
    assert "could not be closed: OSError" in caplog.text and "secret" not in caplog.text
