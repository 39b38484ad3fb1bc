"""What happens to every request before it is answered: it is counted, read, and worked on in a thread."""

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
from redflag.server.exchange import Readiness, timeout_at
from redflag.server.metrics import Metrics
from redflag.trace import Trace

Made = TypeVar("Made")


class Gate:
    """Shared by all routes that read a body."""

    def __init__(self, limits: Limits, metrics: Metrics, readiness: Readiness, answered: Collection[object]) -> None:
        """Opens.

        Args:
            limits: What is allowed.
            metrics: Counts.
            readiness: Whether the engine can be used.
            answered: The requests that are being answered, as they come and go.
        """
        self._limits = limits
        self._metrics = metrics
        self._readiness = readiness
        self._answered = answered
        self._coming = 0  # requests that are not yet being answered
        # Their own threads: those of the event loop may all be waiting for second judges.
        self._clerks = ThreadPoolExecutor(2, "redflag-render")

    def close(self) -> None:
        """Frees the threads."""
        self._clerks.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def arriving(self, route: str) -> Iterator[None]:
        """Counts a request that is not yet being answered, also where that ends with an `ApiError`."""
        begun = time.perf_counter()
        self._coming += 1
        try:
            yield
        except ApiError:
            self._count(route, begun, "refused")
            raise
        finally:
            self._coming -= 1

    @contextmanager
    def passing(self, route: str) -> Iterator[None]:
        """As `arriving`, for a request that no response is made for: when the block is over, so is the request."""
        begun = time.perf_counter()
        with self.arriving(route):
            yield
        self._count(route, begun, "done")

    async def read(self, request: Request, work: Callable[[bytes], Made]) -> Made:
        """What a thread makes of the body of a request, if there is room for one more and an engine that works.

        Raises:
            ApiError: There is not, or the body does not come, or `work` refuses it.
        """
        most = self._limits.max_open
        if len(self._answered) + self._coming > most:
            raise busy(f"{most} requests are being answered, which is all; try again later")
        content = await read_body(request, self._limits)
        # Parsing and rendering a long conversation takes a while, in which others want their tokens.
        loop = asyncio.get_running_loop()
        try:
            async with timeout_at(loop.time() + self._limits.request_timeout):
                made = await loop.run_in_executor(self._clerks, work, content)
        except TimeoutError:
            raise late() from None
        if self._readiness.doubted and await self._readiness.why_not():
            raise unavailable()
        return made

    def _count(self, route: str, begun: float, end: str) -> None:
        self._metrics.observe(
            Trace(),
            route=route,
            streamed=False,
            overridden=False,
            seconds_to_first=None,
            seconds=time.perf_counter() - begun,
            end=end,
        )
