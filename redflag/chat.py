"""The client for models behind `POST /chat/completions`, shared by judges, writers and attackers.

It uses the openai package with its retries, `Retry-After` and time-outs. The package's environment variables
(`OPENAI_ORG_ID`, `OPENAI_CUSTOM_HEADERS`, ...) and its headers about this machine are not sent.

A model may refuse a field of the request: OpenAI's reasoning models answer 400 to `max_tokens` (they expect
`max_completion_tokens`) and to any temperature but their own; others do not support log-probabilities. The request is
then repeated once without the field, and the client remembers which fields are accepted.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from redflag.errors import RedflagError
from redflag.outbound import proxy_for

if TYPE_CHECKING:
    import openai

LARGEST = 1 << 20  # bytes of a reply: answers are short, and a server must not fill the memory

_ROUTE = "/chat/completions"
_NEWER = "max_completion_tokens"
# Field -> the fields that go with it.
_OPTIONAL = {"max_tokens": ("max_tokens",), "temperature": ("temperature",), "logprobs": ("logprobs", "top_logprobs")}
_ALIASES = {"top_logprobs": "logprobs"}
_LENGTH = re.compile(r"context|too (?:large|long|many)|exceed", re.IGNORECASE)
_SECRET = 8  # minimum length of a secret: blanking shorter ones would hit ordinary words


class ChatError(Exception):
    """There was no reply, or an unreadable one. `status` is the HTTP status; 0 without an answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ChatClient:
    """A model behind an OpenAI-compatible server. Thread-safe.

    Redirects are not followed, so that no other host gets the key; at most `LARGEST` bytes of a reply are read. No
    request is made before `ask` or `reply`.

    Args:
        url: Base address, such as `http://host:8000/v1`, or that of the chat route itself.
        model: The model's name there.
        api_key: Sent as bearer token.
        headers: Sent with every request; one of the user's own named Authorization replaces the key's.
        options: Further fields of every request, or replacements of the caller's; None leaves a field out.
        timeout: Seconds that a server may be silent within one request; None = no limit.
        limit: Seconds for one question, all tries together; None = no limit.
        retries: Further tries after a server that cannot be reached, is late, is busy (429) or fails (5xx).
        before: Awaited before every request, including retries.
        busy: Callback with the seconds of a server's `Retry-After`.

    Raises:
        RedflagError: A setting is invalid, or openai is not installed.

    Example:
        >>> ChatClient("http://127.0.0.1:8000/v1", "writer").url
        'http://127.0.0.1:8000/v1/chat/completions'
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        limit: float | None = None,
        retries: int = 2,
        before: Callable[[], Awaitable[None]] | None = None,
        busy: Callable[[float], None] | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401
        except ImportError:
            raise RedflagError(
                "the package openai must be installed for requests to a model behind an address. "
                "`pip install redflag-llm[serve]`"
            ) from None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RedflagError(f"the server's address must be an http or https URL (got {url!r}): http://host:port/v1")
        if not model:
            raise RedflagError("the model's name must be the one that the server knows it by (got ''): name the model")
        for seconds in (timeout, limit):
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise RedflagError(f"timeout must be seconds above 0 (got {seconds})")
        if retries < 0:
            raise RedflagError(f"retries must be 0 or more (got {retries})")
        sent = dict(headers or {})
        if api_key and not any(name.lower() == "authorization" for name in sent):
            sent["Authorization"] = f"Bearer {api_key}"
        if not all(value.isprintable() for value in sent.values()):
            raise RedflagError("the API key and the headers must be of printable characters (not shown): check them")
        self.url = parts._replace(path=parts.path.rstrip("/").removesuffix(_ROUTE) + _ROUTE).geturl()
        self.model = model
        self.options = dict(options or {})
        self.headers = sent
        self._proxy = proxy_for(self.url)
        if self._proxy is not None and urlsplit(self._proxy).scheme not in ("http", "https"):
            raise RedflagError(
                f"the proxy for {self.url} must be an http or https URL (got {urlsplit(self._proxy).scheme}): set "
                "HTTP_PROXY or HTTPS_PROXY, or NO_PROXY for this server"
            )
        self._timeout, self._limit, self._retries = timeout, limit, retries
        self._before, self._busy = before, busy
        self._refused: frozenset[str] = frozenset()

    def ask(self, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Any]) -> Any:
        """One request on a connection of its own; see `reply`."""

        async def once() -> Any:
            async with self.open() as connections:
                return await self.reply(connections, messages, fields)

        return asyncio.run(once())

    def open(self) -> openai.AsyncOpenAI:
        """Connections for `reply`, to be used with `async with` in one event loop."""
        import openai

        http = _http_client()(
            proxy=self._proxy, verify=_authorities(), trust_env=False, follow_redirects=False, timeout=self._timeout
        )
        sent = {"Content-Type": "application/json", **self.headers}
        http.own_url = self.url
        http.own_headers = {name.encode(): value.encode() for name, value in sent.items()}
        http.before, http.busy = self._before, self._busy
        return openai.AsyncOpenAI(
            api_key="unused",  # it stands in own_headers; None would take that of the environment
            base_url=self.url,  # None would take that, too; requests go to own_url
            timeout=self._timeout,
            max_retries=self._retries,
            http_client=http,
        )

    async def reply(
        self, connections: openai.AsyncOpenAI, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Any]
    ) -> Any:
        """The server's reply, decoded from JSON.

        Args:
            connections: From `open`.
            fields: Of the request, besides the model and the messages; `options` win.

        Raises:
            ChatError: The server cannot be reached, is late or refuses, or its reply is not JSON.
        """
        try:
            content = await asyncio.wait_for(self._content(connections, messages, fields), self._limit)
        except asyncio.TimeoutError:
            raise ChatError(f"{self.url} gave no answer within {self._limit} s") from None
        if len(content) > LARGEST:
            raise ChatError(f"{self.url} replied with more than {LARGEST} bytes", 200)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise ChatError(f"{self.url} replied with invalid JSON: {self._shown(content[:80])}", 200) from None

    async def _content(
        self, connections: openai.AsyncOpenAI, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Any]
    ) -> bytes:
        import openai

        # Half a surrogate pair, which JSON may hold and models may repeat, has no UTF-8 encoding.
        turns: Any = [
            {name: text.encode("utf-8", "replace").decode() for name, text in turn.items()} for turn in messages
        ]
        refused = self._refused
        while True:
            sent = without(refused, request_fields(fields, self.options))
            try:
                reply = await connections.chat.completions.with_raw_response.create(
                    model=self.model, messages=turns, extra_body=sent
                )
            except openai.APIStatusError as error:
                status, content = error.status_code, error.response.content
                field = refused_field(status, content.decode(errors="replace"), sent)
                if field is None and status in (400, 422) and "logprobs" in sent:
                    field = "logprobs"  # which some servers refuse without naming them
                if field is None:
                    raise ChatError(f"{self.url} answered {status}: {self._shown(content)}", status) from None
                refused |= {field}
            except openai.OpenAIError as error:
                cause = error.__cause__ or error
                why = f"{type(cause).__name__} {cause}".strip()
                raise ChatError(f"{self.url} is lost: {self._shown(why.encode())}") from None
            else:
                self._refused |= refused  # only after success: fields that were not the reason are sent again
                return reply.content

    def _shown(self, content: bytes) -> str:
        """The beginning of an error text, with keys blanked out that a server repeats."""
        text = content[:4096].decode(errors="replace")
        for word in (word for value in self.headers.values() for word in value.split() if len(word) >= _SECRET):
            text = text.replace(word, "***")
        return text[:200]


@functools.cache
def _authorities() -> ssl.SSLContext:
    # The system's authorities, or those in SSL_CERT_FILE, instead of httpx's own list.
    return ssl.create_default_context()


@functools.cache
def _http_client() -> Any:
    """The class of openai's HTTP client, created when openai is first needed."""
    import openai

    class HttpClient(openai.DefaultAsyncHttpxClient):
        own_url: str
        own_headers: Mapping[bytes, bytes]
        before: Callable[[], Awaitable[None]] | None
        busy: Callable[[float], None] | None

        async def send(self, request: Any, *, stream: bool = False, **settings: Any) -> Any:
            if self.before is not None:
                await self.before()
            sent = self.build_request(
                request.method,
                self.own_url,
                headers=self.own_headers,
                content=request.content,
                extensions=request.extensions,
            )
            response = await super().send(sent, stream=True, **settings)
            content = bytearray()
            try:
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > LARGEST:
                        break
            finally:
                await response.aclose()
            pause = _seconds(response.headers.get("Retry-After"))
            if self.busy is not None and pause and not response.is_success:
                self.busy(pause)
            gone = ("content-encoding", "content-length", "transfer-encoding")
            headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in gone]
            whole = bytes(content[: LARGEST + 1])
            return type(response)(response.status_code, headers=headers, content=whole, request=request)

    return HttpClient


