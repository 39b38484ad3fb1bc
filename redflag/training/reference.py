"""Hidden states of the reference, the model before training."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from redflag.kept_states import KeptStates, row_keys
from redflag.training.batch import JudgedPositions
from redflag.training.hidden_states import last_hidden
from redflag.training.loss import Head


@torch.no_grad()
def reference_states(
    reference: Any,
    head: Head,
    inputs: dict[str, torch.Tensor],
    judged: JudgedPositions,
    cache: KeptStates | None,
    accelerator: Accelerator,
) -> torch.Tensor:
    """The reference's hidden states (N, H) that judge the N positions.

    The reference reads the text without the inserted flags: they are masked, and position ids skip them. Where the
    state at a flag judges the trained model, the reference's comes from the nearest earlier column without a flag.
    Inserted flags are resampled in each pass, so such batches are not cached.
    """
    inserted = inputs["inserted"]
    columns = torch.arange(inserted.shape[1], device=inserted.device).expand_as(inserted)
    plain = torch.where(inserted, 0, columns).cummax(1).values[judged.row, judged.column - 1]
    mask = inputs["attention_mask"] * ~inserted
    keys = None
    if cache is not None:
        if not bool(inserted.any()):
            keys = row_keys(inputs["input_ids"], mask, judged.row, plain)
        cached = cache.read(keys, like=head.weight) if keys else None
        # A forward pass of a sharded model needs all processes, so one process without cached states makes all run it.
        if bool(accelerator.gather(torch.tensor([cached is not None], device=mask.device)).all()):
            assert cached is not None
            return cached
    position_ids = (mask.cumsum(1) - 1).clamp(min=0) if bool(inserted.any()) else None
    states_NH = last_hidden(reference, inputs["input_ids"], mask, position_ids)[judged.row, plain]
    if cache is not None and keys:
        cache.write(keys, [states_NH[judged.row == i] for i in range(len(keys))])
    return states_NH
