"""`redflag serve --playground`: a page to chat with the guarded model that also shows flag probabilities.

| route | answers | key |
|---|---|---|
| `/` | the page: one HTML file that fetches nothing from elsewhere and has no data of the operator's | none |
| `/playground/guard` | name, categories, thresholds, monitor, release | API key, operator key |
| `/playground/traces/ID` | JSON lines: steps and events of a response as they come, then its whole trace | the same |

The page gets its answers from `/v1/chat/completions`, as any client. Only the two other routes give probabilities; they
need the operator key if there is one. Without one they answer every client of the server, but no page of another origin
(`own_page`).
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import ipaddress
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import asdict
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from redflag.api.api_errors import ApiError
from redflag.api.operator_view import json_number
from redflag.errors import RedflagError
from redflag.guard.detokenize import Detokenizer
from redflag.guard.guard import Guard
from redflag.server.access import Limits, admit
from redflag.server.exchange import Exchange
from redflag.trace import Event, Forced, Resume, Text, Thought, Trace, trace_line

SCRIPTS = ("page.js", "trace.js", "chat.js")
_PACE = 0.05  # seconds between two reads of a growing trace
_KEPT = 32  # traces of finished responses


class Playground:
    """The routes of the page, and the last traces."""

    def __init__(self, guard: Guard, limits: Limits, then: Callable[[Trace], None] | None = None) -> None:
        """`then` is called with every trace, too."""
        self._guard = guard
        self._limits = limits
        self._then = then
        self._open: Collection[Exchange] = ()
        self._over: deque[Trace] = deque(maxlen=_KEPT)

    def record(self, trace: Trace) -> None:
        """Stores the trace of a finished response."""
        self._over.append(trace)
        if self._then is not None:
            self._then(trace)

    def mount(self, app: FastAPI, open_exchanges: Collection[Exchange]) -> None:
        """Adds the routes; `open_exchanges` are the requests being answered, as they come and go."""
        self._open = open_exchanges
        app.add_api_route("/", self.page, methods=["GET", "HEAD"], response_model=None)
        app.add_api_route("/playground/guard", self.guard, methods=["GET"], response_model=None)
        app.add_api_route("/playground/traces/{name}", self.trace, methods=["GET"], response_model=None)

    async def page(self) -> Response:
        content, policy = page()
        headers = {
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        }
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    async def guard(self, request: Request) -> Response:
        """Thresholds and policy."""
        self._admit(request)
        thresholds, policy = self._guard.thresholds, self._guard.policy
        body = {
            "model": self._limits.name,
            "categories": self._guard.spec.categories,
            "thresholds": [thresholds.values[name] for name in self._guard.spec.categories],
            "monitor": asdict(thresholds.monitor),
            "release": policy.release,
            "hold_back": policy.hold_back,
            "observe": policy.observe,
        }
        return JSONResponse(body, headers={"cache-control": "no-store"})

    async def trace(self, request: Request, name: str) -> Response:
        """A response in progress, or one of the last."""
        self._admit(request)
        exchange = next((item for item in self._open if item.response.trace.id == name), None)
        trace = exchange.response.trace if exchange else next((item for item in self._over if item.id == name), None)
        if trace is None:
            raise ApiError(404, f"there is no response {name[:100]!r} here, or not any more", "not_found")
        lines = self._lines(trace, lambda: exchange in self._open)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"cache-control": "no-store"})

    async def _lines(self, trace: Trace, goes_on: Callable[[], bool]) -> AsyncIterator[bytes]:
        at = (0, 0)
        while True:
            over = not goes_on()
            news, at = since(trace, *at, self._pieces)
            if news is not None:
                yield _line(news)
            if over:
                break
            await asyncio.sleep(_PACE)
        try:
            yield b'{"trace":' + trace_line(trace, text=True).rstrip() + b"}\n"
        except RedflagError as error:
            yield _line({"trace": None, "error": str(error)})

    def _pieces(self, trace: Trace, event: Text | Thought) -> list[str]:
        """The text of each token; one text of all if it cannot be split."""
        if len(event.token_ids) > 1:
            try:
                detokenizer = Detokenizer(self._guard.tokenizer, trace.token_ids[: event.position])
                pieces = [detokenizer.push(token_id) for token_id in event.token_ids]
                if "".join(pieces) == event.text:
                    return pieces
            except Exception:  # of any tokenizer; it only costs colours
                pass
        return [event.text]

    def _admit(self, request: Request) -> None:
        caller = admit(request, self._limits)
        if self._limits.operator_key is None:
            own_page(request)
        elif not caller.operator:
            text = "probabilities and thresholds are the operator's: send the operator key"
            raise ApiError(403, text, "operator_key_required")


def since(
    trace: Trace, steps: int, events: int, pieces: Callable[[Trace, Text | Thought], list[str]]
) -> tuple[dict[str, Any] | None, tuple[int, int]]:
    """What is new in a growing trace.

    Args:
        steps: Steps that were read; likewise `events`.
        pieces: The text of each token that an event released, or one text of all.

    Returns:
        `start`, `flag_probs`, `scores` (T x K each; they replace all from `start` on), `events` and `answer_at`, the
        answer's first step behind a thought; None if nothing is new. And the steps and events read by now.
    """
    new = trace.events[events:]
    # Tokens may have been taken back and replaced.
    back = [event.position for event in new if isinstance(event, Forced | Resume)]
    start = min(steps, len(trace.token_ids), *back)
    seen = (len(trace.token_ids), events + len(new))
    if not new and start == seen[0]:
        return None, seen
    return {
        "start": start,
        "flag_probs": trace.flag_probs[start:],
        "scores": trace.scores[start:],
        "events": [_as_json(event, lambda released: pieces(trace, released)) for event in new],
        "answer_at": trace.answer_at,
    }, seen


def _as_json(event: Event, pieces: Callable[[Text | Thought], list[str]]) -> dict[str, Any]:
    if isinstance(event, Text | Thought):
        place = {"position": event.position, "tokens": len(event.token_ids)}
        return {"kind": "text", "part": event.part, **place, "pieces": pieces(event)}
    values = {name: json_number(value) for name, value in asdict(event).items()}
    return {"kind": type(event).__name__.lower(), **values, "describe": event.describe()}


def own_page(request: Request) -> None:
    """Refuses pages of other origins, for servers without an operator key.

    A browser sends a page's `Origin`. A page whose name resolves to this machine (DNS rebinding) sends that name as
    `Host`, so only IP addresses and localhost are answered.

    Raises:
        ApiError: 403.
    """
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
        local = True
    except ValueError:
        local = name == "localhost"
    if not local or (origin is not None and urlsplit(origin).netloc != host):
        text = (
            "without an operator key probabilities are for the page of this server, at an IP address or localhost; set "
            "REDFLAG_OPERATOR_KEY"
        )
        raise ApiError(403, text, "operator_key_required")


@functools.cache
def page() -> tuple[bytes, str]:
    """The page, and its content security policy."""
    style, scripts = _file("page.css"), [_file(name) for name in SCRIPTS]
    html = _file("page.html").replace("/* style */", style)
    html = html.replace("<!-- scripts -->", "\n".join(f"<script>{script}</script>" for script in scripts))
    policy = [
        "default-src 'none'",
        f"script-src {' '.join(map(_hash, scripts))}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return html.encode(), "; ".join(policy)


def _file(name: str) -> str:
    return resources.files("redflag.server").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _line(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, separators=(",", ":")).encode() + b"\n"
