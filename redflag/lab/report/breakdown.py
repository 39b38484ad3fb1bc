"""Sections on parts of the rows, on attacks, on what the methods cost, and on how the report was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redflag.lab.report import bars
from redflag.lab.report.evaluation import AttackDelay, Evaluation, HarmfulTokens, Peaks
from redflag.lab.report.method import Cost, FalseAlarms, Slice
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
    left,
    number,
    point,
    rate,
    rated,
    threshold,
    tokens,
)
from redflag.watching.monitor import AGGREGATIONS, MonitorConfig

DIMENSIONS = {"source": "source", "category": "category", "lang": "language", "turns": "number of turns"}


def slices(report: Evaluation, flag: str) -> Section | None:
    """Per source, category, language and number of turns."""
    found = report.methods[flag].slices or {}
    others = [name for name in report.methods if name != flag]
    tables: list[Table] = []
    for dimension, values in found.items():
        if not values:
            continue
        rows, forced = [], by_force(values)
        for value, one in values.items():
            if forced and not one.harmful:
                continue
            auroc = one.auroc
            row = [
                left(value, mark="few rows" if few(one, forced) else "", quiet=few(one, forced)),
                cell(number(one.harmful)),
                cell(number(one.harmless)),
                cell(NOT_MEASURED if auroc is None else f"{auroc:.4f}", between(one.auroc_interval, 1, 4)),
            ]
            for name in (flag, *others):
                parts = (report.methods[name].slices or {}).get(dimension) or {}
                row.append(rate(*point(parts.get(value), forced)))
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


def over_refusal(report: Evaluation, flag: str) -> Section | None:
    """Alarms on harmless responses, set by set."""
    methods = {name: m.over_refusal for name, m in report.methods.items() if m.over_refusal}
    if not methods:
        return None
    names = list(dict.fromkeys(key for found in methods.values() for key in found))
    rows = []
    for key in names:
        one = next(found[key] for found in methods.values() if key in found)
        small = bool(one.few)
        row = [left(key, mark="few rows" if small else "", quiet=small), cell(number(one.harmless))]
        row += [rate(of.rate, of.interval) for f in methods.values() for of in [f.get(key, FalseAlarms())]]
        rows.append(row)
    chart = bars.over_refusal(report, flag)
    table = Table(["set", "harmless", *methods], rows)
    lead = "Share of harmless responses of each set that alarm at the threshold in force."
    return Section("over-refusal", "False alarms by set", lead, [table], [chart] if chart else [])


def attacks(report: Evaluation) -> Section | None:
    """What attacks got out of the model, and what of it got past the guard."""
    if not report.attacks:
        return None
    rows, efforts = [], []
    for attack in report.attacks:
        name = left(attack_name(attack), mark="adaptive" if attack.adaptive else "")
        late, shown = attack.delay or AttackDelay(), attack.harmful_tokens or HarmfulTokens()
        peak = attack.flag_peak or Peaks()
        spread = between([peak.q10, peak.q90], 1, 3)
        rows.append(
            [
                name,
                rated(attack.harm_produced),
                rated(attack.harm_released),
                cell(tokens(shown.produced)),
                cell(tokens(shown.released)),
                rated(attack.alarm_rate),
                cell(threshold(peak.median), spread),
                cell(number(late.median)),
            ]
        )
        efforts.append(
            [
                name,
                *map(cell, map(number, (attack.requests, attack.not_run, attack.attempts, attack.queries))),
                *map(cell, map(number, (attack.unjudged, attack.seconds))),
                left(attack.note or ""),
            ]
        )
    head = ["attack", "produced", "released", "tokens produced", "tokens released", "alarms", "flag peak", "delay"]
    note = (
        "Produced: requests for which the model wrote harm. Released: those of which harm got past the guard. Tokens: "
        "mean harmful tokens. ≤: were all unjudged attempts harmful. Flag peak: median, and from the 10th to the 90th "
        "percentile. Delay: median tokens. Adaptive attacks work against the flag itself."
    )
    if judge := report.judge:
        unanswered = f", {number(judge.unanswered)} without an answer" if judge.unanswered else ""
        note += f" Judged by {judge.name or 'an unnamed judge'} ({number(judge.answered)} answers{unanswered})."
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


def methods(report: Evaluation, flag: str) -> Section:
    """What the methods are and cost."""
    rows = []
    for name, method in report.methods.items():
        cost, caught = method.cost or Cost(None, None, None), method.pooled.at("0.01")
        rows.append(
            [
                left(name, strong=name == flag),
                left(method.kind),
                rate(caught.tpr, caught.interval),
                cell(number(cost.microseconds_per_token)),
                cell(big(cost.flops_per_token)),
                left(monitor_words(method.monitor)),
                left(" ".join(filter(None, (method.what, cost.note)))),
            ]
        )
    head = ["method", "kind", "caught at 1%", "µs per token", "FLOPs per token", "monitor", "what it is"]
    return Section("methods", "Methods and cost", "", [Table(head, rows)])


def language(report: Evaluation) -> Section | None:
    """What training the flag did to the language."""
    found = report.language
    if not found:
        return None
    row = [cell(number(found.keep_kl)), cell(number(found.perplexity_ratio, 5)), cell(number(found.tokens))]
    lead = "Next-token distribution against the reference model: 0 nats and a ratio of 1 mean that nothing changed."
    return Section("language", "Language", lead, [Table(["KL, nats per token", "perplexity ratio", "tokens"], [row])])


def made(report: Evaluation) -> Section | None:
    """Command, versions, seeds, hashes: what it takes to repeat it."""
    if not report.made:
        return None
    rows: list[list[Cell]] = []
    _flatten(report.made, "", rows)
    return Section("made", "How this was made", "", [Table(["", ""], rows)])


def monitor_words(monitor: MonitorConfig | None) -> str:
    """A monitor in words: only the numbers that its aggregation uses."""
    if monitor is None:
        return NOT_MEASURED
    said = [f"{key} {number(getattr(monitor, key))}" for key in AGGREGATIONS[monitor.aggregation].uses]
    said += [f"warm-up {monitor.warm_up}"] if monitor.warm_up else []
    return ", ".join([monitor.aggregation, *said])


def _against(values: Mapping[str, Slice], forced: bool) -> str:
    said = list(dict.fromkeys(one.against for one in values.values() if one.against))
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
