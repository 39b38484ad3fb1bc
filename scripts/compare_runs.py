#!/usr/bin/env python3
"""Two or more `report.json` files side by side: what differs, and whether their intervals are apart.

    python scripts/compare_runs.py runs/a/report.json runs/b/report.json
    python scripts/compare_runs.py a.json b.json --methods flag "linear probe" --json differences.json

Every figure stands beside its 95% interval; differences are to the first report. Figures of different test rows cannot
be told from a difference of the rows, so such reports are refused unless --different-rows says that it is wanted.
Markdown on standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from redflag.errors import RedflagError
from redflag.files import atomic_write
from redflag.lab.report import Evaluation, read_report
from redflag.lab.report.evaluation import Language
from redflag.lab.report.method import InForce, Method
from redflag.lab.report.parts import Ends

RATES = {"0.001": "0.1%", "0.01": "1%", "0.05": "5%"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", help="report.json files, the one to compare with first")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods to compare; default: the flag of each")
    parser.add_argument("--different-rows", action="store_true", help="compare although the test rows differ")
    parser.add_argument("--json", metavar="FILE", help="write figures and differences as JSON")
    arguments = parser.parse_args(argv)
    try:
        found = compare(arguments)
        print(markdown(found))
        if arguments.json:
            with atomic_write(arguments.json) as file:
                file.write(json.dumps(found, indent=2, allow_nan=False).encode() + b"\n")
    except RedflagError as error:
        print(f"compare_runs: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of all reports and their differences to the first."""
    if len(arguments.reports) < 2:
        raise RedflagError("one report is nothing to compare: give two or more report.json files")
    reports = [read_report(path) for path in arguments.reports]
    hashes = [made(report, "rows", "test", "sha256") for report in reports]
    warnings = []
    if len(set(hashes)) > 1 or hashes[0] is None:
        said = ", ".join(f"{path}: {str(sha)[:12]}" for path, sha in zip(arguments.reports, hashes, strict=True))
        if not arguments.different_rows:
            raise RedflagError(
                f"the reports were not made on the same test rows, as far as they say ({said}), so a difference may be "
                "that of the rows: evaluate on the same rows, or give --different-rows"
            )
        warnings.append(f"the test rows differ ({said}): a difference may be that of the rows")
    sections: dict[str, dict[str, list[dict[str, Any] | None]]] = {}
    for name in arguments.methods or [None]:
        chosen = [method(path, report, name) for path, report in zip(arguments.reports, reports, strict=True)]
        sections[name or "flag"] = figures([of_method(part) for part in chosen])
    sections["language"] = figures([of_language(report) for report in reports])
    sections["attacks"] = figures([of_attacks(report) for report in reports])
    return {
        "format": 1,
        "reports": [
            {"path": path, "title": report.title, "run_id": made(report, "model", "run_id")}
            for path, report in zip(arguments.reports, reports, strict=True)
        ],
        "warnings": warnings,
        "sections": {
            name: {figure: {"values": values, "differences": differences(values)} for figure, values in part.items()}
            for name, part in sections.items()
            if part
        },
    }


def method(path: str, report: Evaluation, name: str | None) -> Method:
    """A method of a report by name; None: its first flag."""
    if name is not None and name not in report.methods:
        raise RedflagError(f"{path} has no method {name!r}: use one of {', '.join(report.methods)}")
    return report.methods[report.flag_name if name is None else name]


def of_method(part: Method) -> dict[str, dict[str, Any]]:
    """Figure -> value and interval of a method."""
    force = part.in_force or InForce()
    found = {"AUROC": figure(part.pooled.auroc, part.pooled.auroc_interval)}
    for key, name in RATES.items():
        found[f"TPR at {name} FPR"] = figure(part.pooled.at(key).tpr, part.pooled.at(key).interval)
    found["TPR in force"] = figure(force.tpr, force.tpr_interval)
    found["realised FPR"] = figure(force.realised_fpr, force.realised_fpr_interval)
    for kind, delay in (part.delay or {}).items():
        if delay is None:
            continue
        # A delay means nothing without the false alarms that bought it.
        beside = f" (at {delay.realised_fpr:.2%} FPR)"
        for name, value in (("median delay", delay.median), ("on time", delay.on_time), ("missed", delay.missed)):
            found[f"{name}, {kind} onsets"] = figure(value) | {"beside": beside if value is not None else ""}
    found["microseconds per token"] = figure(part.cost.microseconds_per_token if part.cost else None)
    return found


