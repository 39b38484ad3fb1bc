"""What an operator, and nobody else, sees at the end of a response: scores, alarms and reviews."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from redflag.trace import Event, Trace


def operator_view(trace: Trace) -> dict[str, Any]:
    """JSON for the operator.

    `end`: how it really ended, also behind a decoy; `detail`: what failed; `peak`: category -> highest score (of the
    answer, if there was a thought); `waited`: hidden tokens; `thought`: tokens and peaks of the thought, if any;
    `alarms`, `reflections`, `escalations`: in order.
    """
    facts, end = trace.facts(), trace.end
    return {
        "end": {"kind": type(end).__name__.lower(), "reason": end.reason} if end is not None else None,
        "detail": facts.detail,
        "peak": {name: json_number(facts.step_peaks.get(name, 0.0)) for name in trace.categories},
        "waited": facts.waited,
        **({"thought": _thought(trace)} if facts.thought_tokens else {}),
        "alarms": _fields(facts.alarms, "position", "category", "score", "threshold", "action"),
        "reflections": _fields(facts.reflections, "position", "verdict", "harm", "text"),
        "escalations": _fields(facts.escalations, "position", "verdict", "harm", "detail"),
    }


def _fields(events: Iterable[Event], *names: str) -> list[dict[str, Any]]:
    return [{name: json_number(getattr(event, name)) for name in names} for event in events]


def _thought(trace: Trace) -> dict[str, Any]:
    facts = trace.facts()
    return {"tokens": facts.thought_tokens, "peak": {k: json_number(peak) for k, peak in facts.thought_peaks.items()}}


def json_number(value: Any) -> Any:
    """The value; None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
