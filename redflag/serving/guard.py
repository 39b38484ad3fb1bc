"""Conversations in, judged events out: the one place where model, thresholds and policy meet a user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from redflag.backends import Backend, Sampling
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.prompt import render_prompt
from redflag.serving.detokenize import ResponseText
from redflag.trace import Event, Halt, Step, Text, Trace
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import THRESHOLDS_FILE, Thresholds

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Result:
    """A whole response.

    Attributes:
        text: What was released.
        verdict: `completed`; `halted` by an alarm; `fault` when something could not be judged.
        trace: Steps, scores and events, for the operator.
        events: What a stream would have yielded, in order.
    """

    text: str
    verdict: Literal["completed", "halted", "fault"]
    trace: Trace
    events: tuple[Event, ...]


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
            _close(part)

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Guard:
    """Streams a model's responses, judged.

    Text leaves only as `Text` events of tokens that were judged and, with a hold-back, whose successors were judged
    too. A halt, or anything that goes wrong on the way (an engine lost, a probability missing, a flag chosen by the
    engine), ends the response with a `Halt` event and shows nothing that was held. `Text`, `Halt` and `Done` may go to
    end users; `Alarm` events and traces hold probabilities and are the operator's.

    Example:
        ```python
        guard = Guard.from_pretrained("runs/nano/model", policy=Policy(hold_back=4))
        for event in guard.stream([{"role": "user", "content": "How do I bake bread?"}]):
            if isinstance(event, Text):
                print(event.text, end="", flush=True)
        ```
    """

    def __init__(
        self, backend: Backend, tokenizer: Any, spec: FlagSpec, thresholds: Thresholds, policy: Policy | None = None
    ) -> None:
        """Puts the parts together.

        Args:
            backend: The engine.
            tokenizer: The model's tokenizer, with its chat template.
            spec: The model's flags, with ids.
            thresholds: Where alarms begin.
            policy: What alarms lead to; the default halts without a hold-back.

        Raises:
            RedflagError: The thresholds belong to another run, template, set of flags or way of measuring; or policy
                and flags do not fit.
        """
        thresholds.check(spec.run_id, spec.template_hash, "raw", spec.categories)
        self._backend = backend
        self._tokenizer = tokenizer
        self._spec = spec
        self._thresholds = thresholds
        self._policy = policy if policy is not None else Policy()
        self._flag_ids = frozenset(spec.ids)
        self._flag_texts = tuple(flag.token for flag in spec.flags)
        # A policy that names unknown categories is refused here, not at the first request.
        Session(thresholds, self._policy, spec.categories)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        policy: Policy | None = None,
        thresholds: Thresholds | float | None = None,
        dtype: Any = "auto",
        device: str | None = "auto",
    ) -> Guard:
        """Loads a trained and calibrated directory: model, tokenizer, `redflag.json` and `thresholds.json`.

        Args:
            directory: What `redflag train` wrote.
            policy: What alarms lead to; the default halts without a hold-back.
            thresholds: In place of the calibrated file: thresholds, or one number for all categories, set by hand.
            dtype: The weights' type; `"auto"` takes the saved one.
            device: Where the model shall run, such as `"cuda"`; "auto" is the first GPU where there is one.

        Raises:
            RedflagError: Something is missing, or the files do not belong together.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise RedflagError(
                f"{directory} is not a folder, so there is no model to guard; give the one that `redflag train` wrote."
            )
        spec = FlagSpec.load(directory)
        if thresholds is None and not (directory / THRESHOLDS_FILE).exists():
            raise RedflagError(
                f"{directory} holds no {THRESHOLDS_FILE}, so it is unknown where an alarm begins; run `redflag "
                f"calibrate --model {directory} --input rows.jsonl`, or set one by hand with thresholds=0.5."
            )
        if thresholds is None:
            thresholds = Thresholds.load(directory)
        elif not isinstance(thresholds, Thresholds):
            thresholds = Thresholds.manual(
                thresholds, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash
            )
        # Cheap refusals first: the weights may take minutes.
        thresholds.check(spec.run_id, spec.template_hash, "raw", spec.categories)

        from redflag.backends.load import load_flagged

        backend, tokenizer, spec = load_flagged(directory, device, dtype)
        return cls(backend, tokenizer, spec, thresholds, policy)

    @property
    def spec(self) -> FlagSpec:
        """The model's flags."""
        return self._spec

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds in force."""
        return self._thresholds

    def stream(self, messages: Messages, sampling: Sampling | None = None) -> EventStream:
        """Responds to a conversation, event by event.

        Closing the stream, or dropping it, stops the engine. A stop text and what follows it are not shown; text that
        may be the beginning of one waits for the next tokens.

        Args:
            messages: The conversation. A last message of the assistant's is a prefill, which the response continues.
            sampling: How tokens are chosen.

        Returns:
            Events; exactly one `Halt` or `Done` comes, and it comes last.

        Raises:
            RedflagError: The conversation is empty or malformed, or leaves no room for a response.
        """
        sampling = sampling if sampling is not None else Sampling()
        prompt = render_prompt(self._tokenizer, [dict(message) for message in messages], self._spec)
        shown = self._text(messages, prompt, sampling)
        session = Session(self._thresholds, self._policy, self._spec.categories, shown.push)
        steps: Iterator[Step] | Exception
        try:
            steps = self._backend.stream(prompt, sampling)
        except RedflagError:
            raise
        except Exception as error:  # An engine that cannot be reached is a fault, as one that is lost later.
            steps = error
        # Stop texts are looked for in what is generated, ahead of what is released: nothing is generated after one.
        ahead = self._text(messages, prompt, sampling) if sampling.stop else None
        return EventStream(self._run(steps, session, shown, ahead), session.trace, steps)

    def generate(self, messages: Messages, sampling: Sampling | None = None) -> Result:
        """Responds to a conversation at once; arguments and errors as in `stream`."""
        with self.stream(messages, sampling) as stream:
            events = tuple(stream)
        last = events[-1]
        verdict: Literal["completed", "halted", "fault"] = "completed"
        if isinstance(last, Halt):
            verdict = "fault" if last.reason == "fault" else "halted"
        text = "".join(event.text for event in events if isinstance(event, Text))
        return Result(text, verdict, stream.trace, events)

    def _text(self, messages: Messages, prompt: Sequence[int], sampling: Sampling) -> ResponseText:
        continues = messages[-1].get("role") == "assistant"
        return ResponseText(
            self._tokenizer,
            hidden_ids=self._backend.eos_ids | self._flag_ids,
            context=prompt if continues else (),
            stop=sampling.stop,
            remove=self._flag_texts,
        )

    def _run(
        self, steps: Iterator[Step] | Exception, session: Session, shown: ResponseText, ahead: ResponseText | None
    ) -> Iterator[Event]:
        try:
            if isinstance(steps, Exception):
                raise steps
            reason = "length"
            for step in steps:
                if step.token_id in self._flag_ids:
                    # Its text would be hidden, but an engine that can choose a flag is not the one that was set up.
                    yield from session.fault(f"the engine chose flag id {step.token_id}, which has to be masked")
                    return
                yield from session.feed(step)
                if session.finished:
                    return
                if ahead is not None:
                    ahead.push(step.token_id)
                if step.token_id in self._backend.eos_ids or (ahead is not None and ahead.stopped):
                    reason = "stop"
                    break
            yield from _finish(session, shown, reason)
        except RedflagError:
            # Input that the engine refuses before the first step is the caller's to mend; later it is a fault.
            if session.trace.token_ids:
                yield from session.fault("the engine refused to go on")
            else:
                raise
        except Exception as error:
            yield from session.fault(f"{type(error).__name__}: {error}")
        finally:
            _close(steps)


def _close(part: object) -> None:
    # An iterator need not have `close`; generators and everything that holds a connection do.
    close = getattr(part, "close", None)
    if close is not None:
        close()


def _finish(session: Session, shown: ResponseText, reason: str) -> list[Event]:
    """The last events of a response that ended by itself, with the text that waited for its end."""
    events = session.finish(reason)
    tail = shown.flush() if not isinstance(events[-1], Halt) else ""
    if tail:
        text = Text(session.released, (), tail)
        events.insert(-1, text)
        session.trace.events.insert(-1, text)
    return events
