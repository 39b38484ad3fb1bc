"""What an operator sees at the end of a response: numbers, and what stayed hidden."""

from __future__ import annotations

import math
from typing import Any

from redflag.trace import Trace


def operator_view(trace: Trace) -> dict[str, Any]:
    """What an operator sees at the end of a response, and nobody else: numbers, and what stayed hidden.

    `alarms`, `reflections`, `escalations` in order; `peak`: category -> highest score; `waited`: hidden tokens;
    `thought`: tokens and peaks of the thought, if there was one (`peak` is then the answer's);
    `detail`: what went wrong, for a fault; `end`: how it really ended, also behind a decoy.
    """
    facts, end = trace.facts(), trace.end
    return {
        "end": {"kind": type(end).__name__.lower(), "reason": end.reason} if end is not None else None,
        "detail": facts.detail,
        "peak": {name: _number(facts.step_peaks.get(name, 0.0)) for name in trace.categories},
        "waited": facts.waited,
        **({"thought": _thought(trace)} if facts.thought_tokens else {}),
        "alarms": [
            {
                "position": event.position,
                "category": event.category,
                "score": _number(event.score),
                "threshold": _number(event.threshold),
                "action": event.action,
            }
            for event in facts.alarms
        ],
        "reflections": [
            {"position": event.position, "verdict": event.verdict, "harm": _number(event.harm), "text": event.text}
            for event in facts.reflections
        ],
        "escalations": [
            {"position": event.position, "verdict": event.verdict, "harm": _number(event.harm), "detail": event.detail}
            for event in facts.escalations
        ],
    }


def _thought(trace: Trace) -> dict[str, Any]:
    facts = trace.facts()
    return {"tokens": facts.thought_tokens, "peak": {k: _number(peak) for k, peak in facts.thought_peaks.items()}}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no others
