"""Equal flag probability for rows that ask the same thing: the term, and batches in which such rows meet.

Shapes: R rows, K flags.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def group_keys(group_R: torch.Tensor, flag_class_R: torch.Tensor, at: str) -> torch.Tensor:
    """A key per row: rows with equal keys are compared, rows with a negative key are not.

    At the first position only the prompt has been read, so all rows that ask the same thing should agree. At the peak
    only responses of the same class should: a refusal and a harmful answer should differ.
    """
    if at == "first":
        return group_R
    return torch.where(group_R < 0, -1, group_R * (int(flag_class_R.max()) + 1) + flag_class_R)


def groups_met(keys_R: torch.Tensor) -> torch.Tensor:
    """Number of groups with at least two rows in this batch."""
    _, counts = keys_R[keys_R >= 0].unique(return_counts=True)
    return (counts > 1).sum()


def consistency_loss(class_log_probs_RC: torch.Tensor, keys_R: torch.Tensor, kind: str) -> torch.Tensor:
    """Sum over groups of the mean distance between the flag probabilities of a group's pairs.

    Args:
        class_log_probs_RC: Log-probabilities of none, flag 1, ..., flag K in each row, (R, K + 1).
        keys_R: Result of `group_keys`.
        kind: `kl`: the mean of the two KL divergences between the class distributions, nats. `logit`: the squared gap
            of log p(flag) - log p(none), mean over flags; its gradient does not vanish when both probabilities are
            tiny.
    """
    together = (keys_R[:, None] == keys_R) & (keys_R >= 0)
    size = together.sum(1)
    one, other = together.triu(1).nonzero(as_tuple=True)
    p, q = class_log_probs_RC[one], class_log_probs_RC[other]
    if kind == "kl":
        gap = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2
    else:
        gap = ((p[:, 1:] - p[:, :1]) - (q[:, 1:] - q[:, :1])).square().mean(-1)
    return (gap * 2 / (size[one] * (size[one] - 1)).to(gap.dtype)).sum()


class GroupSampler(Sampler[int]):
    """Yields every row once, ordered so that batches of `batch_size` hold whole groups.

    Groups come in random order. A group that does not fit into the rest of a batch waits for the next batch; it is
    split only if no other group fills the gap, or if it is larger than a batch. The order depends on the seed and the
    epoch alone, so every process draws the same order and a resumed run continues where it stopped.

    Args:
        groups: Group of each row, negative = a group of its own.
        batch_size: Rows per batch and process.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.epoch, self.count = batch_size, seed, 0, len(groups)
        members: dict[tuple[str, int], list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(("group", group) if group >= 0 else ("row", row), []).append(row)
        self.members = list(members.values())

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"groups/{self.seed}/{self.epoch}")
        order = [draw.sample(rows, len(rows)) for rows in self.members]
        draw.shuffle(order)
        # One queue for each size; the next group is the earliest in order among those that fit.
        waiting: list[deque[tuple[int, list[int]]]] = [deque() for _ in range(self.batch_size + 1)]
        rank = 0
        for rows in order:
            for start in range(0, len(rows), self.batch_size):
                piece = rows[start : start + self.batch_size]
                waiting[len(piece)].append((rank, piece))
                rank += 1
        free, left = self.batch_size, self.count
        while left:
            fitting = [queue for queue in waiting[1 : free + 1] if queue]
            queue = min(fitting or [queue for queue in waiting if queue], key=lambda queue: queue[0][0])
            first, piece = queue.popleft()
            taken, rest = piece[:free], piece[free:]
            if rest:
                waiting[len(rest)].appendleft((first, rest))
            yield from taken
            left -= len(taken)
            free = free - len(taken) or self.batch_size
