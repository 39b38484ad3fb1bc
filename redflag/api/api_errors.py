"""Errors in OpenAI's shape: what a request is refused with, and what a response that breaks ends with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
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


class ApiError(Exception):
    """A refusal, in the words of the API.

    Attributes:
        status: The HTTP status.
        code: What is wrong, for programs.
        param: The request's field, as a path such as `messages.0.role`.
        headers: Headers of the answer.

    Example:
        >>> ApiError(404, "there is no model 'x'", "model_not_found", param="model").body()["error"]["type"]
        'invalid_request_error'
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def in_anthropics_shape(body: dict[str, Any]) -> dict[str, Any]:
    """An error's body for a client of `/v1/messages`, which knows other types and no code."""
    error = body["error"]
    kind = _ANTHROPICS.get(error["code"], _ANTHROPICS.get(error["type"], error["type"]))
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}


def error_response(
    error: ApiError, path: str, headers: Mapping[str, str] | None = None, detail: Mapping[str, Any] | None = None
) -> Response:
    """The error as an answer to a request for `path`; `detail` stands beside it in the body."""
    said = in_anthropics_shape(error.body()) if path.startswith("/v1/messages") else error.body()
    # In ASCII: what went wrong may hold half a surrogate pair.
    body = json.dumps({**said, **(detail or {})})
    return Response(body, error.status, {**(headers or {}), **error.headers}, "application/json")


def busy(message: str) -> ApiError:
    """Too many requests."""
    return ApiError(429, message, "engine_busy", headers={"Retry-After": "1"})


def unavailable(shown: bool = False) -> ApiError:
    """The engine failed."""
    return ApiError(
        503,
        f"the engine failed {_WHEN[shown]}; try again",
        "engine_unavailable",
        headers={"Retry-After": "1"},
    )


def late(shown: bool = False) -> ApiError:
    """The response took too long."""
    return ApiError(504, f"the time that a response has was over {_WHEN[shown]}; try again", "response_timeout")


def stopping(shown: bool = False) -> ApiError:
    """The server goes down."""
    return ApiError(
        503, f"the server is shutting down {_WHEN[shown]}; try again", "shutting_down", headers={"Retry-After": "1"}
    )


_WHEN = {
    False: "before anything could be shown, and what cannot be judged is not shown",
    True: "in the middle of the response; what was sent had been judged, and the rest is not shown",
}


def refused_by_engine(error: RedflagError, param: str) -> ApiError:
    """The engine did not begin: it is full, cannot continue this prompt, or an upstream refuses this server itself.

    Args:
        error: What the engine raised.
        param: The request's field that holds the prompt.
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
    status = getattr(error, "status", 400)
    return ApiError(400, str(error), "invalid_value") if status in (400, 413, 422) else unavailable()


def add_handlers(app: FastAPI) -> None:
    """Lets an application answer every error in this shape."""
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
    return error_response(ApiError(error.status_code, message, code, headers=error.headers), path)


async def _internal_error(request: Request, error: Exception) -> Response:
    # What went wrong is in the log; its text may hold what nobody outside should read.
    made = ApiError(500, "the server has a defect; its log says more", "internal_error")
    return error_response(made, request.url.path)
