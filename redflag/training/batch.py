"""One batch as the loss sees it: what its terms divide by, which positions are judged, and what each of them weighs.

Shapes: B rows, T columns, N judged positions, H width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from redflag.training.consistency import group_keys, groups_met
from redflag.training.encode import IGNORE
from redflag.training.loss import Forecast, Head, flag_log_odds, peak_weights


class Counts(NamedTuple):
    """What the terms of the loss divide by. Counts of batches add up, and so do those of processes.

    Attributes:
        pinned: Positions with a keep term.
        flagged: Positions labelled with a flag.
        harmless: Positions labelled "no flag".
        responses_flagged: Responses with a flagged position.
        responses_harmless: Responses with a harmless one.
        groups: Groups with at least two rows in one batch.
        answered: Tokens of answers that are learnt, and of refusals with the prefills before them, counted as in
            PRESTO's code.
        after: Pinned positions of harmful rows that stand after an inserted flag.
        benign: Pinned positions of harmless rows.
        forecast: Sum of the forecasts; None where they are not in use.
    """

    pinned: torch.Tensor
    flagged: torch.Tensor
    harmless: torch.Tensor
    responses_flagged: torch.Tensor
    responses_harmless: torch.Tensor
    groups: torch.Tensor
    answered: torch.Tensor
    after: torch.Tensor
    benign: torch.Tensor
    forecast: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor], consistency_at: str) -> Counts:
        """Counts of one batch of the collator. No hidden state judges column 0, so it does not count."""
        flag_labels, labels = batch["flag_labels"][:, 1:], batch["labels"]
        flagged, harmless = flag_labels > 0, flag_labels == 0
        after, benign = after_and_benign(batch)
        refusals = (batch["prefill"] >= 0)[:, None] & (labels != IGNORE) & ~batch["inserted"]
        return cls(
            pinned=pinned_positions(batch)[:, 1:].sum(),
            flagged=flagged.sum(),
            harmless=harmless.sum(),
            responses_flagged=flagged.any(1).sum(),
            responses_harmless=harmless.any(1).sum(),
            groups=groups_met(group_keys(batch["group"], batch["flag_class"], consistency_at)),
            answered=(batch["answered"] | refusals).sum() + batch["prefill"].clamp(min=0).sum(),
            after=after[:, 1:].sum(),
            benign=benign[:, 1:].sum(),
            forecast=batch["forecast"][:, 1:].clamp(min=0).sum() if "forecast" in batch else None,
        )

    @classmethod
    def from_tensor(cls, numbers: torch.Tensor) -> Counts:
        """Reads the result of `to_tensor`, or a sum of such results."""
        return cls(*numbers.unbind())

    def to_tensor(self) -> torch.Tensor:
        """A vector that can be summed and gathered: integers, or float32 if forecasts are in use."""
        numbers = torch.stack(self[:-1])
        return numbers if self.forecast is None else torch.cat([numbers, self.forecast[None]])


def pinned_positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mask (B, T) of the keep term: every response token that is not learnt instead."""
    return (batch["labels"] != IGNORE) & ~batch["answered"]


def after_and_benign(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pinned positions (B, T) that stand after an inserted flag in a harmful row, and those in harmless rows."""
    pinned = pinned_positions(batch)
    harmful = batch["flag_class"][:, None] > 0
    inserted = batch["inserted"].long()
    return pinned & harmful & (inserted.cumsum(1) > inserted), pinned & ~harmful


class JudgedPositions(NamedTuple):
    """The N positions of a batch at which the flag term or the keep term has a label.

    The token at a position is judged by the hidden state one column earlier, so column 0 is never among them.
    """

    row: torch.Tensor
    column: torch.Tensor
    flag_labels: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> JudgedPositions:
        """The judged positions of a batch of the collator, row by row."""
        labels, flag_labels = batch["labels"], batch["flag_labels"]
        judged = (labels != IGNORE) | (flag_labels != IGNORE)
        judged[:, 0] = False
        row, column = judged.nonzero(as_tuple=True)
        return cls(row, column, flag_labels[row, column], labels[row, column])


@dataclass
class BatchState:
    """Tensors of the current batch that optional terms may use.

    Attributes:
        hidden: Last hidden states (B, T, H).
        reference_NH: The reference's hidden states that judge the N positions.
        attentions: Each layer's attention weights, if PRESTO is on; else empty.
        counts: Counts of the whole accumulated batch.
    """

    model: Any
    batch: dict[str, torch.Tensor]
    hidden: torch.Tensor
    reference_NH: torch.Tensor
    judged: JudgedPositions
    head: Head
    reference_head: Head
    flag_ids: torch.Tensor
    attentions: Sequence[torch.Tensor]
    counts: Counts


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
