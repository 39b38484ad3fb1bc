"""Errors in OpenAI's shape, and in Anthropic's for `/v1/messages`; what they say of a body that pydantic refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from redflag.backends import BusyError, ContextLengthError
from redflag.errors import RedflagError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Code, or OpenAI's type -> Anthropic's type, where it has another name.
_ANTHROPICS = {
    "model_not_found": "not_found_error",
    "not_found": "not_found_error",
    "request_too_large": "request_too_large",
    "response_timeout": "timeout_error",
    "server_error": "api_error",
}
_WITHOUT_V1 = ("/chat/completions", "/completions", "/models", "/responses", "/moderations")
_RETRY = {"Retry-After": "1"}
_VALUES = ("literal_error", "string_too_short", "string_too_long", "too_long", "too_short", "finite_number")
_CODES = {
    **dict.fromkeys((*_VALUES, "greater_than", "greater_than_equal", "less_than", "less_than_equal"), "invalid_value"),
    "missing": "missing_required_parameter",
    "unsupported_turn": "unsupported_parameter",
    "extra_forbidden": "unsupported_parameter",
}


class ApiError(Exception):
    """A request is refused, or its response has failed.

    Attributes:
        code: What is wrong, for programs.
        param: The request's field, as a path such as `messages.0.role`.

    Example:
        >>> ApiError(404, "there is no model 'x'", "model_not_found", param="model").body()["error"]["type"]
        'invalid_request_error'
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def in_anthropics_shape(body: dict[str, Any]) -> dict[str, Any]:
    """An error's body for a client of `/v1/messages`, which has other types and no code."""
    error = body["error"]
    kind = _ANTHROPICS.get(error["code"], _ANTHROPICS.get(error["type"], error["type"]))
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}


def error_response(
    error: ApiError, path: str, headers: Mapping[str, str] | None = None, detail: Mapping[str, Any] | None = None
) -> Response:
    """The response to a request for `path`; `detail` is added to its body."""
    body = in_anthropics_shape(error.body()) if path.startswith("/v1/messages") else error.body()
    # In ASCII, since a message may hold half a surrogate pair.
    content = json.dumps({**body, **(detail or {})})
    return Response(content, error.status, {**(headers or {}), **error.headers}, "application/json")


def short(value: Any) -> str:
    """A value that a client sent, as part of a message."""
    text = repr(value)
    return text if len(text) < 80 else text[:76] + " ..."


def invalid(message: str, param: str | None) -> ApiError:
    return ApiError(400, message, "invalid_value", param=param)


def unsupported(message: str, param: str) -> ApiError:
    return ApiError(400, message, "unsupported_parameter", param=param)


def busy(message: str) -> ApiError:
    return ApiError(429, message, "engine_busy", headers=_RETRY)


def unavailable(shown: bool = False) -> ApiError:
    return ApiError(503, f"the engine failed {_WHEN[shown]}; try again", "engine_unavailable", headers=_RETRY)


def late(shown: bool = False) -> ApiError:
    return ApiError(504, f"the time that a response has was over {_WHEN[shown]}; try again", "response_timeout")


def stopping(shown: bool = False) -> ApiError:
    return ApiError(503, f"the server is shutting down {_WHEN[shown]}; try again", "shutting_down", headers=_RETRY)


_WHEN = {
    False: "before anything could be shown, and what cannot be judged is not shown",
    True: "in the middle of the response; what was sent had been judged, and the rest is not shown",
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


def refused_by_engine(error: RedflagError, param: str) -> ApiError:
    """What a client is told if the engine did not begin the response.

    It is busy, the prompt is too long or refused, or an upstream refuses this server. `param` is the prompt's field.
    """
    if isinstance(error, BusyError):
        return busy(str(error))
    if isinstance(error, ContextLengthError):
        # Clients look for the code (inspect), the first sentence (LiteLLM) or "prompt is too long" (LangChain).
        return ApiError(
            400,
            f"This model's maximum context length is {error.context_length} tokens. However, your {param} resulted in "
            f"{error.prompt_tokens} tokens: the prompt is too long and leaves no room for a response; shorten it.",
            "context_length_exceeded",
            param=param,
        )
    return invalid(str(error), None) if getattr(error, "status", 400) in (400, 413, 422) else unavailable()


def add_handlers(app: FastAPI) -> None:
    """Makes an application report every error in these shapes."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(Exception, _internal_error)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path.rstrip("/")
    message, code = str(error.detail), "http_error"
    if error.status_code == 404:
        message, code = f"there is no {path[:200]!r} here", "not_found"
        message += "; the base URL ends in /v1" if path in _WITHOUT_V1 else ""
    elif error.status_code == 405:
        message, code = f"{request.method} is not supported here", "method_not_allowed"
    return error_response(ApiError(error.status_code, message, code, headers=dict(error.headers or {})), path)


async def _internal_error(request: Request, error: Exception) -> Response:
    # The error's text may quote a request: it goes to the log alone.
    defect = ApiError(500, "the server has a defect; its log says more", "internal_error")
    return error_response(defect, request.url.path)
