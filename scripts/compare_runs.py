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
import math
import sys
from typing import Any

from redflag.errors import RedflagError
from redflag.files import atomic_write

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
    reports = [load(path) for path in arguments.reports]
    hashes = [at(report, "made", "rows", "test", "sha256") for report in reports]
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
            {"path": path, "title": at(report, "title"), "run_id": at(report, "made", "model", "run_id")}
            for path, report in zip(arguments.reports, reports, strict=True)
        ],
        "warnings": warnings,
        "sections": {
            name: {figure: {"values": values, "differences": differences(values)} for figure, values in part.items()}
            for name, part in sections.items()
            if part
        },
    }


def load(path: str) -> dict[str, Any]:
    """A report of format 1."""
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
    except OSError as error:
        raise RedflagError(f"{path} cannot be read ({error.strerror}): give a report.json") from error
    except (ValueError, RecursionError) as error:
        raise RedflagError(f"{path} is not JSON ({error}): give a report.json that `redflag evaluate` wrote") from error
    if at(report, "format") != 1 or not isinstance(at(report, "methods"), dict) or not report["methods"]:
        raise RedflagError(
            f"{path} is no report of format 1 with methods: give a report.json that `redflag evaluate` wrote"
        )
    return dict(report)


def method(path: str, report: dict[str, Any], name: str | None) -> Any:
    """A method of a report by name; None: its first flag."""
    methods = report["methods"]
    if name is None:
        return next((part for part in methods.values() if at(part, "kind") == "flag"), next(iter(methods.values())))
    if name not in methods:
        raise RedflagError(f"{path} has no method {name!r}: use one of {', '.join(methods)}")
    return methods[name]


def of_method(part: Any) -> dict[str, dict[str, Any]]:
    """Figure -> value and interval of a method."""
    found = {"AUROC": figure(part, ("pooled", "auroc"), ("pooled", "auroc_interval"))}
    for key, name in RATES.items():
        found[f"TPR at {name} FPR"] = figure(part, ("pooled", "tpr", key, "tpr"), ("pooled", "tpr", key, "interval"))
    found["TPR in force"] = figure(part, ("in_force", "tpr"), ("in_force", "tpr_interval"))
    found["realised FPR"] = figure(part, ("in_force", "realised_fpr"), ("in_force", "realised_fpr_interval"))
    delays = at(part, "delay")
    for kind in delays if isinstance(delays, dict) else ():
        # A delay means nothing without the false alarms that bought it.
        bought = at(part, "delay", kind, "realised_fpr")
        beside = f" (at {bought:.2%} FPR)" if number(bought) else ""
        for key, name in (("median", "median delay"), ("on_time", "on time"), ("missed", "missed")):
            value = figure(part, ("delay", kind, key), ())
            found[f"{name}, {kind} onsets"] = value | {"beside": beside if value["value"] is not None else ""}
    found["microseconds per token"] = figure(part, ("cost", "microseconds_per_token"), ())
    return found


def of_language(report: Any) -> dict[str, dict[str, Any]]:
    return {
        "keep KL": figure(report, ("language", "keep_kl"), ()),
        "perplexity ratio": figure(report, ("language", "perplexity_ratio"), ()),
    }


def of_attacks(report: Any) -> dict[str, dict[str, Any]]:
    found = {}
    attacks = at(report, "attacks")
    for attack in attacks if isinstance(attacks, list) else ():
        name = " ".join(str(at(attack, key)) for key in ("name", "setting") if at(attack, key))
        for key, what in (
            ("harm_released", "harm released"),
            ("harm_produced", "harm produced"),
            ("alarm_rate", "alarms"),
        ):
            found[f"{name}: {what}"] = figure(attack, (key, "rate"), (key, "interval"))
    return found


def figures(of_reports: list[dict[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any] | None]]:
    """Figure -> its value in each report, where any has one."""
    names = dict.fromkeys(name for part in of_reports for name in part)
    found = {name: [part.get(name) for part in of_reports] for name in names}
    return {name: values for name, values in found.items() if any(v and v["value"] is not None for v in values)}


def figure(part: Any, value: tuple[str, ...], interval: tuple[str, ...]) -> dict[str, Any]:
    ends = at(part, *interval) if interval else None
    sound = isinstance(ends, list) and len(ends) == 2 and all(map(number, ends))
    found = at(part, *value)
    return {"value": found if number(found) else None, "interval": ends if sound else None}


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


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def at(part: Any, *path: str) -> Any:
    """A value deep inside; None where any key on the way is missing."""
    for key in path:
        if not isinstance(part, dict) or key not in part:
            return None
        part = part[key]
    return part


if __name__ == "__main__":
    sys.exit(main())
