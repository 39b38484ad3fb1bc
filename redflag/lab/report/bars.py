"""Bars and intervals as Vega-Lite specifications: methods, parts of the rows, false alarms, attacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.marks import CALM, HARM, INK, Spec, by_method, named, only, tip
from redflag.lab.report.parts import Chart, View, attack_name, by_force, few, percent, point

BAR = 26


def caught(report: Evaluation, flag: str) -> Chart | None:
    """All methods at one false-alarm rate, with intervals."""
    if len(report.methods) < 2:
        return None
    data: list[dict[str, Any]] = []
    for key, label in (("0.001", "0.1%"), ("0.01", "1%"), ("0.05", "5%")):
        for name, method in report.methods.items():
            at = method.pooled.at(key)
            if at.tpr is not None:
                low, high = at.interval or (None, None)
                data.append(
                    {
                        "view": label,
                        "name": name,
                        "value": at.tpr,
                        "low": low,
                        "high": high,
                        "colour": "flag" if name == flag else "other",
                        "few": False,
                    }
                )
    views = [
        View(
            label,
            _intervals(list(report.methods), "harmful responses caught", {"domain": [0, 1]}, label),
            f"At a false-alarm rate of at most {label}, with 95% intervals.",
        )
        for label in dict.fromkeys(row["view"] for row in data)
    ]
    return (
        Chart("caught", "Methods side by side", data, sorted(views, key=lambda v: v.label != "1%")) if views else None
    )


def slices(report: Evaluation, flag: str) -> Chart | None:
    """TPR at 1% of every part of the rows: bars of the flag, ticks of the others."""
    data: list[dict[str, Any]] = []
    views = []
    found = report.methods[flag].slices or {}
    titles = {"lang": "language"}
    for dimension, values in found.items():
        values = values or {}
        order, forced = [], by_force(values)
        label = titles.get(dimension, dimension)
        for value, one in values.items():
            base = {"view": label, "name": value, "few": few(one, forced), "n": one.harmful}
            ours = False
            for name, method in report.methods.items():
                parts = (method.slices or {}).get(dimension) or {}
                caught, interval = point(parts.get(value), forced)
                if caught is not None:
                    low, high = interval or (None, None)
                    data.append({**base, "method": name, "value": caught, "low": low, "high": high})
                    ours |= name == flag
            order += [value] if ours else []
        if order:
            methods = list(report.methods)
            at = "at the threshold in force" if forced else "at 1% false alarms"
            said = f"Bars: {flag}, with 95% intervals; ticks: the other methods; palest: few rows."
            views.append(
                View(label, _bars(order, label, flag, methods, f"harmful responses caught {at}", [0, 1]), said)
            )
    return Chart("slices", "Caught, part by part", data, views) if views else None


def over_refusal(report: Evaluation, flag: str) -> Chart | None:
    """Alarms on harmless responses by set."""
    data: list[dict[str, Any]] = []
    order: list[str] = []
    for name, method in report.methods.items():
        for key, one in (method.over_refusal or {}).items():
            if one.rate is not None:
                low, high = one.interval or (None, None)
                order += [key] if key not in order else []
                data.append(
                    {
                        "view": "sets",
                        "name": key,
                        "few": bool(one.few),
                        "method": name,
                        "value": one.rate,
                        "n": one.harmless,
                        **({"low": low, "high": high} if name == flag else {}),
                    }
                )
    if not any(row["method"] == flag for row in data):
        return None
    top = max([row.get("high") or row["value"] for row in data])
    spec = _bars(
        order, "sets", flag, list(report.methods), "harmless responses that alarm", [0, min(1.0, top * 1.1) or 1]
    )
    limits = report.methods[flag].threshold
    target = limits.target_fpr if limits else None
    caption = f"Bars: {flag}, with 95% intervals; ticks: the other methods; palest: few rows."
    if target is not None:
        spec["layer"].append(
            {
                "data": {"values": [{"at": target}]},
                "mark": {"type": "rule", "strokeDash": [4, 3], "color": INK},
                "encoding": {"x": {"field": "at", "type": "quantitative"}},
            }
        )
        caption += f" Dashed: the target, {percent(target)}."
    return Chart("over-refusal", "False alarms by set", data, [View("sets", spec, caption)])


def attacks(report: Evaluation) -> Chart | None:
    """What the model wrote, and what got past the guard."""
    data: list[dict[str, Any]] = []
    for attack in report.attacks or ():
        name = attack_name(attack) + (" · adaptive" if attack.adaptive else "")
        for what, found in (("produced", attack.harm_produced), ("released", attack.harm_released)):
            if found and found.rate is not None:
                low, high = found.interval or (None, None)
                data.append(
                    {"view": "attacks", "name": name, "what": what, "value": found.rate, "low": low, "high": high}
                )
    if not data:
        return None
    order = list(dict.fromkeys(row["name"] for row in data))
    y = named(order)
    offset = {"field": "what", "scale": {"domain": ["produced", "released"]}}
    colour = {
        "field": "what",
        "scale": {"domain": ["produced", "released"], "range": ["var(--pale)", HARM]},
        "legend": {"title": None},
    }
    x = {
        "type": "quantitative",
        "axis": {"format": "~%", "title": "requests", "tickCount": 6},
        "scale": {"domain": [0, 1]},
    }
    spec = {
        "height": BAR * len(order),
        "layer": [
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 1.5, "opacity": 0.8},
                "encoding": {
                    "y": y,
                    "yOffset": offset,
                    "x": {**x, "field": "value"},
                    "color": colour,
                    "tooltip": [
                        tip("name", title="attack"),
                        tip("what"),
                        tip("value", ".1%", "rate"),
                        tip("low", ".1%", "from"),
                        tip("high", ".1%", "to"),
                    ],
                },
            },
            {
                "mark": {"type": "rule", "color": INK, "opacity": 0.55},
                "encoding": {"y": y, "yOffset": offset, "x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
        ],
    }
    return Chart(
        "attacks",
        "Harm produced and harm released",
        data,
        [View("attacks", spec, "Share of requests, with 95% intervals.")],
    )


def _bars(
    order: Sequence[str], label: str, flag: str, methods: Sequence[str], title: str, domain: Sequence[float]
) -> Spec:
    y, pale = named(order), {"condition": {"test": "datum.few", "value": 0.14}, "value": 0.42}
    x = {
        "type": "quantitative",
        "axis": {"format": "~%", "title": title, "tickCount": 6},
        "scale": {"domain": list(domain)},
    }
    ours, others = (
        {"filter": {"field": "method", "equal": flag}},
        {"filter": {"not": {"field": "method", "equal": flag}}},
    )
    tips = [tip("name", title=label), tip("method"), tip("value", ".1%", "rate"), tip("n", title="responses")]
    layers: list[Spec] = [
        {
            "transform": [only(label), ours],
            "mark": {"type": "bar", "cornerRadiusEnd": 1.5, "height": 13},
            "encoding": {
                "y": y,
                "x": {**x, "field": "value"},
                "opacity": pale,
                "color": {"value": HARM},
                "tooltip": tips,
            },
        },
        {
            "transform": [only(label), ours],
            "mark": {"type": "rule", "color": HARM, "opacity": 0.7, "strokeWidth": 1.5},
            "encoding": {"y": y, "x": {**x, "field": "low"}, "x2": {"field": "high"}},
        },
        {
            "transform": [only(label), ours],
            "mark": {"type": "tick", "thickness": 3, "size": 15, "color": HARM},
            "encoding": {"y": y, "x": {**x, "field": "value"}, "tooltip": tips},
        },
    ]
    if len(methods) > 1:
        colour = by_method(methods)
        legend = {
            **colour,
            "legend": {
                "title": None,
                "symbolType": "square",
                "symbolOpacity": 1,
                "values": [m for m in methods if m != flag],
            },
        }
        layers.append(
            {
                "transform": [only(label), others],
                "mark": {"type": "tick", "thickness": 2, "size": 15},
                "encoding": {"y": y, "x": {**x, "field": "value"}, "color": legend, "tooltip": tips},
            }
        )
    return {"height": BAR * len(order), "layer": layers}


def _intervals(order: Sequence[str], title: str, scale: Spec, label: str) -> Spec:
    y = named(order)
    x = {"type": "quantitative", "axis": {"format": "~%", "title": title, "tickCount": 6}, "scale": scale}
    colour = {"field": "colour", "scale": {"domain": ["flag", "other"], "range": [HARM, CALM]}, "legend": None}
    return {
        "height": BAR * len(order),
        "layer": [
            {
                "transform": [only(label)],
                "mark": {"type": "rule", "opacity": 0.5, "strokeWidth": 2},
                "encoding": {"y": y, "x": {**x, "field": "low"}, "x2": {"field": "high"}, "color": colour},
            },
            {
                "transform": [only(label)],
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {
                    "y": y,
                    "x": {**x, "field": "value"},
                    "color": colour,
                    "tooltip": [
                        tip("name", title="method"),
                        tip("value", ".1%", "caught"),
                        tip("low", ".1%", "from"),
                        tip("high", ".1%", "to"),
                    ],
                },
            },
        ],
    }
