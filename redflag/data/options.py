"""Options for reading rows, shared by several verbs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class RowOptions:
    """Options for rows in other formats; see `redflag.data.rows.load_rows`."""

    columns: dict[str, str | list[str] | None] | None = field(
        default=None, metadata={"help": "Our column -> the data set's column (a list: a row for each); null drops one."}
    )
    labels: dict[str, str | None] | None = field(
        default=None, metadata={"help": "Label -> category, or null = harmless."}
    )
    unlabelled: Literal["stop", "skip", "harmless"] = field(
        default="stop", metadata={"help": "Rows whose label is null: stop, skip or harmless."}
    )
    split: str = field(
        default="train", metadata={"help": "Split of a data set of the hub; or name it NAME:CONFIGURATION:SPLIT."}
    )

    def row_options(self) -> dict[str, Any]:
        """The options as arguments of `load_rows`."""
        return {
            "columns": self.columns,
            "labels": self.labels,
            "unlabelled": self.unlabelled,
            "split": self.split,
        }
