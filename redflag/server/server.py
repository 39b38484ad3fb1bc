"""An OpenAI-compatible server in front of a guard: HTTP in, judged text out.

Every way out of here leads through `Answer`, which sees nothing but the events of a response. What a request can end in
stands in the table of `redflag.api.wire`; where the engine fails before anything was released and sent, the answer
is an error (503, or 504 for a time-out) instead, so that a client may simply try again. What of a request is refused,
clipped or ignored stands in docs/clients.md.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware

from redflag.api.api_errors import ApiError, add_handlers
from redflag.api.doors import DOORS, Body, Door
from redflag.api.fields import escaped, header
from redflag.api.logprobs import ShownLogprobs
from redflag.api.messages_schema import CountRequest
from redflag.api.schema import ChatRequest, parse
from redflag.api.thinking import thinking_of
from redflag.api.tools import ToolSupport
from redflag.api.wire import REFUSAL
from redflag.backends import AsyncBackend
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
from redflag.server.moderations import moderation_routes
from redflag.server.playground import Playground
from redflag.server.sending import EventStream, Part, close, whole
from redflag.server.strikes import Strikes, conversation_name
from redflag.server.telemetry import Telemetry
from redflag.tool_prompt import ToolUse
from redflag.trace import Trace
from redflag.watching.policy import Policy

_log = logging.getLogger(__name__)

_IGNORED = "x-ignored-params"
_MOST_NAMES = 256  # of ignored fields, of which the log tells once each: clients choose them
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
    """The application; an ASGI server runs it.

    Args:
        guard: Model, thresholds, policy and judge; its backend must be an `AsyncBackend`. Closed with the application.
        limits: What is allowed.
        metrics: Counts.
        readiness: Whether the engine can be used; None trusts it always.
        audit: Where overrides are written down; without it there are none.
        telemetry: Spans, if anybody wants them.
        record: Gets the trace of every response that was begun.
        playground: Adds the page at `/`, and what it shows of the operator's.
    """
    page = Playground(guard, limits, record) if playground else None
    if page is not None:
        record = page.record
    server = Server(guard, limits, metrics, readiness or Readiness(None), audit, telemetry, record)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(server.readiness.watch())
        try:
            yield
        finally:
            watching.cancel()
            server.gate.close()
            if telemetry is not None:
                telemetry.shutdown()
            await cast(AsyncBackend, guard.backend).aclose()

    # No redirects to a path without its slash: before TLS they would lead away from it.
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
            allow_headers=["*"],  # SDKs send x-stainless-* of their own
            expose_headers=["x-request-id", _IGNORED, "retry-after"],
        )
    reading = ["GET", "HEAD"]
    routes: tuple[tuple[str, Callable[..., Any], list[str]], ...] = (
        *((path, _answering(server, door), ["POST"]) for path, door in DOORS.items()),
        ("/v1/messages/count_tokens", server.count_tokens, ["POST"]),
        *moderation_routes(guard, limits, server.gate),
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
    """What a chat says that was halted before its first token; never the text of a decoy."""
    text = policy.replacement
    return text if isinstance(text, str) and text and not policy.decoy else REFUSAL


def _conversation(body: Body, caller: Caller) -> str:
    return conversation_name(caller.client, body.user_id, body.inputs()[0])


class Server:
    """What all requests share."""

    def __init__(
        self,
        guard: Guard,
        limits: Limits,
        metrics: Metrics,
        readiness: Readiness,
        audit: AuditLog | None,
        telemetry: Telemetry | None,
        record: Callable[[Trace], None] | None,
    ) -> None:
        self.guard = guard
        self.limits = limits
        self.readiness = readiness
        self.open: set[Exchange] = set()
        self._metrics = metrics
        self._audit = audit
        self._telemetry = telemetry if telemetry is not None else Telemetry(enabled=False)
        self._record = record
        self._ignored: set[str] = set()  # fields of which the log has told
        self.gate = Gate(limits, metrics, readiness, self.open)
        self._since = int(time.time())
        self._tools = ToolSupport(guard, limits.tool_format)
        most = limits.halts_allowed
        self._strikes = None if most is None else Strikes(most, limits.halts_forgotten)

    def stop(self) -> None:
        """Ends all responses, each with an error that says so: the server is going down."""
        for exchange in tuple(self.open):
            exchange.stop()

    async def health(self) -> Response:
        """Whether the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether the next request can be answered."""
        if await self.readiness.why_not():
            return JSONResponse({"status": "the engine does not answer as it should"}, 503)
        return JSONResponse({"status": "ready"})

    async def show_metrics(self, request: Request) -> Response:
        """Counters; where there is an operator, for him alone: halts by category answer an attacker's questions."""
        if self.limits.operator_key is not None and not shows_operator_key(request, self.limits):
            raise ApiError(403, "metrics are the operator's: send the operator key", "operator_key_required")
        content, media_type = self._metrics.render()
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
        """Tokens of the prompt that a request of `/v1/messages` leads to."""
        with self.gate.passing(request.url.path.rstrip("/")):
            admit(request, self.limits)
            count = await self.gate.read(request, self._prompt_tokens)
        return JSONResponse({"input_tokens": count})

    async def respond(self, request: Request, door: Door) -> Response:
        """A conversation's next turn, or a text's continuation."""
        route = request.url.path.rstrip("/")
        with self.gate.arriving(route):
            caller = admit(request, self.limits, audited=self._audit is not None)
            body, responses, tools = await self.gate.read(request, partial(self._prepare, door, caller))
        headers = {"x-request-id": responses[0].trace.id}
        if body.ignored:
            headers[_IGNORED] = header(body.ignored)
            self._tell_ignored(body.ignored)
        parts = [self._begin(request, route, door, responses, i, body, caller, tools) for i in range(len(responses))]
        if body.stream:
            return EventStream(parts, caller.view, headers, self.limits)
        try:
            return await whole(request, parts, caller.view, headers)
        finally:
            await close(parts)

    def _begin(
        self,
        request: Request,
        route: str,
        door: Door,
        responses: Sequence[GuardedResponse],
        index: int,
        body: Body,
        caller: Caller,
        tools: ToolUse | None,
    ) -> Part:
        """Starts the clock of one choice and everything that counts."""
        response = responses[index]
        first = response.request
        assert isinstance(first, Stream), "a response begins with a stream"
        policy = caller.key.policy if caller.key is not None else self.guard.policy
        chat, decoy = isinstance(body, ChatRequest), policy.decoy
        engine = cast(AsyncBackend, self.guard.backend)
        if random.random() < _TIMED:
            engine = Stopwatch(engine, self._metrics.observe_step_seconds)
        logprobs = None
        if first.sampling.logprobs is not None:
            context = first.token_ids if not chat or body.prefill else ()
            hidden = engine.eos_ids | frozenset(self.guard.spec.ids)
            logprobs = ShownLogprobs(response.trace, self.guard.tokenizer, hidden, context)
            engine = logprobs.of(engine)
        if caller.alarm_at is not None:
            engine = Alarmed(engine, caller.alarm_at)
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
        around.enter_context(self._metrics.open())
        span = around.enter_context(
            self._telemetry.span(response.trace.id, route, self.limits.name, dict(request.headers))
        )

        def tell(exchange: Exchange) -> None:
            self.open.discard(exchange)
            with around:
                span.finish(response.trace, exchange.end, input_tokens=len(first.token_ids))
            self._tell(route, exchange, body, caller)

        events = adrive(response, engine, self.guard.judge)
        closing = self.limits.closing_text if chat and not decoy else ""
        exchange = Exchange(response, events, self.limits.request_timeout, tell, closing)
        self.open.add(exchange)
        return exchange, answer

    def _tell(self, route: str, exchange: Exchange, body: Body, caller: Caller) -> None:
        """Counts and logs a request that is over."""
        trace, end = exchange.response.trace, exchange.end
        self._metrics.observe(
            trace,
            route=route,
            streamed=bool(body.stream),
            overridden=caller.override is not None,
            seconds_to_first=exchange.seconds_to_first,
            seconds=exchange.seconds,
            end=end,
        )
        real = caller.override is None and caller.alarm_at is None
        # Whether the client stayed to read the end does not matter.
        if self._strikes is not None and real and trace.facts().end == "halted":
            self._strikes.count(_conversation(body, caller))
        if end == "fault":
            self.readiness.doubt()
        elif end in ("done", "halted"):
            self.readiness.trust()
        log.request(
            trace,
            request_id=trace.id,
            route=route,
            end=end,
            seconds=exchange.seconds,
            streamed=bool(body.stream),
            seconds_to_first=exchange.seconds_to_first,
            overridden=caller.override is not None,
        )
        if self._audit is not None:
            by = "operator" if caller.override is not None else None
            self._audit.record(
                trace,
                user=body.user_id,
                request_id=trace.id,
                overridden_by=by,
                reason=caller.override,
                thresholds=caller.key.thresholds.values if caller.key is not None else None,
            )
        if self._record is not None and caller.alarm_at is None:
            self._record(trace)

    def _prepare(
        self, door: Door, caller: Caller, content: bytes
    ) -> tuple[Body, list[GuardedResponse], ToolUse | None]:
        """The request, the responses to it, one per choice, and what they may call; in a thread."""
        body = parse(door.request, content, refuse_unknown=self.limits.unknown_fields == "refuse")
        check_model(body.model, self.limits)
        if self._strikes is not None and caller.override is None:
            self._strikes.check(_conversation(body, caller))
        tools = self._tools.use(body)
        responses = choices_of(self.guard, body, caller, self.limits, door.prefix, tools)
        if caller.override is not None and self._audit is not None:
            try:
                for response in responses:
                    self._audit.begin_override(body.user_id, caller.override, response.trace.id)
            except RedflagError as error:
                raise ApiError(503, str(error), "audit_log_failed") from error
        return body, responses, tools

    def _prompt_tokens(self, content: bytes) -> int:
        body = parse(CountRequest, content)
        check_model(body.model, self.limits)
        tools = self._tools.use(body)
        asked, possible = body.asked_thinking(), self.guard.can_think
        thinking = thinking_of(asked, [], possible=possible, refuse_unknown=False)
        try:
            first = self.guard.respond(body.input(), thinking=thinking, tools=tools).request
        except RedflagError as error:
            raise ApiError(400, str(error), "invalid_value", param=body.param) from error
        assert isinstance(first, Stream), "a response begins with a stream"
        return len(first.token_ids)

    def _tell_ignored(self, names: list[str]) -> None:
        for name in map(escaped, names):
            if name not in self._ignored and len(self._ignored) < _MOST_NAMES:
                self._ignored.add(name)
                _log.info("ignored the request field %s, which is unknown here or changes no token", name)

    def _count(self, text: str) -> int:
        try:
            return len(text_ids(self.guard.tokenizer, text, self.guard.spec))
        except Exception:  # An operator's text that no tokenizer reads is shown all the same.
            return 0

    def _model(self) -> dict[str, Any]:
        return {"id": self.limits.name, "object": "model", "created": self._since, "owned_by": "redflag"}
