"""Definitions of tools before rendering: validating them, and locating the untrusted texts in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redflag.errors import RedflagError

# As in OpenAI's chat format: {"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON
# schema}}.
Tool = Mapping[str, Any]
MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

# Types and keywords of JSON schemas by which templates decide what to write; they are never replaced.
_TYPES = frozenset(("array", "boolean", "function", "integer", "null", "number", "object", "string"))
_KEYWORDS = frozenset((
    "$defs", "additionalProperties", "allOf", "anyOf", "const", "default", "definitions", "description", "enum",
    "format", "items", "name", "nullable", "oneOf", "parameters", "properties", "required", "title", "type",
))  # fmt: skip
# Keywords whose object has the author's names as keys.
_NAMING = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependentRequired")
)


def checked_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """A copy of the definitions with the keys that are rendered: name, description and parameters.

    Raises:
        RedflagError: One of them is malformed, two have the same name, or there are too many.
    """
    if len(tools) > MOST_TOOLS:
        raise RedflagError(f"tools must be at most {MOST_TOOLS} (got {len(tools)})")
    copies = [_checked(number, tool) for number, tool in enumerate(tools)]
    names = [copy["function"]["name"] for copy in copies]
    for name in names:
        if names.count(name) > 1:
            raise RedflagError(f"the names of tools must differ (got {name!r} twice)")
    return copies


def _checked(number: int, tool: Tool) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise RedflagError(f"tool {number} must be {{'type': 'function', 'function': {{'name': 'text', ...}}}}")
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RedflagError(
            f"the name of tool {number} must be 1 to 128 letters, digits or any of _ . : / - (got {name!r})"
        )
    if not isinstance(description, str | None):
        raise RedflagError(f"the description of tool {name} must be text (got {description!r})")
    if not isinstance(parameters, Mapping | None):
        raise RedflagError(f"the parameters of tool {name} must be a JSON schema, an object (got {parameters!r})")
    copy = {
        "name": name,
        "description": description or "",
        "parameters": dict(parameters) if parameters else {"type": "object", "properties": {}},
    }
    try:
        json.dumps(copy, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RedflagError(f"the definition of tool {name} must be JSON ({error})") from None
    return {"type": "function", "function": copy}


def fill_tools(tools: Sequence[Tool], replace: Callable[[str, str], str]) -> list[dict[str, Any]]:
    """A copy of checked definitions with each untrusted string replaced, always in the same order.

    `replace` takes the string's kind and the string. Kinds are `function` (a tool's name), `key` (a parameter's name)
    and `definition` (any other string).
    """
    filled = []
    for tool in tools:
        function = dict(tool["function"])
        name = replace("function", function.pop("name"))
        filled.append({**tool, "function": {"name": name, **_fill(function, replace)}})
    return filled


def _fill(value: Any, replace: Callable[[str, str], str], named: bool = False) -> Any:
    """With `named`, the keys are the author's names, not keywords of JSON schema."""
    if isinstance(value, str):
        return value if value in _TYPES else replace("definition", value)
    if isinstance(value, Mapping):
        copy = {}
        for key, item in value.items():
            word = not named and key in _KEYWORDS
            copy[key if word else replace("key", str(key))] = _fill(item, replace, word and key in _NAMING)
        return copy
    if isinstance(value, Sequence):
        return [_fill(item, replace) for item in value]
    return value
