"""Whatever is not of the shape that the sections declare is refused before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from redflag.lab.report import breakdown, compute, detection, timing
from redflag.lab.report.shapes import ANY, COUNT, TEXT, Needed, check_shape, is_a, refusal

FORMAT = 1

METHOD = {
    "kind": Needed(is_a('"flag", "baseline" or "cascade"', lambda x: x in ("flag", "baseline", "cascade"))),
    **detection.FIGURES,
    **timing.FIGURES,
    **compute.FIGURES,
    **breakdown.FIGURES,
}
REPORT = {
    "format": Needed(is_a(f"the number {FORMAT}", lambda x: x == FORMAT)),
    "title": Needed(TEXT),
    "made": {str: ANY},
    "methods": Needed({str: Needed(METHOD)}),
    "model_pass": compute.COST,
    "language": breakdown.LANGUAGE,
    "attacks": [Needed(breakdown.ATTACK)],
    "judge": {"name": TEXT, "answered": COUNT, "unanswered": COUNT},
    "warnings": [Needed(TEXT)],
}


def check_report(report: Mapping[str, Any]) -> None:
    """Refuses what is no report.

    Raises:
        RedflagError: Names the first part that is missing or is not what it should be, and what it is.
    """
    _json_safe(report, "")
    check_shape(report, REPORT, "")
    if not report["methods"]:
        raise refusal("methods", {}, "at least one method")


def check_traces(traces: Sequence[Mapping[str, Any]]) -> int:
    """Refuses responses that the viewer could not show as they are.

    Returns:
        K, the number of flags; 1 where there are no responses.

    Raises:
        RedflagError: Names the response and what is wrong with it.
    """
    flags: int | None = None
    for number, trace in enumerate(traces):
        path = f"traces[{number}]"
        if not isinstance(trace, Mapping):
            raise refusal(path, trace, "an object")
        if not isinstance(trace.get("harmful"), bool):
            raise refusal(f"{path}.harmful", trace.get("harmful"), "true or false")
        tokens, onset = trace.get("tokens"), trace.get("onset")
        if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not all(isinstance(t, str) for t in tokens):
            raise refusal(f"{path}.tokens", tokens, "a list of texts")
        if onset is not None and (isinstance(onset, bool) or not isinstance(onset, int) or onset < 0):
            raise refusal(f"{path}.onset", onset, "a token index or null")
        for key in ("id", "set", "source", "category", "onset_source", "given"):
            if not isinstance(trace.get(key), str | None):
                raise refusal(f"{path}.{key}", trace[key], "a text or null")
        try:
            probs = np.asarray(trace.get("probs"), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise refusal(f"{path}.probs", trace.get("probs"), "a table of numbers, steps x flags") from error
        if probs.size == 0 and not tokens:
            continue
        if probs.ndim != 2 or len(probs) < len(tokens) or not probs.shape[1]:
            kind = f"at least one row of flag probabilities for each of the {len(tokens)} tokens"
            raise refusal(f"{path}.probs", f"a table of shape {probs.shape}", kind)
        if not ((probs >= 0) & (probs <= 1)).all():  # false for NaN
            bad = probs[~((probs >= 0) & (probs <= 1))][0]
            raise refusal(f"{path}.probs", float(bad), "a probability between 0 and 1 at every step")
        flags = probs.shape[1] if flags is None else flags
        if probs.shape[1] != flags:
            raise refusal(f"{path}.probs", f"{probs.shape[1]} flags", f"as many flags as before ({flags})")
    return flags or 1


def _json_safe(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise refusal(f"{path}.{key}".lstrip("."), key, "a text as its name")
            _json_safe(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _json_safe(inner, f"{path}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise refusal(path, value, "a finite number, or null where there is none")
    elif not isinstance(value, str | int | float | None):
        raise refusal(path, value, "a plain JSON value")
