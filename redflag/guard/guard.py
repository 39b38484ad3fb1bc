"""Conversations in, judged events out: the entry point that joins model, thresholds and policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from redflag.backends import AsyncBackend, Backend, ChatInput, Grammar, Sampling, measures_earlier
from redflag.backends.open import open_backend
from redflag.earlier_answers import answer_spans
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.guard.asking import Messages, verdict_ids
from redflag.guard.grammar import Grammars
from redflag.guard.response import Response, Stream, drive
from redflag.guard.result import EventStream as EventStream
from redflag.guard.result import Result as Result
from redflag.judges import Judge
from redflag.models.named import model_folder
from redflag.prompt import render_prompt, render_text
from redflag.thoughts import ThoughtMarks, thinks_by_itself, thought_marks
from redflag.tool_prompt import ToolPrompt, ToolUse, mark_ids, render_tool_prompt
from redflag.trace import Halt, Step, Text
from redflag.watching.memory import Memory
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import THRESHOLDS_FILE, Thresholds
from redflag.watching.watch import check_fit

Thinking = Literal["template", "on", "off"]


class Guard:
    """Streams a model's responses, judged.

    A `Text` event holds only tokens that were judged and, with a hold-back, whose successors were judged too. A halt or
    a fault (a lost engine, a missing probability, a flag chosen by the engine) ends the response with a `Halt` event
    and drops what was held. `Thought` events come only under `Policy(thoughts="show")`. `Text`, `Thought`, `Halt` and
    `Done` may go to end users; the other events and traces hold probabilities or hidden text, for the operator.

    Example:
        ```python
        guard = Guard.from_pretrained("runs/nano/model", policy=Policy(hold_back=4))
        for event in guard.stream([{"role": "user", "content": "How do I bake bread?"}]):
            if isinstance(event, Text):
                print(event.text, end="", flush=True)
        ```
    """

    def __init__(
        self,
        backend: Backend | AsyncBackend,
        tokenizer: Any,
        spec: FlagSpec,
        thresholds: Thresholds,
        policy: Policy | None = None,
        judge: Judge | None = None,
        thinking: Thinking = "off",
        memory: Memory | None = None,
    ) -> None:
        """Checks that the parts fit each other.

        Args:
            backend: `stream` and `generate` need a `Backend`; a server drives an `AsyncBackend` itself.
            policy: The default halts without a hold-back.
            thinking: Whether responses begin with a thought by default; `template`: as the chat template does.
            memory: How earlier answers of the conversation raise the scores of the next; None: as the thresholds were
                calibrated, by default not at all.

        Raises:
            RedflagError: The thresholds belong to another run, template, set of flags, log-probability mode or memory;
                or the policy, `thinking` or `memory` is not supported by the other parts.
        """
        thresholds = thresholds.remembering(memory)
        thresholds.check(spec.run_id, spec.template_hash, backend.logprob_mode, spec.categories)
        self.backend = backend
        self.tokenizer = tokenizer
        self.judge = judge
        self._spec = spec
        self._thresholds = thresholds
        self._policy = policy if policy is not None else Policy()
        self.check(self._policy)
        if thinking not in get_args(Thinking):
            raise RedflagError(f"thinking must be one of {', '.join(get_args(Thinking))} (got {thinking!r})")
        self.thinks = thinking == "on" or (thinking == "template" and thinks_by_itself(tokenizer))
        if self.thinks:
            self._marks(self._policy)
        self._grammars = Grammars(tokenizer, spec, backend.eos_ids)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        policy: Policy | None = None,
        thresholds: Thresholds | float | None = None,
        dtype: Any = "auto",
        device: str | None = "auto",
        judge: Judge | None = None,
        upstream: str | None = None,
        thinking: Thinking = "off",
        memory: Memory | None = None,
        **served: Any,
    ) -> Guard:
        """Loads a trained and calibrated directory: model, tokenizer, `redflag.json` and `thresholds.json`.

        Args:
            directory: Output of `redflag train`, or the name of a model that ships, `smollm2-135m`. With `upstream` no
                weights are read.
            policy: As for `Guard`; likewise `judge`, `thinking` and `memory`.
            thresholds: In place of the calibrated file: thresholds, or one number for all categories, set by hand.
            dtype: Type of the weights; "auto": as saved. `device`: "auto" is the first GPU, if there is one.
            upstream: The server that runs the model, such as a stock vLLM at `"http://localhost:8000"`; None: this
                process.
            **served: Options of `redflag.backends.remote.RemoteBackend`.

        Raises:
            RedflagError: Files are missing or do not belong together, or the server does not measure the flags.
        """
        directory = model_folder(directory)
        spec, thresholds = _read_folder(Path(directory), thresholds, policy)
        thresholds = thresholds.remembering(memory)
        earlier = thresholds.memory is not None
        backend, tokenizer, spec = open_backend(
            directory, upstream, device=device, dtype=dtype, earlier=earlier, **served
        )
        return cls(backend, tokenizer, spec, thresholds, policy, judge, thinking, memory)

    @classmethod
    def from_upstream(
        cls,
        directory: str | Path,
        url: str,
        policy: Policy | None = None,
        thresholds: Thresholds | float | None = None,
        judge: Judge | None = None,
        **options: Any,
    ) -> Guard:
        """Guards a model that the server at `url` runs; otherwise as `from_pretrained`."""
        return cls.from_pretrained(directory, policy, thresholds, judge=judge, upstream=url, **options)

    @property
    def spec(self) -> FlagSpec:
        """The model's flags."""
        return self._spec

    @property
    def thresholds(self) -> Thresholds:
        """The default thresholds of responses."""
        return self._thresholds

    @property
    def policy(self) -> Policy:
        """The default policy of responses."""
        return self._policy

    @property
    def can_think(self) -> bool:
        """Whether the model can begin a response with a thought, and its end can be recognised."""
        return self._around_thoughts is not None

    @cached_property
    def _around_thoughts(self) -> ThoughtMarks | None:
        return thought_marks(self.tokenizer)

    def grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of a JSON schema: `Sampling(grammar=guard.grammar({"type": "object"}))`.

        The first call takes 0.5 to 11 s with the tokenizers of released models.

        Raises:
            RedflagError: The schema cannot be enforced in full, or llguidance is missing.
        """
        return self._grammars.json(schema)

    def stream(
        self, messages: Messages | str, sampling: Sampling | None = None, thinking: bool | None = None
    ) -> EventStream:
        """Responds to a conversation, event by event.

        Closing the stream, or dropping it, stops the engine. A stop text and what follows it are not shown; text that
        may be the beginning of one waits for the next tokens.

        Args:
            messages: The conversation. A last assistant message is a prefill, which the response continues. A string is
                a plain prompt, without the chat template.
            thinking: As for `respond`.

        Returns:
            Events; the last one, and only this, is a `Halt` or `Done`.

        Raises:
            RedflagError: The conversation is empty or malformed, or leaves no room for a response.
        """
        if not hasattr(self.backend, "stream"):
            raise RedflagError(
                f"stream must have a backend that runs without an event loop (got {type(self.backend).__name__}). Use "
                "`redflag.guard.response.adrive`."
            )
        backend = cast(Backend, self.backend)
        response = self.respond(messages, sampling, thinking=thinking)
        first = response.request
        assert isinstance(first, Stream)
        steps: Iterator[Step]
        try:
            steps = backend.stream(first.token_ids, first.sampling)  # here, so that the caller gets its RedflagError
        except RedflagError:
            raise
        except Exception as error:  # An engine that cannot be reached is a fault, like one that is lost later.
            steps = _raising(error)
        return EventStream(drive(response, backend, self.judge, steps), response.trace, steps)

    def respond(
        self,
        messages: Messages | str,
        sampling: Sampling | None = None,
        policy: Policy | None = None,
        thinking: bool | None = None,
        tools: ToolUse | None = None,
        thresholds: Thresholds | None = None,
    ) -> Response:
        """The response to a conversation as a state machine, before its first step; the engine is not used yet.

        Args:
            messages: As for `stream`.
            policy: In place of the guard's own, for this response; likewise `thresholds`.
            thinking: Whether the response begins with a thought; None: the guard's default. There is none behind a
                prefill, and in a plain prompt.
            tools: With tools the response's text holds marks, for `redflag.api.tool_calls`.

        Raises:
            RedflagError: The conversation is empty or malformed, or the policy or `thinking` is not supported.
        """
        if policy is not None or thresholds is not None:
            self.check(policy or self._policy, thresholds)
        policy = policy or self._policy
        sampling = sampling if sampling is not None else Sampling()
        if isinstance(messages, str):
            prompt = render_text(self.tokenizer, messages, self._spec)
            messages, continues, marks = [{"role": "user", "content": messages}], True, None
        else:
            messages = [dict(message) for message in messages]
            preface = policy.reflect.system if policy.asks("reflect") else ""
            prefilled = bool(messages) and messages[-1].get("role") == "assistant"
            continues = prefilled or bool(tools and tools.opening)
            if sampling.grammar is not None:
                if continues or thinking:
                    raise RedflagError(
                        "a grammar must not be given with a prefill or with thinking. It describes the response from "
                        "its first token on."
                    )
                thinking = False
            thinks = self.thinks if thinking is None else thinking
            thinks = thinks and not continues and not (tools and tools.in_channels)
            marks = self._marks(policy, thresholds) if thinks else None
            if tools is None:
                rendered = ToolPrompt(render_prompt(self.tokenizer, messages, self._spec, preface, thinks), messages)
            else:
                rendered = render_tool_prompt(self.tokenizer, messages, self._spec, tools, preface, thinks)
            prompt = rendered.ids
            # A preface, and a thought or an answer that begins in the prompt, would be rendered otherwise by a server.
            plain = not continues and not preface and not (marks and marks.opening)
            if plain and getattr(self.backend, "route", "") == "chat":
                sampling = replace(sampling, chat=ChatInput(tuple(rendered.turns), tuple(rendered.tools), thinks))
            if (thresholds or self._thresholds).memory is not None:
                ids, spans = answer_spans(self.tokenizer, rendered.turns, self._spec, preface, thinks, rendered.tools)
                assert prompt[: len(ids)] == ids, "the same conversation in other ids"
                sampling = replace(sampling, earlier=spans)
        return Response(
            self.tokenizer,
            self._spec,
            thresholds or self._thresholds,
            policy,
            self.backend.eos_ids,
            messages,
            prompt,
            sampling,
            continues=continues,
            thought=marks,
            marks=mark_ids(self.tokenizer, tools.format) if tools is not None and tools.definitions else None,
        )

    def generate(
        self, messages: Messages | str, sampling: Sampling | None = None, thinking: bool | None = None
    ) -> Result:
        """Responds to a conversation as a whole; arguments and errors as in `stream`."""
        with self.stream(messages, sampling, thinking) as stream:
            events = tuple(stream)
        last = events[-1]
        verdict: Literal["completed", "halted", "fault"] = "completed"
        if isinstance(last, Halt):
            verdict = "fault" if last.reason == "fault" else "halted"
        text = "".join(event.text for event in events if isinstance(event, Text))
        return Result(text, verdict, stream.trace, events)

    def _marks(self, policy: Policy, thresholds: Thresholds | None = None) -> ThoughtMarks:
        """The marks around a thought, if model and policy support thoughts."""
        marks = self._around_thoughts
        if marks is None:
            raise RedflagError(
                "thinking must be off for this model. Its chat template has no thinking mode, or its tokenizer no "
                "token that ends a thought."
            )
        check_fit(thresholds or self._thresholds, policy, self._spec.categories, thought=True)
        return marks

    def check(self, policy: Policy, thresholds: Thresholds | None = None) -> None:
        """Refuses before the first request a policy, or thresholds in place of the guard's own, that do not fit it.

        Raises:
            RedflagError: They do not fit each other or this guard, or the policy needs a judge.
        """
        thresholds = thresholds or self._thresholds
        Session(thresholds, policy, self._spec.categories)
        if thresholds.memory is not None and not measures_earlier(self.backend):
            raise RedflagError(
                f"memory must be off with {type(self.backend).__name__}, which does not measure earlier answers. They "
                "would not count."
            )
        if policy.prompt is not None:
            spec = self._spec
            policy.prompt.check(spec.run_id, spec.template_hash, self.backend.logprob_mode, spec.categories)
        if policy.asks("reflect") and policy.reflect.verdict == "words":
            verdict_ids(self.tokenizer, self._spec, policy.reflect.words)
        if policy.asks("escalate") and self.judge is None:
            raise RedflagError(
                "the action escalate must come with a judge (got no second judge). Every alarm would halt. Give a "
                "judge, or another action."
            )


def _read_folder(
    directory: Path, thresholds: Thresholds | float | None, policy: Policy | None
) -> tuple[FlagSpec, Thresholds]:
    """Flags and thresholds of a folder, checked before the weights are read, which may take minutes.

    Raises:
        RedflagError: Files are missing, or do not belong together.
    """
    if not directory.is_dir():
        raise RedflagError(f"{directory} must be a folder that `redflag train` wrote.")
    spec = FlagSpec.load(directory)
    if thresholds is None and not (directory / THRESHOLDS_FILE).exists():
        raise RedflagError(
            f"{directory} must hold {THRESHOLDS_FILE}. Run `redflag calibrate --model {directory} --input rows.jsonl`, "
            "or set a threshold by hand with thresholds=0.5."
        )
    if thresholds is None:
        thresholds = Thresholds.load(directory)
    elif not isinstance(thresholds, Thresholds):
        monitor = MonitorConfig("max" if policy is None or policy.first_token is None else "first")
        thresholds = Thresholds.manual(
            thresholds, spec.categories, monitor, run_id=spec.run_id, template_hash=spec.template_hash
        )
    thresholds.check(spec.run_id, spec.template_hash, "raw", spec.categories)
    return spec, thresholds


def _raising(error: Exception) -> Iterator[Step]:
    raise error
    yield
