"""The JSON schema of a request, from OpenAI's, Anthropic's and vLLM's fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from redflag.api.api_errors import ApiError, invalid, short, unsupported

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def json_schema(
    response_format: Any, structured_outputs: Any = None, guided_json: Any = None, *, flat: tuple[str, Any] = ("", None)
) -> tuple[str, Mapping[str, Any]] | None:
    """The field that asks for JSON, and its schema.

    Args:
        response_format: `{"type": "text" | "json_object" | "json_schema", ...}`.
        structured_outputs: vLLM's `{"json": schema}`; its other kinds are not supported.
        guided_json: A schema, in older versions of vLLM.
        flat: Name and value of another API's field for `response_format`, which holds the schema directly.

    Raises:
        ApiError: 400; a field is malformed or not supported, or two fields ask for JSON.

    Example:
        >>> json_schema({"type": "json_object"})
        ('response_format', {'type': 'object'})
    """
    wanted = [
        (name, schema)
        for name, schema in (
            ("response_format", _of_format(response_format, "response_format")),
            (flat[0], _of_format(flat[1], flat[0], flat=True)),
            ("structured_outputs", _of_outputs(structured_outputs)),
            ("guided_json", None if guided_json is None else _schema(guided_json, "guided_json")),
        )
        if schema is not None
    ]
    if len(wanted) > 1:
        name = wanted[1][0]
        raise invalid(f"{name} and {wanted[0][0]} must not be given together. Give one of them.", name)
    return wanted[0] if wanted else None


def _of_format(value: Any, name: str, *, flat: bool = False) -> Mapping[str, Any] | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else value
    if kind == "text":
        return None
    if kind == "json_object":  # llama.cpp and others take a schema beside it
        schema = value.get("schema") if isinstance(value, dict) else None
        return _ANY_OBJECT if schema is None else _schema(schema, f"{name}.schema")
    if kind != "json_schema":
        text = f"{name}.type must be text, json_object or json_schema (got {short(kind)})."
        raise invalid(text, f"{name}.type")
    if not flat:
        name = f"{name}.json_schema"
        value = value.get("json_schema") if isinstance(value, dict) else None
    if not isinstance(value, dict):
        raise ApiError(400, f"{name} must be an object.", "invalid_type", param=name)
    schema = value.get("schema")
    return _ANY_OBJECT if schema is None else _schema(schema, f"{name}.schema")


def _of_outputs(value: Any) -> Mapping[str, Any] | None:
    if value is None:
        return None
    kinds = {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else {}
    if kinds == {"json_object": True}:
        return _ANY_OBJECT
    if set(kinds) != {"json"}:
        text = f'structured_outputs must be {{"json": SCHEMA}} (got {short(value)}). Other kinds are not supported.'
        raise unsupported(text, "structured_outputs")
    return _schema(kinds["json"], "structured_outputs.json")


def _schema(value: Any, param: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise ApiError(400, f"{param} must be a JSON schema, as an object.", "invalid_type", param=param)
    return value
