"""Request bodies of `/v1/messages` (Anthropic's Messages API)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, Tag

from redflag.api.schema import _OPEN, OneAnswer, _Limit, _Stops, by_type, joined
from redflag.api.structured import json_schema
from redflag.api.thinking import AskedThinking
from redflag.api.tool_fields import MessagesTools
from redflag.api.tool_formats import chat_call
from redflag.backends import Sampling


class _TextBlock(BaseModel):
    model_config = _OPEN
    type: Literal["text"]
    text: str


class _CallBlock(BaseModel):
    model_config = _OPEN
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class _ResultBlock(BaseModel):
    model_config = _OPEN
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[_TextBlock] = ""


class _ThoughtBlock(BaseModel):
    """Left out of the prompt."""

    model_config = _OPEN
    type: Literal["thinking", "redacted_thinking"]


_KINDS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


_Block = Annotated[
    Annotated[_TextBlock, Tag("[text]")]
    | Annotated[_CallBlock, Tag("[tool_use]")]
    | Annotated[_ResultBlock, Tag("[tool_result]")]
    | Annotated[_ThoughtBlock, Tag("[thinking]")]
    | Annotated[_ThoughtBlock, Tag("[redacted_thinking]")],
    by_type(_KINDS, f"blocks must be of a type among {', '.join(_KINDS)}; leave images and documents out"),
]


class _Turn(BaseModel):
    model_config = _OPEN
    role: Literal["user", "assistant", "system"]
    content: str | list[_Block]

    def turns(self) -> Iterator[dict[str, Any]]:
        """The turns of a chat: results of tools are turns of their own, before the user's text."""
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        results = [block for block in self.content if isinstance(block, _ResultBlock)]
        calls = [block for block in self.content if isinstance(block, _CallBlock)]
        texts = [block for block in self.content if isinstance(block, _TextBlock)]
        for result in results:
            yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": joined(result.content)}
        if texts or not results:
            turn: dict[str, Any] = {"role": self.role, "content": joined(texts)}
            if calls:
                turn["tool_calls"] = [chat_call(call.id, call.name, call.input) for call in calls]
            yield turn


class _Thinking(BaseModel):
    model_config = _OPEN
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None  # without effect


class _OutputConfig(BaseModel):
    model_config = _OPEN
    format: Any = None


class CountRequest(OneAnswer, MessagesTools):
    """Body of `/v1/messages/count_tokens`."""

    messages: Annotated[list[_Turn], Field(min_length=1)]
    system: str | list[_TextBlock] | None = None
    thinking: _Thinking | None = None
    output_config: _OutputConfig | None = None

    param: ClassVar[str] = "messages"

    def input(self) -> list[dict[str, Any]]:
        system = joined(self.system or "")
        turns = [{"role": "system", "content": system}] if system else []
        return [*turns, *(turn for message in self.messages for turn in message.turns())]

    def asked_schema(self) -> tuple[str, Mapping[str, Any]] | None:
        form = ("output_config.format", self.output_config.format if self.output_config else None)
        return json_schema(self.response_format, self.structured_outputs, self.guided_json, flat=form)

    def asked_thinking(self) -> AskedThinking:
        """With `adaptive` the model thinks if it can."""
        kind = self.thinking.type if self.thinking else None
        switch = {"enabled": True, "disabled": False}.get(kind or "")
        return AskedThinking(switch, kind, "thinking", "thinking")

    @property
    def prefill(self) -> str | None:
        return f"messages.{len(self.messages) - 1}" if self.messages[-1].role == "assistant" else None

    def extra(self) -> Iterator[str]:
        yield from super().extra()
        yield from self.unused()
        for name, part in (("thinking", self.thinking), ("output_config", self.output_config)):
            yield from (f"{name}.{key}" for key in (part and part.model_extra) or {})
        for message in self.messages:
            yield from (f"messages.{name}" for name in message.model_extra or {})
            if not isinstance(message.content, str):
                for block in message.content:
                    if not isinstance(block, _ThoughtBlock):
                        yield from (f"messages.content.{name}" for name in block.model_extra or {})


class MessagesRequest(CountRequest):
    """Body of `/v1/messages`."""

    max_tokens: _Limit
    stop_sequences: _Stops | None = None

    @property
    def user_id(self) -> str | None:
        user = (self.metadata or {}).get("user_id")
        return user if isinstance(user, str) else super().user_id

    def sampling(self, max_new_tokens: int, choice: int = 0) -> Sampling:
        return replace(super().sampling(max_new_tokens, choice), stop=tuple(self.stop_sequences or ()))
