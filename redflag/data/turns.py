"""The conversation in a record, turn by turn: roles, content parts, tool turns and thoughts in common formats.

A turn of a row has `role` (one of `ROLES`) and `content` (text), and if the record has them: `tool_calls` and
`reasoning_content` of the assistant, `tool_call_id` and `name` of a tool. `redflag.prompt` checks whether a chat
template can render those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from redflag.messages import ROLES

THOUGHTS = ("reasoning_content", "reasoning", "thinking")

_RENAMED = {"developer": "system", "function": "tool"}
# Roles in ShareGPT's `from`.
_SPEAKERS = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant", "chatgpt", "model")},
    **{name: "tool" for name in ("tool", "function", "function_response", "observation")},
    "system": "system",
}
# Columns that hold requests or answers in public sets, the likelier ones first.
_REQUESTS = (
    *("goal", "forbidden_prompt", "user_input", "instruction", "question", "query", "request", "behavior"),
    *("vanilla", "input", "text"),
)
_ANSWERS = ("model_output", "output", "answer", "completion", "generation", "model_response", "assistant")


def conversation(cells: Mapping[str, Any], keep_unanswered: bool) -> list[dict[str, Any]]:
    """The turns, the response last: from `messages`, `messages` + `response` or `prompt` + `response`.

    Raises:
        ValueError: There is no conversation, or (without `keep_unanswered`) no response in it; with the reason.
    """
    turns, response = cells.get("messages"), cells.get("response")
    if turns is None:
        turns = cells.get("prompt")
        if turns is None:
            raise ValueError(f"a row must have messages or a prompt{_suggestion(cells)}")
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        if response is None and not keep_unanswered:
            hint = _suggestion(cells) or "; requests alone are for `redflag score --prompts true`"
            raise ValueError(f"a prompt without response: there is nothing to judge{hint}")
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"messages must be a list (got {kind(turns)})")
    messages = [_turn(number, turn) for number, turn in enumerate(turns)]
    if response is not None:
        if messages and messages[-1]["role"] == "assistant":
            raise ValueError(
                "messages must not end with an assistant turn if there is a response too. Which one is the answer?"
            )
        messages.append(_turn(len(messages), {"role": "assistant", "content": response}))
    if not messages:
        raise ValueError("messages must not be empty")
    answered = messages[-1]["role"] == "assistant"
    if not answered and not keep_unanswered:
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError("no assistant turn: there is nothing to judge")
        raise ValueError(f"the last turn is the {messages[-1]['role']}'s: it must be the assistant's, which is judged")
    if answered and not keep_unanswered and not messages[-1]["content"].strip():
        if "tool_calls" in messages[-1]:
            raise ValueError("the response is a tool call without text: there is nothing to judge")
        raise ValueError("the response is empty")
    if all(message["role"] != "user" or not message["content"].strip() for message in messages):
        raise ValueError("no user turn with text: the response answers nothing")
    return messages


def kind(value: Any) -> str:
    """A value in the terms of JSON, for error texts."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    return json.dumps(value) if isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


def _turn(number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} must be an object (got {kind(turn)})")
    role, content = turn.get("role"), turn.get("content")
    if role is None and "from" in turn:
        speaker, content = turn["from"], turn.get("value")
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(f"message {number} must be from one of {', '.join(_SPEAKERS)} (got {speaker!r})")
    elif isinstance(role, str):
        role = _RENAMED.get(role, role)
    if role not in ROLES:
        raise ValueError(f"the role of message {number} must be one of {', '.join(ROLES)} (got {role!r})")
    where = f"message {number} ({role})"
    calls = turn.get("tool_calls") if role == "assistant" else None
    if isinstance(content, (list, tuple)):
        content = _joined(where, content)
    elif content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"the content of {where} must be text (got {kind(content)})")
    _check_text(where, content)
    message = {"role": role, "content": content}
    if len(turn) > 2:
        message.update(_extras(where, role, turn))
    return message


def _joined(where: str, parts: list[Any] | tuple[Any, ...]) -> str:
    """Text parts as lines, as `redflag serve` reads them."""
    texts = []
    for number, part in enumerate(parts):
        what = part.get("type") if isinstance(part, Mapping) else None
        if what not in ("text", "input_text", "output_text"):
            description = f"of the type {what!r}" if what is not None else f"{kind(part)} without a type"
            raise ValueError(
                f"the content of {where} must be text or text parts (part {number} is {description}). Only text can be "
                "judged"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"the content of {where} must be text or text parts (no text in part {number})")
        texts.append(part["text"])
    return "\n".join(texts)


def _extras(where: str, role: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn's keys besides its text; empty values, which Parquet adds to every turn, are left out."""
    extras: dict[str, Any] = {}
    if role == "assistant":
        if calls := turn.get("tool_calls"):
            if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
                raise ValueError(f"tool_calls of {where} must be a list of objects")
            try:
                _check_text(f"{where}: tool_calls", json.dumps(calls, ensure_ascii=False))
            except TypeError as error:
                raise ValueError(f"tool_calls of {where} must be JSON ({error})") from None
            extras["tool_calls"] = list(calls)
        texts = {"reasoning_content": next((turn[key] for key in THOUGHTS if turn.get(key)), None)}
    else:
        texts = {key: turn.get(key) for key in ("tool_call_id", "name") if role == "tool"}
    for key, value in texts.items():
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise ValueError(f"{key} of {where} must be text (got {kind(value)})")
        _check_text(f"{where}: {key}", value)
        extras[key] = value
    return extras


def _check_text(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a character (a lone surrogate at {error.start})") from None


def _suggestion(cells: Mapping[str, Any]) -> str:
    """Suggests how to map the columns in which a record of another format probably holds its conversation."""
    names = {str(name).lower(): str(name) for name in cells}
    columns: dict[str, str] = {}
    for ours, likely in (("prompt", _REQUESTS), ("response", _ANSWERS)):
        column = next((names[name] for name in likely if name in names), None)
        if column is not None and cells.get(ours) is None:
            columns[ours] = column
    if columns:
        return f". If these columns hold it, add --columns '{json.dumps(columns)}'"
    for name, value in cells.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            return f". Its {name!r} is a list of objects: if those are the rows, write them as a JSON array"
    return ""
