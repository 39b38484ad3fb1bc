"""The limits of the server, API keys, the operator's headers, and reading a body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import zlib
from dataclasses import dataclass
from typing import Literal

from fastapi import Request

from redflag.api.api_errors import ApiError, invalid
from redflag.server.exchange import TIMEOUTS, timeout_at
from redflag.server.keys import Key, Keys

KEY_HEADER = "x-api-key"  # of Anthropic's clients and LiteLLM's guardrails
OPERATOR_HEADER = "x-redflag-operator"
TRACE_HEADER = "x-redflag-trace"
OVERRIDE_HEADER = "x-redflag-override"
TEST_HEADER = "x-redflag-test"

_DISCARDED = 64 << 20  # bytes of an oversized body that are read and dropped, so that its sender reads the error
_LONGEST_REASON = 1000
_TESTS = {"halt": 3, "halt-at-once": 0}  # tokens before the simulated alarm


@dataclass(frozen=True)
class Limits:
    """What the server allows; fields without a line here are options of `redflag serve`, described there.

    Attributes:
        name: The model's name for clients.
        api_keys: Clients must send one of these, or one of `keys`; without either no key is needed.
        keys: Keys with policies of their own.
        operator_key: Identifies the operator's requests; None: there is no operator.
        allow_origins: Origins of web pages that may send requests; `*` for all.
        tool_format: One of `redflag.tool_prompt.FORMATS`; `auto` reads the chat template, `off` refuses tools.
    """

    name: str
    api_keys: tuple[str, ...] = ()
    keys: Keys | None = None
    operator_key: str | None = None
    max_body_bytes: int = 4 << 20
    max_tokens: int = 4096
    over_limit: Literal["clip", "refuse"] = "clip"
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    allow_origins: tuple[str, ...] = ()
    moderations: Literal["operator", "all"] = "operator"
    default_tokens: int = 1024
    max_open: int = 1024
    prefill: bool = False
    max_choices: int = 4
    logprobs: bool = False
    closing_text: str = ""
    test_halt: bool = False
    halts_allowed: int | None = None
    halts_forgotten: float = 3600.0
    tool_format: Literal["auto", "hermes", "llama", "mistral", "harmony", "json", "off"] = "auto"
    body_timeout: float = 30.0
    request_timeout: float = 600.0
    send_timeout: float = 60.0
    ping: float = 15.0


@dataclass(frozen=True)
class Caller:
    """What a request's headers entitle it to.

    Attributes:
        view: The operator wants the trace.
        override: Reason for overriding the watch, if the operator does.
        alarm_at: Index of the token with a simulated alarm, if the operator tests the halt.
        key: Its key, if that has a policy of its own.
        client: A digest of the client's key; "" without one.
    """

    operator: bool = False
    view: bool = False
    override: str | None = None
    alarm_at: int | None = None
    key: Key | None = None
    client: str = ""


def admit(request: Request, limits: Limits, *, audited: bool = False) -> Caller:
    """Checks the keys of a request. Overrides need an audit log (`audited`).

    Raises:
        ApiError: 401 without a valid key, 403 for what is the operator's alone.
    """
    sent = client_keys(request)
    # All are compared, so that the time taken tells nothing.
    known = any([same(one, key) for one in sent for key in limits.api_keys])
    key = limits.keys.find(sent) if limits.keys is not None else None
    if (limits.api_keys or limits.keys is not None) and not known and key is None:
        raise ApiError(
            401,
            "the API key is missing or unknown; send `Authorization: Bearer KEY`",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    operator = is_operator(request, limits)
    view = request.headers.get(TRACE_HEADER) == "1"
    reason = request.headers.get(OVERRIDE_HEADER)
    test = request.headers.get(TEST_HEADER)
    if not operator and (view or reason is not None or test is not None):
        what = "sees traces" if view else "overrides the watch" if reason is not None else "tests the halt"
        raise ApiError(403, f"only the operator {what}: send the operator key", "operator_key_required")
    client = hashlib.sha256("\0".join(sent).encode()).hexdigest() if any(sent) else ""
    alarm_at = None if test is None else _alarm_at(test, reason, limits)
    if reason is not None:
        reason = reason.strip()[:_LONGEST_REASON]
        if not reason:
            raise ApiError(400, "the override must give a reason, for its log", "override_reason_missing")
        if not audited:
            raise ApiError(403, "an override needs the audit log, which is off on this server", "audit_log_required")
    return Caller(operator, view, reason, alarm_at, key, client)


def check_model(name: str, limits: Limits) -> None:
    """Refuses another model's name.

    Raises:
        ApiError: 404.
    """
    if name != limits.name:
        text = f"there is no model {name[:100]!r} here; this server has {limits.name!r}"
        raise ApiError(404, text, "model_not_found", param="model")


def _alarm_at(test: str, reason: str | None, limits: Limits) -> int:
    if not limits.test_halt:
        text = f"{TEST_HEADER} must be left out: this server was started without test_halt"
        raise ApiError(403, text, "test_halt_off")
    if test not in _TESTS or reason is not None:
        text = f"{TEST_HEADER} must be one of {', '.join(_TESTS)}, without {OVERRIDE_HEADER} (got {test[:40]!r})"
        raise invalid(text, None)
    return _TESTS[test]


def bearer(request: Request) -> str:
    """The bearer token, or "". The case of the scheme does not matter (RFC 9110, 11.1)."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def is_operator(request: Request, limits: Limits) -> bool:
    """Whether the request has the operator's key in its header.

    Raises:
        ApiError: 403; the header has another key.
    """
    sent = request.headers.get(OPERATOR_HEADER)
    if sent is None:
        return False
    if limits.operator_key is None or not same(sent, limits.operator_key):
        raise ApiError(403, "the operator key is not the one of this server", "invalid_operator_key")
    return True


