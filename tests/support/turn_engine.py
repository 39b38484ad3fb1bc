"""An engine that keeps a diary, for the tests of `Turns`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

from redflag.backends import Sampling
from redflag.errors import RedflagError
from redflag.trace import Step

SAMPLING = Sampling(max_new_tokens=1000)


class Engine:
    """Counts up from the prompt's first token; keeps a diary of every step, start and end, and of the threads."""

    eos_ids = frozenset({7})
    logprob_mode = "raw"
    upper_bound = True

    def __init__(self, length: int = 5, at_step: Callable[[int, int], None] = lambda stream, index: None) -> None:
        self.length, self.at_step = length, at_step
        self.diary: list[int] = []
        self.asked: list[tuple[object, ...]] = []
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.threads: set[int] = set()
        self.most_open = 0

    @property
    def open(self) -> int:
        return len(self.opened) - len(self.closed)

    def stream(self, token_ids, sampling, watch=()) -> Iterator[Step]:
        self.asked.append((list(token_ids), sampling, tuple(watch)))
        if not token_ids:
            raise RedflagError("the prompt must not be empty")
        return self._steps(token_ids[0])

    def _steps(self, name: int) -> Iterator[Step]:
        self.opened.append(name)
        self.most_open = max(self.most_open, self.open)
        try:
            for index in range(self.length):
                self.threads.add(threading.get_ident())
                self.at_step(name, index)
                self.diary.append(name)
                yield Step(1000 * name + index, (0.5,))
        finally:
            self.threads.add(threading.get_ident())
            self.closed.append(name)


def whole(name: int, length: int) -> list[int]:
    return [1000 * name + index for index in range(length)]


def run(main, runner=asyncio.run) -> None:
    """Runs a coroutine; nothing may be left of it: no thread, no task."""
    before = set(threading.enumerate())

    async def timed() -> None:
        await asyncio.wait_for(main, 60)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    runner(timed())
    assert not set(threading.enumerate()) - before


async def read(stream) -> list[int]:
    return [step.token_id async for step in stream]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("waited in vain")


class Gate:
    """Stops the engine's thread at a place until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self.opened.wait(30)
