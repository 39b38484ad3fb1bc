"""Means over everything since the last time they were asked for, on all processes together."""

from __future__ import annotations

from typing import Any

import torch

from redflag.weights.precision import widest


def rows_that_count(accelerator: Any, rows: int, batch_size: int) -> int:
    """How many of an evaluation batch's rows are its own; behind them stand repeated ones.

    accelerate fills up the last batches, so that all processes run as many and as large ones. Of the rows left over for
    them the first process has the first.

    Args:
        accelerator: Of the trainer, while it goes through the batches.
        rows: Rows of this batch.
        batch_size: Rows of a full batch on one process.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(rows, max(0, state.remainder - accelerator.process_index * batch_size))


class Means:
    """Sums and counts by name, on the device until they are asked for.

    All processes add the same names, if need be with no values.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Takes in the values of one batch, of any number."""
        wide = widest(values.device)
        pair = torch.stack([values.detach().to(wide).sum(), values.new_tensor(values.numel(), dtype=wide)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means, NaN where there was no value; all processes call it together, and it begins anew."""
        names, sums = sorted(self._sums), self._sums
        self._sums = {}
        if not names:
            return {}
        pairs = accelerator.gather(torch.stack([sums[name] for name in names])[None]).sum(0).tolist()
        means = [total / count if count else float("nan") for total, count in pairs]
        return dict(zip(names, means, strict=True))
