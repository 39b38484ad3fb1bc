"""Fields of a chat request that some models refuse, and what an endpoint is asked with in their place.

OpenAI's reasoning models answer 400 to `max_tokens` (they want `max_completion_tokens`) and to any temperature but
their own; others know no log-probabilities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_NEWER = "max_completion_tokens"
# Field -> the fields that go with it.
_OPTIONAL = {"max_tokens": ("max_tokens",), "temperature": ("temperature",), "logprobs": ("logprobs", "top_logprobs")}
_ALIASES = {"top_logprobs": "logprobs"}
_LENGTH = re.compile(r"context|too (?:large|long|many)|exceed", re.IGNORECASE)


def request_fields(own: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request: the caller's own, and a user's options, which win; None leaves a field out.

    Example:
        >>> request_fields({"max_tokens": 16, "temperature": 0}, {"max_completion_tokens": 512, "temperature": None})
        {'max_completion_tokens': 512}
    """
    fields = {**own, **options}
    if options.get(_NEWER) is not None and "max_tokens" not in options:
        fields["max_tokens"] = None
    return {name: value for name, value in fields.items() if value is not None}


def without(refused: frozenset[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that an endpoint will take which has refused others.

    Example:
        >>> without(frozenset({"max_tokens", "temperature"}), {"max_tokens": 16, "temperature": 0})
        {'max_completion_tokens': 16}
    """
    kept = dict(fields)
    for name in refused:
        values = [kept.pop(field, None) for field in _OPTIONAL[name]]
        if name == "max_tokens" and values[0] is not None:
            kept.setdefault(_NEWER, values[0])
    return kept


def refused_field(status: int, content: str, fields: Mapping[str, Any]) -> str | None:
    """The field of a request because of which a server answered 400 or 422; None where it was none of those here.

    Args:
        status: HTTP status.
        content: The answer's body.
        fields: What was sent.

    Example:
        >>> refused_field(400, '{"error": {"message": "no", "param": "temperature"}}', {"temperature": 0})
        'temperature'
    """
    if status not in (400, 422):
        return None
    try:
        error = json.loads(content)
        error = error.get("error") or error
        named = error.get("param")
    except (AttributeError, ValueError, RecursionError):
        named = None
    if isinstance(named, str):
        named = named.rpartition(".")[2]
        named = _ALIASES.get(named, named)
    else:
        named = _named_in(content)
    return named if named in _OPTIONAL and any(field in fields for field in _OPTIONAL[named]) else None


def _named_in(content: str) -> str | None:
    if _NEWER in content and not _LENGTH.search(content):  # "... is too large" names both, and is about the prompt
        return "max_tokens"
    found = re.search(r"\b(max_tokens|temperature|top_logprobs|logprobs)\b", content)
    return None if found is None or _LENGTH.search(content) else _ALIASES.get(found[1], found[1])
