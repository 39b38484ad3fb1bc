"""Bars and intervals as Vega-Lite specifications: methods, parts of the rows, false alarms, attacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.marks import (
    CALM,
    HARM,
    INK,
    Spec,
    by_method,
    coded,
    layer,
    measured,
    named,
    only,
    quantity,
    spread,
    tip,
    where,
)
from redflag.lab.report.parts import FPRS, Chart, View, attack_name, by_force, few, percent, point

BAR = 26
WHOLE = (0, 1)


def caught(report: Evaluation, flag: str) -> Chart | None:
    """All methods at one false-alarm rate, with intervals."""
    if len(report.methods) < 2:
        return None
    data = [
        measured(at.tpr, at.interval, view=label, name=name, colour="flag" if name == flag else "other")
        for key, label in FPRS.items()
        for name, method in report.methods.items()
        if (at := method.pooled.at(key)).tpr is not None
    ]
    share = partial(quantity, title="harmful responses caught", scale=WHOLE, format="~%", tickCount=6)
    colour = coded("colour", {"flag": HARM, "other": CALM})
    marks = [
        layer("rule", {"x": share("low"), "x2": {"field": "high"}}, opacity=0.5, strokeWidth=2),
        layer(
            "point",
            {"x": share("value"), "tooltip": [tip("name", title="method"), *spread("caught")]},
            filled=True,
            size=70,
            opacity=1,
        ),
    ]
    shared = {"height": _height(report.methods), "encoding": {"y": named(list(report.methods)), "color": colour}}
    views = [
        View(
            label,
            {"transform": [only(label)], **shared, "layer": marks},
            f"At a false-alarm rate of at most {label}, with 95% intervals.",
        )
        for label in sorted(dict.fromkeys(row["view"] for row in data), key=lambda label: label != "1%")
    ]
    return Chart("caught", "Methods side by side", data, views) if views else None


def slices(report: Evaluation, flag: str) -> Chart | None:
    """TPR at 1% of every part of the rows: bars of the flag, ticks of the others."""
    data: list[dict[str, Any]] = []
    views = []
    for dimension, values in (report.methods[flag].slices or {}).items():
        values = values or {}
        order, forced = [], by_force(values)
        label = "language" if dimension == "lang" else dimension
        for value, one in values.items():
            base = {"view": label, "name": value, "few": few(one, forced), "n": one.harmful}
            for name, method in report.methods.items():
                tpr, interval = point(((method.slices or {}).get(dimension) or {}).get(value), forced)
                if tpr is not None:
                    data.append(measured(tpr, interval, **base, method=name))
                    order += [value] if name == flag else []
        if order:
            at = "at the threshold in force" if forced else "at 1% false alarms"
            spec = _bars(order, label, flag, report, f"harmful responses caught {at}", WHOLE)
            views.append(View(label, spec, _bars_and_ticks(flag)))
    return Chart("slices", "Caught, part by part", data, views) if views else None


def over_refusal(report: Evaluation, flag: str) -> Chart | None:
    """Alarms on harmless responses by set."""
    data = []
    for name, method in report.methods.items():
        for key, one in (method.over_refusal or {}).items():
            if one.rate is not None:
                row = {"view": "sets", "name": key, "few": bool(one.few), "method": name, "n": one.harmless}
                data.append(measured(one.rate, one.interval if name == flag else None, **row))
    if not any(row["method"] == flag for row in data):
        return None
    order = list(dict.fromkeys(row["name"] for row in data))
    top = max(row["high"] or row["value"] for row in data)
    spec = _bars(order, "sets", flag, report, "harmless responses that alarm", (0, min(1.0, top * 1.1) or 1))
    limits = report.methods[flag].threshold
    caption = _bars_and_ticks(flag)
    if limits and limits.target_fpr is not None:
        target = layer("rule", {"x": quantity("at")}, strokeDash=[4, 3], color=INK)
        spec["layer"].append({"data": {"values": [{"at": limits.target_fpr}]}, **target})
        caption += f" Dashed: the target, {percent(limits.target_fpr)}."
    return Chart("over-refusal", "False alarms by set", data, [View("sets", spec, caption)])


def attacks(report: Evaluation) -> Chart | None:
    """Harm that the model wrote, and harm that the guard released."""
    data = [
        measured(harm.rate, harm.interval, name=attack_name(attack) + " · adaptive" * bool(attack.adaptive), what=what)
        for attack in report.attacks or ()
        for what, harm in (("produced", attack.harm_produced), ("released", attack.harm_released))
        if harm and harm.rate is not None
    ]
    if not data:
        return None
    order = list(dict.fromkeys(row["name"] for row in data))
    share = partial(quantity, title="requests", scale=WHOLE, format="~%", tickCount=6)
    colours = {"produced": "var(--pale)", "released": HARM}
    tips = [tip("name", title="attack"), tip("what"), *spread("rate")]
    bars = {"x": share("value"), "color": coded("what", colours, legend=True), "tooltip": tips}
    offset = {"field": "what", "scale": {"domain": list(colours)}}
    spec = {
        "height": _height(order),
        "encoding": {"y": named(order), "yOffset": offset},
        "layer": [
            layer("bar", bars, cornerRadiusEnd=1.5, opacity=0.8),
            layer("rule", {"x": share("low"), "x2": {"field": "high"}}, color=INK, opacity=0.55),
        ],
    }
    view = View("attacks", spec, "Share of requests, with 95% intervals.")
    return Chart("attacks", "Harm produced and harm released", data, [view])


def _bars(order: Sequence[str], label: str, flag: str, report: Evaluation, title: str, domain: Sequence[float]) -> Spec:
    """Bars with intervals of the flag, ticks of the other methods."""
    share = partial(quantity, title=title, scale=domain, format="~%", tickCount=6)
    ours = where("method", flag)
    tips = [tip("name", title=label), tip("method"), tip("value", ".1%", "rate"), tip("n", title="responses")]
    at_value: Spec = {"y": named(order), "x": share("value"), "tooltip": tips}
    interval = {"y": named(order), "x": share("low"), "x2": {"field": "high"}}
    pale = {"condition": {"test": "datum.few", "value": 0.14}, "value": 0.42}
    bar = {**at_value, "opacity": pale, "color": {"value": HARM}}
    layers = [
        layer("bar", bar, ours, cornerRadiusEnd=1.5, height=13),
        layer("rule", interval, ours, color=HARM, opacity=0.7, strokeWidth=1.5),
        layer("tick", at_value, ours, thickness=3, size=15, color=HARM),
    ]
    if others := [name for name in report.methods if name != flag]:
        legend = {"title": None, "symbolType": "square", "symbolOpacity": 1, "values": others}
        ticks: Spec = {**at_value, "color": {**by_method(report.methods), "legend": legend}}
        layers.append(layer("tick", ticks, {"filter": {"not": ours["filter"]}}, thickness=2, size=15))
    return {"height": _height(order), "transform": [only(label)], "layer": layers}


def _bars_and_ticks(flag: str) -> str:
    return f"Bars: {flag}, with 95% intervals; ticks: the other methods; palest: few rows."


def _height(names: Any) -> int:
    return BAR * len(names)
