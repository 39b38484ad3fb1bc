"""Structured logs on standard error: one line per request, in JSON or as text.

Logs are read by more people than traces are, so they never have a word of a prompt or a response, and scores only on
demand: `FIELDS` lists what a line may have. Of an exception, they have its type and place, and of other libraries'
messages at most the beginning of the first line.
"""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from structlog.processors import JSONRenderer
from structlog.stdlib import ExtraAdder, ProcessorFormatter
from structlog.types import EventDict, Processor

from redflag.errors import RedflagError
from redflag.server.faults import fault_class
from redflag.trace import Trace

_requests = logging.getLogger("redflag.request")

# Fields that a line may have, in this order; all others are dropped.
FIELDS = (
    "request_id", "route", "streamed", "end", "reason", "category", "fault", "alarms", "reviews", "tokens", "released",
    "waited", "thought", "seconds", "seconds_to_first", "overridden", "model", "url",
)  # fmt: skip
_LONGEST = 200
_MARK = "_redflag_handler"


def setup(json: bool = False, level: int | str = "INFO", *, scores: bool = False, stream: TextIO | None = None) -> None:
    """Sends the logs of this process to standard error. A second call replaces the first.

    Other libraries are logged from WARNING on, since their debug lines quote requests.

    Args:
        json: One JSON object per line, not text.
        level: Least severity of redflag's and the HTTP server's lines, by name or number.
        scores: The line of a request also has the highest score of each category.
        stream: In place of standard error.

    Raises:
        RedflagError: The level is unknown.

    Example:
        >>> import sys
        >>> setup(json=True, stream=sys.stdout)
        >>> request(Trace(token_ids=[5]), request_id="r-1", route="/v1/completions", end="disconnected",
        ...     seconds=0.5)  # doctest: +ELLIPSIS
        {"time": "...Z", "level": "info", "logger": "redflag.request", "message": "request", "request_id": "r-1", ...}
        >>> teardown()
    """
    number = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int):
        raise RedflagError(f"level must be debug, info, warning or error (got {level!r})")
    teardown()
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    attached = [*FIELDS, "detail", *(["redflag_scores"] if scores else [])]
    form: list[Processor] = [_machine, JSONRenderer(default=str)] if json else [_people]
    handler.setFormatter(ProcessorFormatter(foreign_pre_chain=[ExtraAdder(attached)], processors=[_allowed, *form]))
    setattr(handler, _MARK, True)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(max(number, logging.WARNING))
    for name in ("redflag", "uvicorn"):
        logging.getLogger(name).setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # its own handlers would repeat every line
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # There is a line for every request already, and uvicorn's has the query.
    logging.getLogger("uvicorn.access").disabled = True


def teardown() -> None:
    """Removes the handlers of `setup`."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if hasattr(handler, _MARK)]:
        root.removeHandler(handler)


def request(
    trace: Trace,
    *,
    request_id: str,
    route: str,
    end: str,
    seconds: float,
    streamed: bool | None = None,
    seconds_to_first: float | None = None,
    overridden: bool = False,
) -> None:
    """Logs one finished request; a warning after a fault or time-out. Arguments as for `Metrics.observe`."""
    facts = trace.facts()
    fields: dict[str, Any] = {
        "request_id": request_id,
        "route": route,
        "streamed": streamed,
        "end": end,
        "reason": facts.reason,
        "category": facts.category,
        "fault": fault_class(facts.detail) if facts.end == "fault" else None,
        "alarms": len(facts.alarms),
        "reviews": len(facts.reviews),
        "tokens": len(trace.token_ids),
        "released": facts.released,
        "waited": facts.waited,
        "thought": facts.thought_tokens or None,
        "seconds": round(seconds, 4),
        "seconds_to_first": None if seconds_to_first is None else round(seconds_to_first, 4),
        "overridden": overridden or None,
    }
    peaks = dict.fromkeys(trace.categories, 0.0) | facts.peaks
    level = logging.WARNING if end in ("fault", "timeout") else logging.INFO
    _requests.log(level, "request", extra={**fields, "redflag_scores": peaks})


def _allowed(logger: Any, method: str, event: EventDict) -> EventDict:
    """The fields of a line in order: those of `FIELDS`, and an exception's type and place."""
    record: logging.LogRecord = event["_record"]
    text = str(event["event"])
    if not record.name.startswith("redflag"):
        text = text.partition("\n")[0]
        text = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    line = {"time": record.created, "level": record.levelname, "logger": record.name, "message": text}
    line |= {name: event[name] for name in FIELDS if event.get(name) is not None}
    if peaks := event.get("redflag_scores"):
        line["scores"] = {name: round(value, 6) for name, value in peaks.items()}
    if detail := event.get("detail"):
        line.setdefault("fault", fault_class(str(detail)))
    if (error := event.get("exc_info", (None, None))[1]) is not None:
        line["error"] = type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        line["where"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return line


def _machine(logger: Any, method: str, line: EventDict) -> EventDict:
    time = datetime.fromtimestamp(line["time"], timezone.utc).isoformat(timespec="milliseconds")
    return {**line, "time": time.replace("+00:00", "Z"), "level": line["level"].lower()}


def _people(logger: Any, method: str, line: EventDict) -> str:
    time = datetime.fromtimestamp(line.pop("time"), timezone.utc)
    head = f"{time:%H:%M:%S} {line.pop('level'):<7} {line.pop('message')}"
    del line["logger"]
    text = " ".join([head, *(f"{name}={_plain(value)}" for name, value in line.items())])
    # A field could otherwise forge lines or send escape sequences to the terminal.
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{item:g}" for name, item in value.items())
    if isinstance(value, list):
        return " < ".join(map(str, reversed(value)))
    return f"{value:g}" if isinstance(value, float) else str(value)
