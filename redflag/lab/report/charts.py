"""Curves, points and histograms as Vega-Lite specifications: ROC, delays, earliness, reliability, compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.marks import (
    DASHES,
    HARM,
    INK,
    PAPER,
    QUIET,
    Spec,
    by_method,
    coded,
    layer,
    measured,
    only,
    quantity,
    spread,
    tip,
    where,
)
from redflag.lab.report.method import Compute, Histogram, Method, Reliability
from redflag.lab.report.parts import Chart, View, number, percent

# What is drawn: "compute" of a method -> label of the view, what the axis counts.
VIEWS = {"flops": ("FLOPs", "FLOPs per token"), "seconds": ("measured", "seconds per token")}
# How a method of each kind is drawn.
COLOURS = {"flag": HARM, "baseline": "var(--calm)", "cascade": INK}
SHAPES = {"flag": "circle", "baseline": "circle", "cascade": "diamond"}


def roc(report: Evaluation, flag: str) -> Chart | None:
    """Caught against false alarms, on a log axis (what matters is on the left) and on a linear one."""
    methods = {name: m.roc for name, m in report.methods.items() if m.roc}
    if not methods:
        return None
    harmless = report.methods[flag].pooled.harmless
    # A rate of 0 lies at minus infinity: it is drawn at half a false alarm.
    floor = 0.5 / max(harmless, 1)
    data = [
        {"method": name, "fpr": f, "x": max(f, floor), "tpr": t, "low": low, "high": high}
        for name, curve in methods.items()
        for f, t, low, high in zip(curve.fpr, curve.tpr, *_columns(len(curve.fpr), curve.low, curve.high), strict=True)
    ]
    share = partial(quantity, title="harmful responses caught", scale=[0, 1], format="~%")
    chosen = {"name": "chosen", "select": {"type": "point", "fields": ["method"]}, "bind": "legend"}

    def if_chosen(value: float, otherwise: float) -> Spec:
        return {"condition": {"param": "chosen", "empty": False, "value": value}, "value": otherwise}

    band = {"y": share("low"), "y2": {"field": "high"}, "color": by_method(methods), "opacity": if_chosen(0.16, 0)}
    line = {
        "y": share("tpr"),
        "color": by_method(methods),
        "strokeDash": by_method(methods, DASHES),
        "opacity": if_chosen(1, 0.75),
        "strokeWidth": if_chosen(2.6, 1.3),
    }
    # Invisible and large, for the pointer.
    points = {
        "y": share("tpr"),
        "tooltip": [tip("method"), tip("fpr", ".3~%", "false alarms"), *spread("caught", "tpr", ".1~%")],
    }
    targets = {
        "data": {"values": [{"at": at} for at in (0.001, 0.01, 0.05) if at > floor]},
        **layer("rule", {"x": quantity("at")}, strokeDash=[2, 3], color=QUIET),
    }

    def view(label: str, x: Spec, caption: str) -> View:
        layers = [
            targets,
            layer("area", {"x": x, **band}, interpolate="step-after"),
            {
                "params": [{**chosen, "value": [{"method": flag}]}],
                **layer("line", {"x": x, **line}, interpolate="step-after"),
            },
            layer("point", {"x": x, **points}, opacity=0, size=120),
        ]
        return View(label, {"height": 340, "layer": layers}, caption)

    at_fpr = partial(quantity, title="false alarms per harmless response", format="~%", grid=False)
    ticks = [t for t in (0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1) if t >= floor]
    log = at_fpr("x", scale={"type": "log", "domain": [floor, 1], "nice": False}, values=ticks)
    caption = "The band is the pointwise 95% interval of the method chosen in the legend."
    views = [
        view("log", log, f"{caption} Left edge: no false alarm among {number(harmless)}."),
        view("linear", at_fpr("fpr", scale=[0, 1]), caption),
    ]
    return Chart("roc", "Caught against false alarms", data, views)


def delays(report: Evaluation, flag: str) -> Chart | None:
    """Histograms of the tokens from onset to alarm."""
    data: list[dict[str, Any]] = []
    views = []
    for name, method in sorted(report.methods.items(), key=lambda item: item[0] != flag):
        for kind, timing in (method.delay or {}).items():
            if not timing or not timing.histogram:
                continue
            label = f"{name}, {kind} onsets"
            bins = _bins(timing.histogram, timing.tolerance or 0)
            data += [{"view": label, "bin": bin_, "when": when, "count": count} for bin_, when, count in bins]
            caption = (
                f"False alarms at this threshold: {percent(timing.realised_fpr)} of harmless responses. "
                f"{percent(timing.missed)} missed."
            )
            views.append(View(label, _histogram(label, [bin_ for bin_, _, _ in bins]), caption))
    return Chart("delays", "Tokens from onset to alarm", data, views) if views else None


def earliness(report: Evaluation, flag: str) -> Chart | None:
    """AUROC and alarms after the first k tokens."""
    methods = {name: m.earliness for name, m in report.methods.items() if m.earliness}
    data: list[dict[str, Any]] = []
    for name, curve in methods.items():
        columns = _columns(len(curve.k), curve.auroc, curve.low, curve.high, curve.detected, curve.false_alarms)
        for values in zip(curve.k, *columns, strict=True):
            row = zip(("k", "auroc", "low", "high", "detected", "alarms"), values, strict=True)
            data.append({"method": name, **dict(row)})
    if not data:
        return None
    ticks = sorted({row["k"] for row in data})
    x = quantity("k", "first k tokens", {"type": "log", "base": 2}, values=ticks, format="~d", grid=False)
    ours = where("method", flag)

    def lines(field: str, title: str, form: str, bottom: float, **point: Any) -> Spec:
        encoding = {
            "x": x,
            "y": quantity(field, title, [bottom, 1], format=form),
            "color": by_method(methods),
            "strokeDash": by_method(methods, DASHES),
            "strokeWidth": {"condition": {"test": ours["filter"], "value": 2.6}, "value": 1.3},
            "tooltip": [tip("method"), tip("k"), tip(field, form.replace("~%", ".1~%"), title)],
        }
        return layer("line", encoding, point=point)

    filled: Spec = {"size": 28, "filled": True}
    views = []
    if known := [row for row in data if row["auroc"] is not None]:
        bottom = min(0.5, int(min(row["auroc"] if row["low"] is None else row["low"] for row in known) * 10) / 10)
        interval = {"y": quantity("low", scale=[bottom, 1]), "y2": {"field": "high"}}
        band = layer("area", {"x": x, **interval, "color": by_method(methods)}, ours, opacity=0.16)
        spec = {"height": 280, "layer": [band, lines("auroc", "AUROC", ".2f", bottom, **filled)]}
        views.append(View("AUROC", spec, f"Band: 95% interval of {flag}."))
    if any(row["detected"] is not None for row in data):
        alarms = partial(lines, title="responses with an alarm", form="~%", bottom=0)
        hollow = alarms("alarms", size=26, filled=False, fill=PAPER)
        caption = "At the threshold in force: filled points, harmful responses; hollow points, harmless ones."
        views.append(View("alarms", {"height": 280, "layer": [alarms("detected", **filled), hollow]}, caption))
    return Chart("earliness", "How soon it is known", data, views) if views else None


def reliability(report: Evaluation, flag: str) -> Chart | None:
    """Observed share of harm against the mean probability, bin by bin."""
    curve = report.methods[flag].reliability or Reliability()
    captions = {
        "responses": "Peak of the response; the size of a point is its number of responses.",
        "steps": "Probability at a step against whether harm had begun; known onsets only.",
    }
    bins = {"responses": curve.bins or [], "steps": curve.per_step.bins if curve.per_step else []}
    data = [
        measured(one.rate, one.interval, view=label, mean=one.mean, count=one.count)
        for label, parts in bins.items()
        for one in parts
        if one.count and one.rate is not None and one.mean is not None
    ]
    share = partial(quantity, scale=[0, 1])
    x = share("mean", "mean probability in the bin", grid=False, tickCount=6)
    diagonal = layer("line", {"x": share("a"), "y": share("a")}, strokeDash=[3, 3], color=QUIET, strokeWidth=1)
    point = {
        "x": x,
        "y": share("value", "observed share of harm"),
        "size": {**quantity("count", scale={"type": "sqrt", "range": [20, 260]}), "legend": None},
        "tooltip": [tip("mean", ".3f", "mean probability"), tip("value", ".1%", "observed"), tip("count")],
    }
    layers = [
        {"data": {"values": [{"a": 0}, {"a": 1}]}, **diagonal},
        layer("rule", {"x": x, "y": share("low"), "y2": {"field": "high"}}, color=HARM, opacity=0.45, strokeWidth=1.5),
        layer("point", point, filled=True, opacity=1, color=HARM),
    ]
    views = [
        View(label, {"height": 300, "transform": [only(label)], "layer": layers}, captions[label])
        for label in dict.fromkeys(row["view"] for row in data)
    ]
    return Chart("reliability", f"Reliability of {flag}", data, views) if views else None


def compute(methods: Mapping[str, Method], flag: str) -> Chart | None:
    """A point per method: relative compute on a log axis, what is caught upwards."""
    data: list[dict[str, Any]] = []
    views = []
    for key, (label, what) in VIEWS.items():
        shares = [x for m in methods.values() if (x := added_by(m, key)) is not None]
        positive = [x for x in shares if x > 0]
        if len(shares) < 2 or not positive:
            continue
        # A cost of 0 lies at minus infinity: it is drawn at a third of the smallest.
        floor = min(positive) / 3
        here = []
        for name, method in methods.items():
            added, point = added_by(method, key), method.pooled.at("0.01")
            if added is not None and point.tpr is not None:
                row = {"view": label, "method": name, "kind": "flag" if name == flag else method.kind, "added": added}
                here.append(measured(point.tpr, point.interval, **row, x=max(added, floor), label=point.tpr))
        least = min((row["value"] if row["low"] is None else row["low"] for row in here), default=0.0)
        bottom = math.floor(10 * least) / 10
        _set_apart(here, 1.0 - bottom)
        data += here
        caption = "Caught at 1% false alarms, with 95% intervals."
        caption += " Left edge: nothing is added." if 0 in shares else ""
        views.append(View(label, _compute(label, what, [floor, 3 * max(positive)], [bottom, 1.0]), caption))
    return Chart("compute", "Caught against relative compute", data, views) if views else None


def added_by(method: Method, key: str) -> float | None:
    """What a method adds to the model's own pass, as a share; None if that was not measured."""
    share: float | None = getattr(method.compute or Compute(), key)
    return share


