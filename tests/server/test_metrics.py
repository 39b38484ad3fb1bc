"""What was counted is what happened, and no label can grow without end."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from redflag.server import metrics as module
from redflag.server.faults import fault_class
from redflag.server.metrics import ENDS, Metrics
from redflag.trace import Alarm, Done, Escalation, Halt, Reflection, Resume, Text, Trace


def trace(*events, tokens=6):
    return Trace(
        categories=("weapons", "fraud"),
        token_ids=list(range(tokens)),
        flag_probs=[(0.1, 0.2)] * tokens,
        scores=[(0.1, 0.2)] * tokens,
        events=list(events),
    )


def observe(metrics, response, end="done", **options):
    given = dict(route="/v1/chat/completions", streamed=True, overridden=False, seconds_to_first=0.2, seconds=0.9)
    metrics.observe(response, end=end, **(given | options))


def samples(metrics):
    """Everything that is not zero: name and labels -> value, without the process's own figures."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if sample.value and not sample.name.endswith(("_created", "_bucket")) and family.name[:8] != "process_":
                found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(metrics, name, **labels):
    return samples(metrics).get((f"redflag_{name}", tuple(sorted(labels.items()))), 0.0)


ROUTE = {"route": "/v1/chat/completions", "streamed": "true"}


def test_a_response_without_an_alarm():
    metrics = Metrics()
    observe(metrics, trace(Text(0, (0, 1, 2, 3), "abcd"), Text(4, (4, 5), "ef"), Done(6, "stop")))
    times = (("streamed", "true"),)
    assert samples(metrics) == {
        ("redflag_requests_total", tuple(sorted({**ROUTE, "end": "done"}.items()))): 1,
        ("redflag_tokens_generated_total", ()): 6,
        ("redflag_tokens_released_total", ()): 6,
        ("redflag_first_text_seconds_count", times): 1,
        ("redflag_first_text_seconds_sum", times): 0.2,
        ("redflag_response_seconds_count", times): 1,
        ("redflag_response_seconds_sum", times): 0.9,
    }


def test_a_response_that_is_reviewed_twice_and_halted():
    metrics = Metrics()
    events = (
        Text(0, (0, 1), "ab"),
        Alarm(2, "weapons", 0.9, 0.5, "reflect"),
        Reflection(2, (7, 8, 9), "harmless", 0.1),
        Resume(3),
        Text(2, (2, 3), "cd"),
        Alarm(4, "fraud", 0.8, 0.5, "escalate"),
        Alarm(4, "weapons", 0.8, 0.5, "continue"),
        Escalation(5, "unanswered", 1.0, "TimeoutError"),
        Halt(4, "alarm", "fraud"),
    )
    observe(metrics, trace(*events, tokens=5), "halted", streamed=False, seconds_to_first=None)
    assert value(metrics, "alarms_total", category="weapons", action="reflect") == 1
    assert value(metrics, "alarms_total", category="weapons", action="continue") == 1
    assert value(metrics, "alarms_total", category="fraud", action="escalate") == 1
    assert value(metrics, "reflections_total", verdict="harmless") == 1
    assert value(metrics, "escalations_total", verdict="unanswered") == 1
    assert value(metrics, "failures_total", reason="judge") == 1
    assert value(metrics, "resumes_total") == 1
    assert value(metrics, "halts_total", reason="alarm", category="fraud") == 1
    assert (value(metrics, "exposed_tokens_count"), value(metrics, "exposed_tokens_sum")) == (1, 4)
    assert (value(metrics, "wait_tokens_count"), value(metrics, "wait_tokens_sum")) == (1, 3)
    assert (value(metrics, "tokens_generated_total"), value(metrics, "tokens_released_total")) == (8, 4)
    assert value(metrics, "first_text_seconds_count", streamed="false") == 0
    assert value(metrics, "requests_total", **{**ROUTE, "streamed": "false", "end": "halted"}) == 1


FAULTS = [
    ("ConnectionError: the server went away", "engine_lost"),
    ("ConnectionResetError: [Errno 104]", "engine_lost"),
    ("ClientConnectorError: Cannot connect", "engine_lost"),
    ("ServerDisconnectedError: x", "engine_lost"),
    ("ClientPayloadError: x", "engine_lost"),
    ("OSError: disk", "engine_lost"),
    ("TimeoutError: the server is late", "timeout"),
    ("SocketTimeoutError: x", "timeout"),
    ("BusyError: 68 responses", "busy"),
    ("RedflagError: the prompt is too long", "engine_refused"),
    ("the engine refused to go on", "engine_refused"),
    ("the engine chose flag id 7, which has to be masked", "flag_chosen"),
    ("ConnectionError: the server chose token 4, which logit_bias bans", "flag_chosen"),
    ("step 3: a flag probability must be at least 0 and at most 1 (got nan). The step cannot be judged.", "unjudged"),
    ("ConnectionError: the server sent a token without log-probabilities", "unjudged"),
    ("token 4 cannot be decoded: ValueError: x", "decode"),
    ("the verdict on the alarm at step 3 must be in [0, 1] (got nan)", "verdict"),
    ("no verdict can be read from the probabilities (0.0, 0.0)", "verdict"),
    ("OutOfMemoryError: CUDA out of memory", "memory"),
    ("MemoryError: ", "memory"),
    ("KeyError: 'how to build a bomb'", "other"),
    ("", "other"),
]


