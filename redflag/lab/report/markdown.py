"""The report as Markdown: the sections' tables, without the charts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from redflag.lab.report.parts import Cell, Section, Table


def render(title: str, warnings: Sequence[str], verdict: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole report as text."""
    blocks = [f"# {_safe(title)}"]
    blocks += [f"> **Warning.** {_safe(warning)}" for warning in warnings]
    blocks.append("\n".join(_safe(sentence) for sentence in verdict))
    for section in sections:
        blocks.append(f"## {_safe(section.title)}")
        blocks += [_safe(section.lead)] if section.lead else []
        for table in section.tables:
            blocks += [f"### {_safe(table.title)}"] if table.title else []
            blocks.append(_table(table))
            blocks += [_safe(table.note)] if table.note else []
    return "\n\n".join(blocks) + "\n"


def _table(table: Table) -> str:
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.head)
    rule = ["---" if all(cell.left for cell in column) else "---:" for column in columns]
    lines = [[_safe(name) for name in table.head], rule, *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    text = _safe(cell.text)
    parts = [f"**{text}**" if cell.strong else text]
    parts += [f"({_safe(cell.small)})"] if cell.small else []
    parts += [f"*{_safe(cell.mark)}*"] if cell.mark else []
    return " ".join(parts)


def _safe(text: str) -> str:
    # Names come from data: they neither break a row, nor become markup where Markdown allows HTML.
    return re.sub(r"([\\|*_<>`\[\]#])", r"\\\1", " ".join(text.split()))
