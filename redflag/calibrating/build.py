"""Builds `Thresholds` from fitted values; all keys of `thresholds.json` are set here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redflag.calibrating import replay
from redflag.calibrating.guarantee import Guarantee
from redflag.calibrating.hold_back import HoldBack, suggest_hold_back
from redflag.watching.monitor import MonitorConfig
from redflag.watching.thresholds import Thresholds


def build_thresholds(
    categories: Sequence[str],
    values: Sequence[float],
    monitor: MonitorConfig,
    responses: replay.Responses,
    dated: Sequence[int],
    onsets: Sequence[int],
    *,
    target_fpr: float | None,
    guarantee: Guarantee,
    delta: float,
    hold_back_share: float = 0.95,
    **fields: Any,
) -> tuple[Thresholds, HoldBack]:
    """Thresholds with all their fields.

    Args:
        dated: The measured responses that are harmful and reach a known onset.
        target_fpr: None = another objective, without guarantee.
        hold_back_share: As for `redflag.calibrating.hold_back.suggest_hold_back`.
        **fields: The other fields of `Thresholds`.

    Returns:
        Thresholds, and the delays that the suggested hold-back comes from.
    """
    first = replay.alarms(monitor, responses, values, dated).tolist()
    hold_back = suggest_hold_back([step if step >= 0 else None for step in first], onsets, hold_back_share)
    thresholds = Thresholds(
        values=dict(zip(categories, values, strict=True)),
        monitor=monitor,
        target_fpr=target_fpr,
        guarantee="manual" if target_fpr is None else guarantee,
        delta=delta if target_fpr is not None and guarantee == "high_probability" else None,
        suggested_hold_back=hold_back.suggested,
        **fields,
    )
    return thresholds, hold_back
