"""What happens to every request before it is answered: it is counted, read, and prepared in a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from fastapi import Request

from redflag.api.api_errors import ApiError, busy, late, unavailable
from redflag.server.access import Limits, read_body
from redflag.server.exchange import TIMEOUTS, Readiness, timeout_at
from redflag.server.metrics import Metrics
from redflag.trace import Trace

Result = TypeVar("Result")


class Gate:
    """Shared by all routes that read a body."""

    def __init__(self, limits: Limits, metrics: Metrics, readiness: Readiness, answered: Collection[object]) -> None:
        """`answered` are the requests that are being answered, as they come and go."""
        self._limits = limits
        self._metrics = metrics
        self._readiness = readiness
        self._answered = answered
        self._arriving = 0
        # Not the event loop's threads, which may all be waiting for second judges.
        self._threads = ThreadPoolExecutor(2, "redflag-render")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def arriving(self, route: str) -> Iterator[None]:
        """Counts a request until it is being answered or refused."""
        begun = time.perf_counter()
        self._arriving += 1
        try:
            yield
        except ApiError:
            self._count(route, begun, "refused")
            raise
        finally:
            self._arriving -= 1

    @contextmanager
    def passing(self, route: str) -> Iterator[None]:
        """As `arriving`, for a request without a guarded response: it is over with this block."""
        begun = time.perf_counter()
        with self.arriving(route):
            yield
        self._count(route, begun, "done")

    async def read(self, request: Request, work: Callable[[bytes], Result]) -> Result:
        """Reads the body and returns what `work` makes of it in a thread.

        Raises:
            ApiError: Too many requests are open, the engine does not work, or the body or `work` fails.
        """
        most = self._limits.max_open
        if len(self._answered) + self._arriving > most:
            raise busy(f"{most} requests are being answered, the most that are allowed; try again later")
        content = await read_body(request, self._limits)
        # In a thread, since rendering a long conversation would delay the tokens of others.
        loop = asyncio.get_running_loop()
        try:
            async with timeout_at(loop.time() + self._limits.request_timeout):
                result = await loop.run_in_executor(self._threads, work, content)
        except TIMEOUTS:
            raise late() from None
        if self._readiness.doubted and await self._readiness.why_not():
            raise unavailable()
        return result

    def _count(self, route: str, begun: float, end: str) -> None:
        seconds = time.perf_counter() - begun
        self._metrics.observe(Trace(), route=route, seconds=seconds, end=end)
