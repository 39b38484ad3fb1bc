"""Means of training metrics over all processes, since they were last taken."""

from __future__ import annotations

from typing import Any

import torch

from redflag.weights.precision import widest


def rows_that_count(accelerator: Any, rows: int, batch_size: int) -> int:
    """Number of an evaluation batch's rows that are not repetitions; the repeated ones come last.

    accelerate pads the last batches with repeated rows, so that all processes run equally many batches of equal size.
    The remaining real rows are dealt out in the order of the processes.
    `batch_size` is the number of rows of a full batch on one process.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(rows, max(0, state.remainder - accelerator.process_index * batch_size))


class Means:
    """Sums and counts by name, which stay on the device until they are taken.

    All processes must add the same names, even if with no values.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Adds the values of one batch; there may be none."""
        wide = widest(values.device)
        pair = torch.stack([values.detach().to(wide).sum(), values.new_tensor(values.numel(), dtype=wide)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self, accelerator: Any) -> dict[str, float]:
        """Returns the means (NaN for a name without values) and resets; all processes must call it together."""
        names, sums = sorted(self._sums), self._sums
        self._sums = {}
        if not names:
            return {}
        pairs = accelerator.gather(torch.stack([sums[name] for name in names])[None]).sum(0).tolist()
        means = [total / count if count else float("nan") for total, count in pairs]
        return dict(zip(names, means, strict=True))
