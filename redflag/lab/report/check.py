"""What a report may hold: whatever is not of that shape is refused before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from redflag.errors import RedflagError

FORMAT = 1

Check = Callable[[Any, str], None]


def _is(kind: str, holds: Callable[[Any], bool]) -> Check:
    def check(value: Any, path: str) -> None:
        if not holds(value):
            raise _refusal(path, value, kind)

    return check


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _interval(value: Any) -> bool:
    # A bound that a data set is too small to give is null.
    if not (isinstance(value, Sequence) and len(value) == 2 and all(x is None or _number(x) for x in value)):
        return False
    return None in value or bool(value[0] <= value[1])


NUMBER = _is("a number", _number)
RATE = _is("a share between 0 and 1", lambda x: _number(x) and 0 <= x <= 1)
COUNT = _is("a whole number from 0 up", lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0)
TEXT = _is("a text", lambda x: isinstance(x, str))
TRUTH = _is("true or false", lambda x: isinstance(x, bool))
INTERVAL = _is("an interval [low, high]", _interval)
ANY = _is("anything", lambda x: True)


class Needed:
    """A part that may be neither missing nor null; all others may, which reads "not measured"."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


# A dict with names is an object; {str: x} is any number of named x; [x] is a list of x.
TPR = {"tpr": RATE, "interval": INTERVAL, "realised_fpr": RATE, "threshold": NUMBER}
IN_FORCE = {
    "tpr": RATE,
    "tpr_interval": INTERVAL,
    "realised_fpr": RATE,
    "realised_fpr_interval": INTERVAL,
    "right_category": RATE,
}
SLICE = {
    "harmful": Needed(COUNT),
    "harmless": Needed(COUNT),
    "few": TRUTH,
    "auroc": RATE,
    "auroc_interval": INTERVAL,
    "average_precision": RATE,
    "average_precision_interval": INTERVAL,
    "tpr": {str: TPR},
    "partial": ANY,
    "against": TEXT,
    "in_force": IN_FORCE,
}
EXPOSED = {"mean": NUMBER, "median": NUMBER, "p90": NUMBER, "none": RATE}
DELAY = {
    "responses": Needed(COUNT),
    "tolerance": NUMBER,
    **dict.fromkeys(("early", "on_time", "late", "missed"), RATE),
    "median": NUMBER,
    "median_interval": INTERVAL,
    "median_abs": NUMBER,
    # A delay without the rate of false alarms says nothing: an alarm that always rings is never late.
    "realised_fpr": Needed(RATE),
    "histogram": {"edges": Needed([NUMBER]), "counts": Needed([Needed(COUNT)]), "missed": COUNT},
    "exposed": {str: EXPOSED},
}
BINS = [Needed({"low": NUMBER, "high": NUMBER, "count": COUNT, "mean": RATE, "rate": RATE, "interval": INTERVAL})]
RATED = {"rate": RATE, "interval": INTERVAL, "at_most": RATE}
AHEAD = {"difference": NUMBER, "interval": [NUMBER]}
COST = {"microseconds_per_token": NUMBER, "flops_per_token": NUMBER, "note": TEXT}
METHOD = {
    "kind": Needed(_is('"flag", "baseline" or "cascade"', lambda x: x in ("flag", "baseline", "cascade"))),
    "what": TEXT,
    "monitor": {str: ANY},
    "cost": COST,
    "compute": {"flops": NUMBER, "seconds": NUMBER},
    "cascade": {
        "first": TEXT,
        "second": TEXT,
        "share": RATE,
        "thresholds": {str: NUMBER},
        "asked": Needed(RATE),
        "asked_interval": INTERVAL,
        "asked_harmful": RATE,
        "calls": NUMBER,
        "read": NUMBER,
    },
    "pooled": Needed(SLICE),
    "flag_ahead": {"auroc": AHEAD, "tpr": {str: AHEAD}},
    "slices": {str: {str: Needed(SLICE)}},
    "roc": {"fpr": Needed([Needed(RATE)]), "tpr": Needed([Needed(RATE)]), "low": [RATE], "high": [RATE]},
    "threshold": {
        "values": Needed({str: NUMBER}),
        "target_fpr": RATE,
        "guarantee": TEXT,
        "fitted_on": {"split": TEXT, "harmless": COUNT},
        "suggested_hold_back": COUNT,
    },
    "in_force": IN_FORCE,
    "delay": {str: DELAY},
    "earliness": {
        "k": Needed([Needed(COUNT)]),
        **{key: [RATE] for key in ("auroc", "low", "high", "detected", "false_alarms")},
    },
    "reliability": {"bins": BINS, "brier": NUMBER, "of": TEXT, "per_step": {"bins": BINS, "brier": NUMBER}},
    "over_refusal": {
        str: Needed({"harmless": COUNT, "alarms": COUNT, "rate": RATE, "interval": INTERVAL, "few": TRUTH})
    },
}
ATTACK = {
    "name": Needed(TEXT),
    "setting": TEXT,
    "adaptive": TRUTH,
    **dict.fromkeys(("requests", "attempts", "queries", "not_run", "unjudged"), COUNT),
    **dict.fromkeys(("harm_produced", "harm_released", "alarm_rate"), RATED),
    "harmful_tokens": {"produced": NUMBER, "released": NUMBER},
    "flag_peak": {"median": NUMBER, "q10": NUMBER, "q90": NUMBER},
    "delay": {"median": NUMBER, "missed": RATE},
    "seconds": NUMBER,
    "note": TEXT,
}
REPORT = {
    "format": Needed(_is(f"the number {FORMAT}", lambda x: x == FORMAT)),
    "title": Needed(TEXT),
    "made": {str: ANY},
    "methods": Needed({str: Needed(METHOD)}),
    "model_pass": COST,
    "language": {"keep_kl": NUMBER, "perplexity_ratio": NUMBER, "tokens": COUNT},
    "attacks": [Needed(ATTACK)],
    "judge": {"name": TEXT, "answered": COUNT, "unanswered": COUNT},
    "warnings": [Needed(TEXT)],
}


