"""One guarded response as a pure state machine, and the two loops that drive it: with and without an event loop.

`Response` makes all decisions. `drive` and `adrive` only carry steps from an engine, verdicts from a judge, and events
to the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from redflag.backends import AsyncStreams, Backend, Sampling
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.guard.asking import Messages, ask, verdict_ids
from redflag.guard.detokenize import ResponseText
from redflag.judges import Judge, Verdict
from redflag.prompt import text_ids
from redflag.thoughts import ThoughtMarks
from redflag.trace import Event, Halt, Step, Text, Thought, Trace
from redflag.watching.memory import earlier_peaks
from redflag.watching.monitor import UnjudgedError
from redflag.watching.policy import Policy
from redflag.watching.review import Review
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds


@dataclass(frozen=True)
class Stream:
    """Request to the engine: continue `token_ids`; pass its steps to `Response.feed`, its end to `Response.ended`."""

    token_ids: tuple[int, ...]
    sampling: Sampling
    watch: tuple[int, ...] = ()


class Ask(NamedTuple):
    """Request to a second judge about the answer so far; pass its verdict to `Response.answered` within `seconds`."""

    messages: Messages
    answer: str
    seconds: float


class Response:
    """A response from its prompt to the one `Halt` or `Done`.

    The caller fulfils `request` and passes on the results; all methods return events for the user. When `request` is
    replaced, the caller closes the old stream; None ends the response.

    A reflection is a hidden stream: prompt and tokens before the alarm, the flag, the cue; then one step that measures
    the verdict words. Afterwards the first stream is continued behind its tokens, which is cheap with a prefix cache.
    A forced flag also starts a new stream, which the user sees: prompt, released tokens, flag, and the continuation.

    Attributes:
        text: Decodes the tokens; holds the stop text that ended the response.
    """

    def __init__(
        self,
        tokenizer: Any,
        spec: FlagSpec,
        thresholds: Thresholds,
        policy: Policy,
        eos_ids: frozenset[int],
        messages: Messages,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        continues: bool = False,
        thought: ThoughtMarks | None = None,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """Starts before the first step.

        Args:
            messages: The conversation, for a second judge; `prompt`: its ids.
            continues: Whether the response continues the prompt's last text.
            thought: Marks of the thought in which the prompt ends; None: the answer begins.
            marks: As for `ResponseText`, of the answer.
        """
        self._tokenizer = tokenizer
        self._spec, self._policy = spec, policy
        self._eos_ids = eos_ids
        self._messages = messages
        # Prompts of later streams are longer than the chat.
        self._sampling = replace(sampling, chat=None, earlier=())
        self._earlier, self._monitor = sampling.earlier, thresholds.monitor
        self._flag_ids = frozenset(spec.ids)
        self._continued = tuple(prompt) if continues else ()
        self._thought, self._marks = thought, marks
        self.text = self._new_text(thinks=thought is not None)
        self.session = Session(thresholds, policy, spec.categories, self.text.push, thought=thought is not None)
        # All ids before the next token: the prompt, the response, and reflections that stay in it.
        self._context = list(prompt)
        self._starts: list[int] = []  # index in the context of each token of the response
        self._restarts = 0
        self._hidden: list[int] = []
        self._take: Callable[[Step], list[Event]] = self._answer_step
        self._end: Callable[[], list[Event]] = self._answer_end
        self.request: Stream | Ask | None = Stream(tuple(prompt), sampling)

    @property
    def trace(self) -> Trace:
        """The trace, which grows in place."""
        return self.session.trace

    @property
    def untouched(self) -> bool:
        """Whether nothing has been generated yet, so that an engine's refusal is the caller's error."""
        return not self.trace.token_ids and not self.session.finished

    def feed(self, step: Step) -> list[Event]:
        """Takes a step of the requested stream."""
        if step.token_id in self._flag_ids:
            # Its text would be hidden, but the engine is misconfigured if it can choose a flag.
            return self.failed(f"the engine chose flag id {step.token_id}, which has to be masked")
        if self._earlier and (events := self._remember(step)):
            return events
        return self._take(step)

    def _remember(self, step: Step) -> list[Event]:
        lengths, self._earlier = [end - start for start, end in self._earlier], ()
        try:
            peaks = earlier_peaks(step.earlier, lengths, self._monitor, len(self._spec.categories))
        except UnjudgedError as error:
            return self.failed(str(error))
        return self.session.remember(peaks)

    def ended(self) -> list[Event]:
        """The stream ended without an end-of-sequence token: a length limit."""
        return self._end()

    def failed(self, error: Exception | str) -> list[Event]:
        """Fails closed."""
        self.request = None
        return self.session.fault(error if isinstance(error, str) else f"{type(error).__name__}: {error}")

    def answered(self, verdict: Verdict | None, detail: str = "") -> list[Event]:
        """Takes the second judge's verdict; None, with the reason, if it failed or was late: the alarm stands."""
        harm, detail = (None, detail) if verdict is None else (verdict.harm, verdict.detail)
        return self._resume(self.session.answer(harm, detail=detail))

    def _answer_step(self, step: Step) -> list[Event]:
        session = self.session
        events = session.feed(step)
        if session.finished:
            self.request = None
            return events
        if session.pending is not None:
            return events + self._review(session.pending)
        return events + self._accepted(step.token_id)

    def _answer_end(self) -> list[Event]:
        return self._finish("length")

    def _accepted(self, token_id: int) -> list[Event]:
        """Adds the newest token to the response; ends the thought, or the response, if it does."""
        self._append(token_id)
        if self._thinks and self._thought is not None:
            ids = self._thought.end_ids
            if tuple(self.trace.token_ids[-len(ids) :]) == ids:
                return self._begin_answer()
        stopped = token_id in self._eos_ids or self.text.stop_text is not None
        return self._finish("stop") if stopped else []

    @property
    def _thinks(self) -> bool:
        return self.trace.answer_at is None

    def _begin_answer(self) -> list[Event]:
        """Ends the thought."""
        tail = self.text.flush()  # an incomplete character, or the possible beginning of a flag
        self.text = self._new_text(thinks=False)
        events = self.session.begin_answer(self.text.push)
        if self.session.finished:
            self.request = None
        elif tail and self._policy.thoughts == "show":
            thought = Thought(self.session.released, (), tail)
            events.append(thought)
            self.trace.events.append(thought)
        return events

    def _finish(self, reason: str) -> list[Event]:
        """Ends a response that was completed, with the text that was held until its end."""
        self.request = None
        events = self.session.finish(reason)
        tail = self.text.flush() if not isinstance(events[-1], Halt) else ""
        if tail and not (self._thinks and self._policy.thoughts == "hide"):
            text = (Thought if self._thinks else Text)(self.session.released, (), tail)
            events.insert(-1, text)
            self.trace.events.insert(-1, text)
        return events

    def _append(self, token_id: int) -> None:
        self._starts.append(len(self._context))
        self._context.append(token_id)

    def _new_text(self, thinks: bool) -> ResponseText:
        """The decoder of the thought or of the answer; stop texts and marks apply to answers only."""
        thought = self._thought
        return ResponseText(
            self._tokenizer,
            hidden_ids=self._eos_ids | self._flag_ids,
            context=self._continued,
            stop=() if thinks else self._sampling.stop,
            remove=tuple(flag.token for flag in self._spec.flags),
            until=thought.end_ids[0] if thinks and thought is not None else None,
            skip=thought.before_answer if not thinks and thought is not None else "",
            marks=None if thinks else self._marks,
        )

    def _review(self, review: Review) -> list[Event]:
        if review.kind == "escalate":
            part = self.trace.token_ids[self.trace.answer_at or 0 :]  # the thought or the answer, which alarmed
            answer = str(self._tokenizer.decode(part, skip_special_tokens=True))
            self.request = Ask(self._messages, answer, self._policy.judge_timeout)
            return []
        reflect = self._policy.reflect
        flag = self._spec.ids[self._spec.categories.index(review.category)]
        if review.kind == "force":
            return self._force(flag)
        self._hidden = []
        self._reflected = [*self._context, flag, *text_ids(self._tokenizer, reflect.cue, self._spec)]
        if review.tokens == 0:
            self._ask_verdict()
            return []
        # Greedy even if the user sets a temperature: a high one would make the reflection noise.
        sampling = Sampling(max_new_tokens=review.tokens, temperature=0.0)
        self.request = Stream(tuple(self._reflected), sampling)
        self._take, self._end = self._reflect_step, self._reflect_end
        return []

    def _force(self, flag: int) -> list[Event]:
        """Continues with the flag behind the released tokens; the tokens after them are dropped."""
        self.text = self._new_text(self._thinks)
        events = self.session.force(self.text.push)
        if self.session.finished:
            self.request = None
            return events
        released = self.session.released
        if released < len(self._starts):
            del self._context[self._starts[released] :]
            del self._starts[released:]
        self._context.append(flag)
        return self._restart(events)

    def _reflect_step(self, step: Step) -> list[Event]:
        if step.token_id in self._eos_ids:
            return self._reflect_end()
        self._hidden.append(step.token_id)
        stop = self._policy.reflect.stop
        if stop and any(text in self._hidden_text() for text in stop):
            return self._reflect_end()
        return []

    def _reflect_end(self) -> list[Event]:
        self._reflected += self._hidden
        self._ask_verdict()
        return []

    def _ask_verdict(self) -> None:
        reflect = self._policy.reflect
        token_ids = self._reflected
        watch: tuple[int, ...] = ()
        if reflect.verdict == "words":
            token_ids = [*token_ids, *text_ids(self._tokenizer, reflect.verdict_cue, self._spec)]
            watch = verdict_ids(self._tokenizer, self._spec, reflect.words)
        self.request = Stream(tuple(token_ids), Sampling(max_new_tokens=1, temperature=0.0), watch)
        self._take = self._verdict_step
        self._end = lambda: self.failed("the engine gave no step to read the verdict from")

    def _verdict_step(self, step: Step) -> list[Event]:
        review = self.session.pending
        assert review is not None
        try:
            if self._policy.reflect.verdict == "words":
                harmful, harmless = step.flag_probs
                harm = harmful / (harmful + harmless)
            else:
                harm = step.flag_probs[self._spec.categories.index(review.category)]
        except (IndexError, TypeError, ValueError, ZeroDivisionError):
            return self.failed(f"no verdict can be read from the probabilities {step.flag_probs!r}")
        events = self.session.answer(harm, token_ids=self._hidden, text=self._hidden_text())
        if self._policy.reflect.stay and not self.session.finished:
            self._context = self._reflected
            return self._restart(events)
        return self._resume(events)

    def _hidden_text(self) -> str:
        return str(self._tokenizer.decode(self._hidden, skip_special_tokens=True))

    def _resume(self, events: list[Event]) -> list[Event]:
        """Ends the response after a verdict, or continues it behind the token that raised the alarm."""
        if self.session.finished:
            self.request = None
            return events
        events = events + self._accepted(self.trace.token_ids[-1])
        return events if self.request is None else self._restart(events)

    def _restart(self, events: list[Event]) -> list[Event]:
        self._restarts += 1
        left = self._sampling.max_new_tokens - len(self.trace.token_ids)
        if left < 1:
            return events + self._finish("length")
        sampling = replace(self._sampling, max_new_tokens=left, seed=self._sampling.seed_of(self._restarts))
        if sampling.grammar is not None:
            sampling = replace(sampling, grammar=sampling.grammar.after([self._context[i] for i in self._starts]))
        self.request = Stream(tuple(self._context), sampling)
        self._take, self._end = self._answer_step, self._answer_end
        return events


