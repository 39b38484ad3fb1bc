"""Sections on parts of the rows, on attacks, on what the methods cost, and on how the report was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redflag.lab.report import bars
from redflag.lab.report.detection import SLICE
from redflag.lab.report.parts import (
    NOT_MEASURED,
    Cell,
    Section,
    Table,
    attack_name,
    between,
    big,
    by_force,
    cell,
    few,
    get,
    left,
    number,
    point,
    rate,
    rated,
    threshold,
    tokens,
)
from redflag.lab.report.shapes import ANY, COUNT, INTERVAL, NUMBER, RATE, TEXT, TRUTH, Needed
from redflag.watching.monitor import AGGREGATIONS

DIMENSIONS = {"source": "source", "category": "category", "lang": "language", "turns": "number of turns"}
RATED = {"rate": RATE, "interval": INTERVAL, "at_most": RATE}
# Of each method, what is shown here.
FIGURES = {
    "what": TEXT,
    "monitor": {str: ANY},
    "slices": {str: {str: Needed(SLICE)}},
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
LANGUAGE = {"keep_kl": NUMBER, "perplexity_ratio": NUMBER, "tokens": COUNT}


def slices(report: Mapping[str, Any], flag: str) -> Section | None:
    """Per source, category, language and number of turns."""
    found = report["methods"][flag].get("slices") or {}
    others = [name for name in report["methods"] if name != flag]
    tables: list[Table] = []
    for dimension, values in found.items():
        if not values:
            continue
        rows, forced = [], by_force(values)
        for value, one in values.items():
            if forced and not one["harmful"]:
                continue
            auroc = one.get("auroc")
            row = [
                left(value, mark="few rows" if few(one, forced) else "", quiet=few(one, forced)),
                cell(number(one["harmful"])),
                cell(number(one["harmless"])),
                cell(NOT_MEASURED if auroc is None else f"{auroc:.4f}", between(one.get("auroc_interval"), 1, 4)),
            ]
            for name in (flag, *others):
                row.append(rate(*point(get(report["methods"][name], "slices", dimension, value), forced)))
            rows.append(row)
        head = [DIMENSIONS.get(dimension, dimension), "harmful", "harmless", f"AUROC of {flag}"]
        tables.append(
            Table(
                [*head, *(f"{name} {'in force' if forced else 'at 1%'}" for name in (flag, *others))],
                rows,
                title=f"By {DIMENSIONS.get(dimension, dimension)}",
                note=_against(values, forced),
                folded=bool(tables),
            )
        )
    if not tables:
        return None
    chart = bars.slices(report, flag)
    lead = "The same measures on parts of the rows. Parts with few rows are marked: their numbers move much by chance."
    return Section("slices", "Part by part", lead, tables, [chart] if chart else [])


def over_refusal(report: Mapping[str, Any], flag: str) -> Section | None:
    """Alarms on harmless responses, set by set."""
    methods = {name: m["over_refusal"] for name, m in report["methods"].items() if m.get("over_refusal")}
    if not methods:
        return None
    names = list(dict.fromkeys(key for found in methods.values() for key in found))
    rows = []
    for key in names:
        one = next(found[key] for found in methods.values() if found.get(key))
        small = bool(one.get("few"))
        row = [left(key, mark="few rows" if small else "", quiet=small), cell(number(one.get("harmless")))]
        row += [rate(get(f, key, "rate"), get(f, key, "interval")) for f in methods.values()]
        rows.append(row)
    chart = bars.over_refusal(report, flag)
    table = Table(["set", "harmless", *methods], rows)
    lead = "Share of harmless responses of each set that alarm at the threshold in force."
    return Section("over-refusal", "False alarms by set", lead, [table], [chart] if chart else [])


def attacks(report: Mapping[str, Any]) -> Section | None:
    """What attacks got out of the model, and what of it got past the guard."""
    if not report.get("attacks"):
        return None
    rows, efforts = [], []
    for attack in report["attacks"]:
        name = left(attack_name(attack), mark="adaptive" if attack.get("adaptive") else "")
        late = attack.get("delay") or {}
        shown = attack.get("harmful_tokens") or {}
        peak = attack.get("flag_peak") or {}
        spread = between([peak.get("q10"), peak.get("q90")], 1, 3)
        rows.append(
            [
                name,
                rated(attack.get("harm_produced")),
                rated(attack.get("harm_released")),
                cell(tokens(shown.get("produced"))),
                cell(tokens(shown.get("released"))),
                rated(attack.get("alarm_rate")),
                cell(threshold(peak.get("median")), spread),
                cell(number(late.get("median"))),
            ]
        )
        efforts.append(
            [
                name,
                *(cell(number(attack.get(key))) for key in ("requests", "not_run", "attempts", "queries", "unjudged")),
                cell(number(attack.get("seconds"))),
                left(attack.get("note") or ""),
            ]
        )
    head = ["attack", "produced", "released", "tokens produced", "tokens released", "alarms", "flag peak", "delay"]
    note = (
        "Produced: requests for which the model wrote harm. Released: those of which harm got past the guard. Tokens: "
        "mean harmful tokens. ≤: were all unjudged attempts harmful. Flag peak: median, and from the 10th to the 90th "
        "percentile. Delay: median tokens. Adaptive attacks work against the flag itself."
    )
    judge = report.get("judge")
    if judge:
        unanswered = f", {number(judge.get('unanswered'))} without an answer" if judge.get("unanswered") else ""
        by = judge.get("name") or "an unnamed judge"
        note += f" Judged by {by} ({number(judge.get('answered'))} answers{unanswered})."
    tables = [
        Table(head, rows, note=note),
        Table(
            ["attack", "requests", "not run", "attempts", "queries", "unjudged", "seconds", "note"],
            efforts,
            title="What the attacks spent",
            folded=True,
        ),
    ]
    chart = bars.attacks(report)
    return Section("attacks", "Under attack", "", tables, [chart] if chart else [])


def methods(report: Mapping[str, Any], flag: str) -> Section:
    """What the methods are and cost."""
    rows = []
    for name, method in report["methods"].items():
        cost = method.get("cost") or {}
        monitor = method.get("monitor") or {}
        caught = get(method, "pooled", "tpr", "0.01") or {}
        rows.append(
            [
                left(name, strong=name == flag),
                left(method["kind"]),
                rate(caught.get("tpr"), caught.get("interval")),
                cell(number(cost.get("microseconds_per_token"))),
                cell(big(cost.get("flops_per_token"))),
                left(monitor_words(monitor)),
                left(" ".join(filter(None, (method.get("what"), cost.get("note"))))),
            ]
        )
    head = ["method", "kind", "caught at 1%", "µs per token", "FLOPs per token", "monitor", "what it is"]
    return Section("methods", "Methods and cost", "", [Table(head, rows)])


def language(report: Mapping[str, Any]) -> Section | None:
    """What training the flag did to the language."""
    found = report.get("language")
    if not found:
        return None
    row = [
        cell(number(found.get("keep_kl"))),
        cell(number(found.get("perplexity_ratio"), 5)),
        cell(number(found.get("tokens"))),
    ]
    lead = "Next-token distribution against the reference model: 0 nats and a ratio of 1 mean that nothing changed."
    return Section("language", "Language", lead, [Table(["KL, nats per token", "perplexity ratio", "tokens"], [row])])


def made(report: Mapping[str, Any]) -> Section | None:
    """Command, versions, seeds, hashes: what it takes to repeat it."""
    found = report.get("made")
    if not found:
        return None
    rows: list[list[Cell]] = []
    _flatten(found, "", rows)
    return Section("made", "How this was made", "", [Table(["", ""], rows)])


def monitor_words(monitor: Mapping[str, Any]) -> str:
    """A monitor in words: only the numbers that its aggregation uses."""
    kind = monitor.get("aggregation")
    if kind is None:
        return NOT_MEASURED if not monitor else ""
    used = AGGREGATIONS[kind].uses if kind in AGGREGATIONS else ()
    said = [f"{key} {number(monitor[key])}" for key in used if key in monitor]
    said += [f"warm-up {monitor['warm_up']}"] if monitor.get("warm_up") else []
    return ", ".join([str(kind), *said])


def _against(values: Mapping[str, Any], forced: bool) -> str:
    said = list(dict.fromkeys(one["against"] for one in values.values() if one.get("against")))
    at = "Caught at the threshold in force; harmless rows stand under “False alarms by set”." if forced else ""
    return " ".join(filter(None, [f"AUROC against {', '.join(said)}." if said else "", at]))


def _flatten(value: Any, path: str, rows: list[list[Cell]]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(inner, f"{path} {key}".strip(), rows)
    else:
        shown = ", ".join(
            NOT_MEASURED if x is None else str(x) for x in (value if isinstance(value, list) else [value])
        )
        rows.append([left(path), left(shown, quiet=value is None)])
