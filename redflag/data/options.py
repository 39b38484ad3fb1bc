"""Options for reading rows, shared by several verbs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from redflag.bounds import option


@dataclass(kw_only=True)
class RowOptions:
    """Options for rows in other formats; see `redflag.data.rows.load_rows`."""

    columns: dict[str, str | list[str] | None] | None = option(
        None, "Our column -> the data set's column (a list: a row for each); null drops one."
    )
    labels: dict[str, str | None] | None = option(None, "Label -> category, or null = harmless.")
    unlabelled: Literal["stop", "skip", "harmless"] = option(
        "stop", "Rows whose label is null: stop, skip or harmless."
    )
    split: str = option("train", "Split of a data set of the hub; or name it NAME:CONFIGURATION:SPLIT.")

    def row_options(self) -> dict[str, Any]:
        """The options as arguments of `load_rows`."""
        return {item.name: getattr(self, item.name) for item in fields(RowOptions)}