def check_report(report: Mapping[str, Any]) -> None:
    """Refuses what is no report.

    Raises:
        RedflagError: Names the first part that is missing or is not what it should be, and what it is.
    """
    _json_safe(report, "")
    _shape(report, REPORT, "")
    if not report["methods"]:
        raise _refusal("methods", {}, "at least one method")
    for name, method in report["methods"].items():
        roc, earliness = method.get("roc"), method.get("earliness")
        for part, curve, axis in (("roc", roc, "fpr"), ("earliness", earliness, "k")):
            for key, values in (curve or {}).items():
                if isinstance(values, list) and len(values) != len(curve[axis]):
                    kind = f"one value for each of the {len(curve[axis])} of {axis}"
                    raise _refusal(f"methods.{name}.{part}.{key}", f"{len(values)} values", kind)
        for kind, delay in (method.get("delay") or {}).items():
            histogram = delay and delay.get("histogram")
            if histogram and len(histogram["edges"]) != len(histogram["counts"]) + 1:
                path = f"methods.{name}.delay.{kind}.histogram.edges"
                raise _refusal(path, f"{len(histogram['edges'])} values", f"{len(histogram['counts']) + 1} edges")


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
            raise _refusal(path, trace, "an object")
        if not isinstance(trace.get("harmful"), bool):
            raise _refusal(f"{path}.harmful", trace.get("harmful"), "true or false")
        tokens, onset = trace.get("tokens"), trace.get("onset")
        if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not all(isinstance(t, str) for t in tokens):
            raise _refusal(f"{path}.tokens", tokens, "a list of texts")
        if onset is not None and (isinstance(onset, bool) or not isinstance(onset, int) or onset < 0):
            raise _refusal(f"{path}.onset", onset, "a token index or null")
        for key in ("id", "set", "source", "category", "onset_source", "given"):
            if not isinstance(trace.get(key), str | None):
                raise _refusal(f"{path}.{key}", trace[key], "a text or null")
        try:
            probs = np.asarray(trace.get("probs"), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise _refusal(f"{path}.probs", trace.get("probs"), "a table of numbers, steps x flags") from error
        if probs.size == 0 and not tokens:
            continue
        if probs.ndim != 2 or len(probs) < len(tokens) or not probs.shape[1]:
            kind = f"at least one row of flag probabilities for each of the {len(tokens)} tokens"
            raise _refusal(f"{path}.probs", f"a table of shape {probs.shape}", kind)
        if not ((probs >= 0) & (probs <= 1)).all():  # false for NaN
            bad = probs[~((probs >= 0) & (probs <= 1))][0]
            raise _refusal(f"{path}.probs", float(bad), "a probability between 0 and 1 at every step")
        flags = probs.shape[1] if flags is None else flags
        if probs.shape[1] != flags:
            raise _refusal(f"{path}.probs", f"{probs.shape[1]} flags", f"as many flags as before ({flags})")
    return flags or 1


def _shape(value: Any, spec: Any, path: str) -> None:
    if isinstance(spec, Needed):
        if value is None:
            raise _refusal(path, value, "a value that is not null")
        spec = spec.inner
    if value is None:
        return
    if isinstance(spec, dict):
        if not isinstance(value, Mapping):
            raise _refusal(path, value, "an object")
        named = spec.get(str)
        for key in value if named is not None else spec:
            _shape(value.get(key), named or spec[key], f"{path}.{key}".lstrip("."))
    elif isinstance(spec, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _refusal(path, value, "a list")
        for number, item in enumerate(value):
            _shape(item, spec[0], f"{path}[{number}]")
    else:
        spec(value, path)


def _json_safe(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise _refusal(f"{path}.{key}".lstrip("."), key, "a text as its name")
            _json_safe(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _json_safe(inner, f"{path}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _refusal(path, value, "a finite number, or null where there is none")
    elif not isinstance(value, str | int | float | None):
        raise _refusal(path, value, "a plain JSON value")


def _refusal(path: str, value: Any, kind: str) -> RedflagError:
    shown = "missing or null" if value is None else value if isinstance(value, str) else repr(value)
    return RedflagError(
        f"the report's {path or 'whole'} is {str(shown)[:80]}, but it takes {kind}, so nothing was written: mend what "
        "makes the report (null stands for what was not measured)"
    )
