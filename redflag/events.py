"""Steps and events of one response, and the trace of both.

Standard library only, so that traces can be read where no model can be run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar


class Logprobs(NamedTuple):
    """Log-probabilities of one position in nats, of the language distribution: flags left out, the rest renormalised.

    Attributes:
        chosen: Of the token that was chosen.
        top: The most likely ids with their log-probabilities, in descending order, without flags.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


class Step(NamedTuple):
    """One decoding position.

    Attributes:
        token_id: The token chosen at this position.
        flag_probs: K probabilities in [0, 1], one per flag, measured *before* the token was chosen, over the whole
            vocabulary (flags included), from raw logits: no temperature, bias or penalty.
        logprobs: From the same raw logits, where `Sampling.logprobs` asks for them.
        earlier: At the first step, where `Sampling.earlier` asks for it: for each span of the prompt, T x K
            probabilities, each measured before its token.
    """

    token_id: int
    flag_probs: tuple[float, ...]
    logprobs: Logprobs | None = None
    earlier: tuple[tuple[tuple[float, ...], ...], ...] | None = None


class _Event:
    """The interface of events for reports (log, metrics, terminal, ...), which need no change for new kinds of events.

    Attributes:
        counts_as: Kind of `token_ids` that were not released: `waited`, hidden tokens that the user waited for; or
            `taken`, tokens of the response that were taken back.
    """

    __slots__ = ()
    counts_as: ClassVar[Literal["", "waited", "taken"]] = ""

    def describe(self) -> str:
        """One line for the operator about the outcome of an alarm; "" for other events."""
        return ""

    def mark(self) -> str:
        """Mark in the text on a terminal, for the operator; "" for none."""
        return ""

    def tokens(self, kind: str) -> int:
        """Number of its tokens that count as `kind`."""
        return len(getattr(self, "token_ids", ())) if kind == self.counts_as else 0


@dataclass(frozen=True, slots=True)
class Text(_Event):
    """Released text. `position` is the index of its first token in the response; `token_ids` are what was released."""

    part: ClassVar[str] = "answer"

    position: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Thought(_Event):
    """Released text of the thought before an answer; not a subclass of `Text`, so that it is never shown as one."""

    part: ClassVar[str] = "thought"

    position: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Alarm(_Event):
    """A score reached its threshold at step `position`. `action` is the policy's."""

    position: int
    category: str
    score: float
    threshold: float
    action: str


@dataclass(frozen=True, slots=True)
class Halt(_Event):
    """The response ends here and nothing held back is shown.

    `reason` is `"alarm"` (with its `category`) or `"fault"` (fail closed: a step could not be judged; the cause is in
    `detail`). `position` is the index of the first token that was not released. `text` is the policy's replacement for
    the rest; "" shows nothing.
    """

    position: int
    reason: str
    category: str | None = None
    detail: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Reflection(_Event):
    """The model reviewed its own response, hidden from the user.

    `position` is the number of response tokens that it saw, `token_ids` are the tokens of the reflection, `verdict` is
    `"harmful"` or `"harmless"`, derived from `harm` in [0, 1].
    """

    counts_as = "waited"

    position: int
    token_ids: tuple[int, ...]
    verdict: str
    harm: float
    text: str = ""

    def describe(self) -> str:
        return f"reflection at token {self.position}: {len(self.token_ids)} hidden tokens, {verdict(self)}"


