"""Events -> OpenAI's Responses: typed events of a stream, or one object. `redflag.api.wire` says what ends how.

| how it ended | `status` | besides |
|---|---|---|
| by itself | `completed` | |
| at its limit | `incomplete` | `incomplete_details.reason`: `max_output_tokens` |
| an alarm | `incomplete` | `incomplete_details.reason`: `content_filter`; a `refusal` where no text was shown |
| a fault, in a stream | `failed`, by `response.failed` | `error` |

A fault is a 5xx where nothing was sent yet, and for a whole answer.

`redflag` stands in the response object of the last event, or in the body.
"""

from __future__ import annotations

import json
from typing import Any

from redflag.api.responses_schema import ResponsesRequest
from redflag.api.wire import Answer, usage

_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}


class ResponsesAnswer(Answer):
    """One response in the manner of `/v1/responses`, without its thought; otherwise as `Answer`."""

    says_done = False

    def __init__(self, name: str, model: str, *, asked: ResponsesRequest, **shared: Any) -> None:
        """Starts before the first event.

        Args:
            name: The response's id.
            model: The model's name, as the client knows it.
            asked: The request, of which the answer repeats some fields.
            **shared: As for `Answer`.
        """
        super().__init__(name, model, chat=True, **shared)
        self._asked = asked
        self._item = name.replace("resp", "msg", 1)
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        self._begun = False
        self._sent = 0

    @property
    def param(self) -> str:
        """The request's field that holds the prompt."""
        return self._asked.param

    def opening(self) -> bytes:
        """What a stream starts with."""
        made = self._response("in_progress", [])
        return self._event("response.created", response=made) + self._event("response.in_progress", response=made)

    def chunk(self, text: str) -> bytes:
        """One piece of text."""
        return self._begin() + self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def thought_chunk(self, text: str) -> bytes:
        """Nothing: thoughts have no place here."""
        return b""

    def last(self, generated: int, view: dict[str, Any] | None = None) -> bytes:
        """What a stream ends with; arguments as for `Answer.last`."""
        part, item = self._part(), self._message()
        sent = self._begin()
        if self.refusal:
            sent += self._event("response.refusal.delta", **self._place, delta=self.refusal)
            sent += self._event("response.refusal.done", **self._place, refusal=self.refusal)
        else:
            sent += self._event("response.output_text.done", **self._place, text=self.text, logprobs=[])
        sent += self._event("response.content_part.done", **self._place, part=part)
        sent += self._event("response.output_item.done", output_index=0, item=item)
        body = self.body(generated, view)
        return sent + self._event(f"response.{body['status']}", response=body)

    def breaking(self, error: dict[str, Any], view: dict[str, Any] | None = None) -> bytes:
        """What a stream ends with after a fault; arguments as for `Answer.breaking`."""
        assert self.failed, "nothing has failed"
        said = {"code": "server_error", "message": error["error"]["message"]}
        made = self._response("failed", [self._message()] if self._begun else [], error=said)
        return self._event("response.failed", response={**made, **self.redflag(view)})

    def body(self, generated: int, view: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole response; arguments as for `Answer.body`."""
        assert self.finish_reason is not None, "the response goes on"
        self._generated = generated
        reason = _REASONS.get(self.finish_reason)
        made = self._response("incomplete" if reason else "completed", [self._message()], over=True)
        return {**made, "incomplete_details": {"reason": reason} if reason else None, **self.redflag(view)}

    def _begin(self) -> bytes:
        """The item and its one part, before what is in it."""
        if self._begun:
            return b""
        self._begun = True
        part = {"type": "refusal", "refusal": ""} if self.refusal else _text_part("")
        item = {**self._message(), "status": "in_progress", "content": []}
        return self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **self._place, part=part
        )

    def _part(self) -> dict[str, Any]:
        return {"type": "refusal", "refusal": self.refusal} if self.refusal else _text_part(self.text)

    def _message(self) -> dict[str, Any]:
        whole = self.finish_reason is not None and self.finish_reason not in _REASONS
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": "completed" if whole else "incomplete",
            "content": [self._part()],
        }

    def _response(
        self, status: str, output: list[dict[str, Any]], *, over: bool = False, error: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.head["model"],
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": self._usage() if over else None,
        }

    def _usage(self) -> dict[str, Any]:
        counts = usage([self])
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0, **counts["completion_tokens_details"]},
            "total_tokens": counts["total_tokens"],
        }

    def _event(self, kind: str, **content: Any) -> bytes:
        self._sent += 1
        data = json.dumps({"type": kind, "sequence_number": self._sent - 1, **content}, separators=(",", ":"))
        return f"event: {kind}\ndata: {data}\n\n".encode()


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
