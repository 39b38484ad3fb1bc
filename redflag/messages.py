"""A conversation before rendering: validating its messages, and locating the untrusted texts in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redflag.errors import RedflagError

# `role`, `content`, and optionally `reasoning_content`, `tool_calls`, `tool_call_id` and `name`, as in
# OpenAI's chat format; a tool call is {"function": {"name": ..., "arguments": JSON text or an object}}.
Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of the messages with the keys that are rendered; arguments in JSON text become objects.

    Raises:
        RedflagError: They are empty, or one of them is malformed.
    """
    if not messages:
        raise RedflagError("the conversation must have at least one user message (got none).")
    return [_checked(number, message) for number, message in enumerate(messages)]


def _checked(number: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise RedflagError(f"message {number} must have text content: {{'role': ..., 'content': 'text'}}.")
    role = message.get("role")
    if role not in ROLES:
        raise RedflagError(f"the role of message {number} must be one of {', '.join(ROLES)} (got {role!r}).")
    copy = {"role": role, "content": message["content"]}
    for key in ("reasoning_content", "name", "tool_call_id"):
        if message.get(key) is not None:
            if not isinstance(message[key], str):
                raise RedflagError(f"{key} of message {number} must be text (got {message[key]!r})")
            copy[key] = message[key]
    if message.get("tool_calls"):
        if role != "assistant":
            raise RedflagError(f"message {number} must not have tool_calls. Only an assistant turn can have them.")
        copy["tool_calls"] = _checked_calls(number, message["tool_calls"])

    def check(kind: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RedflagError(
                f"message {number} must not hold half of a surrogate pair, which no tokenizer reads. Fix the program "
                "that decoded the text."
            ) from None
        return text

    return fill(copy, check)


def _checked_calls(number: int, calls: Any) -> list[dict[str, Any]]:
    copies = []
    for call in calls if isinstance(calls, list | tuple) else [None]:
        call = call if isinstance(call, Mapping) else {}
        function = call.get("function")
        name, arguments = (
            (function.get(key) for key in ("name", "arguments")) if isinstance(function, Mapping) else ("", "")
        )
        identity = call.get("id")
        if not (name and isinstance(name, str) and isinstance(arguments, str | Mapping)) or not isinstance(
            identity, str | None
        ):
            raise RedflagError(
                f"tool_calls of message {number} must be a list of {{'function': {{'name': 'text', 'arguments': "
                f"JSON}}}} (got {calls!r})"
            )
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        checked_call = {} if identity is None else {"id": identity}
        copies.append({**checked_call, "type": "function", "function": {"name": name, "arguments": arguments}})
    return copies


def fill(message: Message, replace: Callable[[str, str], str]) -> dict[str, Any]:
    """A copy of a checked message with each untrusted string replaced, always in the same order.

    `replace` takes the string's kind and the string. Kinds are `content`, `reasoning`, `argument` (a string among the
    arguments of a tool call), `function`, `key` (of an argument), `name` and `id`.
    """
    copy = dict(message)
    for key, kind in (
        ("content", "content"),
        ("reasoning_content", "reasoning"),
        ("name", "name"),
        ("tool_call_id", "id"),
    ):
        if key in copy:
            copy[key] = replace(kind, copy[key])
    if "tool_calls" in copy:
        copy["tool_calls"] = [_fill_call(call, replace) for call in copy["tool_calls"]]
    return copy


def _fill_call(call: Message, replace: Callable[[str, str], str]) -> dict[str, Any]:
    copy = dict(call)
    if "id" in copy:
        copy["id"] = replace("id", copy["id"])
    function = copy["function"]
    name = replace("function", function["name"])
    return {**copy, "function": {"name": name, "arguments": _fill_value(function["arguments"], replace)}}


def _fill_value(value: Any, replace: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        return replace("argument", value)
    if isinstance(value, Mapping):
        return {replace("key", str(key)): _fill_value(item, replace) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_fill_value(item, replace) for item in value]
    return value
