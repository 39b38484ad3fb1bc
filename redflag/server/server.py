"""An OpenAI-compatible server in front of a guard: HTTP in, judged text out.

All responses go through `Answer`, which gets nothing but the events of a response. `redflag.api.wire` lists how a
response can end. If the engine fails before anything was sent, the client gets an error (503, or 504 for a time-out)
and may try again. docs/clients.md says which fields of a request are refused, clipped or ignored.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware

from redflag.api.api_errors import ApiError, add_handlers, invalid
from redflag.api.doors import DOORS, Body, Door
from redflag.api.fields import escaped, header
from redflag.api.logprobs import ShownLogprobs
from redflag.api.messages_schema import CountRequest
from redflag.api.schema import ChatRequest, parse
from redflag.api.thinking import thinking_of
from redflag.api.tools import ToolSupport
from redflag.api.wire import REFUSAL
from redflag.backends import AsyncBackend, AsyncStreams
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.guard.rehearsal import Alarmed
from redflag.guard.response import Response as GuardedResponse
from redflag.guard.response import Stream, adrive
from redflag.prompt import text_ids
from redflag.server import log
from redflag.server.access import Caller, Limits, admit, check_model, shows_operator_key
from redflag.server.audit_log import AuditLog
from redflag.server.choices import choices_of
from redflag.server.exchange import Exchange, Readiness, Stopwatch
from redflag.server.gate import Gate
from redflag.server.metrics import Metrics
from redflag.server.moderations import Moderations
from redflag.server.playground import Playground
from redflag.server.sending import EventStream, Part, close, whole
from redflag.server.strikes import Strikes, conversation_name
from redflag.server.telemetry import Telemetry
from redflag.tool_prompt import ToolUse
from redflag.trace import Trace
from redflag.watching.policy import Policy

_log = logging.getLogger(__name__)

_IGNORED = "x-ignored-params"
_MOST_NAMES = 256  # of ignored fields, which clients choose; each is logged once
_TIMED = 1 / 8  # share of the responses whose steps are timed, which costs as much as counting them


def build_app(
    guard: Guard,
    limits: Limits,
    *,
    metrics: Metrics,
    readiness: Readiness | None = None,
    audit: AuditLog | None = None,
    telemetry: Telemetry | None = None,
    record: Callable[[Trace], None] | None = None,
    playground: bool = False,
) -> FastAPI:
    """The application, for an ASGI server.

    Args:
        guard: Its backend must be an `AsyncBackend`, and is closed with the application.
        readiness: Whether the engine can be used; None: always.
        audit: The log that overrides need.
        record: Callback for the trace of every response that was begun.
        playground: Adds the page at `/`, and its routes.
    """
    page = Playground(guard, limits, record) if playground else None
    if page is not None:
        record = page.record
    telemetry = telemetry or Telemetry(enabled=False)
    server = Server(guard, limits, metrics, readiness or Readiness(None), audit, telemetry, record)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(server.readiness.watch())
        try:
            yield
        finally:
            watching.cancel()
            server.gate.close()
            telemetry.shutdown()
            await cast(AsyncBackend, guard.backend).aclose()

    # No redirects to a path without its slash: behind a TLS proxy they would lead to http.
    app = FastAPI(
        title="redflag", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.server = server
    add_handlers(app)
    if limits.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # SDKs send x-stainless-*
            expose_headers=["x-request-id", _IGNORED, "retry-after"],
        )
    moderations = Moderations(guard, limits, server.gate)
    reading = ["GET", "HEAD"]
    routes: tuple[tuple[str, Callable[..., Any], list[str]], ...] = (
        *((path, _answering(server, door), ["POST"]) for path, door in DOORS.items()),
        ("/v1/messages/count_tokens", server.count_tokens, ["POST"]),
        ("/v1/moderations", moderations.moderate, ["POST"]),
        ("/beta/litellm_basic_guardrail_api", moderations.guardrail, ["POST"]),
        ("/v1/models", server.models, reading),
        ("/health", server.health, reading),
        ("/ready", server.ready, reading),
        ("/metrics", server.show_metrics, reading),
    )
    for path, endpoint, methods in routes:
        for spelling in (path, f"{path}/"):
            app.add_api_route(spelling, endpoint, methods=methods, response_model=None)
    app.add_api_route("/v1/models/{name:path}", server.model, methods=reading, response_model=None)
    if page is not None:
        page.mount(app, server.open)
    return app


def _answering(server: Server, door: Door) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await server.respond(request, door)

    return answer


def _refusal(policy: Policy) -> str:
    """The refusal of a chat that was halted before any text; never the text of a decoy."""
    text = policy.replacement
    return text if isinstance(text, str) and text and not policy.decoy else REFUSAL


def _conversation(body: Body, caller: Caller) -> str:
    return conversation_name(caller.client, body.user_id, body.inputs()[0])


class Prepared(NamedTuple):
    """A request that was read and checked, a response for each of its choices, and the tools that they may call."""

    body: Body
    responses: list[GuardedResponse]
    tools: ToolUse | None


@dataclass(eq=False)
class Server:
    """State shared by all requests, and their handlers. Arguments as for `build_app`."""

    guard: Guard
    limits: Limits
    metrics: Metrics
    readiness: Readiness
    audit: AuditLog | None
    telemetry: Telemetry
    record: Callable[[Trace], None] | None

    def __post_init__(self) -> None:
        self.open: set[Exchange] = set()
        self.gate = Gate(self.limits, self.metrics, self.readiness, self.open)
        self._ignored: set[str] = set()  # fields that were logged
        self._since = int(time.time())
        self._tools = ToolSupport(self.guard, self.limits.tool_format)
        most = self.limits.halts_allowed
        self._strikes = None if most is None else Strikes(most, self.limits.halts_forgotten)

    def stop(self) -> None:
        """Ends all responses with an error, since the server shuts down."""
        for exchange in tuple(self.open):
            exchange.stop("stopped")

    async def health(self) -> Response:
        """Whether the process runs."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether the next request can be answered."""
        if await self.readiness.why_not():
            return JSONResponse({"status": "the engine does not answer as it should"}, 503)
        return JSONResponse({"status": "ready"})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus metrics. They need the operator's key if there is one: halts by category help attackers."""
        if self.limits.operator_key is not None and not shows_operator_key(request, self.limits):
            raise ApiError(403, "metrics are the operator's: send the operator key", "operator_key_required")
        content, media_type = self.metrics.render()
        return Response(content, media_type=media_type)

    async def models(self, request: Request) -> Response:
        """The one model."""
        admit(request, self.limits)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, name: str) -> Response:
        """The one model, by name."""
        admit(request, self.limits)
        check_model(name.rstrip("/"), self.limits)
        return JSONResponse(self._model())

    async def count_tokens(self, request: Request) -> Response:
        """Tokens of a `/v1/messages` request's prompt."""
        with self.gate.passing(request.url.path.rstrip("/")):
            admit(request, self.limits)
            count = await self.gate.read(request, self._prompt_tokens)
        return JSONResponse({"input_tokens": count})

    async def respond(self, request: Request, door: Door) -> Response:
        """Answers a request of any `Door`."""
        route = request.url.path.rstrip("/")
        with self.gate.arriving(route):
            caller = admit(request, self.limits, audited=self.audit is not None)
            prepared = await self.gate.read(request, partial(self._prepare, door, caller))
        body, responses, _ = prepared
        headers = {"x-request-id": responses[0].trace.id}
        if body.ignored:
            headers[_IGNORED] = header(body.ignored)
            self._log_ignored(body.ignored)
        parts = [self._begin(request, route, door, caller, prepared, index) for index in range(len(responses))]
        if body.stream:
            return EventStream(parts, caller.view, headers, self.limits)
        try:
            return await whole(request, parts, caller.view, headers)
        finally:
            await close(parts)

    def _begin(self, request: Request, route: str, door: Door, caller: Caller, prepared: Prepared, index: int) -> Part:
        """Begins one choice: its clock, metrics and span."""
        body, responses, tools = prepared
        response = responses[index]
        first = response.request
        assert isinstance(first, Stream), "a response begins with a stream"
        policy = caller.key.policy if caller.key is not None else self.guard.policy
        chat, decoy = isinstance(body, ChatRequest), policy.decoy
        engine: AsyncStreams = cast(AsyncBackend, self.guard.backend)
        eos_ids = self.guard.backend.eos_ids
        if random.random() < _TIMED:
            engine = Stopwatch(engine, self.metrics.observe_step_seconds)
        logprobs = None
        if first.sampling.logprobs is not None:
            context = first.token_ids if not chat or body.prefill else ()
            hidden = eos_ids | frozenset(self.guard.spec.ids)
            logprobs = ShownLogprobs(response.trace, self.guard.tokenizer, hidden, context)
            engine = logprobs.of(engine)
        if caller.alarm_at is not None:
            engine = Alarmed(engine, eos_ids, caller.alarm_at)
        answer = door.answer(
            body,
            response,
            name=responses[0].trace.id,
            model=self.limits.name,
            # Choices of one prompt share its tokens.
            prompt_tokens=0 if index % (body.n or 1) else len(first.token_ids),
            decoy=decoy,
            refusal=_refusal(policy),
            in_words=chat and bool(self.limits.closing_text) and not decoy,
            count=self._count,
            index=index,
            logprobs=logprobs,
            calls=self._tools.reader(tools, body),
        )
        around = ExitStack()
        around.enter_context(self.metrics.open())
        span = around.enter_context(
            self.telemetry.span(response.trace.id, route, self.limits.name, dict(request.headers))
        )

        def on_close(exchange: Exchange) -> None:
            self.open.discard(exchange)
            with around:
                span.finish(response.trace, exchange.end, input_tokens=len(first.token_ids))
            self._report(route, exchange, body, caller)

        events = adrive(response, engine, self.guard.judge)
        closing = self.limits.closing_text if chat and not decoy else ""
        exchange = Exchange(response, events, self.limits.request_timeout, on_close, closing)
        self.open.add(exchange)
        return exchange, answer

    def _report(self, route: str, exchange: Exchange, body: Body, caller: Caller) -> None:
        """Counts and logs a finished request."""
        trace, end = exchange.response.trace, exchange.end
        facts: dict[str, Any] = {
            "route": route,
            "seconds": exchange.seconds,
            "end": end,
            "streamed": bool(body.stream),
            "overridden": caller.override is not None,
            "seconds_to_first": exchange.seconds_to_first,
        }
        self.metrics.observe(trace, **facts)
        real = caller.override is None and caller.alarm_at is None
        # The trace's end, since `disconnected` would hide a halt.
        if self._strikes is not None and real and trace.facts().end == "halted":
            self._strikes.count(_conversation(body, caller))
        if end == "fault":
            self.readiness.doubt()
        elif end in ("done", "halted"):
            self.readiness.trust()
        log.request(trace, request_id=trace.id, **facts)
        if self.audit is not None:
            self.audit.record(
                trace,
                user=body.user_id,
                request_id=trace.id,
                reason=caller.override,
                thresholds=caller.key.thresholds.values if caller.key is not None else None,
            )
        if self.record is not None and caller.alarm_at is None:
            self.record(trace)

    def _prepare(self, door: Door, caller: Caller, content: bytes) -> Prepared:
        """Parses and checks a body; in a thread."""
        body = parse(door.request, content, refuse_unknown=self.limits.unknown_fields == "refuse")
        check_model(body.model, self.limits)
        if self._strikes is not None and caller.override is None:
            self._strikes.check(_conversation(body, caller))
        tools = self._tools.use(body)
        responses = choices_of(self.guard, body, caller, self.limits, door.prefix, tools)
        if caller.override is not None and self.audit is not None:
            try:
                for response in responses:
                    self.audit.begin_override(body.user_id, caller.override, response.trace.id)
            except RedflagError as error:
                raise ApiError(503, str(error), "audit_log_failed") from error
        return Prepared(body, responses, tools)

    def _prompt_tokens(self, content: bytes) -> int:
        body = parse(CountRequest, content)
        check_model(body.model, self.limits)
        tools = self._tools.use(body)
        asked, possible = body.asked_thinking(), self.guard.can_think
        thinking = thinking_of(asked, [], possible=possible, refuse_unknown=False)
        try:
            first = self.guard.respond(body.input(), thinking=thinking, tools=tools).request
        except RedflagError as error:
            raise invalid(str(error), body.param) from error
        assert isinstance(first, Stream), "a response begins with a stream"
        return len(first.token_ids)

    def _log_ignored(self, names: list[str]) -> None:
        for name in map(escaped, names):
            if name not in self._ignored and len(self._ignored) < _MOST_NAMES:
                self._ignored.add(name)
                _log.info("ignored the request field %s, which is unknown or changes no token", name)

    def _count(self, text: str) -> int:
        try:
            return len(text_ids(self.guard.tokenizer, text, self.guard.spec))
        except Exception:  # an operator's text that the tokenizer cannot read is shown all the same
            return 0

    def _model(self) -> dict[str, Any]:
        return {"id": self.limits.name, "object": "model", "created": self._since, "owned_by": "redflag"}
