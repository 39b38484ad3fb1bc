"""The report of an evaluation: one dictionary in, `report.json`, `report.md` and `report.html` out.

The three say the same. What was not measured is null in the dictionary and "not measured" in the other two. The page is
one file: charts, and a viewer in which a threshold is moved over the responses themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redflag.files import atomic_write
from redflag.lab.report import breakdown, compute, detection, markdown, page, timing, verdict
from redflag.lab.report.check import check_report, check_traces
from redflag.lab.report.page import require
from redflag.lab.report.parts import Section
from redflag.lab.report.viewer_data import pack

__all__ = ["require", "write"]


def write(report: Mapping[str, Any], traces: Sequence[Mapping[str, Any]], folder: str | Path) -> None:
    """Writes the three files; none where the dictionary is refused.

    Args:
        report: What was measured, as `report.json` holds it: `format` 1, `title`, `methods` (name -> what was measured
            of it, the flag first) and perhaps `model_pass`, `made`, `language`, `attacks`, `judge`, `warnings`. Every
            part that was not measured is null or missing.
        traces: Responses for the viewer: `tokens` (T texts), `probs` (T steps and those that end the turn, x K),
            `harmful`, and perhaps `id`, `set` ("rows" or an attack), `source`, `category`, `onset`, `onset_source`,
            `given` (a prefill), `judged`.
        folder: Where the files go; made if it is not there.

    Raises:
        RedflagError: The report or a response is not of that shape (named with its place), or a package is missing.

    Example:
        >>> import tempfile
        >>> pooled = {"harmful": 8, "harmless": 9, "auroc": 0.75}
        >>> report = {"format": 1, "title": "A test", "methods": {"flag": {"kind": "flag", "pooled": pooled}}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(report, [], folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['report.html', 'report.json', 'report.md']
    """
    check_report(report)
    flags = check_traces(traces)
    flag = verdict.flag_name(report)
    parts = _sections(report, flag)
    title, warnings, said = report["title"], report.get("warnings") or [], verdict.sentences(report)
    packed = pack(traces, flags, report["methods"][flag]) if traces else None
    files = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown.render(title, warnings, said, parts),
        "report.html": page.render(title, warnings, said, verdict.figures(report), parts, packed),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with atomic_write(folder / name) as file:
            file.write(text.encode("utf-8", "replace"))


def _sections(report: Mapping[str, Any], flag: str) -> list[Section]:
    found = [
        detection.detection(report, flag),
        detection.in_force(report, flag),
        compute.compute(report, flag),
        breakdown.methods(report, flag),
        timing.delay(report, flag),
        timing.earliness(report, flag),
        detection.reliability(report, flag),
        breakdown.slices(report, flag),
        breakdown.over_refusal(report, flag),
        breakdown.attacks(report),
        breakdown.language(report),
        breakdown.made(report),
    ]
    return [section for section in found if section is not None]
