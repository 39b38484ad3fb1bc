"""`redflag serve --playground`: one page to chat with the guarded model, and what it measures beside.

| route | answers | key |
|---|---|---|
| `/` | the page: one HTML file that fetches nothing from elsewhere, and holds nothing of the operator's | none |
| `/playground/guard` | name, categories, thresholds, monitor, release | API key, operator key |
| `/playground/traces/ID` | JSON lines: steps and events of a response as they come, then its whole trace | the same |

The page is a client like any other: what it shows as the answer is what `/v1/chat/completions` sends. Probabilities
come by the two other routes alone, which ask for the operator key where there is one. Without one they answer every
client of the server, but no page of another origin: see `own_page`.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import ipaddress
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import asdict
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from redflag.api.api_errors import ApiError
from redflag.errors import RedflagError
from redflag.guard.detokenize import Detokenizer
from redflag.guard.guard import Guard
from redflag.server.access import Limits, admit
from redflag.server.exchange import Exchange
from redflag.trace import Forced, Resume, Text, Trace, trace_line

SCRIPTS = ("page.js", "trace.js", "chat.js")
_PACE = 0.05  # seconds between two looks at a trace that grows
_KEPT = 32  # traces of responses that are over


class Playground:
    """The routes of the page, and the last traces."""

    def __init__(self, guard: Guard, limits: Limits, then: Callable[[Trace], None] | None = None) -> None:
        """Keeps no trace yet.

        Args:
            guard: What is shown: its thresholds, its policy.
            limits: Where the keys are.
            then: Gets every trace as well.
        """
        self._guard = guard
        self._limits = limits
        self._then = then
        self._open: Collection[Exchange] = ()
        self._over: deque[Trace] = deque(maxlen=_KEPT)

    def record(self, trace: Trace) -> None:
        """Keeps the trace of a response that is over."""
        self._over.append(trace)
        if self._then is not None:
            self._then(trace)

    def mount(self, app: FastAPI, open_exchanges: Collection[Exchange]) -> None:
        """Adds the routes.

        Args:
            app: The application.
            open_exchanges: The requests being answered; read at each request.
        """
        self._open = open_exchanges
        app.add_api_route("/", self.page, methods=["GET", "HEAD"], response_model=None)
        app.add_api_route("/playground/guard", self.guard, methods=["GET"], response_model=None)
        app.add_api_route("/playground/traces/{name}", self.trace, methods=["GET"], response_model=None)

    async def page(self) -> Response:
        """The page itself."""
        content, policy = page()
        headers = {
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        }
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    async def guard(self, request: Request) -> Response:
        """What the responses are judged by."""
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
        """One response, while it goes on or shortly after it."""
        self._admit(request)
        exchange = next((one for one in self._open if one.response.trace.id == name), None)
        trace = exchange.response.trace if exchange else next((one for one in self._over if one.id == name), None)
        if trace is None:
            raise ApiError(404, f"there is no response {name[:100]!r} here, or no more", "not_found")
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

    def _pieces(self, trace: Trace, event: Any) -> list[str]:
        """The text of each token; one text of all, where that cannot be told."""
        if len(event.token_ids) > 1:
            try:
                detokenizer = Detokenizer(self._guard.tokenizer, trace.token_ids[: event.position])
                pieces = [detokenizer.push(token_id) for token_id in event.token_ids]
                if "".join(pieces) == event.text:
                    return pieces
            except Exception:  # Whatever a tokenizer may raise: colour is all that hangs on it.
                pass
        return [event.text]

    def _admit(self, request: Request) -> None:
        caller = admit(request, self._limits)
        if self._limits.operator_key is None:
            own_page(request)
        elif not caller.operator:
            raise ApiError(
                403, "probabilities and thresholds are the operator's: send the operator key", "operator_key_required"
            )


def since(
    trace: Trace, steps: int, events: int, pieces: Callable[[Trace, Any], list[str]]
) -> tuple[dict[str, Any] | None, tuple[int, int]]:
    """What is new in a trace that grows, for who has seen so many of its steps and events.

    Args:
        trace: The trace.
        steps: Steps seen.
        events: Events seen.
        pieces: The text of each token that an event released, or one text of all.

    Returns:
        `start`, `flag_probs`, `scores` (T x K each; they take the place of all that was seen from `start` on), `events`
        and `answer_at`, the answer's first step behind a thought; None where nothing is new. And how many steps and
        events have been seen now.
    """
    new = trace.events[events:]
    # Tokens may have been taken back: from there on there are others now.
    back = [event.position for event in new if isinstance(event, Forced | Resume)]
    start = min(steps, len(trace.token_ids), *back)
    seen = (len(trace.token_ids), events + len(new))
    if not new and start == seen[0]:
        return None, seen
    told = [_as_json(event, pieces(trace, event) if _part(event) else []) for event in new]
    return {
        "start": start,
        "flag_probs": trace.flag_probs[start:],
        "scores": trace.scores[start:],
        "events": told,
        "answer_at": getattr(trace, "answer_at", 0),
    }, seen


def _part(event: Any) -> str | None:
    """The part of the response that an event released text of, `answer` or `thought`; None for all other events."""
    return getattr(event, "part", "answer" if isinstance(event, Text) else None)


def _as_json(event: Any, pieces: list[str]) -> dict[str, Any]:
    if part := _part(event):
        place = {"position": event.position, "tokens": len(event.token_ids)}
        return {"kind": "text", "part": part, **place, "pieces": pieces}
    values = {name: _number(value) if isinstance(value, float) else value for name, value in asdict(event).items()}
    return {"kind": type(event).__name__.lower(), **values, "describe": event.describe()}


def own_page(request: Request) -> None:
    """Lets no web page of another origin read what no key protects.

    A browser says where a page comes from (`Origin`), and a page whose name was pointed at this machine asks for that
    name (`Host`): without an operator key only addresses and localhost are answered.

    Raises:
        ApiError: 403.
    """
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
        known = True
    except ValueError:
        known = name == "localhost"
    if not known or (origin is not None and urlsplit(origin).netloc != host):
        raise ApiError(
            403,
            "without an operator key probabilities are for the page of this server, at an IP address or localhost; set "
            "REDFLAG_OPERATOR_KEY",
            "operator_key_required",
        )


@functools.cache
def page() -> tuple[bytes, str]:
    """The page, and its content security policy: nothing runs and nothing is fetched but what is named there."""
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


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
