"""Who may ask, how much, and with what in the headers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import zlib
from dataclasses import dataclass
from typing import Literal

from fastapi import Request

from redflag.api.api_errors import ApiError
from redflag.server.exchange import timeout_at
from redflag.server.keys import Key, Keys

KEY_HEADER = "x-api-key"  # where clients of Anthropic's API, and LiteLLM's guardrails, put theirs
OPERATOR_HEADER = "x-redflag-operator"
TRACE_HEADER = "x-redflag-trace"
OVERRIDE_HEADER = "x-redflag-override"
TEST_HEADER = "x-redflag-test"

_DISCARDED = 64 << 20  # bytes of an oversized body that are read and dropped, so that its sender can read the answer
_LONGEST_REASON = 1000
_TESTS = {"halt": 3, "halt-at-once": 0}  # tokens before the alarm that is made up


@dataclass(frozen=True)
class Limits:
    """What the server allows, and whom.

    Attributes:
        name: The model's name, as clients call it.
        api_keys: Clients must show one of these; empty lets everybody in, unless there are `keys`.
        keys: ... or one of these, which have policies of their own.
        operator_key: Shows that a request is the operator's own; None: there is no operator.
        max_body_bytes: Longest request body.
        max_tokens: Most response tokens of a request.
        over_limit: What becomes of a request for more: it is clipped, or refused.
        unknown_fields: What becomes of request fields that are unknown and change no token.
        allow_origins: Web pages from there may ask; `*` lets all pages ask, no origin none.
        moderations: Who may have given texts judged: the operator, or all who may ask.
        default_tokens: Response tokens where the client asks for no number.
        max_open: Most requests being answered at once; more are refused with 429.
        prefill: Clients may write the beginning of the response, as a last message of the assistant's.
        max_choices: Most answers of one request: its prompts, times `n`.
        logprobs: Clients may have the log-probabilities of what is shown.
        closing_text: What a chat's answer ends with that was halted after some of it was shown; "" adds nothing, and
            leaves the text of one that was halted before empty, as OpenAI does.
        test_halt: The operator may ask for an answer that is halted for sure.
        halts_allowed: Halted answers after which a conversation is not served any more (`redflag.server.strikes`);
            None: any number.
        halts_forgotten: Seconds without a further halt after which they are forgotten.
        tool_format: How the model writes calls of tools, one of `redflag.tool_prompt.FORMATS`; `auto` finds out, `off`
            refuses tools.
        body_timeout: Seconds for a request body to arrive.
        request_timeout: Seconds for a response, all in all.
        send_timeout: Seconds for a client to take what is sent.
        ping: Seconds of silence after which a stream says that it lives. Until then it has no status yet: an engine
            that fails before is an error.
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
    """What the headers of a request give a right to.

    Attributes:
        operator: It is the operator's.
        view: The operator wants to see the trace.
        override: Why the watch is to be overridden; None where it is not.
        alarm_at: The token at which an alarm is made up, for a test; None for a real answer.
        key: The key with a policy of its own that it shows.
        client: A digest of the client's key; "" without one.
    """

    operator: bool = False
    view: bool = False
    override: str | None = None
    alarm_at: int | None = None
    key: Key | None = None
    client: str = ""


def admit(request: Request, limits: Limits, *, audited: bool = False) -> Caller:
    """Reads the keys of a request.

    Args:
        request: The request.
        limits: Where the keys are.
        audited: Overrides are logged; without, there are none.

    Raises:
        ApiError: 401 for a client without a key that it needs, 403 for what is the operator's.
    """
    given = client_keys(request)
    # All are compared, so that the time taken tells nothing.
    known = any([same(one, key) for one in given for key in limits.api_keys])
    key = limits.keys.find(given) if limits.keys is not None else None
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
    client = hashlib.sha256("\0".join(given).encode()).hexdigest() if any(given) else ""
    if test is not None:
        return Caller(operator, view, alarm_at=_alarm_at(test, reason, limits), key=key, client=client)
    if reason is None:
        return Caller(operator, view, key=key, client=client)
    if not reason.strip():
        raise ApiError(400, "the override gives no reason, and its log would say nothing", "override_reason_missing")
    if not audited:
        raise ApiError(403, "this server keeps no audit log, and no override goes unlogged", "audit_log_required")
    return Caller(operator, view, reason.strip()[:_LONGEST_REASON], key=key, client=client)


def check_model(name: str, limits: Limits) -> None:
    """Refuses a name that is not the model's.

    Raises:
        ApiError: 404.
    """
    if name != limits.name:
        raise ApiError(
            404,
            f"there is no model {name[:100]!r} here; this server has {limits.name!r}",
            "model_not_found",
            param="model",
        )


def _alarm_at(test: str, reason: str | None, limits: Limits) -> int:
    if not limits.test_halt:
        raise ApiError(
            403, f"{TEST_HEADER} must be left out: this server was started without test_halt", "test_halt_off"
        )
    if test not in _TESTS or reason is not None:
        raise ApiError(
            400,
            f"{TEST_HEADER} must be one of {', '.join(_TESTS)}, without {OVERRIDE_HEADER} (got {test[:40]!r})",
            "invalid_value",
        )
    return _TESTS[test]


def bearer(request: Request) -> str:
    """The token of a request, "" for none. The case of the scheme does not matter (RFC 9110, 11.1)."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def is_operator(request: Request, limits: Limits) -> bool:
    """Whether the request shows the operator's key.

    Raises:
        ApiError: 403 where it shows another one.
    """
    given = request.headers.get(OPERATOR_HEADER)
    if given is None:
        return False
    if limits.operator_key is None or not same(given, limits.operator_key):
        raise ApiError(403, "the operator key is not the one of this server", "invalid_operator_key")
    return True


def shows_operator_key(request: Request, limits: Limits) -> bool:
    """Whether the request shows the operator's key, in its header or in the place of a client's key.

    Scrapers and clients of other servers can send a key of that kind alone.

    Raises:
        ApiError: 403 where the header shows another one.
    """
    key = limits.operator_key
    return is_operator(request, limits) or (key is not None and any([same(one, key) for one in client_keys(request)]))


def client_keys(request: Request) -> tuple[str, str]:
    """What stands where clients put their keys, "" for nothing."""
    return bearer(request), request.headers.get(KEY_HEADER, "")


def same(given: str, key: str) -> bool:
    """Compares keys in a time that does not depend on how alike they are."""
    return hmac.compare_digest(given.encode(), key.encode())


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, counted as it arrives, unpacked where it is gzipped.

    Raises:
        ApiError: 413 where it is too long (packed or unpacked), 408 where it does not arrive, 415 where it is packed
            in another way.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise ApiError(
            415, f"the content encoding must be gzip or none (got {encoding[:40]!r})", "unsupported_content_encoding"
        )
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
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.body_timeout:g} s; send it at once",
            "request_timeout",
            headers={"connection": "close"},
        ) from None
    if length > limits.max_body_bytes:
        raise _too_long(limits)
    return bytes(body) if encoding == "identity" else _unpacked(bytes(body), limits)


def _unpacked(body: bytes, limits: Limits) -> bytes:
    """Never more of it in memory than may be read: a kilobyte can unpack to a gigabyte."""
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
    return ApiError(
        413,
        f"the body is longer than the {limits.max_body_bytes} bytes that this server reads; shorten it",
        "request_too_large",
        headers={"connection": "close"},
    )