def _seconds(header: str | None) -> float:
    try:
        seconds = float(header or "")
    except ValueError:
        return 0.0  # a date, or nothing
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def request_fields(own: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request: the caller's, overridden by a user's options; None leaves a field out.

    Example:
        >>> request_fields({"max_tokens": 16, "temperature": 0}, {"max_completion_tokens": 512, "temperature": None})
        {'max_completion_tokens': 512}
    """
    fields = {**own, **options}
    if options.get(_NEWER) is not None and "max_tokens" not in options:
        fields["max_tokens"] = None
    return {name: value for name, value in fields.items() if value is not None}


def without(refused: frozenset[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that an endpoint has refused.

    Example:
        >>> without(frozenset({"max_tokens", "temperature"}), {"max_tokens": 16, "temperature": 0})
        {'max_completion_tokens': 16}
    """
    accepted = dict(fields)
    for name in refused:
        values = [accepted.pop(field, None) for field in _OPTIONAL[name]]
        if name == "max_tokens" and values[0] is not None:
            accepted.setdefault(_NEWER, values[0])
    return accepted


def refused_field(status: int, content: str, fields: Mapping[str, Any]) -> str | None:
    """The field of a request that a server refused with 400 or 422; None if it was none of the fields handled here.

    `content` is the body of the answer, `fields` are those that were sent.

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
    match = re.search(r"\b(max_tokens|temperature|top_logprobs|logprobs)\b", content)
    return None if match is None or _LENGTH.search(content) else _ALIASES.get(match[1], match[1])