@pytest.mark.parametrize(("detail", "kind"), FAULTS)
def test_a_fault_is_counted_by_its_class_and_its_text_is_not_shown(detail, kind):
    assert fault_class(detail) == kind
    metrics = Metrics()
    observe(metrics, trace(Text(0, (0,), "a"), Halt(1, "fault", detail=detail)), "fault")
    assert value(metrics, "failures_total", reason=kind) == 1
    assert value(metrics, "halts_total", reason="fault", category="") == 1
    assert value(metrics, "exposed_tokens_count") == 0
    assert b"bomb" not in metrics.render()[0]


def test_a_replacement_that_failed_is_a_failure():
    metrics = Metrics()
    observe(metrics, trace(Halt(2, "alarm", "fraud", "no replacement: KeyError: x")), "halted")
    assert value(metrics, "failures_total", reason="replacement") == 1


@pytest.mark.parametrize("end", ENDS)
def test_every_end_is_counted_also_of_a_request_that_was_never_begun(end):
    metrics = Metrics()
    observe(metrics, Trace(), end, seconds_to_first=None, overridden=True)
    assert value(metrics, "requests_total", **ROUTE, end=end) == 1
    assert value(metrics, "overrides_total") == 1


def test_no_label_grows_without_end_whatever_comes():
    metrics = Metrics()
    for i in range(300):
        events = (
            Alarm(0, f"category {i}", 0.9, 0.5, f"action {i}"),
            Reflection(0, (), f"verdict {i}", 0.5),
            Escalation(0, f"verdict {i}", 0.5),
            Halt(0, f"reason {i}", f"category {i}", f"detail {i}"),
        )
        observe(metrics, trace(*events), f"end {i}", route=f"/route/{i}")
    found = samples(metrics)
    assert len(found) < 4 * module._MOST_VALUES
    assert sum(count for (name, _), count in found.items() if name == "redflag_requests_total") == 300
    assert sum(count for (name, _), count in found.items() if name == "redflag_alarms_total") == 300
    assert value(metrics, "reflections_total", verdict="other") == 300


def test_requests_in_flight_the_queue_and_the_rest():
    metrics = Metrics()
    with metrics.open(), metrics.open():
        assert value(metrics, "in_flight") == 2
        with pytest.raises(ValueError, match="broken"), metrics.open():
            raise ValueError("broken")
    assert value(metrics, "in_flight") == 0
    depth = [3, 5]
    metrics.watch_queue(lambda: tuple(depth))
    assert (value(metrics, "queue_depth", state="active"), value(metrics, "queue_depth", state="waiting")) == (3, 5)
    depth[1] = 6
    assert value(metrics, "queue_depth", state="waiting") == 6
    metrics.audit_failed()
    assert value(metrics, "audit_failures_total") == 1
    for seconds in (2e-5, 3e-4):
        metrics.observe_step_seconds(seconds)
    assert value(metrics, "step_seconds_count") == 2
    assert value(metrics, "step_seconds_sum") == pytest.approx(3.2e-4)


def test_two_servers_in_one_process_do_not_meet_and_threads_lose_nothing():
    one, other = Metrics(), Metrics()

    def work():
        for _ in range(200):
            with one.open():
                observe(one, trace(Text(0, (0,), "a"), Done(1, "stop")))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(one, "requests_total", **ROUTE, end="done") == 800
    assert value(one, "in_flight") == 0
    assert samples(other) == {}


def test_the_table_in_the_documentation_names_every_metric_and_its_labels():
    metrics = Metrics()
    observe(metrics, trace(Alarm(0, "fraud", 0.9, 0.5, "halt"), Halt(0, "alarm", "fraud")), "halted")
    registry = metrics._registry
    real = {}
    for collector in list(registry._collector_to_names):
        if hasattr(collector, "_labelnames"):
            suffix = "_total" if collector._type == "counter" else ""
            real[collector._name + suffix] = (collector._type, set(collector._labelnames))
    rows = [line.split("|")[1:4] for line in module.__doc__.splitlines() if line.startswith("| `redflag_")]
    documented = {
        name.strip(" `"): (kind.strip(), {part.strip(" `") for part in labels.split(":")[0].split(",")} - {""})
        for name, kind, labels in rows
    }
    assert documented == real
