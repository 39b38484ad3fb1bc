"""Events -> OpenAI's Responses, streamed or whole; see `redflag.api.wire`.

| how it ended | `status` | also |
|---|---|---|
| by itself, with calls of tools or without | `completed` | |
| at its limit | `incomplete` | `incomplete_details.reason`: `max_output_tokens`; calls that were complete before it |
| an alarm | `incomplete` | `incomplete_details.reason`: `content_filter`; a `refusal` if no text was shown |
| a fault, in a stream | `failed`, by `response.failed` | `error` |

A fault is a 5xx if nothing was sent yet, and for a whole answer.

`output` has a `reasoning` item if a thought was shown, a `message` unless there are only calls, and a `function_call`
for each call, all at the end of the response. `redflag` is in the response object of the last event, or in the body.
"""

from __future__ import annotations

from typing import Any, Literal

from redflag.api.responses_schema import ResponsesRequest
from redflag.api.tool_formats import Call
from redflag.api.wire import Answer, named_event, usage

_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}


class ResponsesAnswer(Answer):
    """An `Answer` for `/v1/responses`."""

    says_done = False

    def __init__(self, name: str, model: str, *, request: ResponsesRequest, **shared: Any) -> None:
        """`request` is the one of which the answer repeats some fields; the rest as for `Answer`."""
        super().__init__(name, model, chat=True, **shared)
        self._request = request
        self._open: Literal["", "reasoning", "message"] = ""  # the item that is being sent
        self._sent = 0

    @property
    def param(self) -> str:
        return self._request.param

    def opening(self) -> bytes:
        begun = self._response("in_progress", [])
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def chunk(self, text: str) -> bytes:
        return self._begin("message") + self._inside("response.output_text.delta", delta=text, logprobs=[])

    def thought_chunk(self, text: str) -> bytes:
        return self._begin("reasoning") + self._inside("response.reasoning_text.delta", delta=text)

    def last(self, generated: int, view: dict[str, Any] | None = None) -> bytes:
        sent = (self._begin("message") if self._has_message else b"") + self._end()
        before = int(bool(self.thought)) + int(self._has_message)
        sent += b"".join(self._whole_call(before + number, call) for number, call in enumerate(self.calls))
        body = self.body(generated, view)
        return sent + self._event(f"response.{body['status']}", response=body)

    def breaking(self, error: dict[str, Any], view: dict[str, Any] | None = None) -> bytes:
        assert self.failed, "nothing has failed"
        reason = {"code": "server_error", "message": error["error"]["message"]}
        response = self._response("failed", self._output(), error=reason)
        return self._event("response.failed", response={**response, **self.redflag(view)})

    def body(self, generated: int, view: dict[str, Any] | None = None) -> dict[str, Any]:
        assert self.finish_reason is not None, "the response goes on"
        self._generated = generated
        reason = _REASONS.get(self.finish_reason)
        response = self._response("incomplete" if reason else "completed", self._output(), over=True)
        return {**response, "incomplete_details": {"reason": reason} if reason else None, **self.redflag(view)}

    def _begin(self, kind: Literal["reasoning", "message"]) -> bytes:
        """Begins an item and its one part, and ends the item before it."""
        if self._open == kind:
            return b""
        before = self._end()
        self._open = kind
        item = self._item(kind)
        part, begun = item["content"][0], {**item, "status": "in_progress", "content": []}
        text = "refusal" if part["type"] == "refusal" else "text"
        return (
            before
            + self._event("response.output_item.added", output_index=self._place["output_index"], item=begun)
            + self._inside("response.content_part.added", part={**part, text: ""})
        )

    def _end(self) -> bytes:
        """Ends the open item."""
        if not self._open:
            return b""
        item = self._item(self._open)
        part = item["content"][0]
        if part["type"] == "refusal":
            sent = self._inside("response.refusal.delta", delta=self.refusal)
            sent += self._inside("response.refusal.done", refusal=self.refusal)
        elif part["type"] == "reasoning_text":
            sent = self._inside("response.reasoning_text.done", text=self.thought)
        else:
            sent = self._inside("response.output_text.done", text=self.text, logprobs=[])
        sent += self._inside("response.content_part.done", part=part)
        sent += self._event("response.output_item.done", output_index=self._place["output_index"], item=item)
        self._open = ""
        return sent

    def _whole_call(self, index: int, call: Call) -> bytes:
        item = _call_item(call)
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", "arguments": ""}
        return (
            self._event("response.output_item.added", output_index=index, item=begun)
            + self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
            + self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
            + self._event("response.output_item.done", output_index=index, item=item)
        )

    @property
    def _has_message(self) -> bool:
        return bool(self.text) or not (self.failed or self.calls)

    def _output(self) -> list[dict[str, Any]]:
        thought = [self._item("reasoning")] if self.thought else []
        message = [self._item("message")] if self._has_message else []
        return [*thought, *message, *map(_call_item, self.calls)]

    def _item(self, kind: Literal["reasoning", "message"]) -> dict[str, Any]:
        whole = self.finish_reason is not None and self.finish_reason not in _REASONS
        if kind == "reasoning":
            status = "completed" if whole or self.text else "incomplete"  # text follows a whole thought
            content = [{"type": "reasoning_text", "text": self.thought}]
            return {"id": self._id("rs"), "type": kind, "status": status, "summary": [], "content": content}
        part: dict[str, Any] = {"type": "refusal", "refusal": self.refusal}
        if not self.refusal:
            part = {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        status = "completed" if whole else "incomplete"
        return {"id": self._id("msg"), "type": kind, "role": "assistant", "status": status, "content": [part]}

    def _id(self, prefix: str) -> str:
        return str(self.head["id"]).replace("resp", prefix, 1)

    @property
    def _place(self) -> dict[str, Any]:
        """Ids and indices of the open part."""
        if self._open == "reasoning":
            return {"item_id": self._id("rs"), "output_index": 0, "content_index": 0}
        return {"item_id": self._id("msg"), "output_index": int(bool(self.thought)), "content_index": 0}

    def _response(
        self, status: str, output: list[dict[str, Any]], *, over: bool = False, error: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        request = self._request
        choice, named = request.choice, {"type": "function", "name": request.choice.name}
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.head["model"],
            "output": output,
            "parallel_tool_calls": choice.parallel,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}, **(request.text or {})},
            "tool_choice": named if choice.name else choice.mode,
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": 1.0 if request.top_p is None else request.top_p,
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

    def _inside(self, kind: str, **content: Any) -> bytes:
        return self._event(kind, **self._place, **content)

    def _event(self, kind: str, **content: Any) -> bytes:
        self._sent += 1
        return named_event(kind, sequence_number=self._sent - 1, **content)


def _call_item(call: Call) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }
