"""A rate limit for requests."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from redflag.errors import RedflagError


class Pace:
    """Spaces requests evenly, so that no minute holds more than its share. For one event loop.

    Attributes:
        interval: Seconds from one request to the next; 0 = no limit.
        sleep: Waits for a number of seconds.
    """

    def __init__(
        self,
        per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Sets the rate.

        Args:
            per_minute: Maximum number of requests per minute; None = no limit.
            clock: Monotonic time, seconds.
            sleep: Waits for a number of seconds.

        Raises:
            RedflagError: The number is out of bounds.
        """
        if per_minute is not None and not (math.isfinite(per_minute) and per_minute > 0):
            raise RedflagError(f"requests per minute must be above 0 (got {per_minute}).")
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self.sleep = sleep
        self._clock = clock
        self._next = -math.inf

    async def wait(self) -> None:
        """Returns when the next request may be sent."""
        while (now := self._clock()) < self._next:
            await self.sleep(self._next - now)
        self._next = now + self.interval

    def hold(self, seconds: float) -> None:
        """Delays all requests for this many seconds, because the server reported that it is busy."""
        self._next = max(self._next, self._clock() + seconds)
