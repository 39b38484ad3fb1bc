"""Events -> OpenAI's chat completions and completions, streamed or whole.

How a response ends:

| event | `finish_reason` | `redflag`, at the top level of the body or of the last chunk with choices |
|---|---|---|
| `Done("stop")` | `stop` | absent |
| ... of a chat that calls tools | `tool_calls` | absent |
| `Done("length")`, behind complete calls too | `length` | absent |
| `Halt("alarm")` | `content_filter` | `{"verdict": "halted", "reason": "alarm", "category": ...}` |
| ... with the text of a decoy | `stop` | absent |
| `Halt("fault")` | none, but an error | `{"verdict": "fault", "reason": "fault", "category": null}`, beside it |

After a fault a stream ends with `{"error": {...}}` before `[DONE]`. If nothing was sent yet, the status is 500 or more
and the body an error, without `redflag`.

A thought is in `reasoning_content`, and for other clients in `reasoning`; never in `content`.

A chat that was halted before any text was shown has a `refusal`, since many clients take an empty answer for a defect;
after text it stays null, since some clients then erase what they have shown. If halted answers get a closing text,
`content` repeats the refusal: clients that do not know the field show an empty text as "None".

`usage.completion_tokens` counts the tokens that the engine generated, shown or not; its details have `released_tokens`,
`hidden_tokens` (held back at the halt, taken back, of reflections, of a stop text) and, after a thought,
`reasoning_tokens`, shown or not. A replacement counts as generated and released. With a decoy all tokens count as
released: its own, and the thought before it.

Calls of tools are sent at the end of the response, each in one piece; after a halt there are none.

An operator who asks for the trace gets it in `redflag` (`redflag.api.operator_view`). Nobody else gets a probability,
since it would guide an attacker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from redflag.api.logprobs import ShownLogprobs, Token, in_chat, in_text
from redflag.api.tool_calls import CallReader
from redflag.api.tool_formats import Call, chat_call
from redflag.trace import Done, Event, Halt, Text, Thought

DONE = b"data: [DONE]\n\n"
REFUSAL = "The response was stopped by a safety check before any of it was shown."


class Answer:
    """One response as its client sees it: takes the events in order and formats them.

    Attributes:
        tokens: Response tokens shown, including a replacement's.
        finish_reason: `stop`, `length`, `tool_calls` or `content_filter`; None before the end and after a fault.
        detail: Content of `redflag`, if any.
        thought_tokens: `Trace.thought_tokens`; to be set before the end is formatted.
        head: First fields of the body; `frame`: of every chunk.
        wants_usage: The stream ends with token counts.
        says_done: The stream ends with `[DONE]`, as in OpenAI's first two APIs.

    Example:
        >>> answer = Answer("cmpl-1", "nano", chat=False, prompt_tokens=3)
        >>> answer.push(Text(0, (7, 8), "ab")), answer.push(Halt(2, "alarm", "harm"))
        ('ab', '')
        >>> answer.finish_reason, answer.detail
        ('content_filter', {'verdict': 'halted', 'reason': 'alarm', 'category': 'harm'})
    """

    says_done = True

    def __init__(
        self,
        name: str,
        model: str,
        *,
        chat: bool,
        prompt_tokens: int,
        usage: bool = False,
        decoy: bool = False,
        refusal: str = REFUSAL,
        in_words: bool = False,
        count: Callable[[str], int] = lambda text: 0,
        index: int = 0,
        logprobs: ShownLogprobs | None = None,
        calls: CallReader | None = None,
    ) -> None:
        """Starts before the first event.

        Args:
            name: The request's id.
            chat: `/v1/chat/completions`, not `/v1/completions`.
            decoy: A replacement ends as if the model had written it.
            refusal: The text of `refusal`; with `in_words`, `content` repeats it.
            count: Text -> number of tokens, for replacements.
            calls: Reads the calls of tools, if any may be called.
        """
        self.tokens = 0
        self.finish_reason: str | None = None
        self.failed = False
        self.detail: dict[str, Any] | None = None
        self.thought_tokens = 0
        self._chat = chat
        self._prompt_tokens = prompt_tokens
        self.wants_usage = usage
        self._decoy = decoy
        self._refusal = refusal
        self._in_words = in_words
        self._count = count
        self._index = index
        self._logprobs = logprobs
        self._listed: list[Token] = []
        self._sent = 0  # of `_listed`, in chunks
        self._generated = 0
        self._reader = calls
        self._waiting = 0  # tokens of a possible call
        self._replaced = 0
        self._disguised = False
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self._thought_shown = 0
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        self.frame = {**self.head, "object": "chat.completion.chunk" if chat else kind}
        # Chunks differ in their text alone, so the JSON around it is made once.
        chunk = _sse(self._chunk({"content": _HOLE} if chat else _HOLE))
        self._before, self._after = chunk.split(b'"' + _HOLE.encode() + b'"')

    def push(self, event: Event) -> str:
        """Takes one event and returns the text that it adds to the answer."""
        assert not self.over, "the response is over"
        text = ""
        if isinstance(event, Thought):
            self._thoughts.append(event.text)
            self._thought_shown += len(event.token_ids)
            self.tokens += len(event.token_ids)
        elif isinstance(event, Text):
            text = self._read(event)
            if self._logprobs is not None:
                self._listed += self._logprobs.shown(event)
        elif isinstance(event, Done):
            self.finish_reason = "length" if event.reason == "length" else "stop"
            if self._reader is not None:
                text = self._reader.finish()
                self.tokens += self._waiting
                # At a limit the answer was cut, even if its calls are complete.
                if self._reader.calls and event.reason != "length":
                    self.finish_reason = "tool_calls"
        elif isinstance(event, Halt):
            text = event.text
            self._replaced = self._count(text) if text else 0
            self.tokens += self._replaced
            if event.reason == "fault":
                self.failed = True
                self.detail = {"verdict": "fault", "reason": "fault", "category": None}
            elif self._decoy and text:
                self.finish_reason, self._disguised = "stop", True
            else:
                self.finish_reason = "content_filter"
                self.detail = {"verdict": "halted", "reason": "alarm", "category": event.category}
        if text:
            self._pieces.append(text)
        return text

    def _read(self, event: Text) -> str:
        if self._reader is None:
            self.tokens += len(event.token_ids)
            return event.text
        text = self._reader.push(event.text)
        self._waiting += len(event.token_ids) if self._reader.state != "hidden" else 0
        if self._reader.state == "shown":
            self.tokens += self._waiting
            self._waiting = 0
        return text

    @property
    def over(self) -> bool:
        """Whether the last event was taken."""
        return self.failed or self.finish_reason is not None

    @property
    def refusal(self) -> str | None:
        """The refusal of a chat that was halted before any text."""
        halted = self._chat and self.finish_reason == "content_filter" and not self._pieces
        return self._refusal if halted else None

    @property
    def param(self) -> str:
        """The request's field that holds the prompt."""
        return "messages" if self._chat else "prompt"

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def thought(self) -> str:
        """The shown thought so far."""
        return "".join(self._thoughts)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of tools; none before the end, or after a halt or a fault."""
        ended = self.finish_reason in ("tool_calls", "length")
        return self._reader.calls if self._reader is not None and ended else ()

    def opening(self) -> bytes:
        """The first chunk of a chat's stream, with the role."""
        return _sse(self._chunk({"role": "assistant", "content": "", "refusal": None})) if self._chat else b""

    def chunk(self, text: str) -> bytes:
        if self._logprobs is None:
            return self._before + json.dumps(text).encode() + self._after
        listed, self._sent = self._listed[self._sent :], len(self._listed)
        return _sse(self._chunk({"content": text} if self._chat else text, logprobs=self._shown(listed)))

    def thought_chunk(self, text: str) -> bytes:
        """One chunk of a thought's text."""
        return _sse(self._chunk(_reasoning(text)))

    def last(self, generated: int, view: dict[str, Any] | None = None) -> bytes:
        """The end of a choice's stream: the refusal or the calls, if any, and the final chunk.

        `generated` is `Trace.generated`, `view` what the operator asked to see.
        """
        assert self.finish_reason is not None, "the response goes on, or has failed"
        self._generated = generated
        content = {"content": self.refusal} if self._in_words else {}
        refusal = _sse(self._chunk({**content, "refusal": self.refusal})) if self.refusal else b""
        calls = b"".join(
            _sse(self._chunk({"tool_calls": [{"index": index, **call}]})) for index, call in enumerate(self._calls())
        )
        return refusal + calls + _sse(self._chunk({} if self._chat else "", self.finish_reason) | self.redflag(view))

    def breaking(self, error: dict[str, Any], view: dict[str, Any] | None = None) -> bytes:
        """The end of a stream after a fault; `error` is the error's body."""
        assert self.failed, "nothing has failed"
        return _sse({**error, **self.redflag(view)}) + DONE

    def failure(self, view: dict[str, Any] | None = None) -> dict[str, Any]:
        """What is added to an error that is sent in place of the response."""
        return self.redflag(view) if view is not None else {}

    def body(self, generated: int, view: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self.head, "choices": [self.choice(generated)], "usage": usage([self]), **self.redflag(view)}

    def choice(self, generated: int) -> dict[str, Any]:
        """The whole response, as one of the body's choices."""
        assert self.finish_reason is not None, "the response goes on"
        self._generated = generated
        content: dict[str, Any] = {"text": self.text}
        if self._chat:
            text = (self.refusal if self._in_words else None) or self.text
            thought = _reasoning(self.thought) if self._thoughts else {}
            content = {"message": {"role": "assistant", "content": text, "refusal": self.refusal, **thought}}
            if calls := self._calls():
                content["message"] |= {"content": self.text or None, "tool_calls": calls}
        logprobs = None if self._logprobs is None else self._shown(self._listed)
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def counts(self) -> tuple[int, int, int]:
        """Tokens of the prompt and of the answer, and how many of the latter were shown; after the end."""
        # A decoy must look as if nothing else had been generated; its thought may be hidden.
        disguised = self.tokens + self.thought_tokens - self._thought_shown
        all_tokens = disguised if self._disguised else self._generated + self._replaced
        return self._prompt_tokens, all_tokens, self.tokens

    def _calls(self) -> list[dict[str, Any]]:
        return [chat_call(call.id, call.name, call.arguments) for call in self.calls]

    def redflag(self, view: dict[str, Any] | None) -> dict[str, Any]:
        """The field `redflag`, if it has content."""
        content = {**(self.detail or ({"verdict": "completed"} if view is not None else {})), **(view or {})}
        return {"redflag": content} if content else {}

    def _shown(self, tokens: list[Token]) -> dict[str, Any]:
        return in_chat(tokens) if self._chat else in_text(tokens)

    def _chunk(self, content: Any, finish_reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": self._index, ("delta" if self._chat else "text"): content, "logprobs": logprobs}
        usage = {"usage": None} if self.wants_usage else {}
        return {**self.frame, "choices": [{**choice, "finish_reason": finish_reason}], **usage}


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Token counts of a finished request, summed over its choices."""
    prompt, generated, shown = (sum(column) for column in zip(*(answer.counts() for answer in answers), strict=True))
    thought = sum(answer.thought_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "completion_tokens_details": {
            "released_tokens": shown,
            "hidden_tokens": generated - shown,
            **({"reasoning_tokens": thought} if thought else {}),
        },
    }


def ending(answers: Sequence[Answer]) -> bytes:
    """The end of a stream after all its choices: token counts if requested, `[DONE]`."""
    first = answers[0]
    if not first.says_done:
        return b""
    return (_sse({**first.frame, "choices": [], "usage": usage(answers)}) if first.wants_usage else b"") + DONE


def together(parts: Sequence[tuple[Answer, int, dict[str, Any] | None]]) -> dict[str, Any]:
    """The body for several choices, from each one's answer, generated tokens and operator's view.

    `redflag` is in each choice, and that of the first halted one also at the top level, with its `index`.
    """
    answers = [answer for answer, _, _ in parts]
    details = [answer.redflag(view) for answer, _, view in parts]
    choices = [answer.choice(made) | detail for (answer, made, _), detail in zip(parts, details, strict=True)]
    halted = [
        {"redflag": {**detail["redflag"], "index": index}}
        for index, (answer, detail) in enumerate(zip(answers, details, strict=True))
        if answer.detail is not None
    ]
    return {**answers[0].head, "choices": choices, "usage": usage(answers), **(halted[0] if halted else {})}


# Stands for the text in the prepared JSON of a chunk.
_HOLE = "%the text%"


def named_event(kind: str, **content: Any) -> bytes:
    """A server-sent event with a name, as in Anthropic's Messages and OpenAI's Responses."""
    return f"event: {kind}\n".encode() + _sse({"type": kind, **content})


def _sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning_content": text, "reasoning": text}
