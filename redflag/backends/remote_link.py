"""Connections of one event loop, and a synchronous iterator over an asynchronous stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from redflag.errors import RedflagError
from redflag.trace import Step

try:
    import aiohttp as aiohttp  # `remote` imports it from here, so that only this import can fail
except ImportError as error:
    raise RedflagError(
        "The package aiohttp must be installed for requests to a server. pip install 'redflag-llm[serve]'."
    ) from error

_IDLE = 4.0  # seconds that an idle connection stays open; uvicorn closes it after 5, which must not hit a request
_DRAIN = 1.0  # seconds that the end of a response may take before its connection is closed

Result = TypeVar("Result")


class Link:
    """The connections of one event loop. To be created and used on that loop only."""

    def __init__(
        self, *, headers: Mapping[str, str], connect_timeout: float, step_timeout: float, proxy: str | None = None
    ) -> None:
        """Connects to nothing yet; the time-outs are in seconds."""
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=connect_timeout, sock_connect=connect_timeout, sock_read=step_timeout
            ),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=proxy,
        )
        self._draining: dict[asyncio.Task[None], aiohttp.ClientResponse] = {}

    def leave(self, response: aiohttp.ClientResponse, *, over: bool) -> None:
        """Releases a response, read to any point, without waiting.

        If the server has reported its end (`over`), the few bytes that may follow are read in the background, so that
        the connection can be reused. Otherwise the connection is closed, which stops the engine.
        """
        if over and not response.content.at_eof():
            task = asyncio.get_running_loop().create_task(_drain(response))
            self._draining[task] = response
            task.add_done_callback(self._draining.pop)
        else:
            response.close()

    async def close(self) -> None:
        for task, response in self._draining.items():
            task.cancel()
            response.close()  # a cancelled task closes it only if the task had started
        await asyncio.gather(*self._draining, return_exceptions=True)
        await self.session.close()
        await asyncio.sleep(0)  # transports close in the loop's next iteration


async def _drain(response: aiohttp.ClientResponse) -> None:
    async def rest() -> None:
        while await response.content.readany():
            pass

    try:
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
            await asyncio.wait_for(rest(), _DRAIN)
    finally:
        response.close()


class SyncSteps(Iterator[Step]):
    """An asynchronous stream as an iterator, on an event loop of its own.

    The loop runs in the caller's thread, only while a step is awaited. It is closed, with its connection, when the
    stream ends, fails or is closed.
    """

    def __init__(self, make_link: Callable[[], Link], make_steps: Callable[[Link], AsyncGenerator[Step, None]]) -> None:
        """Starts nothing; the first `next` does."""
        self._make_link, self._make_steps = make_link, make_steps
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: Link | None = None
        self._steps: AsyncGenerator[Step, None] | None = None
        self._closed = False

    def __next__(self) -> Step:
        if self._closed:
            raise StopIteration
        if self._loop is None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                raise TypeError("stream would block the event loop that runs in this thread; use `astream`")
            self._loop = asyncio.new_event_loop()
        try:
            step = _run(self._loop, self._next())
        except BaseException:
            self.close()
            raise
        if step is None:
            self.close()
            raise StopIteration
        return step

    def close(self) -> None:
        """Stops the engine and closes the connection. May be called at any point, and repeatedly."""
        loop, self._loop, self._closed = self._loop, None, True
        if loop is None:
            return
        try:
            _run(loop, self._end())
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()

    def __del__(self) -> None:
        # Not `contextlib.suppress`: at interpreter shutdown the module may be gone before this object.
        try:
            self.close()
        except Exception:
            return

    async def _next(self) -> Step | None:
        if self._steps is None:
            self._link = self._make_link()
            self._steps = self._make_steps(self._link)
        return await anext(self._steps, None)

    async def _end(self) -> None:
        if self._steps is not None:
            await self._steps.aclose()
        if self._link is not None:
            await self._link.close()


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine to its end; an interrupt from outside (Ctrl-C) cancels it before it propagates."""
    task = loop.create_task(work)
    try:
        return loop.run_until_complete(task)
    except BaseException:
        if not task.done():
            task.cancel()
            with contextlib.suppress(BaseException):
                loop.run_until_complete(task)
        raise
