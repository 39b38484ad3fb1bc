"""Weights of the flag and keep terms at each judged position: coefficients, divided by the whole batch's counts."""

from __future__ import annotations

from typing import Any

import torch

from redflag.training.batch import Counts, JudgedPositions, after_and_benign, pinned_positions
from redflag.training.loss import Forecast, Head, flag_log_odds, peak_weights


def flag_weights(
    args: Any, batch: dict[str, torch.Tensor], judged: JudgedPositions, counts: Counts
) -> tuple[torch.Tensor, Forecast | None]:
    """Weights of the flag term at the N judged positions: for the hard labels, and for the forecasts.

    The formula is in `redflag.training.forecasts`. Positions without a flag label have a weight too.
    """
    flagged, harmless = counts.flagged, counts.harmless
    if counts.forecast is not None:  # a forecast f counts as f of a flagged position and 1 - f of a harmless one
        flagged, harmless = flagged + counts.forecast, harmless - counts.forecast
    flagged, harmless = flagged.clamp(min=1), harmless.clamp(min=1)
    hard = torch.where(judged.flag_labels > 0, args.harmful_weight / flagged, (1 - args.harmful_weight) / harmless)
    if "forecast" not in batch:
        return args.flag_coef * hard, None
    soft = batch["forecast"][judged.row, judged.column].clamp(min=0)
    forecast = Forecast(batch["forecast_class"][judged.row], args.flag_coef * soft * (args.harmful_weight / flagged))
    return args.flag_coef * hard * (1 - soft), forecast


def response_weights(
    args: Any, hidden_NH: torch.Tensor, head: Head, flag_ids: torch.Tensor, judged: JudgedPositions, counts: Counts
) -> torch.Tensor:
    """Weights of the flag term by response; the harmful and harmless positions of a response count as two responses."""
    weights = torch.zeros(len(judged.row), device=judged.row.device)
    log_odds = flag_log_odds(hidden_NH, head, flag_ids)
    for positions, share, count in (
        (judged.flag_labels > 0, args.harmful_weight, counts.responses_flagged),
        (judged.flag_labels == 0, 1 - args.harmful_weight, counts.responses_harmless),
    ):
        within = peak_weights(log_odds[positions], judged.row[positions], args.peak_window, args.peak_temperature)
        weights[positions] = within * share / count.clamp(min=1)
    return weights


def keep_weights(args: Any, batch: dict[str, torch.Tensor], judged: JudgedPositions, counts: Counts) -> torch.Tensor:
    """Weights of the keep term at the judged positions: `keep_coef`, plus `after_coef` and `benign_coef`."""
    weights = torch.where(pinned_positions(batch), args.keep_coef / counts.pinned.clamp(min=1), 0.0)
    if args.after_coef or args.benign_coef:
        after, benign = after_and_benign(batch)
        weights = weights + after * (args.after_coef / counts.after.clamp(min=1))
        weights = weights + benign * (args.benign_coef / counts.benign.clamp(min=1))
    return weights[judged.row, judged.column]
