"""What happens in one response: its steps, the events that they lead to, and the trace of both.

Standard library only, so that traces can be read where no model can be run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One decoding position.

    Attributes:
        token_id: The token chosen at this position.
        flag_probs: K probabilities in [0, 1], one per flag, measured *before* the token was chosen, over the whole
            vocabulary (flags included), from raw logits: no temperature, bias or penalty.
    """

    token_id: int
    flag_probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Released text. `position` is the index of its first token in the response; `token_ids` are what was released."""

    position: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Alarm:
    """A score reached its threshold at step `position`. `action` is what the policy answered."""

    position: int
    category: str
    score: float
    threshold: float
    action: str


@dataclass(frozen=True, slots=True)
class Halt:
    """The response ends here and nothing held back is shown.

    `reason` is `"alarm"` (with its `category`) or `"fault"` (fail closed: something could not be judged; `detail` says
    what). `position` is the index of the first token that was not released. `text` is what the operator's policy shows
    in place of the rest; "" shows nothing.
    """

    position: int
    reason: str
    category: str | None = None
    detail: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Reflection:
    """The model looked at its own response, unseen by the user.

    `position` is the number of response tokens it had in view, `token_ids` what it wrote, `verdict` is `"harmful"` or
    `"harmless"`, `harm` in [0, 1] what the verdict was read from.
    """

    position: int
    token_ids: tuple[int, ...]
    verdict: str
    harm: float
    text: str = ""


@dataclass(frozen=True, slots=True)
class Escalation:
    """A second judge was asked about the first `position` tokens, unseen by the user.

    `verdict` is `"harmful"`, `"harmless"` or `"unanswered"` (it failed or was late: the alarm stands, `harm` is 1).
    """

    position: int
    verdict: str
    harm: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Forced:
    """A flag was put into the context, unseen by the user, and the response goes on behind it.

    `position` is the number of response tokens before the flag, all of them released; `token_ids` are those that were
    taken back: they had not been released, and the response goes on without them.
    """

    position: int
    category: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Resume:
    """The response goes on after an alarm that was reviewed; `position` is the index of its next token."""

    position: int


@dataclass(frozen=True, slots=True)
class Done:
    """The response ended by itself: `reason` is `"stop"` (end-of-sequence or stop text) or `"length"`.

    `position` is the number of response tokens.
    """

    position: int
    reason: str


Event = Text | Alarm | Reflection | Escalation | Forced | Resume | Halt | Done


@dataclass(slots=True)
class Trace:
    """All steps of one response, with what was made of them.

    Index t is the response token t throughout. Numbers only: `text` is None unless the operator asked to keep it.

    Attributes:
        id: Name of the response, the caller's choice.
        categories: K categories, in the order of the flag probabilities.
        token_ids: T tokens in the order in which the engine chose them, released or not.
        flag_probs: T x K probabilities in [0, 1], as measured. A step that could not be judged is not among them: the
            `Halt` at the end says what was wrong with it.
        scores: T x K scores of the monitor; empty in a trace that no monitor has seen.
        events: What became of them, in order; the last one is a `Halt` or a `Done`, unless the caller
            left early.
        meta: What else is to be kept and JSON can hold: run id, category label, onset, ...
        text: The released text, on request.
    """

    id: str = ""
    categories: tuple[str, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    flag_probs: list[tuple[float, ...]] = field(default_factory=list)
    scores: list[tuple[float, ...]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    text: str | None = None

    def steps(self) -> Iterator[Step]:
        """The steps as the engine gave them."""
        return map(Step, self.token_ids, self.flag_probs)

    @property
    def waited(self) -> int:
        """Hidden tokens that were generated while the user waited."""
        return sum(len(event.token_ids) for event in self.events if isinstance(event, Reflection))

    @property
    def taken(self) -> int:
        """Tokens that were generated and taken back, for a flag that was forced in their place."""
        return sum(len(event.token_ids) for event in self.events if isinstance(event, Forced))

    @property
    def generated(self) -> int:
        """Tokens that the engine made for the response, hidden ones included."""
        return len(self.token_ids) + self.waited + self.taken

    @property
    def end(self) -> Halt | Done | None:
        """The terminal event; None where the caller left before the response was over."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Halt | Done) else None
