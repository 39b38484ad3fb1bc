"""Summarises the labels of rows in a few lines, to read before hours of training."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from redflag.data.rows import Rows

LINES = 12
# Words in the name of a column that may hold a verdict on the response.
_VERDICTS = {"label", "labels", "safe", "unsafe", "safety", "harmful", "harmfulness", "harmless", "benign"}
_VERDICTS |= {"toxic", "toxicity", "refusal", "severity", "flagged"}


def label_table(rows: Rows) -> list[str]:
    """How many rows of each category and source are harmful or harmless, the largest first; at most `LINES` lines."""
    counts = Counter((row.category, row.source) for row in rows)
    harmful = sum(row.harmful for row in rows)
    lines = [f"{len(rows):,} rows: {harmful:,} harmful, {len(rows) - harmful:,} harmless"]
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0][0] or "", item[0][1] or ""))
    shown = ordered if len(ordered) < LINES else ordered[: LINES - 2]
    for (category, source), count in shown:
        verdict = "harmless" if category is None else f"harmful   {category}"
        lines.append(f"  {count:>9,}  {verdict}{f'  (source {source})' if source else ''}")
    if rest := ordered[len(shown) :]:
        total, bad = sum(count for _, count in rest), sum(count for (category, _), count in rest if category)
        lines.append(f"  {total:>9,}  in {len(rest)} further kinds: {bad:,} harmful, {total - bad:,} harmless")
    return lines


def label_warnings(rows: int, harmful: int, decided_by: Mapping[str, int], ignored: Mapping[str, int]) -> list[str]:
    """Warnings about labels that are probably misread, from the numbers of rows and of harmful ones.

    `decided_by` and `ignored` are those of `Rows`.
    """
    by_category = decided_by.get("category", 0)
    labelled = rows - by_category - decided_by.get("", 0)
    warnings = []
    if rows and by_category == rows == harmful:
        warnings.append(
            f"warning: every row has a category, so all {rows:,} count as harmful. If category is the topic of the "
            """request, drop it with --columns '{"category": null}', or name the column that says whether the """
            """response is harmful: --columns '{"label": "COLUMN"}'"""
        )
    elif by_category and labelled:
        warnings.append(
            f"warning: {by_category:,} rows have a category and no label, beside {labelled:,} rows with a label. Those "
            f"{by_category:,} count as harmful: if their category is the topic of the request, give them a label"
        )
    unread = [] if labelled else [name for name in ignored if _VERDICTS & set(re.split(r"[^a-z]+", name.lower()))]
    if unread:
        unread.sort(key=lambda name: "response" not in name.lower())  # labels of the prompt come last
        decides = "category decides" if by_category else "every row counts as harmless"
        plural = len(unread) > 1
        warnings.append(
            f"warning: the column{'s' if plural else ''} {', '.join(unread)} look{'' if plural else 's'} like a label "
            f"and {'are' if plural else 'is'} not read; {decides}. If one says whether the response is harmful, give "
            f"--columns '{json.dumps({'label': unread[0]})}', and --labels unless its values are words like harmful"
        )
    return warnings


def warnings_about(rows: Rows) -> list[str]:
    """`label_warnings` for a result of `load_rows`."""
    return label_warnings(len(rows), sum(row.harmful for row in rows), rows.decided_by, rows.ignored)


def report_rows(rows: Rows) -> None:
    """Prints on stderr which rows were left out, and warnings about the labels of the others."""
    report_skipped(rows.skipped)
    for line in warnings_about(rows):
        print(line, file=sys.stderr)


def report_skipped(skipped: Sequence[Any]) -> None:
    """Names the rows left out on stderr: all of a few, the first of many."""
    for bad in skipped[:5]:
        print(f"skipped {bad}", file=sys.stderr)
    if len(skipped) > 5:
        print(f"... and {len(skipped) - 5} more; {len(skipped)} rows skipped in all", file=sys.stderr)
