"""Resuming within an epoch: the rows keep the order that they had in the interrupted run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class EpochOrder(TrainerCallback, ExportableState):
    """Saves the state of PyTorch's generator at the start of the epoch in each checkpoint's `trainer_state.json`.

    transformers' length-grouped sampler draws its order from the global generator when an epoch begins. A resumed run
    restores that generator only after skipping the rows already seen, and would therefore skip other rows.
    """

    def __init__(self) -> None:
        self._begin: torch.Tensor | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the checkpoint's state, once."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if self._begin is None and saved:
            # A run resumed from a checkpoint at the end of an epoch starts with the next epoch.
            within = state.epoch is not None and state.epoch % 1 != 0
            generator_state = saved["begin" if within else "now"]
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(generator_state), dtype=torch.uint8))
        self._begin = torch.get_rng_state()

    def state(self) -> dict[str, Any]:
        """State for the checkpoint."""
        begin = torch.get_rng_state() if self._begin is None else self._begin
        return {"begin": begin.numpy().tobytes().hex(), "now": torch.get_rng_state().numpy().tobytes().hex()}
