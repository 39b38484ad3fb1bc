"""The scorer protocol, and how a file of rows is processed with it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.scoring.fitting import report_cut, row_name
from redflag.scoring.processes import World
from redflag.scoring.scored import Probs
from redflag.scoring.shards import write_lines

Measurement = TypeVar("Measurement")

BATCHES = 8  # batches that are sorted by length together, and kept or lost as one
_SERVED_WINDOW = 1024  # rows sent to servers at a time


class Scorer(Protocol):
    """A backend for scoring: `redflag.backends.hf.HFBackend`, `redflag.backends.upstreams.Upstreams`."""

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int) -> Iterable[Probs]:
        """T x K flag probabilities of each (prompt ids, response ids), in this order."""


def write_records(
    output: Path,
    count: int,
    records: Callable[[int, int], Iterable[dict[str, Any]]],
    *,
    scorer: object,
    key: dict[str, Any],
    batch_size: int,
    world: World,
) -> bool:
    """Writes a JSON line per row with `redflag.scoring.shards.write_lines`, and reports how many rows were cut.

    Lines whose probabilities are upper bounds get `upper_bound`.

    Args:
        records: The records of rows `start` to `stop`.
        key: All inputs of the lines besides the scorer; with others an unfinished file is started again.

    Returns:
        Whether this process has written the file.
    """
    _check_batch(batch_size)
    chunk = batch_size * BATCHES
    bounds: dict[str, Any] = {"upper_bound": True} if getattr(scorer, "upper_bound", False) else {}
    if served(scorer):
        # Servers batch as they like, so rows need not stay together; their results differ in the last digits.
        key = {**key, "served": "bounds" if bounds else "exact"}
        chunk = batch_size if world.size == 1 else chunk
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    cut: Counter[str] = Counter()

    def lines(start: int, stop: int) -> Iterator[str]:
        for record in records(start, stop):
            cut.update({name: record[name] for name in ("truncated", "prompt_truncated")})
            yield json.dumps({**record, **bounds}, ensure_ascii=False, allow_nan=False)

    written = write_lines(output, count, lines, chunk=chunk, fingerprint=fingerprint, world=world)
    report_cut(cut, "" if world.size == 1 else f"process {world.rank}: ")
    return written


def windows(scorer: object, count: int, batch_size: int) -> Iterator[range]:
    """Spans of rows that a backend is given together: several batches, of which it sorts the rows by length.

    Servers get more, since they idle at the end of each.
    """
    _check_batch(batch_size)
    size = max(batch_size * BATCHES, _SERVED_WINDOW if served(scorer) else 0)
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def measured_together(scorer: object, batch_size: int) -> int:
    """How many rows are measured at a time: a server's results come one by one."""
    return 1 if served(scorer) else batch_size * BATCHES


def named(rows: Iterable[tuple[int, Row]], measured: Iterable[Measurement]) -> Iterator[tuple[int, Row, Measurement]]:
    """Numbers, rows and measurements, these as soon as they are there; errors name the row."""
    results = iter(measured)
    for index, row in rows:
        try:
            result = next(results)
        except RedflagError as error:
            raise RedflagError(f"{row_name(row, index)}: {error}") from error
        yield index, row, result


def check_probs(probs: npt.NDArray[np.floating[Any]], row: Row, index: int, place: str) -> None:
    """Refuses N x K probabilities outside [0, 1]; `place` says in errors where they were measured."""
    sound = ((probs >= 0.0) & (probs <= 1.0)).all(axis=1)  # false for NaN
    if not sound.all():
        bad = int(np.flatnonzero(~sound)[0])
        raise RedflagError(
            f"{row_name(row, index)}: the model gave {probs[bad].tolist()} as {place.format(bad)}, which is invalid. "
            "Check the weights, or load the model with dtype=float32."
        )


def served(scorer: object) -> bool:
    """Whether the scorer is servers (`redflag.backends.upstreams.Upstreams`) instead of a model in this process."""
    return hasattr(scorer, "ways")


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise RedflagError(f"batch_size must be at least 1 (got {batch_size}).")


def context_limit(max_length: int | None, context: int | None) -> int | None:
    """The maximum number of tokens: the option `max_length`, if the model's context allows it."""
    if max_length is None:
        return context
    if max_length < 2:
        raise RedflagError(f"max_length must be at least 2 (got {max_length}): a prompt token and a response token.")
    if context is not None and max_length > context:
        raise RedflagError(f"max_length must be at most {context}, the model's context (got {max_length}).")
    return max_length
