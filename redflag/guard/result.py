"""What a guard gives back: a whole response, or its events as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from redflag.trace import Event, Thought, Trace


@dataclass(frozen=True)
class Result:
    """A whole response.

    Attributes:
        text: What was released of the answer.
        verdict: `completed`; `halted` by an alarm; `fault` when something could not be judged.
        trace: Steps, scores and events, for the operator.
        events: What a stream would have yielded, in order.
    """

    text: str
    verdict: Literal["completed", "halted", "fault"]
    trace: Trace
    events: tuple[Event, ...]

    @property
    def thought(self) -> str:
        """What was released of the thought; "" without one, and where thoughts are hidden."""
        return "".join(event.text for event in self.events if isinstance(event, Thought))


class EventStream(Iterator[Event]):
    """The events of one response as they come. Also a context manager that closes itself.

    Attributes:
        trace: Everything so far, growing in place. For the operator: it holds probabilities, and tokens that were not
            released.
    """

    def __init__(self, events: Iterator[Event], trace: Trace, engine: object = None) -> None:
        """Wraps a generator of events; `engine`, the steps behind it, is closed even when no event was asked for."""
        self._events = events
        self._engine = engine
        self.trace = trace

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Ends the response here and stops the engine. Without effect when it is over."""
        for part in (self._events, self._engine):
            close = getattr(part, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
