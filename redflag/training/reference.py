"""Hidden states of the reference, the model before training."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from redflag.kept_states import KeptStates, row_keys
from redflag.training.batch import JudgedPositions
from redflag.training.loss import Head
from redflag.training.states import last_hidden


@torch.no_grad()
def reference_states(
    reference: Any,
    head: Head,
    inputs: dict[str, torch.Tensor],
    judged: JudgedPositions,
    kept: KeptStates | None,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Those (N, H) that judge the N positions.

    The reference reads the same text without the inserted flags: they are masked, and the positions behind them count
    on as if they were not there. Where the trained model is judged by the state of a flag, the reference is by that of
    the nearest earlier column that is none. Inserted flags are drawn anew in each pass, so such batches are not kept.
    """
    inserted = inputs["inserted"]
    columns = torch.arange(inserted.shape[1], device=inserted.device).expand_as(inserted)
    plain = torch.where(inserted, 0, columns).cummax(1).values[judged.row, judged.column - 1]
    mask = inputs["attention_mask"] * ~inserted
    keys = None
    if kept is not None:
        if not bool(inserted.any()):
            keys = row_keys(inputs["input_ids"], mask, judged.row, plain)
        found = kept.read(keys, like=head.weight) if keys else None
        # A forward pass of a model in several processes needs all of them.
        if bool(accelerator.gather(torch.tensor([found is not None], device=mask.device)).all()):
            assert found is not None
            return found
    position_ids = (mask.cumsum(1) - 1).clamp(min=0) if bool(inserted.any()) else None
    states_NH = last_hidden(reference, inputs["input_ids"], mask, position_ids)[judged.row, plain]
    if kept is not None and keys:
        kept.write(keys, [states_NH[judged.row == i] for i in range(len(keys))])
    return states_NH
