"""A cache on disk of the last hidden states of a frozen model, over passes and runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redflag.files import atomic_write

_SAMPLE = 4096  # numbers of each weight in the model's fingerprint


class KeptStates:
    """A file per row in a folder per model, float16: 2 H bytes a position. Processes and runs may share the folder.

    Args:
        folder: The cache of all models.
        model: The frozen model.
        computed_in: Name of the type that it computes in: other types give other states.
    """

    def __init__(self, folder: str | Path, model: torch.nn.Module, computed_in: str) -> None:
        self._folder = Path(folder) / _fingerprint(model, computed_in)
        self._folder.mkdir(parents=True, exist_ok=True)

    def read(self, keys: Sequence[str], like: torch.Tensor) -> torch.Tensor | None:
        """The states (N, H) of all rows, one after the other, as `like`; None if a row is missing."""
        try:
            parts = [torch.from_numpy(np.load(self._path(key))) for key in keys]
        except (OSError, ValueError, EOFError):
            return None
        return torch.cat(parts).to(like)

    def write(self, keys: Sequence[str], states: Sequence[torch.Tensor]) -> None:
        """Caches the states (n, H) of each row, unless float16 cannot hold them.

        Raises:
            RedflagError: The folder cannot be written.
        """
        for key, part in zip(keys, states, strict=True):
            halved = part.to(torch.float16)
            if halved.isfinite().all():
                self._path(key).parent.mkdir(exist_ok=True)
                with atomic_write(self._path(key)) as file:
                    np.save(file, halved.cpu().numpy())

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.npy"


def row_keys(input_ids: torch.Tensor, mask: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> list[str]:
    """A key for each of B rows, from its tokens and the columns of its states.

    `input_ids` and `mask` (0 at padding) are (B, T); `row` and `column` say where the N states stand.
    """
    keys = []
    for i, (ids, real) in enumerate(zip(input_ids.cpu(), mask.cpu().bool(), strict=True)):
        columns = column[row == i].cpu() - int(real.long().argmax())  # padding may stand on either side
        text = ids[real].numpy().tobytes() + b"|" + columns.numpy().tobytes()
        keys.append(hashlib.blake2b(text, digest_size=16).hexdigest())
    return keys


def _fingerprint(model: torch.nn.Module, computed_in: str) -> str:
    digest = hashlib.blake2b(computed_in.encode(), digest_size=16)
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample: Any = flat[:: max(1, len(flat) // _SAMPLE)].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
