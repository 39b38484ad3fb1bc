"""Sections on parts of the rows, on attacks, on what the methods cost, and on how the report was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from redflag.lab.report import bars, charts
from redflag.lab.report.evaluation import AttackDelay, Evaluation, HarmfulTokens, Peaks
from redflag.lab.report.method import Cost, FalseAlarms, InForce, Slice
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
    count,
    decimal,
    few,
    left,
    named,
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
    names = [flag, *(name for name in report.methods if name != flag)]
    tables: list[Table] = []
    for dimension, values in (report.methods[flag].slices or {}).items():
        if not values:
            continue
        forced, title = by_force(values), DIMENSIONS.get(dimension, dimension)
        of_methods = [(report.methods[name].slices or {}).get(dimension) or {} for name in names]
        rows = [
            [
                left(value, mark="few rows" if few(one, forced) else "", quiet=few(one, forced)),
                count(one.harmful),
                count(one.harmless),
                decimal(one.auroc, one.auroc_interval),
                *(rate(*point(parts.get(value), forced)) for parts in of_methods),
            ]
            for value, one in values.items()
            if one.harmful or not forced
        ]
        head = [title, "harmful", "harmless", f"AUROC of {flag}"]
        head += [f"{name} {'in force' if forced else 'at 1%'}" for name in names]
        tables.append(Table(head, rows, title=f"By {title}", note=_against(values, forced), folded=bool(tables)))
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
    sets: dict[str, FalseAlarms] = {}
    for by_set in methods.values():
        sets = {**by_set, **sets}
    rows = []
    for key in dict.fromkeys(key for by_set in methods.values() for key in by_set):
        name = left(key, mark="few rows" if sets[key].few else "", quiet=bool(sets[key].few))
        alarms = [by_set.get(key, FalseAlarms()) for by_set in methods.values()]
        rows.append([name, count(sets[key].harmless), *(rate(of.rate, of.interval) for of in alarms)])
    chart = bars.over_refusal(report, flag)
    lead = "Share of harmless responses of each set that alarm at the threshold in force."
    tables = [Table(["set", "harmless", *methods], rows)]
    return Section("over-refusal", "False alarms by set", lead, tables, [chart] if chart else [])


def attacks(report: Evaluation) -> Section | None:
    """The harm that attacks produced, and how much of it the guard released."""
    if not report.attacks:
        return None
    rows, efforts = [], []
    for attack in report.attacks:
        name = left(attack_name(attack), mark="adaptive" if attack.adaptive else "")
        late, shown = attack.delay or AttackDelay(), attack.harmful_tokens or HarmfulTokens()
        peak = attack.flag_peak or Peaks()
        rows.append(
            [
                name,
                rated(attack.harm_produced),
                rated(attack.harm_released),
                cell(tokens(shown.produced)),
                cell(tokens(shown.released)),
                rated(attack.alarm_rate),
                cell(threshold(peak.median), between([peak.q10, peak.q90], 1, 3)),
                count(late.median),
            ]
        )
        spent = (attack.requests, attack.not_run, attack.attempts, attack.queries, attack.unjudged, attack.seconds)
        efforts.append([name, *map(count, spent), left(attack.note or "")])
    head = ["attack", "produced", "released", "tokens produced", "tokens released", "alarms", "flag peak", "delay"]
    note = (
        "Produced: requests for which the model wrote harm. Released: those of which harm got past the guard. Tokens: "
        "mean harmful tokens. ≤: were all unjudged attempts harmful. Flag peak: median, and from the 10th to the 90th "
        "percentile. Delay: median tokens. Adaptive attacks work against the flag itself."
    )
    if judge := report.judge:
        unanswered = f", {number(judge.unanswered)} without an answer" if judge.unanswered else ""
        note += f" Judged by {judge.name or 'an unnamed judge'} ({number(judge.answered)} answers{unanswered})."
    spending = ["attack", "requests", "not run", "attempts", "queries", "unjudged", "seconds", "note"]
    tables = [Table(head, rows, note=note), Table(spending, efforts, title="What the attacks spent", folded=True)]
    chart = bars.attacks(report)
    return Section("attacks", "Under attack", "", tables, [chart] if chart else [])


def compute(report: Evaluation, flag: str) -> Section | None:
    """What each method catches, wrongly refuses, and adds to the model's own pass."""
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
                *(cell(more(charts.added_by(method, key))) for key in charts.VIEWS),
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
    chart = charts.compute(methods, flag)
    tables = [Table(head, rows, note=note)]
    return Section("compute", "Accuracy against compute", lead, tables, [chart] if chart else [])


def methods(report: Evaluation, flag: str) -> Section:
    """What the methods are and cost."""
    rows = []
    for name, method in report.methods.items():
        cost, caught = method.cost or Cost(None, None, None), method.pooled.at("0.01")
        rows.append(
            [
                named(name, flag),
                left(method.kind),
                rate(caught.tpr, caught.interval),
                count(cost.microseconds_per_token),
                cell(big(cost.flops_per_token)),
                left(monitor_words(method.monitor)),
                left(" ".join(filter(None, (method.what, cost.note)))),
            ]
        )
    head = ["method", "kind", "caught at 1%", "µs per token", "FLOPs per token", "monitor", "what it is"]
    return Section("methods", "Methods and cost", "", [Table(head, rows)])


def language(report: Evaluation) -> Section | None:
    """What training the flag did to the language."""
    change = report.language
    if not change:
        return None
    row = [count(change.keep_kl), cell(number(change.perplexity_ratio, 5)), count(change.tokens)]
    lead = "Next-token distribution against the reference model: 0 nats and a ratio of 1 mean that nothing changed."
    return Section("language", "Language", lead, [Table(["KL, nats per token", "perplexity ratio", "tokens"], [row])])


def made(report: Evaluation) -> Section | None:
    """Command, versions, seeds and hashes: everything that is needed to repeat it."""
    if not report.made:
        return None
    return Section("made", "How this was made", "", [Table(["", ""], list(_flatten(report.made)))])


def more(x: float | None) -> str:
    """An added share.

    >>> more(0.237), more(4.7e-05), more(0.0), more(12.5), more(None)
    ('+23.7%', '+0.0047%', '+0%', '+1,250%', 'not measured')
    """
    if x is None:
        return NOT_MEASURED
    if 0 < x < 0.001:
        return f"+{float(f'{100 * x:.2g}'):f}".rstrip("0").rstrip(".") + "%"
    return f"+{number(100 * x)}%"


def monitor_words(monitor: MonitorConfig | None) -> str:
    """A monitor in words: only the numbers that its aggregation uses."""
    if monitor is None:
        return NOT_MEASURED
    words = [f"{key} {number(getattr(monitor, key))}" for key in AGGREGATIONS[monitor.aggregation].uses]
    words += [f"warm-up {monitor.warm_up}"] if monitor.warm_up else []
    return ", ".join([monitor.aggregation, *words])


def _against(values: Mapping[str, Slice], forced: bool) -> str:
    others = list(dict.fromkeys(one.against for one in values.values() if one.against))
    at = "Caught at the threshold in force; harmless rows stand under “False alarms by set”." if forced else ""
    return " ".join(filter(None, [f"AUROC against {', '.join(others)}." if others else "", at]))


def _flatten(value: Any, path: str = "") -> Iterator[list[Cell]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path} {key}".strip())
    else:
        items = value if isinstance(value, list) else [value]
        shown = ", ".join(NOT_MEASURED if item is None else str(item) for item in items)
        yield [left(path), left(shown, quiet=value is None)]
