"""Events -> Anthropic's Messages, streamed or whole; see `redflag.api.wire`.

| how it ended | `stop_reason` |
|---|---|
| by itself | `end_turn`, or `stop_sequence` with the text in `stop_sequence` |
| ... with calls of tools | `tool_use` |
| at its limit, with complete calls too | `max_tokens` |
| an alarm | `refusal`; the reason in words in `stop_details` |
| a fault, in a stream | none, but the event `error` |

A fault is a 5xx if nothing was sent yet, and for a whole answer.

`content` has a `thinking` block if a thought was shown (without a signature), a `text` block if there is text, and a
`tool_use` block for each call, at the end of the response. `redflag` is beside `delta` in the event `message_delta`, or
in the body.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from redflag.api.api_errors import in_anthropics_shape
from redflag.api.tool_formats import Call
from redflag.api.wire import Answer, named_event, usage

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


class MessagesAnswer(Answer):
    """An `Answer` for `/v1/messages`."""

    says_done = False

    def __init__(self, name: str, model: str, *, stop_text: Callable[[], str | None], **shared: Any) -> None:
        """`stop_text` returns at the end the stop text that ended the response, if any; the rest as for `Answer`."""
        super().__init__(name, model, chat=True, **shared)
        self._stop_text = stop_text
        self._open: Literal["", "thinking", "text"] = ""  # the block that is being sent

    def opening(self) -> bytes:
        return named_event("message_start", message=self._message([], {"stop_reason": None, "stop_sequence": None}))

    def chunk(self, text: str) -> bytes:
        return self._begin("text") + self._delta({"type": "text_delta", "text": text})

    def thought_chunk(self, text: str) -> bytes:
        return self._begin("thinking") + self._delta({"type": "thinking_delta", "thinking": text})

    def last(self, generated: int, view: dict[str, Any] | None = None) -> bytes:
        stop = self._stop()
        before = int(bool(self.thought)) + int(bool(self.text))
        calls = b"".join(_whole_call(before + number, call) for number, call in enumerate(self.calls))
        self._generated = generated
        delta = named_event("message_delta", delta=self._end(), usage=self._usage(), **self.redflag(view))
        return stop + calls + delta + named_event("message_stop")

    def breaking(self, error: dict[str, Any], view: dict[str, Any] | None = None) -> bytes:
        assert self.failed, "nothing has failed"
        return named_event("error", **in_anthropics_shape(error), **self.redflag(view))

    def body(self, generated: int, view: dict[str, Any] | None = None) -> dict[str, Any]:
        thought = [{"type": "thinking", "thinking": self.thought, "signature": ""}] if self.thought else []
        text = [{"type": "text", "text": self.text}] if self.text else []
        content = [*thought, *text, *(_call_block(call, json.loads(call.arguments)) for call in self.calls)]
        self._generated = generated
        return {**self._message(content, self._end()), **self.redflag(view)}

    def _begin(self, kind: Literal["thinking", "text"]) -> bytes:
        """Begins a block, and ends the one before it."""
        if self._open == kind:
            return b""
        before = self._stop()
        self._open = kind
        block = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
        return before + named_event("content_block_start", index=self._index_of_open, content_block=block)

    def _delta(self, delta: dict[str, str]) -> bytes:
        return named_event("content_block_delta", index=self._index_of_open, delta=delta)

    def _stop(self) -> bytes:
        stop = named_event("content_block_stop", index=self._index_of_open) if self._open else b""
        self._open = ""
        return stop

    @property
    def _index_of_open(self) -> int:
        return int(self._open == "text" and bool(self.thought))

    def _end(self) -> dict[str, Any]:
        assert self.finish_reason is not None, "the response goes on"
        stop_text = self._stop_text() if self.finish_reason == "stop" and not self._disguised else None
        end: dict[str, Any] = {
            "stop_reason": "stop_sequence" if stop_text is not None else _REASONS[self.finish_reason],
            "stop_sequence": stop_text,
        }
        if self.finish_reason == "content_filter":
            end["stop_details"] = {"type": "refusal", "category": None, "explanation": self._refusal}
        return end

    def _message(self, content: list[dict[str, Any]], end: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.head["id"],
            "type": "message",
            "role": "assistant",
            "model": self.head["model"],
            "content": content,
            **end,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        counts = usage([self])
        return {
            "input_tokens": counts["prompt_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": self.thought_tokens, **counts["completion_tokens_details"]},
        }


def _call_block(call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _whole_call(index: int, call: Call) -> bytes:
    return (
        named_event("content_block_start", index=index, content_block=_call_block(call, {}))
        + named_event(
            "content_block_delta", index=index, delta={"type": "input_json_delta", "partial_json": call.arguments}
        )
        + named_event("content_block_stop", index=index)
    )
