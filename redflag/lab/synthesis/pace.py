"""How fast questions may be asked."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from redflag.errors import RedflagError


class Pace:
    """Spaces requests evenly, so that no minute holds more than its share. For one event loop.

    Attributes:
        interval: Seconds from one request to the next; 0: no limit.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Sets the pace.

        Args:
            per_minute: Most requests per minute; None: no limit.
            clock: Seconds, from anywhere.
            sleep: Waits so many seconds.

        Raises:
            RedflagError: The number cannot be kept to.
        """
        if per_minute is not None and not (math.isfinite(per_minute) and per_minute > 0):
            raise RedflagError(f"requests per minute must be above 0 (got {per_minute}).")
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self.sleep = sleep
        self._clock = clock
        self._next = -math.inf

    async def wait(self) -> None:
        """Returns when the next request may go."""
        while (now := self._clock()) < self._next:
            await self.sleep(self._next - now)
        self._next = now + self.interval

    def hold(self, seconds: float) -> None:
        """Delays all requests for this many seconds, because the server reported that it is busy."""
        self._next = max(self._next, self._clock() + seconds)
