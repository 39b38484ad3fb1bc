"""One response, watched: steps in, events out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NoReturn

from redflag.errors import RedflagError
from redflag.trace import Alarm, Done, Event, Halt, Step, Text, Trace
from redflag.watching.monitor import Monitor, UnjudgedError, judged
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds


class Session:
    """A pure state machine for one response; it knows no engine, no clock and no thread.

    The caller drives it: every step of the engine goes to `feed`, the end of the stream to `finish`, a lost engine to
    `fault`, and whatever they return goes to the user, in order. With n steps fed and hold-back h, exactly the first
    max(0, n - h) tokens have been released. A halting alarm at step a releases nothing more: max(0, a - h) tokens are
    out, and neither token a nor the h before it ever will be. A step that cannot be judged ends the response likewise.
    Exactly one `Halt` or `Done` comes, and it comes last. A caller that leaves early just drops the session.

    An alarm is raised when a score reaches its threshold from below; one that stays above raises no second one. When
    several categories alarm at one step, all are reported, in the order of `categories`, and one that halts outweighs
    those that do not.

    Work and memory per step do not depend on the length of the response.

    Attributes:
        trace: Everything so far, growing in place; read it at any time, give it an `id` and `meta` as you like.

    Example:
        >>> session = Session(Thresholds.manual(0.5, ["weapons"]), Policy(hold_back=1), ["weapons"])
        >>> for step in (Step(7, (0.1,)), Step(8, (0.2,)), Step(9, (0.9,))):
        ...     for event in session.feed(step):
        ...         print(event)
        Text(position=0, token_ids=(7,), text='')
        Alarm(position=2, category='weapons', score=0.9, threshold=0.5, action='halt')
        Halt(position=1, reason='alarm', category='weapons', detail='')
        >>> session.finished, session.released
        (True, 1)
    """

    def __init__(
        self,
        thresholds: Thresholds,
        policy: Policy,
        categories: Sequence[str],
        decode: Callable[[int], str | None] = lambda token_id: None,
        *,
        trace_id: str = "",
    ) -> None:
        """Starts before the first step.

        Args:
            thresholds: One value per category; whether they belong to the model is the caller's to check
                (`Thresholds.check`).
            policy: What alarms lead to.
            categories: K categories in the order of the flag probabilities.
            decode: Text that a token adds, given all before it; None or "" while bytes are incomplete. Called once per
                token, in order, when the token is released.
            trace_id: Name of the response in its trace.

        Raises:
            RedflagError: When a category has no threshold, or a threshold or action no category.
        """
        categories = tuple(categories)
        if len(set(categories)) != len(categories) or set(categories) != set(thresholds.values):
            raise RedflagError(
                f"the flags are {list(categories)} but there are thresholds for {list(thresholds.values)}, so "
                "something would go unwatched; give exactly one threshold per flag"
            )
        if unknown := sorted(set(policy.actions) - set(categories)):
            raise RedflagError(
                f"the policy has actions for {unknown}, but the flags are {list(categories)}, so those actions would "
                "never be taken; mend the names"
            )
        self.trace = Trace(id=trace_id, categories=categories, meta={"run_id": thresholds.run_id})
        self._monitor = Monitor(thresholds.monitor, len(categories))
        self._rules = [(name, thresholds.values[name], policy.decide(name)) for name in categories]
        self._above = [False] * len(categories)
        self._hold_back = policy.hold_back
        self._decode = decode
        self._released = 0
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the response is over: its `Halt` or `Done` is out."""
        return self._finished

    @property
    def released(self) -> int:
        """Number of tokens released."""
        return self._released

    def feed(self, step: Step) -> list[Event]:
        """Judges one step and releases what may be released.

        Returns:
            Alarms, then at most one `Text`; or, at the end, alarms and a `Halt`.

        Raises:
            RuntimeError: After the response is over.
        """
        if self._finished:
            _refuse("fed")
        trace = self.trace
        position = len(trace.token_ids)
        try:
            token_id = operator.index(step.token_id)
            probs = judged(step.flag_probs, len(self._rules))
            scores = self._monitor.feed(probs)
        except (AttributeError, TypeError, UnjudgedError) as error:
            return self.fault(f"step {position}: {error}")
        trace.token_ids.append(token_id)
        trace.flag_probs.append(probs)
        trace.scores.append(scores)

        events: list[Event] = []
        halting = None
        for k, (category, threshold, action) in enumerate(self._rules):
            above = scores[k] >= threshold
            if above and not self._above[k]:
                events.append(Alarm(position, category, scores[k], threshold, action))
                if action == "halt" and halting is None:
                    halting = category
            self._above[k] = above
        if halting is not None:
            return self._end(events, Halt(self._released, "alarm", halting))
        return self._release(events, position + 1 - self._hold_back)

    def finish(self, reason: str) -> list[Event]:
        """The stream ended by itself: every token has been judged, so those held back are released.

        Args:
            reason: `"stop"` (end-of-sequence or stop text) or `"length"`.

        Raises:
            RuntimeError: After the response is over.
        """
        assert reason in ("stop", "length"), reason
        if self._finished:
            _refuse("finished")
        length = len(self.trace.token_ids)
        events = self._release([], length)
        # Releasing can fail, and has then ended the response.
        return events if self._finished else events + self._end([], Done(length, reason))

    def fault(self, detail: str) -> list[Event]:
        """Something could not be judged, or the engine is lost: fails closed. Without effect once the response is over.

        Args:
            detail: What went wrong, for the operator.
        """
        return [] if self._finished else self._end([], Halt(self._released, "fault", detail=detail))

    def _release(self, events: list[Event], upto: int) -> list[Event]:
        """Adds the `Text` of the tokens before `upto`, if any, to this step's events and records them."""
        if upto > self._released:
            token_ids = tuple(self.trace.token_ids[self._released : upto])
            try:
                text = "".join([self._decode(token_id) or "" for token_id in token_ids])
            except Exception as error:  # Whatever a tokenizer may raise: what cannot be shown whole is not shown.
                detail = f"tokens {self._released} to {upto - 1} cannot be decoded: {type(error).__name__}: {error}"
                return self._end(events, Halt(self._released, "fault", detail=detail))
            events.append(Text(self._released, token_ids, text))
            self._released = upto
        self.trace.events.extend(events)
        return events

    def _end(self, events: list[Event], terminal: Halt | Done) -> list[Event]:
        events.append(terminal)
        self.trace.events.extend(events)
        self._finished = True
        return events


def replay(trace: Trace, thresholds: Thresholds, policy: Policy) -> Trace:
    """What would have happened to a recorded response under other thresholds or another policy.

    Record under `Policy(observe=True)`: what is unknown after a halt stays unknown.

    Returns:
        A new trace with the same steps as far as they were needed, `id` and `meta`; its `Text` events have no text.

    Raises:
        RedflagError: When the response was halted where these thresholds and policy would have gone on.
    """
    session = Session(thresholds, policy, trace.categories, trace_id=trace.id)
    session.trace.meta = dict(trace.meta)
    for step in trace.steps():
        session.feed(step)
        if session.finished:
            return session.trace
    end = trace.end
    if isinstance(end, Done):
        session.finish(end.reason)
    elif isinstance(end, Halt) and end.reason == "fault":
        session.fault(end.detail)
    elif isinstance(end, Halt):
        raise RedflagError(
            f"trace {trace.id!r} was halted at token {end.position}, and how it would have gone on is unknown; replay "
            "traces that were recorded under observe"
        )
    return session.trace


def _refuse(what: str) -> NoReturn:
    # Not an assertion: under `python -O` a stream would go on after its halt.
    raise RuntimeError(f"a session that is over was {what} again; make a new one for every response")
