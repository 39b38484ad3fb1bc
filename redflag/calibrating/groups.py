"""Splits of rows by group: rows that ask the same thing are never on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError


def split_groups(groups: Sequence[str | None], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows into a calibration and a held-out part without splitting a group.

    Args:
        groups: Per row, its group; None = the row is a group of its own.
        held_out: Share of the rows to hold out; groups are added as long as they fit.

    Returns:
        Indices of the calibration part and of the held-out part, each ascending.
    """
    if not 0.0 <= held_out < 1.0:
        raise RedflagError(f"held_out must be at least 0 and below 1 (got {held_out}). For example 0.3.")
    held: list[int] = []
    for rows in _shuffled(groups, seed):
        if len(held) + len(rows) <= held_out * len(groups):
            held += rows
    in_held_out = set(held)
    return [i for i in range(len(groups)) if i not in in_held_out], sorted(held)


def folds(
    groups: Sequence[str | None], count: int, seed: int, strata: Sequence[object] | None = None
) -> npt.NDArray[np.int64]:
    """Splits rows into folds of similar size without splitting a group.

    Args:
        groups: As for `split_groups`; likewise `seed`.
        strata: Per row, a class that should be spread evenly over the folds, such as harmless and harmful.

    Returns:
        Per row, the number of its fold.
    """
    kinds = {kind: k for k, kind in enumerate(dict.fromkeys(strata or [None]))}
    held = np.zeros((count, len(kinds)))
    fold_of = np.zeros(len(groups), dtype=np.int64)
    for rows in _shuffled(groups, seed):
        added = np.zeros(len(kinds))
        for i in rows:
            added[kinds[strata[i] if strata is not None else None]] += 1
        # The fold with the fewest rows of this group's classes.
        fold = int((held @ added).argmin())
        held[fold] += added
        fold_of[rows] = fold
    return fold_of


def _shuffled(groups: Sequence[str | None], seed: int) -> list[list[int]]:
    """The rows of each group, groups in a random order."""
    members: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(i if group is None else group, []).append(i)
    names = list(members)
    random.Random(seed).shuffle(names)
    return [members[name] for name in names]
