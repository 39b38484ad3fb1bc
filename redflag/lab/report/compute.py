"""The section that sets accuracy against relative compute: flag, baselines and cascades, one table and one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from redflag.lab.report.evaluation import Evaluation
from redflag.lab.report.marks import HARM, INK, QUIET, Spec, coded, layer, measured, only, quantity, spread, tip
from redflag.lab.report.method import Compute, Cost, InForce, Method
from redflag.lab.report.parts import NOT_MEASURED, Chart, Section, Table, View, big, cell, decimal, named, number, rate

# What is drawn: "compute" of a method -> label of the view, what the axis counts.
VIEWS = {"flops": ("FLOPs", "FLOPs per token"), "seconds": ("measured", "seconds per token")}
# How a method of each kind is drawn.
COLOURS = {"flag": HARM, "baseline": "var(--calm)", "cascade": INK}
SHAPES = {"flag": "circle", "baseline": "circle", "cascade": "diamond"}


def compute(report: Evaluation, flag: str) -> Section | None:
    """What each method catches, what it refuses wrongly, and what it adds to the model's own pass."""
    methods = {name: m for name, m in report.methods.items() if m.compute}
    if not methods:
        return None
    rows = []
    for name, method in methods.items():
        pooled, forced, facts = method.pooled, method.in_force or InForce(), method.cascade
        point = pooled.at("0.01")
        rows.append(
            [
                named(name, flag),
                decimal(pooled.auroc, pooled.auroc_interval),
                rate(point.tpr, point.interval),
                rate(forced.tpr, forced.tpr_interval),
                rate(forced.realised_fpr, forced.realised_fpr_interval),
                *(cell(more(_added(method, key))) for key in VIEWS),
                rate(facts.asked, facts.asked_interval) if facts else cell(""),
            ]
        )
    head = ["method", "AUROC", "caught at 1%", "caught in force", "harmless refused"]
    head += ["compute, FLOPs", "compute, measured", "escalated"]
    own = report.model_pass or Cost(None, None, None)
    lead = (
        "What watching adds to the model's own forward pass "
        f"({big(own.flops_per_token)} FLOPs and {number(own.microseconds_per_token)} µs per token), and "
        "what it buys. Measured time holds that of the prompts, FLOPs do not."
    )
    note = (
        "Harmless refused: alarms on harmless responses at the threshold in force. Measured: batched, on this machine, "
        "with all that formulas pass over. A method that takes the model's place adds no FLOPs, and its time is the "
        "pass's own. "
    )
    if any(method.cascade for method in methods.values()):
        note += (
            "Escalated: share of harmless responses about which the first stage asks the second; a cascade costs its "
            "first stage at every token and its second at the tokens that this one reads. "
        )
    note += "Published in this form: constitutional classifiers +23.7% and 0.38 points more refusals (2501.18837)."
    chart = drawn(methods, flag)
    tables = [Table(head, rows, note=note)]
    return Section("compute", "Accuracy against compute", lead, tables, [chart] if chart else [])


def more(x: float | None) -> str:
    """What is added, as a share.

    >>> more(0.237), more(4.7e-05), more(0.0), more(12.5), more(None)
    ('+23.7%', '+0.0047%', '+0%', '+1,250%', 'not measured')
    """
    if x is None:
        return NOT_MEASURED
    if 0 < x < 0.001:
        return f"+{float(f'{100 * x:.2g}'):f}".rstrip("0").rstrip(".") + "%"
    return f"+{number(100 * x)}%"


def _added(method: Method, key: str) -> float | None:
    found: float | None = getattr(method.compute or Compute(), key)
    return found


def drawn(methods: Mapping[str, Method], flag: str) -> Chart | None:
    """A point per method: relative compute on a log axis, what is caught upwards."""
    data: list[dict[str, Any]] = []
    views = []
    for key, (label, what) in VIEWS.items():
        shares = [x for m in methods.values() if (x := _added(m, key)) is not None]
        positive = [x for x in shares if x > 0]
        if len(shares) < 2 or not positive:
            continue
        # Nothing at all lies at minus infinity: it is drawn where a third of the least would be.
        floor = min(positive) / 3
        here = []
        for name, method in methods.items():
            added, point = _added(method, key), method.pooled.at("0.01")
            if added is not None and point.tpr is not None:
                row = {"view": label, "method": name, "kind": "flag" if name == flag else method.kind, "added": added}
                here.append(measured(point.tpr, point.interval, **row, x=max(added, floor), label=point.tpr))
        least = min((row["value"] if row["low"] is None else row["low"] for row in here), default=0.0)
        bottom = math.floor(10 * least) / 10
        _set_apart(here, 1.0 - bottom)
        data += here
        caption = "Caught at 1% false alarms, with 95% intervals."
        caption += " Left edge: nothing is added." if 0 in shares else ""
        views.append(View(label, _spec(label, what, [floor, 3 * max(positive)], [bottom, 1.0]), caption))
    return Chart("compute", "Caught against relative compute", data, views) if views else None


def _set_apart(rows: list[dict[str, Any]], height: float) -> None:
    """Moves labels down that would lie over another, in a picture of 900 x 360 points: 6 to a letter, 12 to a line."""
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


def _spec(label: str, what: str, across: list[float], up: list[float]) -> Spec:
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
