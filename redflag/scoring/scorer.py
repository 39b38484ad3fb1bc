"""The scorer protocol, and how a file of rows is processed with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from redflag.errors import RedflagError
from redflag.scoring.processes import World
from redflag.scoring.scored import Probs

BATCHES = 8  # batches that are sorted by length together, and kept or lost as one


class Scorer(Protocol):
    """A backend for scoring: `redflag.backends.hf.HFBackend`, `redflag.backends.upstreams.Upstreams`."""

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int) -> Iterable[Probs]:
        """T x K flag probabilities of each (prompt ids, response ids), in this order."""


def plan(scorer: object, key: dict[str, Any], world: World, batch_size: int) -> tuple[int, str]:
    """How a file of rows is processed.

    Returns:
        How many rows are kept or lost as one, and the fingerprint of all inputs of the lines (`key`, and the
        scorer).
    """
    chunk = batch_size * BATCHES
    if served(scorer):
        # Servers batch as they like, so rows need not stay together; their results differ in the last digits.
        key = {**key, "served": "bounds" if getattr(scorer, "upper_bound", False) else "exact"}
        chunk = batch_size if world.size == 1 else chunk
    return chunk, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def served(scorer: object) -> bool:
    """Whether the scorer is servers (`redflag.backends.upstreams.Upstreams`) instead of a model in this process."""
    return hasattr(scorer, "ways")


def context_limit(asked: int | None, context: int | None) -> int | None:
    """The maximum number of tokens: the option, if the model's context allows it."""
    if asked is not None and asked < 2:
        raise RedflagError(f"max_length must be at least 2 (got {asked}): a prompt token and a response token.")
    if asked is not None and context is not None and asked > context:
        raise RedflagError(f"max_length must be at most {context}, the model's context (got {asked}).")
    return context if asked is None else asked


def check_batch(batch_size: int) -> None:
    """Refuses a batch size below 1."""
    if batch_size < 1:
        raise RedflagError(f"batch_size must be at least 1 (got {batch_size}).")
