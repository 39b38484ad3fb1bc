"""What scoring needs of an engine, and how a file of rows is worked out with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from redflag.errors import RedflagError
from redflag.scoring.processes import World
from redflag.scoring.scored import Probs

BATCHES = 8  # that are put in order of length together, and kept or lost as one


class Scorer(Protocol):
    """What scoring needs of a backend: `redflag.backends.hf.HFBackend`, `redflag.backends.upstreams.Upstreams`."""

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int) -> Iterable[Probs]:
        """T x K flag probabilities of each (prompt ids, response ids), in this order."""


def plan(scorer: object, key: dict[str, Any], world: World, batch_size: int) -> tuple[int, str]:
    """How a file of rows is worked out.

    Returns:
        How many rows are kept or lost as one, and the fingerprint of all that the lines depend on (`key`, and who
        measures).
    """
    chunk = batch_size * BATCHES
    if served(scorer):
        # Servers batch as they like, so no rows belong together; what they measure differs in the last digits.
        key = {**key, "served": "bounds" if getattr(scorer, "upper_bound", False) else "exact"}
        chunk = batch_size if world.size == 1 else chunk
    return chunk, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def served(scorer: object) -> bool:
    """Whether servers measure (`redflag.backends.upstreams.Upstreams`) and not a model in this process."""
    return hasattr(scorer, "ways")


def context_limit(asked: int | None, context: int | None) -> int | None:
    """The number of tokens that may be used: what was asked for, if the model can hold it."""
    if asked is not None and asked < 2:
        raise RedflagError(f"max_length is {asked}, but a prompt and a response need at least 2 tokens: give more")
    if asked is not None and context is not None and asked > context:
        raise RedflagError(f"max_length is {asked}, but the model's context holds {context} tokens: give at most that")
    return context if asked is None else asked


def check_batch(batch_size: int) -> None:
    """Refuses a batch of nothing."""
    if batch_size < 1:
        raise RedflagError(
            f"batch_size is {batch_size}, but a forward pass needs at least one conversation: give 1 or more"
        )
