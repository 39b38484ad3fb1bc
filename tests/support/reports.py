"""A small report with hand-made numbers, and responses whose alarms can be read off."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redflag.lab import report as reporting
from redflag.lab.report.evaluation import Evaluation, parse
from redflag.lab.report.viewer_data import ShownResponse
from redflag.watching.thresholds import Thresholds

# What a response, an id, a name must never be able to do in a page.
HOSTILE = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=2</script>&lt;b&gt;{{7*7}}'


def read(report: Mapping[str, Any]) -> Evaluation:
    """A report from what its file would hold."""
    found: Evaluation = parse(Evaluation, json.dumps(report), "report.json")
    return found


def write(report: Mapping[str, Any], traces: Sequence[Mapping[str, Any]], folder: str | Path) -> None:
    """Writes a report from what its file would hold, and responses from theirs."""
    reporting.write(read(report), [ShownResponse(**trace) for trace in traces], folder)


def part(tpr: float, *, few: bool = False, harmful: int = 200, harmless: int = 1000) -> dict[str, Any]:
    """A slice in which so many are caught at 1%."""
    return {
        "harmful": harmful,
        "harmless": harmless,
        "few": few,
        "auroc": 0.9871,
        "auroc_interval": [0.9812, 0.9923],
        "average_precision": None,
        "average_precision_interval": None,
        "tpr": {
            "0.001": None,
            "0.01": {"tpr": tpr, "interval": [tpr - 0.05, tpr + 0.04], "realised_fpr": 0.009, "threshold": 0.75},
            "0.05": {"tpr": 0.975, "interval": [0.95, 0.99], "realised_fpr": 0.047, "threshold": 0.4},
        },
        "partial": "0.001 needs 1000 harmless rows",
    }


def make_report(categories: tuple[str, ...] = ("harm",)) -> dict[str, Any]:
    """A flag that has everything, a baseline that has little, a cascade, an attack that released, a silent one."""
    exposed = {"0": (2.25, 0.5), "4": (0.75, 0.8), "sentence": (0.5, 0.9), "end": (0.0, 1.0)}
    delay = {
        "responses": 120,
        "tolerance": 2,
        "early": 0.125,
        "on_time": 0.625,
        "late": 0.15,
        "missed": 0.1,
        "median": 1,
        "median_interval": [0, 2],
        "median_abs": 1.5,
        "realised_fpr": 0.0123,
        "histogram": {"edges": [None, -2, 0, 1, 3, None], "counts": [15, 20, 30, 25, 18], "missed": 12},
        "exposed": {k: {"mean": m, "median": 1, "p90": 6, "none": none} for k, (m, none) in exposed.items()},
    }
    flag = {
        "kind": "flag",
        "what": "The flag's probability.",
        "monitor": {"aggregation": "max", "window": 1, "decay": 0.2, "prior": 0.01, "drift": 0.5, "warm_up": 0},
        "cost": {"microseconds_per_token": 1.5, "flops_per_token": 2048, "note": "one core"},
        "compute": {"flops": 0.0005, "seconds": 0.031},
        "pooled": part(0.912),
        "slices": {
            "source": {"plain": part(0.887), "rare": part(0.643, few=True, harmful=7)},
            "lang": {"en": part(0.876)},
        },
        "roc": {"fpr": [0.0, 0.01, 1.0], "tpr": [0.4, 0.912, 1.0], "low": [0.3, 0.862, 1.0], "high": [0.5, 0.952, 1.0]},
        "threshold": {
            **Thresholds(
                dict.fromkeys(categories, 0.5), target_fpr=0.01, guarantee="expected", suggested_hold_back=3
            ).to_dict(),
            "fitted_on": {"split": "calibration", "harmless": 1234},
        },
        "in_force": {
            "tpr": 0.8642,
            "tpr_interval": [0.8111, 0.9012],
            "realised_fpr": 0.0123,
            "realised_fpr_interval": [0.0051, 0.0234],
            "right_category": None,
        },
        "delay": {"constructed": delay, "natural": None, "unknown": None},
        "earliness": {
            "k": [1, 8, 64],
            "auroc": [0.512, 0.734, 0.981],
            "low": [0.45, 0.7, 0.97],
            "high": [0.57, 0.77, 0.99],
            "detected": [0.0, 0.33, 0.86],
            "false_alarms": [0.0, 0.002, 0.0123],
        },
        "reliability": {
            "bins": [
                {"low": 0.0, "high": 0.5, "count": 90, "mean": 0.11, "rate": 0.13, "interval": [0.07, 0.22]},
                {"low": 0.5, "high": 1.0, "count": 60, "mean": 0.91, "rate": 0.85, "interval": [0.75, 0.93]},
            ],
            "brier": 0.0456,
            "of": "response peak against harmful",
            "per_step": None,
        },
        "over_refusal": {
            "xstest": {"harmless": 250, "alarms": 4, "rate": 0.016, "interval": [0.0044, 0.0405], "few": False}
        },
    }
    attack = {
        "name": "prefill",
        "setting": "20 tokens",
        "adaptive": False,
        "requests": 40,
        "attempts": 80,
        "queries": 80,
        "harm_produced": {"rate": 0.775, "interval": [0.6162, 0.8916]},
        "harm_released": {"rate": 0.05, "interval": [0.0061, 0.1692]},
        "harmful_tokens": {"produced": 31.25, "released": 1.125},
        "unjudged": 1,
        "alarm_rate": {"rate": 0.9, "interval": None},
        "seconds": 12.5,
        "note": None,
        "flag_peak": {"median": 0.991, "q10": 0.42, "q90": 0.999},
        "delay": {"median": 2, "missed": 0.05},
    }
    silent = {
        **dict.fromkeys(attack),
        "name": "gcg",
        "adaptive": True,
        "harm_produced": {"rate": 0.3, "interval": None},
    }
    return {
        "format": 1,
        "title": "A report",
        "made": {"command": "redflag evaluate --seed 0", "seeds": [0, 1], "rows": {"train": None}},
        "methods": {
            "redflag": flag,
            "TF-IDF": {"kind": "baseline", "pooled": part(0.701), "compute": {"flops": 4.7e-05, "seconds": None}},
            "TF-IDF then redflag": {
                "kind": "cascade",
                "pooled": part(0.688),
                "compute": {"flops": 0.0123, "seconds": 0.05},
                "cascade": {"asked": 0.051, "asked_interval": [0.04, 0.065], "read": 0.03},
            },
        },
        "model_pass": {"microseconds_per_token": 48.5, "flops_per_token": 4.2e6, "note": None},
        "language": None,
        "attacks": [attack, silent],
        "judge": {"name": "oracle", "answered": 79, "unanswered": 1},
        "warnings": ["Seven rows are few."],
    }


def bare_report(monitor: dict[str, Any] | None = None, thresholds: dict[str, float] | None = None) -> dict[str, Any]:
    """Nothing but the viewer's needs: no charts, and so a page that loads at once."""
    method = {"kind": "flag", "pooled": {"harmful": 3, "harmless": 3}, "monitor": monitor}
    if thresholds is not None:
        method["threshold"] = {"values": thresholds, **({} if monitor is None else {"monitor": monitor})}
    return {"format": 1, "title": "Bare", "methods": {"redflag": method}}


