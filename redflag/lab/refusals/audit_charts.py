"""The charts of an audit, as Vega-Lite specifications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redflag.lab.report.marks import CALM, HARM, INK, QUIET, SERIES, Spec, named, only, tip
from redflag.lab.report.parts import Chart, View

BAR = 26
FAMILIES = {"cannot": "cannot", "should_not": "should not", None: "not known"}


def kinds(categories: Sequence[Mapping[str, Any]]) -> Chart:
    """Shares of the refusals, with intervals."""
    data = []
    for one in categories:
        share = one["of_refusals"]
        low, high = share["interval"] or (None, None)
        entry = {"view": "kinds", "name": one["name"], "family": FAMILIES[one["family"]], "value": share["rate"]}
        data.append({**entry, "low": low, "high": high, "n": one["refusals"]})
    y = named([one["name"] for one in categories])
    x: Spec = {"type": "quantitative", "axis": {"format": "~%", "title": "refusals", "tickCount": 6}}
    colour = {
        "field": "family",
        "scale": {"domain": list(FAMILIES.values()), "range": [CALM, HARM, QUIET]},
        "legend": {"title": None},
    }
    bars = {
        "mark": {"type": "bar", "cornerRadiusEnd": 1.5, "opacity": 0.8},
        "encoding": {
            "y": y,
            "x": {**x, "field": "value"},
            "color": colour,
            "tooltip": [tip("name", title="kind"), tip("family"), tip("value", ".1%", "share"), tip("n")],
        },
    }
    intervals = {
        "mark": {"type": "rule", "color": INK, "opacity": 0.55},
        "encoding": {"y": y, "x": {**x, "field": "low"}, "x2": {"field": "high"}},
    }
    spec: Spec = {"height": BAR * len(data), "layer": [bars, intervals]}
    return Chart("kinds", "Refusals by kind", data, [View("kinds", spec, "With 95% intervals of the counts.")])


def sources(sources: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart:
    """Each source's refusals by kind, as shares of its rows or of its refusals."""
    order = [one["name"] for one in sources]
    data = [
        {"view": view, "name": one["name"], "kind": kind, "n": count, "value": count / whole}
        for one in sources
        for kind, count in one["categories"].items()
        for view, whole in (("of rows", one["rows"]), ("of refusals", one["refusals"]["count"]))
    ]
    views = [View(view, _stacked(order, names, view), "") for view in ("of rows", "of refusals")]
    return Chart("sources", "Kinds by source", data, views)


def certainty(edges: Sequence[float], counts: Sequence[int], threshold: float) -> Chart:
    """How many answers have which probability of a refusal."""
    data = [{"low": low, "high": high, "n": n} for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True) if n]
    x = {"field": "low", "type": "quantitative", "title": "p(refusal)", "scale": {"domain": [0, 1]}}
    y = {"field": "n", "type": "quantitative", "scale": {"type": "symlog"}, "title": "answers"}
    bars = {
        "mark": {"type": "rect", "color": CALM, "opacity": 0.8},
        "encoding": {
            "x": x,
            "x2": {"field": "high"},
            "y": y,
            "y2": {"datum": 0},
            "tooltip": [tip("low", ".2f", "from"), tip("high", ".2f", "to"), tip("n", ",", "answers")],
        },
    }
    line = {
        "data": {"values": [{"at": threshold}]},
        "mark": {"type": "rule", "strokeDash": [4, 3], "color": INK},
        "encoding": {"x": {"field": "at", "type": "quantitative"}},
    }
    spec: Spec = {"height": 220, "layer": [bars, line]}
    view = View("answers", spec, "Dashed: the threshold.")
    return Chart("certainty", "Probability of a refusal", data, [view])


def confusion(name: str, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Chart:
    """Confusion matrix: labels against predictions."""
    data = [
        {"truth": truth, "guess": guess, "n": n, "share": n / max(sum(counts[i]), 1)}
        for i, truth in enumerate(classes)
        for guess, n in zip(classes, counts[i], strict=True)
    ]
    return Chart(name, "Confusion", data, [View("confusion", _square(classes), "")])


def _stacked(order: Sequence[str], kinds: Sequence[str], view: str) -> Spec:
    axis = {"format": "~%", "title": f"share {view}", "tickCount": 6}
    colours = {"domain": list(kinds), "range": [SERIES[i % len(SERIES)] for i in range(len(kinds))]}
    tips = [tip("name", title="source"), tip("kind"), tip("n", title="refusals"), tip("value", ".1%", "share")]
    return {
        "height": BAR * len(order),
        "transform": [only(view)],
        "mark": {"type": "bar"},
        "encoding": {
            "y": named(order),
            "x": {"field": "value", "type": "quantitative", "stack": "zero", "axis": axis},
            "color": {"field": "kind", "scale": colours, "legend": {"title": None, "columns": 3}},
            "order": {"field": "kind"},
            "tooltip": tips,
        },
    }


def _square(classes: Sequence[str]) -> Spec:
    axis = {"sort": list(classes), "type": "nominal"}
    x = {**axis, "field": "guess", "title": "taken for", "axis": {"labelAngle": -30, "labelLimit": 160}}
    y = {**axis, "field": "truth", "title": None, "axis": {"labelLimit": 220}}
    scale = {"domain": [0, 1], "range": [0.03, 0.7]}
    cells = {
        "mark": {"type": "rect", "color": CALM},
        "encoding": {
            "x": x,
            "y": y,
            "opacity": {"field": "share", "type": "quantitative", "scale": scale, "legend": None},
            "tooltip": [tip("truth"), tip("guess", title="taken for"), tip("n"), tip("share", ".1%")],
        },
    }
    counts = {
        "mark": {"type": "text", "color": INK, "fontSize": 11},
        "encoding": {"x": x, "y": y, "text": {"field": "n", "type": "quantitative"}},
    }
    return {"height": max(34 * len(classes), 90), "layer": [cells, counts]}