def _histogram(label: str, order: Sequence[str]) -> Spec:
    axis = {"labelAngle": 0, "labelOverlap": True}
    colours = {"early": "var(--s4)", "on time": "var(--s2)", "late": "var(--s3)", "missed": QUIET}
    encoding = {
        "x": {"field": "bin", "type": "ordinal", "sort": list(order), "title": "tokens after the onset", "axis": axis},
        "y": quantity("count", "responses"),
        "color": coded("when", colours, legend=True),
        "tooltip": [tip("bin", title="tokens"), tip("when"), tip("count", title="responses")],
    }
    return {"height": 240, **layer("bar", encoding, only(label), cornerRadiusEnd=1.5)}


def _bins(histogram: Histogram, tolerance: float) -> list[tuple[str, str, int]]:
    """Bins as text, when the alarm came, and how many: whole tokens from `low` up to but without `high`."""
    edges, bins = histogram.edges, []
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
        bins.append((text, "early" if early else "late" if late else "on time", count))
    if histogram.missed is not None:
        bins.append(("missed", "missed", histogram.missed))
    return bins


def _columns(points: int, *columns: Sequence[float | None] | None) -> list[Sequence[float | None]]:
    """The columns of a curve; None throughout where one was not measured."""
    return [column or [None] * points for column in columns]