def trace(name: str, peaks: list[float], *, onset: int | None = None, **more: Any) -> dict[str, Any]:
    """A response of one flag with these probabilities: one token each, and the last one ends the turn."""
    return {
        "id": name,
        "set": "rows",
        "source": "plain",
        "category": None if onset is None else "theft",
        "onset": onset,
        "onset_source": None if onset is None else "constructed",
        "given": None,
        "judged": None,
        "tokens": [f" {name}{t}" for t in range(len(peaks) - 1)],
        "probs": [[p] for p in peaks],
        "harmful": onset is not None,
        **more,
    }


def make_traces() -> list[dict[str, Any]]:
    """At 0.5: late, ontime and early caught, hidden missed, loud a false alarm, calm quiet."""
    return copy.deepcopy(
        [
            trace("late", [0.01, 0.1, 0.2, 0.4, 0.9, 0.9], onset=2),
            trace("ontime", [0.01, 0.02, 0.6, 0.3], onset=2, source="rare"),
            trace("early", [0.7, 0.1, 0.1, 0.95, 0.1], onset=3),
            trace("hidden", [0.05, 0.3, 0.3, 0.45], onset=1, set="prefill", given="Sure, here", judged=True),
            trace("loud", [0.1, 0.55, 0.2]),
            trace("calm", [0.001, 0.002, 0.3], tokens=[" calm", HOSTILE]),
        ]
    )


def set_at(report: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a report with another value at a path."""
    changed = copy.deepcopy(report)
    at: Any = changed
    *way, last = path.split("/")
    for part in way:
        at = at[int(part) if isinstance(at, list) else part]
    at[int(last) if isinstance(at, list) else last] = value
    return changed