@dataclass(frozen=True, slots=True)
class Escalation(_Event):
    """A second judge was asked about the first `position` tokens, hidden from the user.

    `verdict` is `"harmful"`, `"harmless"` or `"unanswered"` (it failed or was late: the alarm stands, `harm` is 1).
    """

    position: int
    verdict: str
    harm: float
    detail: str = ""

    def describe(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"second judge on {self.position} tokens: {verdict(self)}{detail}"


@dataclass(frozen=True, slots=True)
class Forced(_Event):
    """A flag was put into the context, hidden from the user, and the response continues behind it.

    `position` is the number of response tokens before the flag, all of them released; `token_ids` are the unreleased
    tokens that were taken back.
    """

    counts_as = "taken"

    position: int
    category: str
    token_ids: tuple[int, ...]

    def mark(self) -> str:
        return f"flag {self.category}"

    def describe(self) -> str:
        return f"flag {self.category} forced at token {self.position}: {len(self.token_ids)} tokens taken back"


@dataclass(frozen=True, slots=True)
class Resume(_Event):
    """The response continues after a reviewed alarm; `position` is the index of its next token."""

    position: int

    def mark(self) -> str:
        return "resumed"

    def describe(self) -> str:
        return f"resumed at token {self.position}"


@dataclass(frozen=True, slots=True)
class Done(_Event):
    """The response ended by itself: `reason` is `"stop"` (end-of-sequence or stop text) or `"length"`.

    `position` is the number of response tokens.
    """

    position: int
    reason: str


Event = Text | Thought | Alarm | Reflection | Escalation | Forced | Resume | Halt | Done
_Kind = TypeVar("_Kind", bound=_Event)


@dataclass(frozen=True, slots=True)
class Facts:
    """Summary of a trace for log, metrics, audit log, spans, operator's view and terminal.

    Attributes:
        released: Response tokens that were shown.
        waited: Hidden tokens that were generated while the user waited.
        generated: Tokens that the engine made for the response, hidden ones included.
        thought_tokens: Tokens of the thought, with those that close it, shown or not.
        thought_peaks: Category -> highest score of the thought's steps; empty where there is none.
        step_peaks: The same of the answer's steps.
        peaks: The same, including the alarms' scores: a step whose token was taken back is not in the trace, but its
            alarm is.
        alarms: All alarms, in order, as are all tuples here.
        overridden: Number of alarms after which the response continued unchanged: let through by the policy, or found
            harmless by a review.
        reviews: Reflections and questions to the second judge (`escalations`).
        resumes: Number of times that the response continued after a reviewed alarm.
        decisions: All events except released text and `Done`.
        halt: The final event, if it is a halt.
        end: `done`, `halted` (an alarm) or `fault`; None if the caller left before the response was over.
        reason: `stop`, `length`, `alarm` or `fault`; None likewise.
        category: Category of the alarm that halted it.
        detail: `Halt.detail`; "" without a halt.
    """

    released: int
    waited: int
    generated: int
    thought_tokens: int
    thought_peaks: dict[str, float]
    step_peaks: dict[str, float]
    peaks: dict[str, float]
    alarms: tuple[Alarm, ...]
    overridden: int
    reviews: tuple[Reflection | Escalation, ...]
    reflections: tuple[Reflection, ...]
    escalations: tuple[Escalation, ...]
    resumes: int
    decisions: tuple[Event, ...]
    halt: Halt | None
    end: str | None
    reason: str | None
    category: str | None
    detail: str


@dataclass(slots=True)
class Trace:
    """All steps of one response, with their scores and events.

    Index t is the response token t throughout. Numbers only: `text` is None unless the operator chose to record it.

    Attributes:
        id: Name of the response, the caller's choice.
        categories: K categories, in the order of the flag probabilities.
        token_ids: T tokens in the order in which the engine chose them, released or not.
        flag_probs: T x K probabilities in [0, 1], as measured. A step that could not be judged is left out; the `Halt`
            at the end has the reason.
        scores: T x K scores of the monitor; empty in a trace without monitor.
        events: Events in order; the last one is a `Halt` or a `Done`, unless the caller left early.
        meta: Further data in JSON's types: run id, category label, onset, ...
        text: The released text, if recorded.
        answer_at: Index of the answer's first token: 0 without a thought; None before a thought has ended.
    """

    id: str = ""
    categories: tuple[str, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    flag_probs: list[tuple[float, ...]] = field(default_factory=list)
    scores: list[tuple[float, ...]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    answer_at: int | None = 0

    def steps(self) -> Iterator[Step]:
        """The engine's steps."""
        return map(Step, self.token_ids, self.flag_probs)

    @property
    def released(self) -> int:
        """Number of response tokens shown. May be read while another thread adds events."""
        return sum(len(event.token_ids) for event in list(self.events) if isinstance(event, Text | Thought))

    @property
    def thought_tokens(self) -> int:
        """Tokens of the thought before the answer, with those that close it."""
        return len(self.token_ids) if self.answer_at is None else self.answer_at

    @property
    def waited(self) -> int:
        """Hidden tokens that were generated while the user waited."""
        return sum(event.tokens("waited") for event in self.events)

    @property
    def taken(self) -> int:
        """Tokens that were generated and taken back, such as for a flag that was forced in their place."""
        return sum(event.tokens("taken") for event in self.events)

    @property
    def generated(self) -> int:
        """Tokens that the engine made for the response, hidden ones included."""
        return len(self.token_ids) + self.waited + self.taken

    @property
    def end(self) -> Halt | Done | None:
        """The final event; None if the caller left before the response was over."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Halt | Done) else None

    def facts(self) -> Facts:
        """Summary of the trace so far."""
        alarms, end = _of(Alarm, self.events), self.end
        halt = end if isinstance(end, Halt) else None
        kind = "done" if end is not None else None
        if halt is not None:
            kind = "fault" if halt.reason == "fault" else "halted"
        step_peaks = self._peaks(self.scores[self.thought_tokens :])
        peaks = dict(step_peaks)
        for alarm in alarms:
            peaks[alarm.category] = max(peaks.get(alarm.category, alarm.score), alarm.score)
        return Facts(
            released=self.released,
            waited=self.waited,
            generated=self.generated,
            thought_tokens=self.thought_tokens,
            thought_peaks=self._peaks(self.scores[: self.thought_tokens]),
            step_peaks=step_peaks,
            peaks={name: peaks[name] for name in (*self.categories, *peaks) if name in peaks},
            alarms=alarms,
            overridden=_overridden(self.events),
            reviews=tuple(event for event in self.events if isinstance(event, Reflection | Escalation)),
            reflections=_of(Reflection, self.events),
            escalations=_of(Escalation, self.events),
            resumes=len(_of(Resume, self.events)),
            decisions=tuple(event for event in self.events if not isinstance(event, Text | Thought | Done)),
            halt=halt,
            end=kind,
            reason=end.reason if end is not None else None,
            category=halt.category if halt is not None else None,
            detail=halt.detail if halt is not None else "",
        )

    def _peaks(self, scores: Sequence[tuple[float, ...]]) -> dict[str, float]:
        return dict(zip(self.categories, map(max, zip(*scores, strict=True)), strict=bool(scores)))


def verdict(review: Reflection | Escalation) -> str:
    """The verdict in words; a judge that did not answer has no number."""
    return review.verdict if review.verdict == "unanswered" else f"{review.verdict} {review.harm:.2f}"


def _of(kind: type[_Kind], events: Sequence[Event]) -> tuple[_Kind, ...]:
    return tuple(event for event in events if isinstance(event, kind))


def _overridden(events: Sequence[Event]) -> int:
    count = 0
    group: list[Alarm] = []  # of one step, of which the severest action was taken
    for event in (*events, None):
        same = isinstance(event, Alarm) and group and event.position == group[-1].position
        if isinstance(event, Resume) or (not same and all(alarm.action == "continue" for alarm in group)):
            count += len(group)
            group = []
        if event is not None and event.counts_as == "taken":
            group = []  # it continued without the tokens of the alarm
        if isinstance(event, Alarm):
            group.append(event)
    return count
