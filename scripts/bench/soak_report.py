"""The figures of `scripts/bench/soak.py`: whether the server grew, and a table."""

from __future__ import annotations

import statistics
from typing import Any


def report(
    wrong: list[str],
    counts: dict[str, int],
    samples: list[dict[str, float]],
    fresh: dict[str, float],
    after: dict[str, float],
    metrics: str,
    **about: Any,
) -> dict[str, Any]:
    """The figures, and what is wrong with them.

    Args:
        wrong: What the clients found.
        counts: Outcome -> requests.
        samples: The server's figures, second by second.
        fresh: The same before the first client.
        after: The same when the last one has left.
        metrics: What the server says of itself then.
        **about: What else is to be told.
    """
    wrong = list(wrong)
    third = len(samples) // 3
    parts = [samples[i * third : (i + 1) * third] for i in range(3)]
    level = {name: [statistics.median(s[name] for s in part) for part in parts] for name in samples[0]}
    for name, most in (
        ("fds", fresh["fds"] + 8),
        ("sockets", fresh["sockets"] + 4),
        ("threads", fresh["threads"] + 12),
    ):
        if after[name] > most:
            wrong.append(f"{name}: {after[name]:g} at rest, {fresh[name]:g} at the start")
    if max(s["threads"] for s in parts[2]) > max(s["threads"] for s in parts[0] + parts[1]) + 2:
        wrong.append("threads still grow in the last third")
    if level["rss_mb"][2] - level["rss_mb"][1] > max(15.0, 0.04 * level["rss_mb"][1]):
        wrong.append(f"memory still grows in the last third: {level['rss_mb']} MB")
    if "redflag_in_flight 0.0" not in metrics:
        wrong.append("requests are in flight with no client left")
    total = sum(counts.values())
    return {
        **about,
        "requests": total,
        "requests_per_second": round(total / about["seconds"], 1),
        "outcomes": dict(sorted(counts.items())),
        "median_by_third": {name: [round(value, 1) for value in values] for name, values in level.items()},
        "most": {name: round(max(s[name] for s in samples), 1) for name in fresh},
        "at_start": fresh,
        "at_rest": after,
        "wrong": wrong[:50],
        "wrong_count": len(wrong),
        "samples": samples[:: max(1, len(samples) // 60)],
    }


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"{figures['clients']} clients, {figures['seconds']:g} s, upstream {figures['upstream']} killed "
        f"{figures['kills']} times: {figures['requests']} requests, {figures['requests_per_second']} per second, "
        f"{figures['responses_compared_with_traces']} responses compared with their traces",
        f"{'':<10}{'start':>8}{'1st third':>11}{'2nd third':>11}{'3rd third':>11}{'most':>8}{'at rest':>9}",
    ]
    for name, values in figures["median_by_third"].items():
        if name != "t":
            ends = figures["at_start"][name], figures["most"][name], figures["at_rest"][name]
            lines.append(
                f"{name:<10}{ends[0]:>8g}" + "".join(f"{v:>11g}" for v in values) + f"{ends[1]:>8g}{ends[2]:>9g}"
            )
    lines += [f"  {count:>6}  {name}" for name, count in figures["outcomes"].items()]
    lines += [f"WRONG ({figures['wrong_count']}): {text}" for text in figures["wrong"]] or ["nothing wrong"]
    return "\n".join(lines)
