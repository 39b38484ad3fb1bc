"""asyncio over a compute-bound backend: one thread runs it, and the streams take turns."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from redflag.backends import Backend, BusyError, Sampling, measures_earlier, most_logprobs
from redflag.errors import RedflagError
from redflag.trace import Step

_log = logging.getLogger(__name__)
_OVER = object()


class Depth(NamedTuple):
    """How many streams are open, and how many wait."""

    active: int
    waiting: int


class Turns:
    """Makes an `AsyncBackend` of a `Backend` that computes in the process, such as `HFBackend`.

    One thread runs the engine. Up to `active` streams take turns, one step each; `waiting` more stand in a queue, first
    come first served, and beyond that `BusyError` is raised at the first `anext`. A task whose last stream is over (a
    response that continues after a reflection) is never refused and does not wait.

    A slow consumer blocks no others: the engine runs at most `buffer` steps ahead of it, gives its place to the next
    stream meanwhile, and ends the stream with a `TimeoutError` if no step is taken for `patience` seconds. Streams of
    slow consumers keep their caches, so up to `active + waiting` caches may exist.

    An error in a stream is raised only to the consumer of that stream. Leaving a stream (`aclose`, cancellation)
    returns at once; the thread closes its iterator before the next step of any stream.

    `eos_ids`, `logprob_mode`, `upper_bound`, `most_logprobs`, `measures_earlier` and `context_length` are those of the
    backend.
    """

    def __init__(
        self, backend: Backend, active: int = 4, waiting: int = 64, *, buffer: int = 16, patience: float = 60.0
    ) -> None:
        """The thread starts with the first stream.

        Args:
            backend: The engine; from now on only the thread uses it.
            active: Maximum number of streams that take turns; they share the engine's speed, each with its own cache.
            buffer: Maximum number of steps ahead of a consumer.
            patience: Seconds that a stream with a full buffer waits for its consumer.

        Raises:
            RedflagError: A number is out of bounds.
        """
        for name, value, least in (("active", active, 1), ("waiting", waiting, 0), ("buffer", buffer, 1)):
            if type(value) is not int or value < least:
                raise RedflagError(f"{name} must be a whole number of at least {least} (got {value!r}).")
        if not patience > 0:
            raise RedflagError(f"patience must be above 0, in seconds (got {patience!r}).")
        self.eos_ids: frozenset[int] = backend.eos_ids
        self.logprob_mode: str = backend.logprob_mode
        self.upper_bound: bool = backend.upper_bound
        self.most_logprobs = most_logprobs(backend)
        self.measures_earlier = measures_earlier(backend)
        self.context_length: int | None = getattr(backend, "context_length", None)
        self._worker = _Worker(backend, active, waiting, buffer, patience)
        # The thread refers to the worker, not to this object, so dropping this object without `aclose` ends it too.
        weakref.finalize(self, _Worker.end, self._worker)

    def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncGenerator[Step, None]:
        """Continues a prompt; see `redflag.backends.Backend.stream`. Errors come with the first step.

        Raises:
            BusyError: The engine and its queue are full.
            ConnectionError: The engine was shut down.
            TimeoutError: The consumer took no step for `patience` seconds.
        """
        prompt, watched = list(token_ids), tuple(watch)
        return self._items(lambda backend: backend.stream(prompt, sampling, watched))

    async def score(self, prompt: Sequence[int], response: Sequence[int]) -> Any:
        """Flag probabilities of a given response, T x K, by the engine's `score`, which takes its turn like a stream.

        Raises:
            RedflagError: The engine cannot score, or prompt and response do not fit its context.
            BusyError, ConnectionError: As `astream`.
        """
        pair = (list(prompt), list(response))
        items = self._items(lambda backend: iter(_scorer(backend)([pair], batch_size=1)))
        try:
            return await anext(items)
        finally:
            await items.aclose()

    async def _items(self, begin: Callable[[Any], Iterator[Any]]) -> AsyncGenerator[Any, None]:
        """The items of an iterator that the thread makes from the backend by `begin` and advances."""
        worker = self._worker
        turn = _Turn(asyncio.get_running_loop(), asyncio.current_task(), begin)
        worker.enter(turn)
        try:
            while True:
                item = await turn.items.get()
                if isinstance(item, _End):
                    error = item.error
                    del item
                    break
                worker.took(turn)
                yield item
        finally:
            worker.leave(turn)
        try:
            if isinstance(error, Exception):
                raise error
            if error is not None:  # SystemExit and KeyboardInterrupt would end the event loop, not just the stream.
                raise RuntimeError(f"the engine ended with {type(error).__name__}") from error
        finally:
            del error  # Its traceback refers to this frame: the cycle would keep the stream's cache in memory.

    def depth(self) -> Depth:
        """Streams that are open and waiting now."""
        return self._worker.depth()

    async def aclose(self) -> None:
        """Ends all streams with a `ConnectionError` and the thread after its current step; refuses new streams."""
        self._worker.stop("the engine was shut down")
        if self._worker.thread is not None:
            await asyncio.wrap_future(self._worker.ended)
            self._worker.thread.join()


def _scorer(backend: Any) -> Callable[..., Any]:
    score = getattr(backend, "score", None)
    if score is None:
        raise RedflagError(f"scoring given responses is not supported by {type(backend).__name__}.")
    return score


@dataclass(frozen=True, slots=True)
class _End:
    """The last item of a stream."""

    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class _Turn:
    """One stream. Only the thread uses its iterator, only its consumer's loop its items."""

    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[Any] | None
    begin: Callable[[Any], Iterator[Any]]
    items: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    steps: Iterator[Any] | None = None
    begun: bool = False  # whether the consumer has taken a step
    behind: int = 0  # steps computed and not yet taken
    full_since: float | None = None


