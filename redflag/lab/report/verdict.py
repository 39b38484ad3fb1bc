"""The first lines of a report: the result in sentences, and its headline numbers."""

from __future__ import annotations

from redflag.lab.report.evaluation import AttackLine, Evaluation, JudgedRate
from redflag.lab.report.method import InForce, Method
from redflag.lab.report.parts import Ends, attack_name, between, number, percent, point, signed

# Without a labelled onset, tokens are counted from the first one, and no alarm is early or late.
UNKNOWN = "unknown"


def sentences(report: Evaluation) -> list[str]:
    """Detection, delay, the best baseline and the worst attack; what was not measured is left out."""
    name = report.flag_name
    method = report.methods[name]
    parts = (_detection(name, method), _delay(method), _against(report, name), _attacked(report))
    return [sentence for sentence in parts if sentence]


def figures(report: Evaluation) -> list[tuple[str, str, str]]:
    """The headline numbers: value, meaning, and the interval or what else it must be read with."""
    method = report.methods[report.flag_name]
    in_force, at_1 = method.in_force or InForce(), method.pooled.at("0.01")
    headlines = []
    if in_force.tpr is not None:
        small = f"{between(in_force.tpr_interval)} · at the threshold in force"
        headlines.append((percent(in_force.tpr), "of harmful responses caught", small))
    elif at_1.tpr is not None:
        headlines.append((percent(at_1.tpr), "caught at 1% false alarms", between(at_1.interval)))
    if in_force.realised_fpr is not None:
        small = between(in_force.realised_fpr_interval)
        headlines.append((percent(in_force.realised_fpr), "of harmless responses alarm", small))
    for kind, delay in (method.delay or {}).items():
        if kind != UNKNOWN and delay and delay.median is not None:
            beside = f"{kind} onsets · false alarms {percent(delay.realised_fpr)}"
            headlines.append((signed(delay.median), "tokens from onset to alarm (median)", beside))
            break
    if worst := _worst(report):
        attack, released = worst
        small = f"{attack_name(attack)} · produced {percent((attack.harm_produced or JudgedRate()).rate)}"
        headlines.append((percent(released), "of requests release harm, at worst", small))
    return headlines


def _detection(name: str, method: Method) -> str:
    pooled, in_force = method.pooled, method.in_force or InForce()
    rows = f"{number(pooled.harmful)} harmful and {number(pooled.harmless)} harmless responses"
    if in_force.tpr is not None and in_force.realised_fpr is not None:
        alarms = _with(in_force.realised_fpr, in_force.realised_fpr_interval)
        return (
            f"At its threshold, {_called(name)} catches {_with(in_force.tpr, in_force.tpr_interval)} of "
            f"harmful responses and alarms on {alarms} of harmless ones ({rows}).{_beyond(method)}"
        )
    caught = pooled.at("0.01")
    if caught.tpr is not None:
        return (
            f"At a false-alarm rate of at most 1% per response, {_called(name)} catches "
            f"{_with(caught.tpr, caught.interval)} of harmful responses ({rows})."
        )
    return f"How much {_called(name)} catches was not measured ({rows})."


def _delay(method: Method) -> str | None:
    clauses = []
    for kind, delay in (method.delay or {}).items():
        if kind == UNKNOWN or not delay or delay.median is None:
            continue
        when, after = "right at it", delay.median
        if after:
            tokens = f"{number(abs(after))} token{'' if abs(after) == 1 else 's'}"
            when = f"{tokens} {'after' if after > 0 else 'before'} it"
        shares = f"{percent(delay.on_time)} on time, {percent(delay.missed)} missed"
        clauses.append(
            f"where the onset of harm is {kind}, the median alarm comes {when} ({shares}; "
            f"false alarms {percent(delay.realised_fpr)})"
        )
    text = "; ".join(clauses)
    return text[:1].upper() + text[1:] + "." if text else None


def _against(report: Evaluation, name: str) -> str | None:
    ours = report.methods[name].pooled.at("0.01")
    others = {
        other: (tpr, interval)
        for other, method in report.methods.items()
        if method.kind == "baseline"
        for tpr, interval in [point(method.pooled, in_force=False)]
        if tpr is not None
    }
    if ours.tpr is None or not others:
        return None
    best = max(others, key=lambda other: others[other][0])
    theirs, its = others[best]
    mine = ours.interval
    apart = mine and its and None not in (*mine, *its) and (mine[0] > its[1] or mine[1] < its[0])  # type: ignore[operator]
    if not apart:
        judged = "the intervals overlap, so this sample does not tell them apart"
    elif ours.tpr > theirs:
        judged = f"{_called(name)} is ahead"
    else:
        judged = f"{_called(name)} is behind"
    return (
        f"At 1% false alarms it catches {_with(ours.tpr, mine)}, the best of {len(others)} "
        f"baseline{'s' * (len(others) > 1)}, {best}, {_with(theirs, its)}: {judged}."
    )


def _attacked(report: Evaluation) -> str | None:
    worst = _worst(report)
    if worst is None:
        return None
    attack, rate = worst
    requests = f" of {number(attack.requests)} requests" if attack.requests is not None else " of requests"
    released, produced = attack.harm_released or JudgedRate(), attack.harm_produced or JudgedRate()
    much = f"{_with(rate, released.interval)}{requests}"
    without = f"; without the guard it is {percent(produced.rate)}" if produced.rate is not None else ""
    if attack.name == "none":
        return f"No attack gets more harm past the guard than plain requests do, in {much}{without}."
    setting = f" ({attack.setting})" if attack.setting else ""
    return f"The attack that gets most harm past the guard, {attack.name}{setting}, does so in {much}{without}."


def _worst(report: Evaluation) -> tuple[AttackLine, float] | None:
    """The attack that got most harm past the guard, and in which share of its requests."""
    rates = [(a, a.harm_released.rate) for a in report.attacks or () if a.harm_released is not None]
    return max(((a, rate) for a, rate in rates if rate is not None), key=lambda pair: pair[1], default=None)


def _beyond(method: Method) -> str:
    """A warning where false alarms exceed the target by more than chance."""
    target = method.threshold.target_fpr if method.threshold else None
    interval = method.in_force.realised_fpr_interval if method.in_force else None
    if target is None or not interval or interval[0] is None or interval[0] <= target:
        return ""
    return f" That is more than the target of {percent(target)}: the rows it was set on are not like these."


def _called(name: str) -> str:
    return "the flag" if name == "flag" else name


def _with(value: float, interval: Ends) -> str:
    spread = between(interval)
    return f"{percent(value)}{f' ({spread})' if spread else ''}"
