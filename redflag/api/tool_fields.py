"""Tools and `tool_choice` in each API's shape, converted to a chat's definitions and one `Choice`.

| | a tool | a call is asked for by `tool_choice` |
|---|---|---|
| chat completions | `{"type": "function", "function": {"name", ...}}` | `{"type": "function", "function": {"name"}}` |
| Responses | `{"type": "function", "name", ...}` | `{"type": "function", "name"}` |
| Anthropic's Messages | `{"name", "input_schema", ...}` | `{"type": "any"}`, `{"type": "tool", "name"}` |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

_OPEN = ConfigDict(extra="allow", strict=True)


class Choice(NamedTuple):
    """Whether a function must be called.

    Attributes:
        mode: `auto`, `none` or `required`.
        name: The function that must be called, "" for any.
        parallel: Several calls are allowed; otherwise the first one counts.
    """

    mode: str
    name: str = ""
    parallel: bool = True


class ToolFields(BaseModel):
    """Fields that all APIs share."""

    tools: list[Any] | None = None
    tool_choice: Any = None

    @property
    def choice(self) -> Choice:
        """`tool_choice` and the fields that belong to it."""
        choice: Choice | None = self.tool_choice
        return choice or Choice("auto")

    def definitions(self) -> list[dict[str, Any]]:
        """The tools in a chat's shape, unchecked."""
        return [{"type": "function", "function": tool.function_fields()} for tool in self.tools or ()]

    def unused(self) -> Iterator[str]:
        """Keys of tools without effect; `strict` too, since arguments are not held to a schema."""
        for tool in self.tools or ():
            yield from (f"tools.{name}" for name in tool.unused())


# A tool of each API


def _only(supported: str) -> AfterValidator:
    def check(kind: str) -> str:
        if kind != supported:
            text = "tools of the type {kind} are not supported, functions are; leave it out"
            # pydantic's type for a value that is not one of those allowed
            raise PydanticCustomError("literal_error", text, {"kind": kind[:100]})
        return kind

    return AfterValidator(check)


# Fields of a base come first, and so do their errors: that of the type is the clearest.
class _Typed(BaseModel):
    model_config = _OPEN
    type: Annotated[str, _only("function")]


class _ClientTyped(BaseModel):
    type: Annotated[str, _only("custom")] | None = None  # Anthropic's name for the client's functions


class _Named(BaseModel):
    model_config = _OPEN
    name: str
    description: str | None = None
    strict: bool | None = None

    def function_fields(self) -> dict[str, Any]:
        """What the prompt shows."""
        return {"name": self.name, **({} if self.description is None else {"description": self.description})}

    def unused(self) -> Iterator[str]:
        """Keys without effect."""
        yield from self.model_extra or {}
        if self.strict:
            yield "strict"


class _Function(_Named):
    parameters: dict[str, Any] | None = None

    def function_fields(self) -> dict[str, Any]:
        return {**super().function_fields(), "parameters": self.parameters}


class _ChatTool(_Typed):
    function: _Function

    def function_fields(self) -> dict[str, Any]:
        return self.function.function_fields()

    def unused(self) -> Iterator[str]:
        yield from self.model_extra or {}
        yield from (f"function.{name}" for name in self.function.unused())


class _FlatTool(_Function, _Typed):
    pass


class _ClientTool(_Named, _ClientTyped):
    input_schema: dict[str, Any]

    def function_fields(self) -> dict[str, Any]:
        return {**super().function_fields(), "parameters": self.input_schema}


# The fields of each API


def _choice(value: Any, *, named: Any, shape: str) -> Choice | None:
    """For OpenAI's APIs; `named` is the object with the function's name, if `value` has one."""
    if value is None or isinstance(value, Choice):
        return value
    if isinstance(value, str) and value in ("auto", "none", "required"):
        return Choice(value)
    name = named.get("name") if isinstance(named, Mapping) else None
    if isinstance(value, Mapping) and value.get("type") == "function" and isinstance(name, str) and name:
        return Choice("required", name)
    raise PydanticCustomError(
        "literal_error", 'it must be "auto", "none", "required" or {shape}; others are not supported', {"shape": shape}
    )


def _chat_choice(value: Any) -> Choice | None:
    named = value.get("function") if isinstance(value, Mapping) else None
    return _choice(value, named=named, shape='{"type": "function", "function": {"name": ...}}')


def _responses_choice(value: Any) -> Choice | None:
    return _choice(value, named=value, shape='{"type": "function", "name": ...}')


def _messages_choice(value: Any) -> Choice | None:
    if value is None or isinstance(value, Choice):
        return value
    fields = value if isinstance(value, Mapping) else {}
    mode = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}.get(str(fields.get("type")))
    name = fields.get("name") if fields.get("type") == "tool" else ""
    alone = fields.get("disable_parallel_tool_use")
    nameless = not isinstance(name, str) or (fields.get("type") == "tool" and not name)
    if mode is None or nameless or not isinstance(alone, bool | None):
        raise PydanticCustomError(
            "literal_error",
            'it must be {"type": "auto"}, {"type": "any"}, {"type": "none"} or {"type": "tool", "name": ...}, with '
            "disable_parallel_tool_use true or false; others are not supported",
        )
    return Choice(mode, str(name), parallel=not alone)


class _OpenAITools(ToolFields):
    parallel_tool_calls: bool | None = None

    @property
    def choice(self) -> Choice:
        return super().choice._replace(parallel=self.parallel_tool_calls is not False)


class ChatTools(_OpenAITools):
    """Of `/v1/chat/completions`."""

    tools: list[_ChatTool] | None = None
    tool_choice: Annotated[Any, AfterValidator(_chat_choice)] = None


class ResponsesTools(_OpenAITools):
    """Of `/v1/responses`."""

    tools: list[_FlatTool] | None = None
    tool_choice: Annotated[Any, AfterValidator(_responses_choice)] = None


class MessagesTools(ToolFields):
    """Of `/v1/messages`."""

    tools: list[_ClientTool] | None = None
    tool_choice: Annotated[Any, AfterValidator(_messages_choice)] = None