def drive(
    response: Response, backend: Backend, judge: Judge | None = None, steps: Iterator[Step] | None = None
) -> Iterator[Event]:
    """Runs one response; the last event, and only this, is a `Halt` or `Done`.

    Closing the iterator closes the engine's stream. `steps` is the first stream, if it is open already.

    Raises:
        RedflagError: The engine refuses the prompt before its first step.
    """
    while (request := response.request) is not None:
        if isinstance(request, Ask):
            yield from response.answered(*ask(judge, *request))
            continue
        try:
            if steps is None:
                steps = backend.stream(request.token_ids, request.sampling, request.watch)
            for step in steps:
                yield from response.feed(step)
                if response.request is not request:
                    break
            else:
                yield from response.ended()
        except Exception as error:
            if isinstance(error, RedflagError) and response.untouched:
                raise
            yield from response.failed(error)
        finally:
            close = getattr(steps, "close", None)  # Plain iterators have none, those with a connection do.
            if close is not None:
                close()
            steps = None


async def adrive(response: Response, backend: AsyncStreams, judge: Judge | None = None) -> AsyncGenerator[Event, None]:
    """As `drive`, for an event loop; the judge runs in a thread."""
    while (request := response.request) is not None:
        if isinstance(request, Ask):
            for event in response.answered(*await asyncio.to_thread(ask, judge, *request)):
                yield event
            continue
        steps: Any = None
        try:
            steps = backend.astream(request.token_ids, request.sampling, request.watch)
            async for step in steps:
                for event in response.feed(step):
                    yield event
                if response.request is not request:
                    break
            else:
                for event in response.ended():
                    yield event
        except Exception as error:
            if isinstance(error, RedflagError) and response.untouched:
                raise
            for event in response.failed(error):
                yield event
        finally:
            close = getattr(steps, "aclose", None)
            if close is not None:
                await close()
