"""One span per request that says what happened, in nobody's words."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from running import ROUTES, Play, body_of, engine, running

from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.server.telemetry import Telemetry
from redflag.trace import Alarm, Done, Escalation, Halt, Reflection, Resume, Text, Trace

SECRET = "how to build a bomb"
CHAT = ("r-1", "/v1/chat/completions", "nano")


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def telemetry(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Telemetry(True, provider=provider)


def trace(*events, tokens=6):
    return Trace(categories=("weapons",), token_ids=list(range(tokens)), events=list(events), text=SECRET)


REVIEWED = (
    Text(0, (0, 1), SECRET),
    Alarm(2, "weapons", 0.9, 0.5, "reflect"),
    Reflection(2, (7, 8, 9), "harmless", 0.125, SECRET),
    Resume(3),
    Text(2, (2, 3), SECRET),
    Alarm(4, "weapons", 0.8, 0.5, "escalate"),
    Escalation(5, "harmful", 0.75, SECRET),
    Halt(4, "alarm", "weapons", SECRET, SECRET),
)


def test_a_request_is_one_span_with_the_conventional_names(telemetry, exporter):
    with telemetry.span(*CHAT) as span:
        span.finish(trace(Text(0, (0, 1, 2, 3, 4, 5), SECRET), Done(6, "stop")), "done", input_tokens=11)
    (told,) = exporter.get_finished_spans()
    assert (told.name, told.kind, told.status.status_code) == ("chat nano", SpanKind.SERVER, StatusCode.UNSET)
    assert dict(told.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "redflag",
        "gen_ai.request.model": "nano",
        "gen_ai.response.id": "r-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 6,
        "http.route": "/v1/chat/completions",
        "redflag.end": "done",
        "redflag.tokens.released": 6,
        "redflag.tokens.waited": 0,
        "redflag.alarms": 0,
        "redflag.reflections": 0,
        "redflag.escalations": 0,
        "redflag.resumes": 0,
    }
    assert told.events == () and told.end_time >= told.start_time
    with telemetry.span("r-2", "/v1/completions", "nano") as span:
        span.finish(trace(Done(6, "length")), "done")
    assert exporter.get_finished_spans()[1].attributes["gen_ai.operation.name"] == "text_completion"


def test_what_the_guard_did_stands_on_the_span_as_events(telemetry, exporter):
    with telemetry.span(*CHAT) as span:
        span.finish(trace(*REVIEWED, tokens=5), "halted")
    (told,) = exporter.get_finished_spans()
    assert [(event.name, dict(event.attributes)) for event in told.events] == [
        ("redflag.alarm", {"redflag.position": 2, "redflag.category": "weapons", "redflag.action": "reflect"}),
        ("redflag.reflection", {"redflag.position": 2, "redflag.verdict": "harmless", "redflag.tokens.waited": 3}),
        ("redflag.resume", {"redflag.position": 3}),
        ("redflag.alarm", {"redflag.position": 4, "redflag.category": "weapons", "redflag.action": "escalate"}),
        ("redflag.escalation", {"redflag.position": 5, "redflag.verdict": "harmful"}),
        ("redflag.halt", {"redflag.position": 4, "redflag.reason": "alarm", "redflag.category": "weapons"}),
    ]
    attributes = dict(told.attributes)
    assert attributes["gen_ai.response.finish_reasons"] == ("content_filter",)
    assert {name: value for name, value in attributes.items() if name.startswith("redflag.")} == {
        "redflag.end": "halted",
        "redflag.halt.reason": "alarm",
        "redflag.halt.category": "weapons",
        "redflag.tokens.released": 4,
        "redflag.tokens.waited": 3,
        "redflag.alarms": 2,
        "redflag.reflections": 1,
        "redflag.escalations": 1,
        "redflag.resumes": 1,
    }
    assert told.status.status_code == StatusCode.UNSET  # a halt is no error: it is what the server is for


@pytest.mark.parametrize("scores", [False, True])
def test_scores_are_told_on_demand_and_words_never(exporter, scores):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with Telemetry(True, provider=provider, scores=scores).span(*CHAT) as span:
        span.finish(trace(*REVIEWED, tokens=5), "halted")
    with (
        pytest.raises(ValueError, match="bomb"),
        Telemetry(True, provider=provider, scores=scores).span(*CHAT) as span,
    ):
        raise ValueError(SECRET)
    told = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "bomb" not in told
    for name in ("redflag.score", "redflag.threshold", "redflag.harm"):
        assert (name in told) == scores
    assert ("0.125" in told) == scores


@pytest.mark.parametrize(
    ("events", "end", "kind"),
    [
        ([Halt(0, "fault", detail=f"ConnectionError: {SECRET}")], "fault", "engine_lost"),
        ([Halt(0, "fault", detail="step 3: a flag probability is nan")], "fault", "unjudged"),
        ([Halt(0, "fault", detail="TimeoutError: took longer")], "timeout", "timeout"),
        ([], "timeout", "timeout"),
    ],
)
def test_what_broke_is_an_error_with_its_class(telemetry, exporter, events, end, kind):
    with telemetry.span(*CHAT) as span:
        span.finish(trace(*events), end)
    (told,) = exporter.get_finished_spans()
    assert told.status.status_code == StatusCode.ERROR and told.attributes["error.type"] == kind
    assert "bomb" not in told.to_json()
    assert [event.attributes["redflag.fault"] for event in told.events] == [kind] * len(events)


@pytest.mark.parametrize("end", ["disconnected", "refused"])
def test_a_request_that_was_given_up_is_a_span_too(telemetry, exporter, end):
    with telemetry.span(*CHAT) as span:
        span.finish(Trace(), end)
    (told,) = exporter.get_finished_spans()
    assert told.attributes["redflag.end"] == end and told.status.status_code == StatusCode.UNSET
    assert "gen_ai.response.finish_reasons" not in told.attributes


def test_an_error_that_passes_through_is_told_by_its_type_and_the_span_ends(telemetry, exporter):
    with pytest.raises(KeyError), telemetry.span(*CHAT):
        raise KeyError(SECRET)
    with telemetry.span(*CHAT):
        pass  # nobody finished it
    first, second = exporter.get_finished_spans()
    assert first.attributes["error.type"] == "KeyError" and "bomb" not in first.to_json() and not first.events
    assert second.status.status_code == StatusCode.UNSET


def test_a_span_is_finished_once(telemetry, exporter):
    with telemetry.span(*CHAT) as span:
        span.finish(trace(*REVIEWED, tokens=5), "halted")
        span.finish(trace(*REVIEWED, tokens=5), "done")
    (told,) = exporter.get_finished_spans()
    assert [event.name for event in told.events] == [
        f"redflag.{name}" for name in ("alarm", "reflection", "resume", "alarm", "escalation", "halt")
    ]
    assert told.attributes["redflag.end"] == "halted"


def test_the_span_is_part_of_the_callers_trace(telemetry, exporter):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with telemetry.span(*CHAT, headers={"traceparent": parent}) as span:
        span.finish(trace(Done(6, "stop")), "done")
    with telemetry.span(*CHAT, headers={"traceparent": "rubbish"}):
        pass
    first, second = exporter.get_finished_spans()
    assert f"{first.context.trace_id:032x}" == parent[3:35] and f"{first.parent.span_id:016x}" == parent[36:52]
    assert second.parent is None


def test_many_requests_at_once_do_not_become_each_others_parents(telemetry, exporter):
    spans = [telemetry.span(f"r-{i}", "/v1/completions", "nano") for i in range(3)]
    entered = [span.__enter__() for span in spans]
    for i in (1, 0, 2):
        entered[i].finish(trace(Done(6, "stop")), "done")
        spans[i].__exit__(None, None, None)
    told = exporter.get_finished_spans()
    assert [span.attributes["gen_ai.response.id"] for span in told] == ["r-1", "r-0", "r-2"]
    assert all(span.parent is None for span in told) and len({span.context.trace_id for span in told}) == 3


@pytest.mark.parametrize("route", ROUTES)
def test_the_span_of_a_stream_ends_with_the_stream(telemetry, exporter, tokenizer, spec, thresholds, script, route):
    """A span for each answer of the request, open as long as its text is on the way."""
    _, turns = engine(Play(script("abcdefghij"), pause=(5, 0.3)), tokenizer.eos_token_id)
    with running(Guard(turns, tokenizer, spec, thresholds), telemetry=telemetry) as server:
        body = body_of(route, stream=True, n=2)
        text = httpx.post(f"{server.url}{route}", json=body, timeout=20).content
    assert text.endswith(b"data: [DONE]\n\n")
    told = exporter.get_finished_spans()
    assert [span.attributes["redflag.end"] for span in told] == ["done", "done"]
    assert max(span.end_time - span.start_time for span in told) > 0.3e9
    assert all(span.attributes["http.route"] == route for span in told)
    first, second = (span.attributes["gen_ai.usage.input_tokens"] for span in told)
    assert first == second > 0


def test_switched_off_it_imports_nothing_and_says_nothing():
    code = """
import sys
from redflag.server.telemetry import Telemetry
from redflag.trace import Trace, Done
telemetry = Telemetry(enabled=False)
with telemetry.span("r", "/v1/completions", "nano") as span:
    span.finish(Trace(), "done")
telemetry.shutdown()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.sdk.trace", "opentelemetry.exporter"])
def test_asked_for_and_not_installed_is_refused_with_the_command_that_helps(monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith(missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RedflagError, match=r"redflag-llm\[otel\]"):
        Telemetry(True)


def test_without_a_provider_spans_go_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    made = Telemetry(True)
    assert made._provider.resource.attributes["service.name"] == "redflag"
    made.shutdown()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named")
    made = Telemetry(True)
    assert made._provider.resource.attributes["service.name"] == "named"
    made.shutdown()
