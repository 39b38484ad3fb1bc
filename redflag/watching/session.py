"""One response, watched: steps in, events out."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

from redflag.trace import Alarm, Done, Escalation, Event, Forced, Halt, Reflection, Resume, Step, Text, Thought, Trace
from redflag.watching.first_token import Decision
from redflag.watching.monitor import UnjudgedError, judged
from redflag.watching.policy import ACTIONS, SEVERITY, Policy
from redflag.watching.review import Review as Review
from redflag.watching.sentences import Sentences
from redflag.watching.thresholds import Thresholds
from redflag.watching.watch import Crossing, Watch, check_fit


class Session:
    """A pure state machine for one response, without engine, clock or thread.

    The caller drives it: every step of the engine goes to `feed`, the end of the stream to `finish`, a lost engine to
    `fault`, and the returned events go to the user, in order. Under the default release, with n steps fed and hold-back
    h, exactly the first max(0, n - h) tokens have been released. After a halting alarm at step a nothing more is
    released: max(0, a - h) tokens have been, and neither token a nor the h before it will ever be. A step that cannot
    be judged ends the response in the same way. The last event, and only the last, is a `Halt` or a `Done`. A caller
    that leaves early just drops the session.

    An alarm is raised when a score reaches its threshold from below; a score that stays above raises no second one.
    When several categories alarm at one step, all are reported, in the order of `categories`, and the severest of their
    actions is taken (`redflag.watching.policy.SEVERITY`).

    An alarm that leads to `reflect` or `escalate` leaves a `Review` in `pending`, and the session takes no steps until
    `answer`. A confirmed alarm ends the response. Otherwise the response continues, and the alarm is muted until the
    score has fallen (`Policy.rearm`, `Policy.mute_limit`). An alarm that leads to `force` waits for `force`, which
    drops all tokens not yet released; nothing more is shown until the score has fallen. Every path ends: interventions
    and hidden tokens have budgets, and when they are used up an alarm halts.

    With `thought` the response begins with a thought, judged by its own thresholds (`Thresholds.thoughts`) until
    `begin_answer`. It is released as `Thought` events or not at all (`Policy.thoughts`), and hold-back and release
    apply to each part separately; a hidden thought is judged too, and an alarm in it acts like any other.

    Work and memory per step do not depend on the length of the response.

    Attributes:
        trace: Everything so far, which grows in place; the caller may read it at any time and set its `id` and `meta`.
        pending: The review that the response waits for, or None.

    Example:
        >>> session = Session(Thresholds.manual(0.5, ["weapons"]), Policy(hold_back=1), ["weapons"])
        >>> for step in (Step(7, (0.1,)), Step(8, (0.2,)), Step(9, (0.9,))):
        ...     for event in session.feed(step):
        ...         print(event)
        Text(position=0, token_ids=(7,), text='')
        Alarm(position=2, category='weapons', score=0.9, threshold=0.5, action='halt')
        Halt(position=1, reason='alarm', category='weapons', detail='', text='')
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
        thought: bool = False,
        trace_id: str = "",
    ) -> None:
        """Starts before the first step.

        Args:
            thresholds: One value per category; the caller checks that they belong to the model (`Thresholds.check`).
            categories: K categories in the order of the flag probabilities.
            decode: Text that a token adds to all before it; None or "" while bytes are incomplete. Called once per
                token of the response, in order, if no alarm of the token's own step stands.
            thought: Whether the response begins with a thought, which lasts until `begin_answer`.

        Raises:
            RedflagError: Thresholds, policy and categories do not match (`redflag.watching.watch.check_fit`).
        """
        categories = tuple(categories)
        check_fit(thresholds, policy, categories, thought)
        self.trace = Trace(
            id=trace_id,
            categories=categories,
            meta={"run_id": thresholds.run_id},
            answer_at=None if thought else 0,
        )
        self.pending: Review | None = None
        self._thresholds = thresholds
        self._policy = policy
        self._factors: tuple[float, ...] = ()
        self._watch = Watch(thresholds.of_thoughts if thought else thresholds, policy, categories)
        # Categories of the pending review, or of the last one.
        self._reviewed: list[int] = []
        self._begun = False
        self._interventions = 0
        self._waited = 0
        # In the context of a reflection, nothing is released until the scores have fallen.
        self._held = False
        self._hidden = thought and policy.thoughts == "hide"
        self._decode = decode
        self._pieces: deque[str] = deque()
        self._sentences = Sentences() if policy.release == "sentence" else None
        self._released = 0
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the response is over, by a `Halt` or `Done`."""
        return self._finished

    @property
    def released(self) -> int:
        """Position of the next release; tokens of a finished hidden thought are counted."""
        return self._released

    def remember(self, earlier: Sequence[Sequence[float]]) -> list[Event]:
        """Lets earlier responses of the conversation raise the scores (`Thresholds.memory`); before the first step.

        `earlier` are the K peaks of each, oldest first. Returns nothing, or a `Halt` where one cannot be judged.
        """
        trace, memory = self.trace, self._thresholds.memory
        assert not self._begun, "`remember` comes before the first step"
        if memory is None or not earlier:
            return []
        try:
            self._factors = memory.factors(earlier, self._thresholds.monitor.prior, len(trace.categories))
        except UnjudgedError as error:
            return self.fault(f"an earlier response cannot be judged: {error}")
        trace.meta["earlier"] = [list(map(float, peak)) for peak in earlier]
        thresholds = self._thresholds.of_thoughts if trace.answer_at is None else self._thresholds
        self._watch = Watch(thresholds, self._policy, trace.categories, self._factors)
        return []

    def feed(self, step: Step) -> list[Event]:
        """Judges one step and releases what may be released.

        Returns:
            Alarms, then at most one `Text` or `Thought`; or, at the end, alarms and a `Halt`; or alarms alone, with a
            `pending` review.

        Raises:
            RuntimeError: After the response is over, or while a review is pending.
        """
        if self._finished or self.pending:
            _refuse("feed", self.pending)
        trace = self.trace
        position = len(trace.token_ids)
        try:
            token_id = operator.index(step.token_id)
            probs = judged(step.flag_probs, len(trace.categories))
            scores = self._watch.score(probs)
        except (AttributeError, TypeError, UnjudgedError) as error:
            return self.fault(f"step {position}: {error}")
        trace.token_ids.append(token_id)
        trace.flag_probs.append(probs)
        trace.scores.append(scores)

        alarms = [] if self._begun else self._policy.prompt_alarms(trace.categories, probs)
        events: list[Event] = [*alarms]
        if alarms and alarms[0].action != "continue":
            return self._stop(alarms[0].action, alarms[0].category, events)
        decision = self._decision(probs)
        crossed = self._watch.crossings(scores, decision)
        if crossed:
            crossed = [crossing._replace(action=self._affordable(crossing.action)) for crossing in crossed]
            events += [Alarm(position, *crossing[1:]) for crossing in crossed]
            action = min((crossing.action for crossing in crossed), key=SEVERITY.index)
            if action != "continue":
                return self._act(action, [crossing for crossing in crossed if crossing.action == action], events)
        elif decision is not None and (rule := self._policy.first_token) and rule.respond and not self._policy.observe:
            self.pending = Review("force", position, rule.respond, 0)  # not an alarm: this flag says "respond"
            return []
        self._held = self._held and self._watch.high(scores)
        return self._accept(events)

    def answer(
        self, harm: float | None, *, token_ids: Sequence[int] = (), text: str = "", detail: str = ""
    ) -> list[Event]:
        """The verdict of the pending review.

        Args:
            harm: In [0, 1], compared with `Reflect.limit` for a reflection and 0.5 for a second judge. None = no
                verdict; the alarm stands.
            token_ids: The hidden tokens that were generated.
            detail: The judge's answer, or why there is none.

        Returns:
            A `Reflection` or `Escalation`, then a `Halt`, or a `Resume` and a release.

        Raises:
            RuntimeError: When no review is pending.
        """
        review = self.pending
        if review is None or review.kind == "force":
            raise RuntimeError("no review is pending; check `pending` before `answer`")
        policy = self._policy
        if harm is not None and not (isinstance(harm, int | float) and 0.0 <= harm <= 1.0):  # false for NaN
            return self.fault(f"the verdict on the alarm at step {review.position} must be in [0, 1] (got {harm!r})")
        self.pending = None
        self._waited += len(token_ids)
        harmful = harm is None or harm >= (policy.reflect.limit if review.kind == "reflect" else 0.5)
        verdict = "unanswered" if harm is None else "harmful" if harmful else "harmless"
        measured = 1.0 if harm is None else float(harm)
        stays = review.kind == "reflect" and policy.reflect.stay and harm is not None
        event: Event
        if review.kind == "reflect":
            event = Reflection(review.position, tuple(token_ids), verdict, measured, text)
        else:
            event = Escalation(review.position + 1, verdict, measured, detail)
        if harmful and not stays:
            return self._stop(policy.confirmed, review.category, [event])
        self._watch.mute(self._reviewed)
        if stays:
            # The answer continues before the alarm's token, which is no longer part of it.
            self.trace.token_ids.pop()
            self.trace.flag_probs.pop()
            self.trace.scores.pop()
            self._held = True
            events: list[Event] = [event, Resume(len(self.trace.token_ids))]
            self.trace.events.extend(events)
            return events
        return self._accept([event, Resume(len(self.trace.token_ids))])

    def force(self, decode: Callable[[int], str | None]) -> list[Event]:
        """Puts the pending flag into the context behind the released tokens; drops all tokens not released.

        Args:
            decode: A new decoder for the same response, from its first token on.

        Returns:
            A `Forced`; or a `Halt` if the remaining tokens cannot be decoded again.

        Raises:
            RuntimeError: No forced flag is pending.
        """
        review, trace = self.pending, self.trace
        if review is None or review.kind != "force":
            raise RuntimeError("no forced flag is pending; check `pending` before `force`")
        self.pending = None
        event = Forced(self._released, review.category, tuple(trace.token_ids[self._released :]))
        for column in (trace.token_ids, trace.flag_probs, trace.scores):
            del column[self._released :]
        self._pieces.clear()
        self._decode = decode
        sentences = Sentences()
        try:
            for upto, token_id in enumerate(trace.token_ids[trace.answer_at or 0 :], 1):
                sentences.whole(decode(token_id) or "", upto)
        except Exception as error:  # As in `_accept`.
            return self.fault(f"the released tokens cannot be decoded again: {type(error).__name__}: {error}")
        self._sentences = sentences if self._sentences is not None else None
        self._watch.mute(self._reviewed)
        self._held = bool(self._reviewed)
        trace.events.append(event)
        return [event]

    def begin_answer(self, decode: Callable[[int], str | None]) -> list[Event]:
        """Ends the thought: all of it has been judged, so the rest is released if thoughts are shown.

        The answer is judged by its own thresholds and a new monitor, so the thought's scores do not affect it. Budgets
        (interventions, hidden tokens) are not restored.

        Args:
            decode: A new decoder for the answer, from its first token on.

        Returns:
            At most one `Thought`; or a `Halt` if a reviewed alarm's score never fell.

        Raises:
            RuntimeError: The response is over, a review is pending, or there is no thought.
        """
        trace = self.trace
        if self._finished or self.pending:
            _refuse("begin_answer", self.pending)
        if trace.answer_at is not None:
            raise RuntimeError("the answer has begun already; call `begin_answer` once, after a thought")
        if self._held:
            return self._stop(self._policy.confirmed, trace.categories[self._reviewed[0]], [])
        length = len(trace.token_ids)
        events = self._release([], length)
        trace.answer_at, self._hidden = length, False
        self._watch = Watch(self._thresholds, self._policy, trace.categories, self._factors)
        self._decode = decode
        self._sentences = Sentences() if self._policy.release == "sentence" else None
        trace.events.extend(events)
        return events

    def finish(self, reason: str) -> list[Event]:
        """Ends a response whose stream ended by itself: all tokens have been judged, so the rest is released.

        Args:
            reason: `"stop"` (end-of-sequence or stop text) or `"length"`.

        Raises:
            RuntimeError: The response is over, or a review is pending.
        """
        assert reason in ("stop", "length"), reason
        if self._finished or self.pending:
            _refuse("finish", self.pending)
        if self._held:  # The score never fell again.
            return self._stop(self._policy.confirmed, self.trace.categories[self._reviewed[0]], [])
        length = len(self.trace.token_ids)
        return self._end(self._release([], length), Done(length, reason))

    def fault(self, detail: str) -> list[Event]:
        """Fails closed: a step could not be judged, or the engine is lost. No effect once the response is over.

        Args:
            detail: The fault, for the operator.
        """
        self.pending = None
        return [] if self._finished else self._end([], Halt(self._released, "fault", detail=detail))

    def _decision(self, probs: tuple[float, ...]) -> Decision | None:
        """The first-token rule's decision at the first step; None at other steps, and without such a rule."""
        rule, begun = self._policy.first_token, self._begun
        self._begun = True
        if rule is None or begun:
            return None
        return rule.decide(dict(zip(self.trace.categories, probs, strict=True)), self._thresholds.values)

    def _affordable(self, action: str) -> str:
        """The action, or `halt` if it would exceed a budget."""
        policy = self._policy
        if not ACTIONS[action].intervenes:
            return action
        spent = action == "reflect" and policy.reflect.max_tokens > 0 and self._waited >= policy.max_wait_tokens
        return "halt" if spent or self._interventions >= policy.max_interventions else action

    def _act(self, action: str, crossed: list[Crossing], events: list[Event]) -> list[Event]:
        category = crossed[0].category
        if ACTIONS[action].ends:
            return self._stop(action, category, events)
        self._interventions += 1
        self._reviewed = [crossing.k for crossing in crossed]
        tokens = min(self._policy.reflect.max_tokens, self._policy.max_wait_tokens - self._waited)
        self.pending = Review(action, len(self.trace.token_ids) - 1, category, tokens if action == "reflect" else 0)
        self.trace.events.extend(events)
        return events

    def _stop(self, how: str, category: str, events: list[Event]) -> list[Event]:
        text = ""
        if how == "replace":
            try:
                text = self._policy.replacement_for(self.trace)
            except Exception as error:  # From the operator's function; without its text the alarm still halts.
                detail = f"no replacement: {type(error).__name__}: {error}"
                return self._end(events, Halt(self._released, "alarm", category, detail))
        return self._end(events, Halt(self._released, "alarm", category, text=text))

    def _accept(self, events: list[Event]) -> list[Event]:
        """Accepts the newest token as part of the response: decodes it and releases what may be released."""
        position = len(self.trace.token_ids) - 1
        try:
            piece = self._decode(self.trace.token_ids[-1]) or ""
        except Exception as error:  # Any error of the tokenizer: text that cannot be decoded is not shown.
            detail = f"token {position} cannot be decoded: {type(error).__name__}: {error}"
            return self._end(events, Halt(self._released, "fault", detail=detail))
        self._pieces.append(piece)
        upto = position + 1 - self._policy.hold_back
        if self._sentences is not None:
            start = self.trace.answer_at or 0
            upto = start + self._sentences.whole(piece, upto - start)
        if self._held or self._policy.release == "end" or self._hidden:
            upto = 0
        events = self._release(events, upto)
        self.trace.events.extend(events)
        return events

    def _release(self, events: list[Event], upto: int) -> list[Event]:
        """Adds the `Text` or `Thought` of the tokens before `upto`, if any."""
        if upto > self._released:
            text = "".join([self._pieces.popleft() for _ in range(upto - self._released)])
            if not self._hidden:
                kind = Text if self.trace.answer_at is not None else Thought
                events.append(kind(self._released, tuple(self.trace.token_ids[self._released : upto]), text))
            self._released = upto
        return events

    def _end(self, events: list[Event], terminal: Halt | Done) -> list[Event]:
        events.append(terminal)
        self.trace.events.extend(events)
        self._finished = True
        self._pieces.clear()
        return events


def _refuse(what: str, pending: Review | None) -> NoReturn:
    if pending is not None:
        raise RuntimeError(f"{what} called while a review is pending; call `answer` or `force` first")
    # Not an assertion: under `python -O` a stream would go on after its halt.
    raise RuntimeError(f"{what} called after the response was over; make a new session for every response")
