"""What a response waits for after an alarm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Review:
    """An alarm's pending review: a reflection or a second judge (`Session.answer`), or its flag in the context
    (`Session.force`). Nothing is released before that.

    Attributes:
        kind: `reflect`, `escalate` or `force`.
        position: The step of the alarm, which is the number of tokens before it.
        category: The first category whose alarm leads to this action.
        tokens: Maximum number of hidden tokens that may be generated.
    """

    kind: str
    position: int
    category: str
    tokens: int