def of_language(report: Evaluation) -> dict[str, dict[str, Any]]:
    found = report.language or Language()
    return {"keep KL": figure(found.keep_kl), "perplexity ratio": figure(found.perplexity_ratio)}


def of_attacks(report: Evaluation) -> dict[str, dict[str, Any]]:
    found = {}
    for attack in report.attacks or ():
        name = " ".join(filter(None, (attack.name, attack.setting)))
        for rate, what in (
            (attack.harm_released, "harm released"),
            (attack.harm_produced, "harm produced"),
            (attack.alarm_rate, "alarms"),
        ):
            found[f"{name}: {what}"] = figure(rate.rate, rate.interval) if rate else figure(None)
    return found


def figures(of_reports: list[dict[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any] | None]]:
    """Figure -> its value in each report, where any has one."""
    names = dict.fromkeys(name for part in of_reports for name in part)
    found = {name: [part.get(name) for part in of_reports] for name in names}
    return {name: values for name, values in found.items() if any(v and v["value"] is not None for v in values)}


def figure(value: float | None, interval: Ends = None) -> dict[str, Any]:
    return {"value": value, "interval": None if interval is None or None in interval else list(interval)}


def differences(values: list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    """To the first report: the difference, and whether the intervals are apart (None: one has none)."""
    first = values[0]
    found: list[dict[str, Any] | None] = []
    for other in values[1:]:
        if not first or not other or first["value"] is None or other["value"] is None:
            found.append(None)
            continue
        apart = None
        if first["interval"] and other["interval"]:
            (a, b), (c, d) = first["interval"], other["interval"]
            apart = d < a or b < c
        found.append({"difference": other["value"] - first["value"], "apart": apart})
    return found


def markdown(found: dict[str, Any]) -> str:
    letters = [chr(ord("A") + i) if i < 26 else f"#{i}" for i in range(len(found["reports"]))]
    lines = ["# Runs side by side", ""]
    for letter, report in zip(letters, found["reports"], strict=True):
        run = f", run {report['run_id']}" if report["run_id"] else ""
        lines.append(f"- **{letter}**: {cell(report['title'] or '(no title)')} (`{report['path']}`{cell(run)})")
    lines += [f"- **Warning**: {warning}" for warning in found["warnings"]]
    for name, part in found["sections"].items():
        head = [name, *letters, *(f"{letter} - A" for letter in letters[1:])]
        lines += ["", "| " + " | ".join(map(cell, head)) + " |", "|" + "---|" * len(head)]
        for what, row in part.items():
            words = [shown(value) for value in row["values"]] + [told(change) for change in row["differences"]]
            lines.append("| " + " | ".join(map(cell, [what, *words])) + " |")
    lines += [
        "",
        "Intervals of 95%. *apart*: they do not overlap, so the difference is more than chance. *overlap*: they do, "
        "and these figures decide nothing; on the same rows a paired comparison may.",
    ]
    return "\n".join(lines)


def shown(value: dict[str, Any] | None) -> str:
    if not value or value["value"] is None:
        return "-"
    interval = f" [{value['interval'][0]:.4g}, {value['interval'][1]:.4g}]" if value["interval"] else ""
    return f"{value['value']:.4g}{interval}{value.get('beside', '')}"


def told(change: dict[str, Any] | None) -> str:
    if not change:
        return "-"
    return f"{change['difference']:+.4g}" + {None: "", True: " *apart*", False: " *overlap*"}[change["apart"]]


def cell(text: str) -> str:
    """Text that cannot end a cell or a line of the table."""
    return " ".join(text.split()).replace("|", "\\|")


def made(report: Evaluation, *path: str) -> Any:
    """What a report says of how it was made; None where it does not say."""
    part: Any = report.made
    for key in path:
        part = part.get(key) if isinstance(part, dict) else None
    return part


if __name__ == "__main__":
    sys.exit(main())
