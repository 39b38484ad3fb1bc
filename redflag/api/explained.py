"""pydantic's errors -> `ApiError`."""

from __future__ import annotations

from pydantic import ValidationError

from redflag.api.api_errors import ApiError, invalid

_VALUES = ("literal_error", "string_too_short", "string_too_long", "too_long", "too_short", "finite_number")
_CODES = {
    **dict.fromkeys((*_VALUES, "greater_than", "greater_than_equal", "less_than", "less_than_equal"), "invalid_value"),
    "missing": "missing_required_parameter",
    "unsupported_turn": "unsupported_parameter",
    "extra_forbidden": "unsupported_parameter",
}


def explained(error: ValidationError) -> ApiError:
    """The first error, as a 400 that names the field."""
    # Without the values, which may be megabytes.
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a union, the branch that got furthest says best what is wrong.
    same_field = len({item["loc"][:1] for item in errors}) == 1
    first = max(errors, key=lambda item: len(item["loc"])) if same_field else errors[0]
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON in UTF-8 ({first['msg']}); fix it", "invalid_json")
    if kind in ("max_completion_tokens", "prompt", "top_logprobs"):
        return invalid(first["msg"], kind)
    # The path also has the names of union branches, which are not fields.
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
