"""What a chat request says of tools: which there are, and whether one has to be called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from redflag.api.api_errors import ApiError
from redflag.api.tool_calls import CallReader
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.tool_definitions import checked_tools
from redflag.tool_prompt import MARK, ToolUse, find_format, mark_ids

_OPEN = ConfigDict(extra="allow", strict=True)


class Choice(NamedTuple):
    """`mode` is `auto`, `none` or `required`; `name` the function that has to be called, "" for any of them."""

    mode: str
    name: str = ""


def _as_choice(value: Any) -> Choice | None:
    if value is None or isinstance(value, Choice):
        return value
    if isinstance(value, str) and value in ("auto", "none", "required"):
        return Choice(value)
    if isinstance(value, Mapping) and value.get("type") == "function":
        function = value.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name:
            return Choice("required", name)
    raise PydanticCustomError(
        "literal_error",  # as pydantic names a value that is not among those allowed
        'it must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}; others are not '
        "supported",
    )


class _Function(BaseModel):
    model_config = _OPEN
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(BaseModel):
    model_config = _OPEN
    type: Literal["function"]
    function: _Function


class ToolFields(BaseModel):
    """The fields of a chat request."""

    tools: list[_Tool] | None = None
    tool_choice: Annotated[Any, AfterValidator(_as_choice)] = None
    parallel_tool_calls: bool | None = None

    @property
    def has_tool_turns(self) -> bool:
        """Whether earlier turns call tools or hold results."""
        return any(message.role == "tool" or message.tool_calls for message in getattr(self, "messages", ()))

    def unused(self) -> Iterator[str]:
        """Keys of tools that mean nothing here. Arguments are not held to a schema, strict or not."""
        for tool in self.tools or ():
            yield from (f"tools.{name}" for name in tool.model_extra or {})
            yield from (f"tools.function.{name}" for name in tool.function.model_extra or {})
            if tool.function.strict:
                yield "tools.function.strict"


class ToolSupport:
    """How the model of this server calls tools."""

    def __init__(self, guard: Guard, asked: str) -> None:
        """Looks at the chat template.

        Args:
            guard: The guarded model.
            asked: As `Limits.tool_format`.

        Raises:
            RedflagError: The template does not show tools, and the format asked for needs that.
        """
        self._format = None if asked == "off" else find_format(guard.tokenizer, guard.spec, asked)
        self._flags = tuple(flag.token for flag in guard.spec.flags)
        marks = mark_ids(guard.tokenizer, self._format).values() if self._format is not None else ()
        # Where the first token decides, a call that is begun in the prompt would be past the decision.
        policy, monitor = guard.policy, guard.thresholds.monitor
        self._may_force = policy.first_token is None and monitor.aggregation != "first"
        self._marks = frozenset(mark.removeprefix(MARK) for mark in marks)

    def use(self, body: object) -> ToolUse | None:
        """What the response to a request may call; None where nothing of the request has to do with tools.

        Raises:
            ApiError: 400; a definition is malformed, or the choice does not fit, or there are no tools here.
        """
        if not isinstance(body, ToolFields):
            return None
        choice = body.tool_choice or Choice("auto")
        if self._format is None:
            if body.tools and choice.mode != "none":
                raise ApiError(
                    400, "tools are switched off on this server; leave them out", "unsupported_parameter", param="tools"
                )
            return None
        try:
            tools = checked_tools([tool.model_dump(exclude_none=True) for tool in body.tools or ()])
        except RedflagError as error:
            raise ApiError(400, str(error), "invalid_value", param="tools") from error
        names = [tool["function"]["name"] for tool in tools]
        if choice.mode == "required" and (not tools or choice.name not in ("", *names)):
            wanted = repr(choice.name[:100]) if choice.name else "a call"
            raise ApiError(400, f"tool_choice wants {wanted}, and tools has none", "invalid_value", param="tool_choice")
        if choice.mode == "required" and not self._may_force:
            why = "tool_choice must be auto or none here: the first token decides whether an answer is halted"
            raise ApiError(400, why, "unsupported_parameter", param="tool_choice")
        if choice.mode == "none":
            tools = []
        if not tools and not body.has_tool_turns:
            return None
        forced = (choice.name or (names[0] if len(names) == 1 else "")) if choice.mode == "required" else None
        return ToolUse(self._format, tuple(tools), forced)

    def reader(self, use: ToolUse | None, body: object) -> CallReader | None:
        """What tells calls and content apart in a response with this `use`; None where nothing may be called."""
        if use is None or not use.definitions or not isinstance(body, ToolFields):
            return None
        return CallReader(use, self._marks, flags=self._flags, parallel=body.parallel_tool_calls is not False)
