"""Training rows of probes as numbers: scale of the inputs, labels, weights of the classes, batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from redflag.lab.baselines.hidden import Hidden
from redflag.lab.baselines.shared import Read

Labels = Literal["onset", "response"]


def scale_of(hidden: Hidden, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of every input, over all steps."""
    count, total, squares = len(hidden.states), 0.0, 0.0
    for first in range(0, count, 4096):
        part = hidden.between(first, first + 4096, layers).astype(np.float64)
        total, squares = total + part.sum(axis=0), squares + np.square(part).sum(axis=0)
    mean = np.asarray(total) / count
    spread = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0.0))
    return torch.from_numpy(mean).float(), torch.from_numpy(1 / (spread + 1e-5)).float()


def onset_of(read: Read, labels: Labels) -> int:
    """First step that counts as harmful; beyond the end in a harmless response."""
    if not read.row.harmful:
        return len(read.judged_ids)
    return 0 if labels == "response" else int(read.onset or 0)


def balance_of(reads: Sequence[Read], labels: Labels, hidden: Hidden) -> tuple[float, float]:
    """Weights of harmless and harmful steps (or responses), so that both sides weigh the same and the mean is 1."""
    used = [i for i in range(len(reads)) if hidden.count(i)]
    if labels == "response":
        harmful = sum(reads[i].row.harmful for i in used)
        total = len(used)
    else:
        total = len(hidden.steps)
        onsets = [onset_of(reads[i], labels) for i in used]
        harmful = sum(
            int((hidden.steps[hidden.starts[i] : hidden.starts[i + 1]] >= onset).sum())
            for i, onset in zip(used, onsets, strict=True)
        )
    share = min(max(harmful / total, 1e-6), 1 - 1e-6)
    return 0.5 / (1 - share), 0.5 / share


def divided(reads: Sequence[Read], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows that choose the pass, no group on both sides."""
    names = [read.row.group or read.row.id or str(i) for i, read in enumerate(reads)]
    groups = sorted(set(names))
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {groups[i] for i in order[: round(share * len(groups))]}
    held_out = [i for i, name in enumerate(names) if name in chosen]
    return [i for i, name in enumerate(names) if name not in chosen], held_out
