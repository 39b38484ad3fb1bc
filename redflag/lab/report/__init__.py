"""The report of an evaluation: `Evaluation` in, `report.json`, `report.md` and `report.html` out.

All three hold the same figures. What was not measured is null in the first and "not measured" in the others. The page
is one file: charts, and a viewer in which a threshold is moved over the responses themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from redflag.files import atomic_write
from redflag.lab.report import breakdown, detection, markdown, page, verdict
from redflag.lab.report.evaluation import Evaluation, as_json, read_report
from redflag.lab.report.page import require
from redflag.lab.report.parts import Section
from redflag.lab.report.viewer_data import ShownResponse, pack

__all__ = ["Evaluation", "ShownResponse", "read_report", "require", "write"]


def write(report: Evaluation, traces: Sequence[ShownResponse], folder: str | Path) -> None:
    """Writes the three files, or none.

    Args:
        folder: Where the files go; made if it is not there.

    Raises:
        RedflagError: A package is missing, or the files cannot be written.
        ValueError: A figure is NaN or infinite, which no JSON holds.

    Example:
        >>> import tempfile
        >>> from redflag.lab.report.method import Method, Slice
        >>> report = Evaluation("A test", {"flag": Method("flag", Slice(harmful=8, harmless=9, auroc=0.75))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(report, [], folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['report.html', 'report.json', 'report.md']
    """
    flag = report.flag_name
    parts = _sections(report, flag)
    title, warnings, sentences = report.title, report.warnings or [], verdict.sentences(report)
    packed = pack(traces, report.methods[flag]) if traces else None
    files = {
        "report.json": json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown.render(title, warnings, sentences, parts),
        "report.html": page.render(title, warnings, sentences, verdict.figures(report), parts, packed),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with atomic_write(folder / name) as file:
            file.write(text.encode("utf-8", "replace"))


def _sections(report: Evaluation, flag: str) -> list[Section]:
    sections = [
        detection.detection(report, flag),
        detection.in_force(report, flag),
        breakdown.compute(report, flag),
        breakdown.methods(report, flag),
        detection.delay(report, flag),
        detection.earliness(report, flag),
        detection.reliability(report, flag),
        breakdown.slices(report, flag),
        breakdown.over_refusal(report, flag),
        breakdown.attacks(report),
        breakdown.language(report),
        breakdown.made(report),
    ]
    return [section for section in sections if section is not None]
