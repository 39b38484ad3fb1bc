"""Baselines: other ways to watch a response as it is written, trained on the rows that a flag is trained on.

A baseline records as a flag does, and so appears in the same tables, under the same monitors and thresholds:
`record_baselines` of the module of that name trains any of them and keeps their recordings. What they share (the base
model, the tokenizer, the limits) is a `redflag.lab.baselines.shared.BaselineContext`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from redflag.data.rows import Row
from redflag.lab.report.method import Cost
from redflag.scoring.recording import Recording

__all__ = ["Baseline", "Cost"]


class Baseline(Protocol):
    """What a baseline is."""

    name: str  # shown in tables
    what: str  # one sentence that says how it judges and what it was trained on

    def fit(self, train: Sequence[Row]) -> None:
        """Trains on these rows; the same rows and seed give the same baseline. Needed once, before `score`."""

    def score(self, rows: Sequence[Row]) -> Recording:
        """One probability before each response token, and before those that end the turn, in the order of the rows.

        The one before token i is computed from the prompt and the tokens before i, as the flagged model's tokenizer
        splits them.
        """

    def cost(self) -> Cost:
        """What it costs per token."""