def shows_operator_key(request: Request, limits: Limits) -> bool:
    """As `is_operator`, or with the operator's key in place of a client's: scrapers can send no other header."""
    key = limits.operator_key
    return is_operator(request, limits) or (key is not None and any([same(one, key) for one in client_keys(request)]))


def client_keys(request: Request) -> tuple[str, str]:
    """The keys in both headers that clients use; "" for none."""
    return bearer(request), request.headers.get(KEY_HEADER, "")


def same(sent: str, key: str) -> bool:
    """Compares keys in constant time."""
    return hmac.compare_digest(sent.encode(), key.encode())


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, unpacked if it is gzipped.

    Raises:
        ApiError: 413 if it is too long (packed or unpacked), 408 if it is late, 415 for another encoding.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        text = f"the content encoding must be gzip or none (got {encoding[:40]!r})"
        raise ApiError(415, text, "unsupported_content_encoding")
    body = bytearray()
    length = 0
    try:
        async with timeout_at(asyncio.get_running_loop().time() + limits.body_timeout):
            async for piece in request.stream():
                length += len(piece)
                if length <= limits.max_body_bytes:
                    body += piece
                elif length > limits.max_body_bytes + _DISCARDED:
                    break
    except TIMEOUTS:
        text = f"the body did not arrive within {limits.body_timeout:g} s; send it at once"
        raise ApiError(408, text, "request_timeout", headers={"connection": "close"}) from None
    if length > limits.max_body_bytes:
        raise _too_long(limits)
    return bytes(body) if encoding == "identity" else _unpacked(bytes(body), limits)


def _unpacked(body: bytes, limits: Limits) -> bytes:
    """Unpacks at most `max_body_bytes`, since a kilobyte can unpack to a gigabyte."""
    packed = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        unpacked = packed.decompress(body, limits.max_body_bytes + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body must be gzip, as its content encoding says ({error})", "invalid_gzip") from None
    if len(unpacked) > limits.max_body_bytes:
        raise _too_long(limits)
    if not packed.eof or packed.unused_data:
        raise ApiError(400, "the body must be one whole gzip stream, as its content encoding says", "invalid_gzip")
    return unpacked


def _too_long(limits: Limits) -> ApiError:
    text = f"the body is longer than the {limits.max_body_bytes} bytes that this server reads; shorten it"
    return ApiError(413, text, "request_too_large", headers={"connection": "close"})
