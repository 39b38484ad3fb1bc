"""Events -> OpenAI's objects: the chunks of a stream, or one body.

How a response ends, on both routes:

| event | `finish_reason` | `redflag`, at the top level of the last chunk with choices or of the body |
|---|---|---|
| `Done("stop")` | `stop` | absent |
| ... of a chat that calls tools | `tool_calls` | absent |
| `Done("length")`, behind complete calls too | `length` | absent |
| `Halt("alarm")` | `content_filter` | `{"verdict": "halted", "reason": "alarm", "category": ...}` |
| ... with the text of a decoy | `stop` | absent |
| `Halt("fault")` | none, but an error | `{"verdict": "fault", "reason": "fault", "category": null}`, beside it |

A fault is no finish: a stream ends with `{"error": {...}}` before `[DONE]`. Where nothing was sent yet, the status is
500 or more and the body an error, without `redflag`.

The text of a thought stands in `reasoning_content` and, for clients that know that name, `reasoning`; never in
`content`.

In a chat that was halted before any text was shown, `refusal` says so, since many clients take an empty answer for a
defect; where text was shown it stays null, since some clients then erase what they have shown. Where halted answers
have a closing text, the same words stand in `content` too: clients that know no refusal show an empty text as "None".

`usage.completion_tokens` counts what the engine generated for the response, also what was not shown; its details tell
apart `released_tokens` and `hidden_tokens` (held back when it was halted, taken back, of reflections, of a stop text).
Where there was a thought, `reasoning_tokens` are its tokens, shown or not. A replacement counts as generated and
released. Behind a decoy all tokens count as released, and only those, with a thought that stands before it.

Calls of tools are sent once the response has ended by itself, each in one piece; behind a halt there are none.

An operator who asks for the trace finds it in `redflag` too, whatever the end (`redflag.api.operator_view`). Nobody
else reads a number here: a probability is an attacker's compass.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from redflag.api.logprobs import ShownLogprobs, Token, in_chat, in_text
from redflag.api.tool_calls import CallReader
from redflag.api.tool_formats import Call
from redflag.trace import Done, Event, Halt, Text, Thought

DONE = b"data: [DONE]\n\n"
REFUSAL = "The response was stopped by a safety check before any of it was shown."


class Answer:
    """One response as its reader sees it; takes the events in order and makes the objects.

    Attributes:
        tokens: Response tokens shown, those of a replacement included.
        finish_reason: `stop`, `length`, `tool_calls` or `content_filter`; None while the response goes on, and after a
            fault.
        failed: It ended with a fault.
        detail: What `redflag` says about the end; None where it says nothing.
        thought_tokens: Tokens of the thought (`Trace.thought_tokens`), to be set before the end is asked for.
        head: What the body begins with; `frame`: what every chunk begins with.
        wants_usage: Whether the stream ends with token counts.
        says_done: Whether it ends with `[DONE]`, as OpenAI's first two APIs do.

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
            model: The model's name, as the client knows it.
            chat: For `/v1/chat/completions`; else `/v1/completions`.
            prompt_tokens: Tokens of the prompt.
            usage: The stream ends with a chunk of token counts.
            decoy: A replacement ends as if the model had written it.
            refusal: What a chat says that was halted before any text was shown.
            in_words: It says so in place of its text too, for readers who are not shown a `refusal`.
            count: Tokens of a text; a replacement counts as written.
            index: Which of the request's choices it is.
            logprobs: Where the log-probabilities of shown tokens come from; None gives none.
            calls: Reads the calls of tools; None where there are no tools.
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
        self._named: list[Token] = []
        self._sent = 0  # of `_named`, with chunks
        self._generated = 0
        self._reader = calls
        self._waiting = 0  # tokens of what may be a call
        self._replaced = 0
        self._disguised = False
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self._thought_shown = 0
        kind = (
            "chat.completion" if chat else "text_completion",
            "chat.completion.chunk" if chat else "text_completion",
        )
        self.head = {"id": name, "object": kind[0], "created": int(time.time()), "model": model}
        # Chunks differ in the text alone: what stands around it is made once.
        self.frame = {**self.head, "object": kind[1]}
        before, after = _sse(self._chunk({"content": _HOLE} if chat else _HOLE)).split(b'"' + _HOLE.encode() + b'"')
        self._before, self._after = before, after

    def push(self, event: Event) -> str:
        """Takes one event.

        Returns:
            The text that the reader sees in the answer because of it; "" for none.
        """
        assert not self.over, "the response is over"
        text = ""
        if isinstance(event, Thought):
            self._thoughts.append(event.text)
            self._thought_shown += len(event.token_ids)
            self.tokens += len(event.token_ids)
        elif isinstance(event, Text):
            text = self._read(event)
            if self._logprobs is not None:
                self._named += self._logprobs.shown(event)
        elif isinstance(event, Done):
            self.finish_reason = "length" if event.reason == "length" else "stop"
            if self._reader is not None:
                text = self._reader.finish()
                self.tokens += self._waiting
                # A limit is told even behind complete calls: a further one may be cut.
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
        """Whether the last event has come."""
        return self.failed or self.finish_reason is not None

    @property
    def refusal(self) -> str | None:
        """What a chat says in place of a text; None wherever there is text, or nothing was halted."""
        halted = self._chat and self.finish_reason == "content_filter" and not self._pieces
        return self._refusal if halted else None

    @property
    def param(self) -> str:
        """The request's field that holds the prompt."""
        return "messages" if self._chat else "prompt"

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    @property
    def thought(self) -> str:
        """All of the thought that was shown so far."""
        return "".join(self._thoughts)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of tools; none while the response goes on, nor behind a halt or a fault."""
        ended = self.finish_reason in ("tool_calls", "length")
        return self._reader.calls if self._reader is not None and ended else ()

    def opening(self) -> bytes:
        """What a stream starts with: in a chat, who speaks."""
        return _sse(self._chunk({"role": "assistant", "content": "", "refusal": None})) if self._chat else b""

    def chunk(self, text: str) -> bytes:
        """One chunk of text."""
        if self._logprobs is None:
            return self._before + json.dumps(text).encode() + self._after
        named, self._sent = self._named[self._sent :], len(self._named)
        return _sse(self._chunk({"content": text} if self._chat else text, logprobs=self._shown(named)))

    def thought_chunk(self, text: str) -> bytes:
        """One chunk of a thought's text."""
        return _sse(self._chunk(_reasoning(text)))

    def closing(self, generated: int, view: dict[str, Any] | None = None) -> bytes:
        """What the stream of one response ends with: `last`, then `ending`; arguments as for `last`."""
        return self.last(generated, view) + ending([self])

    def last(self, generated: int, view: dict[str, Any] | None = None) -> bytes:
        """What a choice ends with in a stream: a refusal or calls, where there are any, and the final chunk.

        Args:
            generated: Tokens that the engine made, hidden ones included (`Trace.generated`).
            view: What the operator asked to see.
        """
        assert self.finish_reason is not None, "the response goes on, or has failed"
        self._generated = generated
        said = {"content": self.refusal} if self._in_words else {}
        refusal = _sse(self._chunk({**said, "refusal": self.refusal})) if self.refusal else b""
        calls = b"".join(
            _sse(self._chunk({"tool_calls": [{"index": index, **call}]})) for index, call in enumerate(self._calls())
        )
        return refusal + calls + _sse(self._chunk({} if self._chat else "", self.finish_reason) | self.redflag(view))

    def breaking(self, error: dict[str, Any], view: dict[str, Any] | None = None) -> bytes:
        """What a stream ends with after a fault: `error`, which is an error's body, and `[DONE]`."""
        assert self.failed, "nothing has failed"
        return _sse({**error, **self.redflag(view)}) + DONE

    def failure(self, view: dict[str, Any] | None = None) -> dict[str, Any]:
        """What stands beside an error that is sent in place of the response: what the operator asked to see."""
        return self.redflag(view) if view is not None else {}

    def body(self, generated: int, view: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole response, for a client that does not stream; arguments as for `last`."""
        choice = self.choice(generated)
        return {**self.head, "choices": [choice], "usage": usage([self]), **self.redflag(view)}

    def choice(self, generated: int) -> dict[str, Any]:
        """The whole response, as one of the body's choices; `generated` as for `last`."""
        assert self.finish_reason is not None, "the response goes on"
        self._generated = generated
        content: dict[str, Any] = {"text": self.text}
        if self._chat:
            text = (self.refusal if self._in_words else None) or self.text
            thought = _reasoning(self.thought) if self._thoughts else {}
            content = {"message": {"role": "assistant", "content": text, "refusal": self.refusal, **thought}}
            if calls := self._calls():
                content["message"] |= {"content": self.text or None, "tool_calls": calls}
        logprobs = None if self._logprobs is None else self._shown(self._named)
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def counts(self) -> tuple[int, int, int]:
        """Tokens of the prompt, tokens of the answer, and how many of these were shown; after the end."""
        # A decoy's answer is all that was generated for it, as far as anybody can see; its thought may be hidden.
        disguised = self.tokens + self.thought_tokens - self._thought_shown
        all_tokens = disguised if self._disguised else self._generated + self._replaced
        return self._prompt_tokens, all_tokens, self.tokens

    def _calls(self) -> list[dict[str, Any]]:
        return [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.calls
        ]

    def redflag(self, view: dict[str, Any] | None) -> dict[str, Any]:
        """What `redflag` says about the end, under that name; empty where it says nothing."""
        said = {**(self.detail or ({"verdict": "completed"} if view is not None else {})), **(view or {})}
        return {"redflag": said} if said else {}

    def _shown(self, tokens: list[Token]) -> dict[str, Any]:
        return in_chat(tokens) if self._chat else in_text(tokens)

    def _chunk(self, content: Any, finish_reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": self._index, ("delta" if self._chat else "text"): content, "logprobs": logprobs}
        return {
            **self.frame,
            "choices": [{**choice, "finish_reason": finish_reason}],
            **({"usage": None} if self.wants_usage else {}),
        }


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Token counts of a request that is over, of all its choices together."""
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
    """What a stream ends with once all its choices are over: token counts where asked for, `[DONE]`."""
    first = answers[0]
    if not first.says_done:
        return b""
    return (_sse({**first.frame, "choices": [], "usage": usage(answers)}) if first.wants_usage else b"") + DONE


def together(parts: Sequence[tuple[Answer, int, dict[str, Any] | None]]) -> dict[str, Any]:
    """The body of a request for several choices, from each one's answer, generated tokens and operator's view.

    What `redflag` says stands in each choice, and that of the first halted one also at the top level, with its `index`.
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


# Letters that stand for the text of a chunk while the chunk is made.
_HOLE = "%the text%"


def _sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning_content": text, "reasoning": text}