class _Worker:
    """The queue and the thread. One lock guards everything but the iterators; it is never held during a step.

    A stream is in `_waiting`, then in `_open` (the thread steps through it round robin), then, if its consumer leaves
    it, in `_left` until the thread has closed its iterator.
    """

    def __init__(self, backend: Backend, active: int, waiting: int, buffer: int, patience: float) -> None:
        self._backend = backend
        self._active, self._most, self._buffer, self._patience = active, active + waiting, buffer, patience
        # Reentrant: garbage collection may call `end` in a thread that holds the lock.
        self._work = threading.Condition(threading.RLock())
        self._open: deque[_Turn] = deque()  # the stream whose turn is next stands first
        self._waiting: deque[_Turn] = deque()
        self._left: deque[_Turn] = deque()  # left by their consumers; iterators still to be closed
        self._between: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()  # tasks whose last stream is over
        self._over: str | None = None
        self.thread: threading.Thread | None = None
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # one waiter's cancellation must not cancel it for the others

    # Called by consumers.

    def enter(self, turn: _Turn) -> None:
        with self._work:
            if self._over is not None:
                raise ConnectionError(self._over)
            held = len(self._open) + len(self._waiting)
            # A task whose last stream is over opens its next one for the same response: after a review or a verdict.
            again = turn.task is not None and turn.task in self._between
            if held >= self._most and not again:
                raise BusyError(f"The engine is at capacity: {held} responses are running or waiting. Try again later.")
            if self.thread is None:
                thread = threading.Thread(target=self.run, name="redflag-turns", daemon=True)
                thread.start()
                self.thread = thread
            if turn.task is not None and again:
                self._between.discard(turn.task)
                self._open.append(turn)  # Its user has half a response already, so it skips the queue.
            else:
                self._waiting.append(turn)
                self._admit()
            self._work.notify()

    def took(self, turn: _Turn) -> None:
        """Called after the consumer has taken a step."""
        with self._work:
            turn.begun = True
            turn.behind -= 1
            if turn.full_since is not None:
                turn.full_since = None
                self._work.notify()

    def leave(self, turn: _Turn) -> None:
        """Called when the consumer leaves the stream. No effect on a stream that is over."""
        with self._work:
            if turn.begun and turn.task is not None:
                self._between.add(turn.task)
            turn.task = None  # The task refers to the stream's error, whose traceback refers to this stream.
            if turn in self._waiting:
                self._waiting.remove(turn)
            if turn in self._open:
                self._open.remove(turn)
                self._left.append(turn)
                self._work.notify()

    def depth(self) -> Depth:
        with self._work:
            return Depth(len(self._open), len(self._waiting))

    def stop(self, why: str) -> None:
        """Ends all streams and refuses new ones; consumers get the error at once, even if the engine hangs."""
        with self._work:
            if self._over is not None:
                return
            self._over = why
            lost = [*self._open, *self._waiting]
            self._left.extend(self._open)
            self._open.clear()
            self._waiting.clear()
            self._work.notify()
        for turn in lost:
            self._send(turn, _End(ConnectionError(why)))

    def end(self) -> None:
        """Called at process exit, or when the queue is no longer referenced."""
        self.stop("the engine was dropped")
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(10.0)  # waits for one step at most; exiting during a step may crash the interpreter

    # Called by the thread.

    def run(self) -> None:
        why = "the engine was shut down"
        try:
            while (job := self._next()) is not None:
                job()
        except BaseException as error:
            why = f"the engine's thread ended with {type(error).__name__}"
            _log.exception(why)
        finally:
            self.stop(why)
            while self._left:
                self._close(self._left.popleft())
            self.ended.set_result(None)

    def _admit(self) -> None:
        # Streams that wait for their consumers do not count as running.
        running = sum(turn.full_since is None for turn in self._open)
        while running < self._active and self._waiting:
            self._open.append(self._waiting.popleft())
            running += 1

    def _next(self) -> Callable[[], None] | None:
        """Waits for the next job of the thread; None ends it."""
        with self._work:
            while self._over is None:
                # First, free the caches of streams that were left. Then let waiting streams in.
                if self._left:
                    return partial(self._close, self._left.popleft())
                self._admit()
                now = time.monotonic()
                soonest = None
                # Round robin: a step of the first stream whose buffer has room. The others are checked for consumers
                # that are too late; without either, sleep until the first of them will be.
                for _ in range(len(self._open)):
                    turn = self._open[0]
                    if turn.full_since is None:
                        return partial(self._step, turn)
                    self._open.rotate(-1)
                    left = turn.full_since + self._patience - now
                    if left <= 0:
                        late = TimeoutError(f"the consumer of this stream took nothing for {self._patience:g} seconds")
                        return partial(self._finish, turn, late)
                    soonest = left if soonest is None else min(soonest, left)
                self._work.wait(soonest)
        return None

    def _step(self, turn: _Turn) -> None:
        if turn.loop.is_closed():  # No consumer is left to take a step.
            self.leave(turn)
            return
        try:
            if turn.steps is None:
                turn.steps = iter(turn.begin(self._backend))
            step: Any = next(turn.steps, _OVER)
        except BaseException as error:
            self._finish(turn, error)
            return
        if step is _OVER:
            self._finish(turn, None)
            return
        with self._work:
            # A full buffer suspends the stream until its consumer takes a step; a step taken moves it to the end of
            # the line.
            turn.behind += 1
            if turn.behind >= self._buffer:
                turn.full_since = time.monotonic()
            if self._open and self._open[0] is turn:
                self._open.rotate(-1)
        self._send(turn, step)

    def _finish(self, turn: _Turn, error: BaseException | None) -> None:
        with self._work:
            if turn in self._open:
                self._open.remove(turn)
        self._close(turn)
        self._send(turn, _End(error))

    def _close(self, turn: _Turn) -> None:
        # An iterator need not have `close`; generators and everything that holds a cache do.
        close = getattr(turn.steps, "close", None)
        turn.steps = None
        if close is not None:
            try:
                close()
            except BaseException as error:  # Its consumer is gone, and the other streams are not affected.
                _log.warning("a stream could not be closed: %s", type(error).__name__)

    def _send(self, turn: _Turn, item: Step | _End) -> None:
        try:
            turn.loop.call_soon_threadsafe(turn.items.put_nowait, item)
        except RuntimeError:  # The loop is closed, so the consumer will not come back.
            self.leave(turn)
