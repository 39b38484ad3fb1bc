"""What is wrong with a request body, in words that name the field."""

from __future__ import annotations

from pydantic import ValidationError

from redflag.api.api_errors import ApiError

_CODES = {
    "missing": "missing_required_parameter",
    "unsupported_turn": "unsupported_parameter",
    "json_invalid": "invalid_json",
    "literal_error": "invalid_value",
    "string_too_short": "invalid_value",
    "string_too_long": "invalid_value",
    "too_long": "invalid_value",
    "too_short": "invalid_value",
    "greater_than": "invalid_value",
    "greater_than_equal": "invalid_value",
    "less_than": "invalid_value",
    "less_than_equal": "invalid_value",
    "finite_number": "invalid_value",
    "extra_forbidden": "unsupported_parameter",
}


def explained(error: ValidationError) -> ApiError:
    """The first fault as an error, 400."""
    # The values are not repeated: they may be megabytes, and are the client's own.
    found = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a union's branches the one that got furthest says what is wrong.
    first = max(found, key=lambda item: len(item["loc"])) if len({item["loc"][:1] for item in found}) == 1 else found[0]
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON in UTF-8 ({first['msg']}); fix it", "invalid_json")
    if kind in ("max_completion_tokens", "prompt", "top_logprobs"):
        return ApiError(400, first["msg"], "invalid_value", param=kind)
    # Names of union branches stand in the path too; they are no fields.
    path = [str(part) for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part == "str"))]
    param = ".".join(path) or None
    if kind == "missing":
        message = f"{param} is missing; give it"
    elif kind == "extra_forbidden":
        message = f"{param} is not supported; leave it out"
    elif path[-1:] == ["type"] and "content" in path:
        message = f"{param}: only parts of the type text are accepted; leave images, audio and files out"
    else:
        message = f"{param or 'the body'}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ApiError(400, message, _CODES.get(kind, "invalid_type"), param=param)
