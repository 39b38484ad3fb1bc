"""Request bodies of `/v1/responses`. Nothing is stored between requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from redflag.api.schema import _OPEN, OneAnswer, _Limit, _Message, by_type, joined
from redflag.api.structured import json_schema
from redflag.api.thinking import AskedThinking
from redflag.api.tool_fields import ResponsesTools
from redflag.api.tool_formats import chat_call


class _Part(BaseModel):
    model_config = _OPEN
    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str = ""  # a refusal has none: it was not part of the answer


class _TextItem(_Message):
    """A turn that a client wrote, or that an answer's `output` had."""

    type: Literal["message"] = "message"
    content: str | list[_Part]  # type: ignore[assignment]  # the parts have other types

    def extra(self) -> Iterator[str]:
        """Unknown keys that answers do not have either."""
        yield from (name for name in super().extra() if name.rpartition(".")[2] not in _OF_ANSWERS)


class _CallItem(BaseModel):
    model_config = _OPEN
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class _ResultItem(BaseModel):
    model_config = _OPEN
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[_Part]


class _ReasoningItem(BaseModel):
    """Left out of the prompt."""

    model_config = _OPEN
    type: Literal["reasoning"]


_OF_ANSWERS = frozenset(("annotations", "id", "logprobs", "phase", "refusal", "status"))
_KINDS = ("message", "function_call", "function_call_output", "reasoning")


_Item = Annotated[
    Annotated[_TextItem, Tag("[message]")]
    | Annotated[_CallItem, Tag("[function_call]")]
    | Annotated[_ResultItem, Tag("[function_call_output]")]
    | Annotated[_ReasoningItem, Tag("[reasoning]")],
    by_type(
        _KINDS,
        f"items must be of a type among {', '.join(_KINDS)}: nothing is stored, and there are no other tools",
        default="message",
    ),
]


class _Reasoning(BaseModel):
    model_config = _OPEN
    effort: str | None = None


class ResponsesRequest(OneAnswer, ResponsesTools):
    """Body of `/v1/responses`."""

    items: str | list[_Item] = Field(alias="input")
    instructions: str | None = None
    max_output_tokens: _Limit | None = None
    text: dict[str, Any] | None = None
    reasoning: _Reasoning | None = None

    param: ClassVar[str] = "input"

    @field_validator("items", mode="before")
    @classmethod
    def _some_item(cls, items: Any) -> Any:
        if items == []:
            raise PydanticCustomError("too_short", "it is empty; give at least one item")
        return items

    @property
    def asked_tokens(self) -> int | None:
        return self.max_output_tokens or super().asked_tokens

    @property
    def limit(self) -> str:
        return "max_output_tokens" if self.max_output_tokens else super().limit

    def asked_schema(self) -> tuple[str, Mapping[str, Any]] | None:
        form = ("text.format", (self.text or {}).get("format"))
        return json_schema(self.response_format, self.structured_outputs, self.guided_json, flat=form)

    def asked_thinking(self) -> AskedThinking:
        return AskedThinking(None, self.reasoning.effort if self.reasoning else None, "", "reasoning.effort")

    def input(self) -> list[dict[str, Any]]:
        """Instructions, then the items; text of the assistant and the calls behind it are one turn."""
        turns: list[dict[str, Any]] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.items, str):
            return [*turns, {"role": "user", "content": self.items}]
        for item in self.items:
            if isinstance(item, _TextItem):
                turns.append(item.turn())
            elif isinstance(item, _ResultItem):
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)})
            elif isinstance(item, _CallItem):
                if not (turns and turns[-1]["role"] == "assistant"):
                    turns.append({"role": "assistant", "content": ""})
                turns[-1].setdefault("tool_calls", []).append(chat_call(item.call_id, item.name, item.arguments))
        return turns

    @property
    def prefill(self) -> str | None:
        last = None if isinstance(self.items, str) else self.items[-1]
        wrote = isinstance(last, _TextItem) and last.role == "assistant"
        return f"input.{len(self.items) - 1}" if wrote else None

    def extra(self) -> Iterator[str]:
        yield from super().extra()
        yield from self.unused()
        for name, value in ((self.reasoning and self.reasoning.model_extra) or {}).items():
            if value is not None:
                yield f"reasoning.{name}"
        if (self.text or {}).get("verbosity") not in (None, "medium"):
            yield "text.verbosity"
        if not isinstance(self.items, str):
            for item in self.items:
                if isinstance(item, _TextItem):
                    yield from (name.replace("messages", "input", 1) for name in item.extra())
