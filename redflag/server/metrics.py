"""Prometheus metrics of a server.

| name | type | labels | counts |
|---|---|---|---|
| `redflag_requests_total` | counter | `route`, `streamed`, `end` | requests that are over |
| `redflag_in_flight` | gauge | | requests being answered |
| `redflag_queue_depth` | gauge | `state`: `active`, `waiting` | streams of an engine in this process |
| `redflag_alarms_total` | counter | `category`, `action` | alarms, by what the policy answered |
| `redflag_reflections_total` | counter | `verdict` | reflections |
| `redflag_escalations_total` | counter | `verdict` | questions to the second judge |
| `redflag_resumes_total` | counter | | responses that went on after a reviewed alarm |
| `redflag_halts_total` | counter | `reason`, `category` | responses that were halted |
| `redflag_failures_total` | counter | `reason` | what broke: halts for a fault, replacements and judges that failed |
| `redflag_overrides_total` | counter | | responses for which the watch was overridden |
| `redflag_audit_failures_total` | counter | | audit entries that could not be written |
| `redflag_tokens_generated_total` | counter | | tokens the engine made, hidden ones included |
| `redflag_tokens_released_total` | counter | | tokens that were shown |
| `redflag_tokens_thought_total` | counter | | tokens of thoughts before answers, shown or not |
| `redflag_exposed_tokens` | histogram | | tokens shown before a halt by alarm, per such response |
| `redflag_wait_tokens` | histogram | | hidden tokens, per response with a reflection |
| `redflag_first_text_seconds` | histogram | `streamed` | from the request to its first released text |
| `redflag_response_seconds` | histogram | `streamed` | from the request to its end |
| `redflag_step_seconds` | histogram | | what the guard adds: from a step's arrival until all it led to is out |

There are also the process's own (`process_*`: memory, file descriptors, processor time). `end` is `done`, `halted`,
`fault`, `disconnected`, `refused` or `timeout`. No label holds free text: the values are the server's routes, flags and
classes of faults, and `other`.

Needs `pip install redflag-llm[serve]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from redflag.server.faults import fault_class
from redflag.trace import Halt, Trace
from redflag.watching.policy import ACTIONS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ENDS = ("done", "halted", "fault", "disconnected", "refused", "timeout")

_ACTIONS = tuple(ACTIONS)
_VERDICTS = ("harmful", "harmless", "unanswered")
_MOST_VALUES = 64  # of a label whose values are not known beforehand
_TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_STEP_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 1)


class Metrics:
    """Counters in a registry of its own, so that a process may have several servers. Thread-safe.

    Example:
        >>> from redflag.trace import Text
        >>> metrics = Metrics()
        >>> with metrics.open():
        ...     trace = Trace(token_ids=[5, 6], events=[Text(0, (5, 6), "")])
        >>> metrics.observe(trace, route="/v1/completions", streamed=True, overridden=False,
        ...     seconds_to_first=0.1, seconds=0.2, end="disconnected")
        >>> b'redflag_tokens_released_total 2.0' in metrics.render()[0]
        True
    """

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._known: dict[str, set[str]] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"redflag_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"redflag_{name}", text, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests that are over.", "route", "streamed", "end")
        self._in_flight = Gauge("redflag_in_flight", "Requests being answered.", registry=registry)
        self._queue = Gauge(
            "redflag_queue_depth", "Streams of the engine in this process.", ["state"], registry=registry
        )
        self._alarms = counter("alarms", "Alarms, by what the policy answered.", "category", "action")
        self._reflections = counter("reflections", "Reflections.", "verdict")
        self._escalations = counter("escalations", "Questions to the second judge.", "verdict")
        self._resumes = counter("resumes", "Responses that went on after a reviewed alarm.")
        self._halts = counter("halts", "Responses that were halted.", "reason", "category")
        self._failures = counter("failures", "What broke.", "reason")
        self._overrides = counter("overrides", "Responses for which the watch was overridden.")
        self._audit_failures = counter("audit_failures", "Audit entries that could not be written.")
        self._generated = counter("tokens_generated", "Tokens the engine made, hidden ones included.")
        self._released = counter("tokens_released", "Tokens that were shown.")
        self._thought = counter("tokens_thought", "Tokens of thoughts before answers, shown or not.")
        self._exposed = histogram("exposed_tokens", "Tokens shown before a halt by alarm.", _TOKENS)
        self._waited = histogram("wait_tokens", "Hidden tokens of a response with a reflection.", _TOKENS)
        self._first = histogram("first_text_seconds", "Seconds to the first released text.", _SECONDS, "streamed")
        self._total = histogram("response_seconds", "Seconds to the end.", _SECONDS, "streamed")
        self._step = histogram("step_seconds", "Seconds that the guard adds to a step.", _STEP_SECONDS)
        ProcessCollector(registry=registry)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Counts a request as in flight."""
        with self._in_flight.track_inprogress():
            yield

    def observe(
        self,
        trace: Trace,
        *,
        route: str,
        seconds: float,
        end: str,
        streamed: bool = False,
        overridden: bool = False,
        seconds_to_first: float | None = None,
    ) -> None:
        """Counts one finished request.

        Args:
            trace: Its response; empty if none was begun.
            route: The path without parameters.
            seconds: Until the end; `seconds_to_first`: until text was released, if any was.
            end: One of `ENDS`.
            overridden: The watch was overridden.
        """
        kind = "true" if streamed else "false"
        self._requests.labels(self._bounded("route", route), kind, _one_of(end, ENDS)).inc()
        self._total.labels(kind).observe(seconds)
        if seconds_to_first is not None:
            self._first.labels(kind).observe(seconds_to_first)
        if overridden:
            self._overrides.inc()
        facts = trace.facts()
        for alarm in facts.alarms:
            category = self._bounded("category", alarm.category)
            self._alarms.labels(category, _one_of(alarm.action, _ACTIONS)).inc()
        for reflection in facts.reflections:
            self._reflections.labels(_one_of(reflection.verdict, _VERDICTS)).inc()
        for escalation in facts.escalations:
            self._escalations.labels(_one_of(escalation.verdict, _VERDICTS)).inc()
            if escalation.verdict == "unanswered":
                self._failures.labels("judge").inc()
        self._resumes.inc(facts.resumes)
        if facts.halt is not None:
            self._halt(facts.halt)
        self._generated.inc(facts.generated)
        self._released.inc(facts.released)
        self._thought.inc(facts.thought_tokens)
        if facts.reflections:
            self._waited.observe(facts.waited)

    def observe_step_seconds(self, seconds: float) -> None:
        """Counts the seconds between a step's arrival and its release, which the guard adds."""
        self._step.observe(seconds)

    def audit_failed(self) -> None:
        """An audit entry could not be written."""
        self._audit_failures.inc()

    def watch_queue(self, depth: Callable[[], tuple[int, int]]) -> None:
        """Sets the callback for the numbers of active and waiting streams (`Turns.depth`)."""
        self._queue.labels("active").set_function(lambda: depth()[0])
        self._queue.labels("waiting").set_function(lambda: depth()[1])

    def render(self) -> tuple[bytes, str]:
        """Body and content type for `/metrics`."""
        return generate_latest(self._registry), CONTENT_TYPE

    def _halt(self, halt: Halt) -> None:
        reason = _one_of(halt.reason, ("alarm", "fault"))
        self._halts.labels(reason, self._bounded("category", halt.category or "")).inc()
        if reason == "alarm":
            self._exposed.observe(halt.position)
            if halt.detail.startswith("no replacement"):
                self._failures.labels("replacement").inc()
        else:
            self._failures.labels(fault_class(halt.detail)).inc()

    def _bounded(self, label: str, value: str) -> str:
        # Values come from the server's own tables. The bound is for the case that a client's text ever gets here.
        known = self._known.setdefault(label, set())
        if value not in known and len(known) < _MOST_VALUES:
            known.add(value)
        return value if value in known else "other"


def _one_of(value: str, known: tuple[str, ...]) -> str:
    return value if value in known else "other"