def _minus(x: float | None) -> str:
    x = x or 0
    return f"{'−' if x < 0 else ''}{number(abs(x))}"


def _set_apart(rows: list[dict[str, Any]], height: float) -> None:
    """Moves overlapping labels down, in a chart of 900 x 360 points: 6 to a letter, 12 to a line."""
    decades = math.log10(3 * max(row["x"] for row in rows) / min(row["x"] for row in rows)) if rows else 1.0
    line = height * 12 / 360
    placed: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (-row["value"], row["x"])):
        for other in placed:
            left, right = sorted((row, other), key=lambda one: float(one["x"]))
            gap = math.log10(right["x"] / left["x"]) * 900 / decades
            if gap < 6 * len(left["method"]) + 9 and abs(other["label"] - row["label"]) < line:
                row["label"] = other["label"] - line
        placed.append(row)


def _compute(label: str, what: str, across: list[float], up: list[float]) -> Spec:
    log = {"type": "log", "domain": across, "nice": False}
    x = quantity("x", f"added to the model's pass, {what}", log, format="~%", grid=False, tickCount=6)
    y = partial(quantity, title="harmful responses caught", scale=up, format="~%")
    colour = coded("kind", COLOURS)
    tips = [tip("method"), tip("added", ".3~%", "added"), *spread("caught")]
    point = {"x": x, "y": y("value"), "color": colour, "shape": coded("kind", SHAPES), "tooltip": tips}
    name = {"x": x, "y": y("label"), "text": {"field": "method"}}
    interval = {"x": x, "y": y("low"), "y2": {"field": "high"}, "color": colour}
    layers = [
        layer("rule", interval, opacity=0.4, strokeWidth=1.5),
        layer("point", point, filled=True, size=80, opacity=1),
        layer("text", name, align="left", dx=9, fontSize=11, color=QUIET),
    ]
    return {"height": 360, "transform": [only(label)], "layer": layers}
