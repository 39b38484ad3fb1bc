"""Events -> Anthropic's Messages: events of a stream, or one object. `redflag.api.wire` says what ends how.

| how it ended | `stop_reason` |
|---|---|
| by itself | `end_turn`, or `stop_sequence` with the text in `stop_sequence` |
| at its limit | `max_tokens` |
| an alarm | `refusal`; the reason in words in `stop_details` |
| a fault, in a stream | none, but the event `error` |

A fault is a 5xx where nothing was sent yet, and for a whole answer.

`redflag` stands beside `delta` in the event `message_delta`, or in the body.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from redflag.api.api_errors import in_anthropics_shape
from redflag.api.wire import Answer, usage

_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}


class MessagesAnswer(Answer):
    """One response in the manner of `/v1/messages`, without its thought; otherwise as `Answer`."""

    says_done = False

    def __init__(self, name: str, model: str, *, stop_text: Callable[[], str | None], **shared: Any) -> None:
        """Starts before the first event.

        Args:
            name: The response's id.
            model: The model's name, as the client knows it.
            stop_text: Asked at the end: the stop text that ended the response, if one did.
            **shared: As for `Answer`.
        """
        super().__init__(name, model, chat=True, **shared)
        self._stop_text = stop_text
        self._begun = False

    def opening(self) -> bytes:
        """What a stream starts with."""
        return _event("message_start", message=self._message([], {"stop_reason": None, "stop_sequence": None}))

    def chunk(self, text: str) -> bytes:
        """One piece of text."""
        begin = b""
        if not self._begun:
            self._begun = True
            begin = _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        return begin + _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def thought_chunk(self, text: str) -> bytes:
        """Nothing: thoughts are not signed here, and clients send only signed ones back."""
        return b""

    def last(self, generated: int, view: dict[str, Any] | None = None) -> bytes:
        """What a stream ends with; arguments as for `Answer.last`."""
        stop = _event("content_block_stop", index=0) if self._begun else b""
        self._generated = generated
        delta = _event("message_delta", delta=self._end(), usage=self._usage(), **self.redflag(view))
        return stop + delta + _event("message_stop")

    def breaking(self, error: dict[str, Any], view: dict[str, Any] | None = None) -> bytes:
        """What a stream ends with after a fault; arguments as for `Answer.breaking`."""
        assert self.failed, "nothing has failed"
        return _event("error", **in_anthropics_shape(error), **self.redflag(view))

    def body(self, generated: int, view: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole response; arguments as for `Answer.body`."""
        content = [{"type": "text", "text": self.text}] if self.text else []
        self._generated = generated
        return {**self._message(content, self._end()), **self.redflag(view)}

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


def _event(kind: str, **content: Any) -> bytes:
    data = json.dumps({"type": kind, **content}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()
