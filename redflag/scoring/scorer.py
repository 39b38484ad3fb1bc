"""What measures the flags: a model in this process or servers; and how a file of rows is worked out with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.scoring.processes import World
from redflag.scoring.scored import Probs
from redflag.scoring.shards import kept_in

if TYPE_CHECKING:
    from redflag.backends.hf import HFBackend
    from redflag.scoring.upstreams import Upstreams

BATCHES = 8  # that are put in order of length together, and kept or lost as one


class Scorer(Protocol):
    """What scoring needs of a backend: `redflag.backends.hf.HFBackend`, `redflag.scoring.upstreams.Upstreams`."""

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int) -> Iterable[Probs]:
        """T x K flag probabilities of each (prompt ids, response ids), in this order."""


class ScorerArguments(Protocol):
    """The options that say what measures the flags."""

    model: str
    upstream: list[str]
    device: str
    dtype: str

    def upstream_options(self) -> dict[str, Any]: ...


def open_scorer(
    arguments: ScorerArguments, world: World, stack: ExitStack, upper_bound: bool = False
) -> tuple[HFBackend | Upstreams, Any, FlagSpec]:
    """What measures the flags: a model in this process, or servers, which `stack` closes; tokenizer and flags.

    Raises:
        RedflagError: The model cannot be loaded, or no server can be used.
    """
    if not arguments.upstream:
        return load_scorer(arguments.model, world.device(arguments.device), arguments.dtype)
    from redflag.scoring.upstreams import connect

    upstreams, tokenizer, spec = connect(
        arguments.model,
        arguments.upstream,
        **arguments.upstream_options(),
        upper_bound=upper_bound,
    )
    stack.callback(upstreams.close)
    return upstreams, tokenizer, spec


def plan(scorer: object, key: dict[str, Any], output: Path, world: World, batch_size: int) -> tuple[bool, int, str]:
    """How a file of rows is worked out.

    Returns:
        Whether one process does it alone, how many rows are kept or lost as one, and the fingerprint of all that the
        lines depend on (`key`, and who measures).
    """
    alone = kept_in(output, world).suffix == ".partial"
    chunk = batch_size * BATCHES
    if served(scorer):
        # Servers batch as they like, so no rows belong together; what they measure differs in the last digits.
        key = {**key, "served": "bounds" if getattr(scorer, "upper_bound", False) else "exact"}
        chunk = 1 if alone else chunk
    return alone, chunk, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def served(scorer: object) -> bool:
    """Whether servers measure (`redflag.scoring.upstreams.Upstreams`) and not a model in this process."""
    return hasattr(scorer, "ways")


def load_scorer(directory: str, device: str = "auto", dtype: str = "auto") -> tuple[HFBackend, Any, FlagSpec]:
    """Loads a flagged model for scoring.

    Returns:
        Backend, tokenizer and flags.

    Raises:
        RedflagError: The folder holds no flagged model, or its prompt template is not the one it was trained with.
    """
    from redflag.backends.load import load_flagged

    return load_flagged(directory, device, dtype)


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
