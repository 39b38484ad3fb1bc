"""One response in progress, however it ends; and whether the engine is ready."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

import anyio

from redflag.backends import AsyncStreams, Sampling
from redflag.errors import RedflagError
from redflag.guard.response import Response
from redflag.trace import Event, Halt, Step, Text, Thought

if sys.version_info >= (3, 11):
    from asyncio import timeout_at as timeout_at
else:
    from async_timeout import timeout_at as timeout_at

_log = logging.getLogger(__name__)

TIMEOUTS = (TimeoutError, asyncio.TimeoutError)  # one class, but in Python 3.10, where `timeout_at` raises the latter
CLOSING = 10.0  # seconds that an engine may take to close a stream
_FRESH = 30.0  # seconds for which the engine counts as ready after a success


class Exchange:
    """Yields the events of one response, and reports its end exactly once.

    One task must ask for all events, since engines identify a response by its task.

    Attributes:
        cut: Why it was ended early: `timeout`, `stopped` (the server shuts down) or `disconnected`; "" if it was not.
        committed: Something was sent, so that a refusal by the engine can no longer become an HTTP error.
        delivered: The last byte was sent.
        seconds_to_first: Seconds until text was released, if any was.
    """

    def __init__(
        self,
        response: Response,
        events: AsyncGenerator[Event, None],
        seconds: float,
        on_close: Callable[[Exchange], None],
        closing_text: str = "",
    ) -> None:
        """Starts the clock.

        Args:
            events: From `adrive`; closed with the exchange.
            seconds: Time limit.
            closing_text: Text for an alarm's `Halt` that has none, if text was released before it.
        """
        self.response = response
        self.cut: Literal["", "timeout", "stopped", "disconnected"] = ""
        self.committed = False
        self.delivered = False
        self.seconds_to_first: float | None = None
        self._events = events
        self._on_close: Callable[[Exchange], None] | None = on_close
        self._closing_text = closing_text
        self._shown = False
        self._begun = time.perf_counter()
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._timer: Any = None
        self._last: deque[Event] = deque()  # events of a failure, still to be given out
        self._refused = False

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begun

    @property
    def end(self) -> str:
        """`done`, `halted`, `fault`, `timeout`, `refused`, or `disconnected` if the client left."""
        end = self.response.trace.facts().end
        if self._refused:
            return "refused"
        if end is None or not self.delivered:
            return "disconnected"
        return "timeout" if end == "fault" and self.cut in ("timeout", "stopped") else end

    async def next(self) -> Event:
        """The next event; a `Halt` or `Done` is the last one.

        Raises:
            RedflagError: The engine refuses the request, and nothing has been sent.
            ConnectionAbortedError: The client has left.
        """
        if self._last:
            return self._last.popleft()
        try:
            async with timeout_at(self._deadline) as self._timer:
                event = await anext(self._events)
        except Exception as error:
            event = self._failed(error)
        finally:
            self._timer = None
        if isinstance(event, Text | Thought) and self.seconds_to_first is None:
            self.seconds_to_first = self.seconds
        if isinstance(event, Text):
            self._shown = self._shown or bool(event.text)
        elif isinstance(event, Halt) and event.reason == "alarm" and self._shown and not event.text:
            event = replace(event, text=self._closing_text)
        return event

    def stop(self, why: Literal["stopped", "disconnected"]) -> None:
        """Ends the response, even while a step is awaited."""
        self.cut = self.cut or why
        self._deadline = asyncio.get_running_loop().time()
        if self._timer is not None:
            # Its name in Python 3.11; async_timeout, which stands in for it in 3.10, calls it `update`.
            (getattr(self._timer, "reschedule", None) or self._timer.update)(self._deadline)

    async def close(self) -> None:
        """Stops the engine, even if this task is cancelled, and reports the end. Idempotent."""
        on_close, self._on_close = self._on_close, None
        if on_close is None:
            return
        try:
            with anyio.move_on_after(CLOSING, shield=True) as scope:
                await self._events.aclose()
            if scope.cancelled_caught:
                _log.error("the engine did not close a stream within %g s", CLOSING)
        finally:
            on_close(self)

    def _failed(self, error: Exception) -> Event:
        if isinstance(error, TIMEOUTS):
            self.cut = self.cut or "timeout"
            if self.cut == "disconnected":
                raise ConnectionAbortedError("the client has left") from error
            late = f"the response took longer than {self._seconds:g} s"
            error = TimeoutError("the server is shutting down" if self.cut == "stopped" else late)
        elif isinstance(error, RedflagError) and not self.committed and self.response.untouched:
            # The engine refuses the request: nothing was written or sent, so the client gets an error of its own.
            self._refused = True
            raise error
        self._last.extend(self.response.failed(error))
        if not self._last:  # The response was over, and nothing may follow its last event.
            raise error
        return self._last.popleft()


class Stopwatch:
    """An engine whose steps are timed, from a step's arrival until its events were sent."""

    def __init__(self, engine: AsyncStreams, observe: Callable[[float], None]) -> None:
        """`observe` gets the seconds of each step."""
        self._engine, self._observe = engine, observe

    async def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncGenerator[Step, None]:
        async with aclosing(self._engine.astream(token_ids, sampling, watch)) as steps:
            async for step in steps:
                arrived = time.perf_counter()
                yield step
                self._observe(time.perf_counter() - arrived)


