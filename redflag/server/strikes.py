"""Counts the halts of a conversation; after some of them it is refused.

Responses are judged separately, so an attacker who goes back after each halt and tries another way
(`redflag.lab.attacks.rap`) has any number of tries. Halts are counted for the end user that a request names
(`safety_identifier`, `user`) and the client's key, or else for the conversation's first turns, which stay the same when
later ones change. A user can change those: only an identifier set by the operator's own application stops a person.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from redflag.api.api_errors import ApiError

_MOST = 100_000  # conversations in memory, about 20 MB; those without a halt for longest are dropped first


class Strikes:
    """Halts per conversation, in this process's memory. Thread-safe.

    Example:
        >>> strikes = Strikes(2, 3600.0)
        >>> strikes.count("a"), strikes.check("a"), strikes.count("a")
        (None, None, None)
        >>> strikes.check("a")
        Traceback (most recent call last):
        redflag.api.api_errors.ApiError: this conversation was stopped, ...
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A conversation is refused after `most` halts, until `seconds` pass without another one."""
        self._most, self._seconds, self._clock = most, seconds, clock
        self._halts: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, name: str) -> None:
        """Refuses a conversation with too many halts.

        Raises:
            ApiError: 403.
        """
        with self._lock:
            if self._current(name) >= self._most:
                text = f"this conversation was stopped, since {self._most} of its answers were halted; start another"
                raise ApiError(403, text, "conversation_stopped")

    def count(self, name: str) -> None:
        with self._lock:
            self._halts[name] = (self._current(name) + 1, self._clock())
            self._halts.move_to_end(name)
            while len(self._halts) > _MOST:
                self._halts.popitem(last=False)

    def _current(self, name: str) -> int:
        halts, last = self._halts.get(name, (0, 0.0))
        return halts if self._clock() - last < self._seconds else 0


def conversation_name(key: str, user: str | None, messages: Sequence[Mapping[str, object]] | str) -> str:
    """A digest that identifies a conversation: of the client's key, and of the end user, the turns or the text."""
    if user:
        what: object = ["user", user]
    elif isinstance(messages, str):
        what = ["text", messages[:200]]
    else:
        first = next((i for i, turn in enumerate(messages) if turn.get("role") == "user"), 0)
        what = ["turns", *messages[: first + 1]]
    return hashlib.sha256(json.dumps([key, what], sort_keys=True, default=str).encode()).hexdigest()
