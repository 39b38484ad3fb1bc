"""Two methods on the same rows: which one is better, and by how much."""

from __future__ import annotations

from redflag.calibrating import replay
from redflag.calibrating.observed import cut_short
from redflag.errors import RedflagError
from redflag.lab.evaluating.tables import RATES
from redflag.lab.report.method import Difference, Lead
from redflag.scoring.recording import Recording
from redflag.stats.intervals import auroc_difference, tpr_differences, unit_of
from redflag.watching.monitor import MonitorConfig


def versus(
    first: Recording,
    second: Recording,
    *,
    monitor: MonitorConfig | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Lead:
    """How much better the first of two methods tells the same responses apart than the second.

    The same rows are drawn for both, so what is hard for both does not blur the difference.

    Args:
        second: What the other recorded on the same rows in the same order.

    Raises:
        RedflagError: The rows are not the same, or a class is missing.
    """
    same = len(first) == len(second) and all(first.columns[c] == second.columns[c] for c in ("id", "category", "group"))
    if not same:
        raise RedflagError(
            "the two methods were recorded on different rows, so their difference would be that of the rows: record "
            "both on the same rows in the same order"
        )
    # A row is left out where it is for either: each method may cut responses at a length of its own.
    kept = ~(cut_short(first) | cut_short(second))
    config = monitor or MonitorConfig()
    one, other = (replay.peaks(config, each.select(kept)).max(axis=1, initial=0.0) for each in (first, second))
    labels = first.harmful[kept]
    units = unit_of([group for group, keep in zip(first.columns["group"], kept, strict=True) if keep], len(labels))
    area = Difference(*auroc_difference(one, other, labels, units))
    found = tpr_differences(one, other, labels, units, fprs=RATES, resamples=resamples, seed=seed)
    return Lead(area, {f"{rate:g}": Difference(*one) for rate, one in zip(RATES, found, strict=True)})
