"""Results of a guard: a whole response, or a stream of its events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from redflag.trace import Event, Thought, Trace


@dataclass(frozen=True)
class Result:
    """A whole response.

    Attributes:
        text: The released part of the answer.
        verdict: `completed`; `halted` by an alarm; `fault` if a step could not be judged.
        trace: For the operator.
    """

    text: str
    verdict: Literal["completed", "halted", "fault"]
    trace: Trace
    events: tuple[Event, ...]

    @property
    def thought(self) -> str:
        """The released part of the thought; "" if there is none or thoughts are hidden."""
        return "".join(event.text for event in self.events if isinstance(event, Thought))


class EventStream(Iterator[Event]):
    """The events of one response; a context manager that closes itself.

    Attributes:
        trace: Grows in place. For the operator: it holds probabilities, and tokens that were not released.
    """

    def __init__(self, events: Iterator[Event], trace: Trace, engine: object = None) -> None:
        """`engine`, the steps behind `events`, is closed even if no event was read."""
        self._events = events
        self._engine = engine
        self.trace = trace

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Ends the response and stops the engine."""
        for part in (self._events, self._engine):
            close = getattr(part, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