class Readiness:
    """Whether the engine answers and measures; probed again after a failure.

    Example:
        >>> async def lost():
        ...     raise ConnectionError("refused")
        >>> asyncio.run(Readiness(lost).why_not())
        'ConnectionError: refused'
    """

    def __init__(
        self, probe: Callable[[], Awaitable[None]] | None, *, patience: float = 10.0, again: float | None = None
    ) -> None:
        """The engine counts as not ready until a probe, unless there is none.

        Args:
            probe: Raises if the engine cannot be used.
            patience: Time limit of a probe, in seconds.
            again: Seconds between the probes of `watch`; None: it does not probe.
        """
        self._probe = probe
        self._patience = patience
        self._again = again
        self._good_until = -1.0
        self._bad: tuple[float, str] = (-1.0, "")
        # Number of failures, and how many of them the last success has settled.
        self._doubts = 1
        self._settled = 0
        self._asking = asyncio.Lock()

    def trust(self) -> None:
        """Reports a success."""
        self._good(self._doubts)

    def doubt(self) -> None:
        """Reports a failure: there will be a probe before the next response."""
        self._doubts += 1

    @property
    def doubted(self) -> bool:
        """Whether there was no success since the last failure."""
        return self._probe is not None and self._doubts > self._settled

    async def why_not(self) -> str:
        """Why the engine cannot be used; "" if it can."""
        if self._probe is None or self._fine():
            return ""
        async with self._asking:  # one probe for all that wait
            if self._fine():
                return ""
            return self._bad[1] if time.monotonic() < self._bad[0] else await self._ask(self._probe)

    async def watch(self) -> None:
        """Probes every `again` seconds, since an engine may be restarted with other options."""
        while self._probe is not None and self._again is not None:
            await asyncio.sleep(self._again)
            async with self._asking:
                if await self._ask(self._probe):
                    self.doubt()

    async def _ask(self, probe: Callable[[], Awaitable[None]]) -> str:
        doubts = self._doubts  # a failure during the probe stays unsettled
        try:
            async with timeout_at(asyncio.get_running_loop().time() + self._patience):
                await probe()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self._bad = (time.monotonic() + 1.0, why)
            _log.warning("the engine is not ready: %s", why)
            return why
        self._good(doubts)
        return ""

    def _fine(self) -> bool:
        return not self.doubted and time.monotonic() < self._good_until

    def _good(self, doubts: int) -> None:
        self._good_until = time.monotonic() + _FRESH
        self._settled = doubts
