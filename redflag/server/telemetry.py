"""OpenTelemetry spans, one per response, if switched on; nothing is imported otherwise.

`gen_ai.*` follows the semantic conventions for generative AI, which have no names for guardrails yet: these are
`redflag.*`.

| attribute of the span | is |
|---|---|
| `gen_ai.operation.name` | `chat` or `text_completion` |
| `gen_ai.provider.name` | `redflag` |
| `gen_ai.request.model` | the model's name |
| `gen_ai.response.id` | the request's id |
| `gen_ai.response.finish_reasons` | `stop`, `length`, `content_filter` (an alarm) or `error` (a fault) |
| `gen_ai.usage.input_tokens` | tokens of the prompt |
| `gen_ai.usage.output_tokens` | generated tokens of the response, without hidden ones |
| `error.type` | class of the fault, if any |
| `http.route` | the path |
| `redflag.end` | `done`, `halted`, `fault`, `disconnected`, `refused`, `timeout` |
| `redflag.halt.reason`, `redflag.halt.category` | why a response was halted |
| `redflag.tokens.released`, `redflag.tokens.waited` | tokens shown; hidden tokens |
| `redflag.alarms`, `redflag.reflections`, `redflag.escalations`, `redflag.resumes` | how many |

The span's events `redflag.alarm`, `.reflection`, `.escalation`, `.resume` and `.halt` have position, category, action
and verdict. They never have text, and scores only on demand.

OpenTelemetry's own instrumentation of FastAPI is not used: it has one span per HTTP request, which may have several
responses, with addresses, queries and the texts of exceptions.

Needs `pip install redflag-llm[otel]`; the environment says where spans go (`OTEL_EXPORTER_OTLP_ENDPOINT`, ...).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from redflag.errors import RedflagError
from redflag.server.faults import fault_class
from redflag.trace import Event, Halt, Trace

_FAILED = ("fault", "timeout")  # ends that are the server's errors
# Fields of events; none may quote a response. Those of `_SCORES` only on demand.
_NAMES = ("category", "action", "verdict", "reason")
_SCORES = ("score", "threshold", "harm")


class Span:
    """The span of one response; without one of OpenTelemetry's it does nothing."""

    def __init__(self, span: Any = None, scores: bool = False) -> None:
        self._span, self._scores = span, scores
        self.finished = span is None

    def finish(self, trace: Trace, end: str, *, input_tokens: int | None = None) -> None:
        """Sets the attributes of a finished response; `end` as in `Metrics.observe`. Idempotent."""
        if self.finished:
            return
        self.finished = True
        facts = trace.facts()
        for event in facts.decisions:
            self._span.add_event(f"redflag.{type(event).__name__.lower()}", _attributes(event, self._scores))
        halt = {} if facts.halt is None else _attributes(facts.halt, False)
        reason = {"alarm": "content_filter", "fault": "error"}.get(facts.reason or "", facts.reason)
        attributes = {
            "redflag.end": end,
            "gen_ai.response.finish_reasons": None if reason is None else [reason],
            "gen_ai.usage.input_tokens": input_tokens,
            "gen_ai.usage.output_tokens": len(trace.token_ids),
            "redflag.tokens.released": facts.released,
            "redflag.tokens.waited": facts.waited,
            "redflag.alarms": len(facts.alarms),
            "redflag.reflections": len(facts.reflections),
            "redflag.escalations": len(facts.escalations),
            "redflag.resumes": facts.resumes,
            **{f"redflag.halt.{name}": halt.get(f"redflag.{name}") for name in ("reason", "category", "fault")},
        }
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if end in _FAILED:
            fault = fault_class(facts.detail) if facts.halt is not None else end
            self.fail("timeout" if end == "timeout" else fault)

    def fail(self, kind: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))


class Telemetry:
    """Creates the spans, if switched on.

    Example:
        >>> telemetry = Telemetry(enabled=False)
        >>> with telemetry.span("r-1", "/v1/chat/completions", "nano") as span:
        ...     span.finish(Trace(), "disconnected")
    """

    def __init__(self, enabled: bool, *, scores: bool = False, provider: Any = None) -> None:
        """Connects to the collector that the environment names.

        Args:
            enabled: False: spans do nothing.
            scores: Events also have scores, thresholds and harm.
            provider: The caller's `TracerProvider`, in place of one with the OTLP exporter.

        Raises:
            RedflagError: OpenTelemetry is not installed.
        """
        self._tracer: Any = None
        self._provider: Any = None
        self._scores = scores
        if not enabled:
            return
        if provider is None:
            provider = self._provider = _provider()
        self._tracer = provider.get_tracer("redflag")

    @contextmanager
    def span(self, request_id: str, route: str, model: str, headers: Mapping[str, str] | None = None) -> Iterator[Span]:
        """The span of one response; `traceparent` in `headers` (lower-case names) puts it into the caller's trace."""
        if self._tracer is None:
            yield Span()
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        operation = "text_completion" if route == "/v1/completions" else "chat"
        # It is never the current span: several tasks ask for a response, and a current span belongs to one task.
        inner = self._tracer.start_span(
            f"{operation} {model}",
            context=TraceContextTextMapPropagator().extract(headers or {}),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "redflag",
                "gen_ai.request.model": model,
                "gen_ai.response.id": request_id,
                "http.route": route,
            },
        )
        span = Span(inner, self._scores)
        try:
            yield span
        except BaseException as error:
            if not span.finished:
                span.fail(type(error).__name__)  # not the text, which may quote a request
            raise
        finally:
            inner.end()

    def shutdown(self) -> None:
        """Sends the remaining spans; a provider of the caller's is left alone."""
        if self._provider is not None:
            self._provider.shutdown()


def _attributes(event: Event, scores: bool) -> dict[str, Any]:
    """An event's attributes; of a fault the class in place of the detail, which may quote a response."""
    names = ("position", *_NAMES, *(_SCORES if scores else ()))
    attributes = {f"redflag.{name}": value for name in names if (value := getattr(event, name, None)) is not None}
    if event.counts_as:
        attributes[f"redflag.tokens.{event.counts_as}"] = event.tokens(event.counts_as)
    if isinstance(event, Halt) and event.reason == "fault":
        attributes["redflag.fault"] = fault_class(event.detail)
    return attributes


def _provider() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RedflagError(
            f"telemetry must be off, since {error.name} is not installed; or run `pip install 'redflag-llm[otel]'`"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", "redflag")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
