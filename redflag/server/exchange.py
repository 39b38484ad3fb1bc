"""One request being answered, whatever ends it; and whether the engine behind it can be trusted to answer."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio

from redflag.backends import AsyncBackend, Sampling
from redflag.errors import RedflagError
from redflag.guard.response import Response
from redflag.trace import Event, Halt, Step, Text, Thought

if sys.version_info >= (3, 11):
    from asyncio import timeout_at as timeout_at
else:
    from async_timeout import timeout_at as timeout_at

_log = logging.getLogger(__name__)

CLOSING = 10.0  # seconds that an engine may take to let a stream go


class Exchange:
    """The events of one response until its last, and what is known then, told once.

    The same task has to ask for all events: engines know a response by it.

    Attributes:
        response: The response that is driven.
        committed: Something has been sent: what the engine refuses now ends the response, and is no error any more.
        delivered: The last byte was handed over.
        seconds_to_first: Seconds until text was released; None before.
    """

    def __init__(
        self,
        response: Response,
        events: AsyncIterator[Event],
        seconds: float,
        tell: Callable[[Exchange], None],
        closing_text: str = "",
    ) -> None:
        """Starts the clock.

        Args:
            response: The response.
            events: What drives it; closed with the exchange.
            seconds: How long the whole may take.
            tell: Is told when the exchange is closed.
            closing_text: Text of an alarm's `Halt` that comes after some text was released and has none of its own.
        """
        self.response = response
        self.committed = False
        self.delivered = False
        self.seconds_to_first: float | None = None
        self._events = events
        self._tell: Callable[[Exchange], None] | None = tell
        self._closing_text = closing_text
        self._shown = False
        self._begun = time.perf_counter()
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._timer: Any = None
        self._last: deque[Event] = deque()
        self._cut = ""
        self._refused = False

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begun

    @property
    def late(self) -> bool:
        """Whether the time was over before the response was."""
        return self._cut == "timeout"

    @property
    def stopped(self) -> bool:
        """Whether the server went down before the response was over."""
        return self._cut == "stopped"

    @property
    def end(self) -> str:
        """How it ended: `done`, `halted`, `fault`, `timeout`, `refused`, or `disconnected` where the client left."""
        end = self.response.trace.facts().end
        if self._refused:
            return "refused"
        if end is None or not self.delivered:
            return "disconnected"
        return "timeout" if end == "fault" and (self.late or self.stopped) else end

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

    def leave(self) -> None:
        """The client has gone: whoever waits for the next event is woken."""
        self._hurry("disconnected")

    def stop(self) -> None:
        """The server goes down: the response ends here, with what was released."""
        self._hurry("stopped")

    async def close(self) -> None:
        """Stops the engine, at any point and whoever cancels, and tells. Without effect the second time."""
        tell, self._tell = self._tell, None
        if tell is None:
            return
        try:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                with anyio.move_on_after(CLOSING, shield=True) as scope:
                    await close()
                if scope.cancelled_caught:
                    _log.error("an engine did not let a stream go within %g s", CLOSING)
        finally:
            tell(self)

    def _hurry(self, cut: str) -> None:
        self._cut = self._cut or cut
        self._deadline = asyncio.get_running_loop().time()
        if self._timer is not None:
            # Its name in Python 3.11; async_timeout, which stands in for it in 3.10, calls it `update`.
            (getattr(self._timer, "reschedule", None) or self._timer.update)(self._deadline)

    def _failed(self, error: Exception) -> Event:
        if isinstance(error, TimeoutError):
            self._cut = self._cut or "timeout"
            if self._cut == "disconnected":
                raise ConnectionAbortedError("the client has left") from error
            late = f"the response took longer than {self._seconds:g} s"
            error = TimeoutError("the server is going down" if self.stopped else late)
        elif isinstance(error, RedflagError) and not self.committed and self.response.untouched:
            self._refused = True
            raise error
        self._last.extend(self.response.failed(error))
        if not self._last:  # The response was over before: nothing may follow its last event.
            raise error
        return self._last.popleft()


class Stopwatch:
    """An engine whose steps are timed: from the arrival of one until all that it led to has been handed over."""

    def __init__(self, backend: AsyncBackend, observe: Callable[[float], None]) -> None:
        """Wraps an engine; `observe` gets the seconds of each step."""
        self.eos_ids = backend.eos_ids
        self.logprob_mode = backend.logprob_mode
        self.upper_bound = backend.upper_bound
        self._backend = backend
        self._observe = observe

    async def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncIterator[Step]:
        """As the engine's."""
        steps: Any = self._backend.astream(token_ids, sampling, watch)
        try:
            async for step in steps:
                arrived = time.perf_counter()
                yield step
                self._observe(time.perf_counter() - arrived)
        finally:
            await steps.aclose()

    async def aclose(self) -> None:
        """As the engine's."""
        await self._backend.aclose()


class Readiness:
    """Whether the engine answers and measures, asked anew when there is doubt.

    Example:
        >>> async def lost():
        ...     raise ConnectionError("refused")
        >>> asyncio.run(Readiness(lost).why_not())
        'ConnectionError: refused'
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[None]] | None,
        *,
        fresh: float = 30.0,
        patience: float = 10.0,
        again: float | None = None,
    ) -> None:
        """Trusts nobody yet, unless there is nothing to ask.

        Args:
            probe: Raises where the engine cannot be used.
            fresh: Seconds for which a good answer counts.
            patience: Seconds that a probe has.
            again: Seconds after which `watch` asks without any doubt; None: never.
        """
        self._probe = probe
        self._fresh = fresh
        self._patience = patience
        self._again = again
        self._good_until = -1.0
        self._bad: tuple[float, str] = (-1.0, "")
        # Doubts raised, and how many of them the last good answer has settled.
        self._doubts = 1
        self._settled = 0
        self._asking = asyncio.Lock()

    def trust(self) -> None:
        """The engine has just shown that it answers."""
        self._good(self._doubts)

    def doubt(self) -> None:
        """Something went wrong: ask before the next response."""
        self._doubts += 1

    @property
    def doubted(self) -> bool:
        """Whether nothing has been heard since something went wrong."""
        return self._probe is not None and self._doubts > self._settled

    async def why_not(self) -> str:
        """Why the engine cannot be used; "" where it can."""
        if self._probe is None or self._fine():
            return ""
        async with self._asking:  # One asks for all that wait.
            if self._fine():
                return ""
            return self._bad[1] if time.monotonic() < self._bad[0] else await self._ask(self._probe)

    async def watch(self) -> None:
        """Asks now and then, for ever: an engine may have been restarted with other options while nobody looked."""
        while self._probe is not None and self._again is not None:
            await asyncio.sleep(self._again)
            async with self._asking:
                if await self._ask(self._probe):
                    self.doubt()

    async def _ask(self, probe: Callable[[], Awaitable[None]]) -> str:
        doubts = self._doubts  # who doubts while the engine is asked is heard
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
        self._good_until = time.monotonic() + self._fresh
        self._settled = doubts
