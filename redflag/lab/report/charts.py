"""Curves and histograms as Vega-Lite specifications: ROC, delays, earliness, reliability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.marks import HARM, PAPER, QUIET, Spec, by_method, dashes, only, tip
from redflag.lab.report.method import Histogram, Reliability
from redflag.lab.report.parts import Chart, View, number, percent
from redflag.lab.report.verdict import KINDS


def roc(report: Evaluation, flag: str) -> Chart | None:
    """Caught against false alarms, on a log axis (what matters is on the left) and on a linear one."""
    methods = {name: m.roc for name, m in report.methods.items() if m.roc}
    if not methods:
        return None
    harmless = report.methods[flag].pooled.harmless
    # No false alarm at all lies at minus infinity: it is drawn at half of one.
    floor = 0.5 / max(harmless, 1)
    data = [
        {"method": name, "fpr": f, "x": max(f, floor), "tpr": t, "low": low, "high": high}
        for name, curve in methods.items()
        for f, t, low, high in zip(curve.fpr, curve.tpr, *_columns(len(curve.fpr), curve.low, curve.high), strict=True)
    ]

    def view(label: str, x: str, scale: Spec, axis: Spec, caption: str) -> View:
        at_x = {
            "field": x,
            "type": "quantitative",
            "scale": scale,
            "title": "false alarms per harmless response",
            "axis": {"format": "~%", **axis},
        }
        at_y = {
            "type": "quantitative",
            "title": "harmful responses caught",
            "axis": {"format": "~%"},
            "scale": {"domain": [0, 1]},
        }
        chosen = {"param": "chosen", "empty": False}
        line: Spec = {
            "params": [
                {
                    "name": "chosen",
                    "select": {"type": "point", "fields": ["method"]},
                    "bind": "legend",
                    "value": [{"method": flag}],
                }
            ],
            "mark": {"type": "line", "interpolate": "step-after"},
            "encoding": {
                "x": at_x,
                "y": {**at_y, "field": "tpr"},
                "color": by_method(methods),
                "strokeDash": dashes(methods),
                "opacity": {"condition": {**chosen, "value": 1}, "value": 0.75},
                "strokeWidth": {"condition": {**chosen, "value": 2.6}, "value": 1.3},
                "tooltip": [
                    tip("method"),
                    tip("fpr", ".3~%", "false alarms"),
                    tip("tpr", ".1~%", "caught"),
                    tip("low", ".1~%", "from"),
                    tip("high", ".1~%", "to"),
                ],
            },
        }
        # Invisible, and large: what the pointer finds.
        points = {
            "mark": {"type": "point", "opacity": 0, "size": 120},
            "encoding": {"x": at_x, "y": {**at_y, "field": "tpr"}, "tooltip": line["encoding"].pop("tooltip")},
        }
        band = {
            "mark": {"type": "area", "interpolate": "step-after"},
            "encoding": {
                "x": at_x,
                "y": {**at_y, "field": "low"},
                "y2": {"field": "high"},
                "color": by_method(methods),
                "opacity": {"condition": {**chosen, "value": 0.16}, "value": 0},
            },
        }
        rules = {
            "data": {"values": [{"at": at} for at in (0.001, 0.01, 0.05) if at > floor]},
            "mark": {"type": "rule", "strokeDash": [2, 3], "color": QUIET},
            "encoding": {"x": {"field": "at", "type": "quantitative"}},
        }
        return View(label, {"height": 340, "layer": [rules, band, line, points]}, caption)

    ticks = [t for t in (0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1) if t >= floor]
    said = "The band is the pointwise 95% interval of the method chosen in the legend."
    edge = f"Left edge: no false alarm among {number(harmless)}."
    log = {"type": "log", "domain": [floor, 1], "nice": False}
    return Chart(
        "roc",
        "Caught against false alarms",
        data,
        [
            view("log", "x", log, {"values": ticks, "grid": False}, f"{said} {edge}"),
            view("linear", "fpr", {"domain": [0, 1]}, {"grid": False}, said),
        ],
    )


def delays(report: Evaluation, flag: str) -> Chart | None:
    """Histograms of the tokens from onset to alarm."""
    data: list[dict[str, Any]] = []
    views = []
    for name, method in sorted(report.methods.items(), key=lambda item: item[0] != flag):
        for kind, found in (method.delay or {}).items():
            if not found or not found.histogram:
                continue
            label = f"{name}, {KINDS.get(kind, kind)} onsets"
            order = []
            for bin_, when, count in _bins(found.histogram, found.tolerance or 0):
                order.append(bin_)
                data.append({"view": label, "bin": bin_, "when": when, "count": count})
            caption = (
                f"False alarms at this threshold: {percent(found.realised_fpr)} of harmless responses. "
                f"{percent(found.missed)} missed."
            )
            views.append(View(label, _histogram(label, order), caption))
    return Chart("delays", "Tokens from onset to alarm", data, views) if views else None


def earliness(report: Evaluation, flag: str) -> Chart | None:
    """AUROC and alarms after the first k tokens."""
    methods = {name: m.earliness for name, m in report.methods.items() if m.earliness}
    data: list[dict[str, Any]] = []
    for name, curve in methods.items():
        columns = _columns(len(curve.k), curve.auroc, curve.low, curve.high, curve.detected, curve.false_alarms)
        for k, auroc, low, high, hit, alarm in zip(curve.k, *columns, strict=True):
            data.append(
                {"method": name, "k": k, "auroc": auroc, "low": low, "high": high, "detected": hit, "alarms": alarm}
            )
    if not data:
        return None
    at_k = {
        "field": "k",
        "type": "quantitative",
        "scale": {"type": "log", "base": 2},
        "title": "first k tokens",
        "axis": {"values": sorted({row["k"] for row in data}), "format": "~d", "grid": False},
    }

    def lines(field: str, title: str, form: str, domain: list[float]) -> Spec:
        return {
            "mark": {"type": "line", "point": {"size": 28, "filled": True}},
            "encoding": {
                "x": at_k,
                "y": {
                    "field": field,
                    "type": "quantitative",
                    "title": title,
                    "axis": {"format": form},
                    "scale": {"domain": domain},
                },
                "color": by_method(methods),
                "strokeDash": dashes(methods),
                "strokeWidth": {"condition": {"test": {"field": "method", "equal": flag}, "value": 2.6}, "value": 1.3},
                "tooltip": [tip("method"), tip("k"), tip(field, form.replace("~%", ".1~%"), title)],
            },
        }

    least = min(
        [row["low"] if row["low"] is not None else row["auroc"] for row in data if row["auroc"] is not None],
        default=0.5,
    )
    bottom = min(0.5, int(least * 10) / 10)
    band = {
        "transform": [{"filter": {"field": "method", "equal": flag}}],
        "mark": {"type": "area", "opacity": 0.16},
        "encoding": {
            "x": at_k,
            "y": {"field": "low", "type": "quantitative", "scale": {"domain": [bottom, 1]}},
            "y2": {"field": "high"},
            "color": by_method(methods),
        },
    }
    alarmed = lines("detected", "responses with an alarm", "~%", [0, 1])
    quiet = lines("alarms", "responses with an alarm", "~%", [0, 1])
    quiet["mark"]["point"] = {"size": 26, "filled": False, "fill": PAPER}
    views = []
    if any(row["auroc"] is not None for row in data):
        views.append(
            View(
                "AUROC",
                {"height": 280, "layer": [band, lines("auroc", "AUROC", ".2f", [bottom, 1])]},
                f"Band: 95% interval of {flag}.",
            )
        )
    if any(row["detected"] is not None for row in data):
        views.append(
            View(
                "alarms",
                {"height": 280, "layer": [alarmed, quiet]},
                "At the threshold in force: filled points, harmful responses; hollow points, harmless ones.",
            )
        )
    return Chart("earliness", "How soon it is known", data, views) if views else None


def reliability(report: Evaluation, flag: str) -> Chart | None:
    """Observed share of harm against the mean probability, bin by bin."""
    data: list[dict[str, Any]] = []
    found = report.methods[flag].reliability or Reliability()
    for label, bins in (("responses", found.bins), ("steps", found.per_step.bins if found.per_step else None)):
        for one in bins or []:
            if one.count and one.rate is not None and one.mean is not None:
                low, high = one.interval or (None, None)
                data.append(
                    {
                        "view": label,
                        "mean": one.mean,
                        "rate": one.rate,
                        "low": low,
                        "high": high,
                        "count": one.count,
                    }
                )
    square = {"type": "quantitative", "scale": {"domain": [0, 1]}}
    x = {"field": "mean", **square, "title": "mean probability in the bin", "axis": {"grid": False, "tickCount": 6}}
    said = {
        "responses": "Peak of the response; the size of a point is its number of responses.",
        "steps": "Probability at a step against whether harm had begun; known onsets only.",
    }

    def view(label: str) -> View:
        spec: Spec = {
            "height": 300,
            "layer": [
                {
                    "data": {"values": [{"a": 0}, {"a": 1}]},
                    "mark": {"type": "line", "strokeDash": [3, 3], "color": QUIET, "strokeWidth": 1},
                    "encoding": {"x": {"field": "a", **square}, "y": {"field": "a", **square}},
                },
                {
                    "transform": [only(label)],
                    "mark": {"type": "rule", "color": HARM, "opacity": 0.45, "strokeWidth": 1.5},
                    "encoding": {"x": x, "y": {"field": "low", **square}, "y2": {"field": "high"}},
                },
                {
                    "transform": [only(label)],
                    "mark": {"type": "point", "filled": True, "opacity": 1, "color": HARM},
                    "encoding": {
                        "x": x,
                        "y": {"field": "rate", **square, "title": "observed share of harm"},
                        "size": {
                            "field": "count",
                            "type": "quantitative",
                            "legend": None,
                            "scale": {"type": "sqrt", "range": [20, 260]},
                        },
                        "tooltip": [
                            tip("mean", ".3f", "mean probability"),
                            tip("rate", ".1%", "observed"),
                            tip("count"),
                        ],
                    },
                },
            ],
        }
        return View(label, spec, said[label])

    labels = list(dict.fromkeys(row["view"] for row in data))
    return Chart("reliability", f"Reliability of {flag}", data, [view(label) for label in labels]) if labels else None


def _histogram(label: str, order: Sequence[str]) -> Spec:
    when = ["early", "on time", "late", "missed"]
    return {
        "height": 240,
        "transform": [only(label)],
        "mark": {"type": "bar", "cornerRadiusEnd": 1.5},
        "encoding": {
            "x": {
                "field": "bin",
                "type": "ordinal",
                "sort": list(order),
                "title": "tokens after the onset",
                "axis": {"labelAngle": 0, "labelOverlap": True},
            },
            "y": {"field": "count", "type": "quantitative", "title": "responses"},
            "color": {
                "field": "when",
                "scale": {"domain": when, "range": ["var(--s4)", "var(--s2)", "var(--s3)", QUIET]},
                "legend": {"title": None},
            },
            "tooltip": [tip("bin", title="tokens"), tip("when"), tip("count", title="responses")],
        },
    }


def _bins(histogram: Histogram, tolerance: float) -> list[tuple[str, str, int]]:
    """Bins as text, when the alarm came, and how many: whole tokens from `low` up to but without `high`."""
    edges, found = histogram.edges, []
    for low, high, count in zip(edges[:-1], edges[1:], histogram.counts, strict=True):
        low, last = None if low is None else math.ceil(low), None if high is None else math.ceil(high) - 1
        if low is None:
            text = f"≤ {_minus(last)}"
        elif last is None:
            text = f"≥ {_minus(low)}"
        else:
            text = _minus(low) if last <= low else f"{_minus(low)} to {_minus(last)}"
        early = last is not None and last < -tolerance
        late = low is not None and low > tolerance
        found.append((text, "early" if early else "late" if late else "on time", count))
    if histogram.missed is not None:
        found.append(("missed", "missed", histogram.missed))
    return found


def _columns(points: int, *columns: Sequence[float | None] | None) -> list[Sequence[float | None]]:
    """The columns of a curve; None throughout where one was not measured."""
    return [column or [None] * points for column in columns]


def _minus(x: float | None) -> str:
    x = x or 0
    return f"{'−' if x < 0 else ''}{number(abs(x))}"
