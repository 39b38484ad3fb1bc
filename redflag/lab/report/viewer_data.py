"""Responses for the trace viewer: columns in JSON, the large ones as bytes, so that thousands fit into one page.

Probabilities are float32, bit for bit: at the threshold in force the viewer counts what the report counts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from redflag.errors import RedflagError
from redflag.lab.report.method import Method

ROWS = "rows"  # the set of the responses that are not from an attack


@dataclass(frozen=True)
class ShownResponse:
    """A response that the viewer shows; refused if a step has no probability."""

    tokens: Sequence[str]  # T texts
    probs: Any  # K flag probabilities at each of T steps and those that end the turn
    harmful: bool  # of an answer to an attack: by a judge, False without a verdict
    id: str | None = None
    set: str = ROWS  # or the attack
    source: str | None = None  # of an attempt its setting
    category: str | None = None
    onset: int | None = None  # index of the first harmful token
    onset_source: str | None = None
    given: str | None = None  # a prefill
    judged: bool | None = None  # the judge's verdict on an answer to an attack

    def __post_init__(self) -> None:
        table = np.asarray(self.probs, dtype="<f4")
        if (table.size and table.ndim != 2) or len(table) < len(self.tokens):
            raise RedflagError(
                f"the response {self.id!r} must have a row of flag probabilities for each of its {len(self.tokens)} "
                f"tokens (got a table of shape {table.shape})"
            )
        if not ((table >= 0) & (table <= 1)).all():  # false for NaN
            bad = table[~((table >= 0) & (table <= 1))][0]
            raise RedflagError(f"the response {self.id!r} must have probabilities from 0 to 1 (got {bad})")
        object.__setattr__(self, "probs", table)


def pack(traces: Sequence[ShownResponse], method: Method) -> dict[str, Any]:
    """Packs responses.

    Args:
        method: The flag, whose monitor and thresholds go along.

    Returns:
        `flags`, `thresholds` (None: none was set), `monitor`, `vocabulary`, `tokens` (indices into it, little-endian,
        base64), `width` (bytes per index), `probs` (float32, little-endian, base64, response after response), `names`
        (column -> its distinct values) and `rows` (column -> one entry per response; indices into `names`, -1: none).

    Raises:
        RedflagError: They differ in their number of flags.
    """
    counts = {trace.probs.shape[1] for trace in traces if trace.probs.size} or {1}
    if len(counts) > 1:
        raise RedflagError(f"the responses must all have as many flags (got {', '.join(map(str, sorted(counts)))})")
    (flags,) = counts
    vocabulary: dict[str, int] = {}
    indices = [vocabulary.setdefault(token, len(vocabulary)) for trace in traces for token in trace.tokens]
    width = 2 if len(vocabulary) <= 1 << 16 else 4
    probs = [trace.probs.reshape(-1, flags) for trace in traces]
    names: dict[str, dict[str, int]] = {"set": {}, "source": {}, "category": {}, "onset_source": {}}
    rows: dict[str, list[Any]] = {
        "id": [trace.id or f"response {i}" for i, trace in enumerate(traces)],
        "tokens": [len(trace.tokens) for trace in traces],
        "steps": [len(table) for table in probs],
        "onset": [-1 if trace.onset is None else trace.onset for trace in traces],
        "harmful": [int(trace.harmful) for trace in traces],
        # An answer to an attack that no judge has seen is covered too.
        "covered": [int(trace.harmful or (trace.judged is None and trace.set != ROWS)) for trace in traces],
        "given": [trace.given for trace in traces],
    }
    for column, codes in names.items():
        rows[column] = [
            -1 if value is None else codes.setdefault(value, len(codes))
            for trace in traces
            for value in [getattr(trace, column)]
        ]
    values = method.threshold.values if method.threshold else {}
    fits = len(values) == flags
    flat = np.concatenate(probs).astype("<f4") if probs else np.zeros((0, flags), "<f4")
    return {
        "flags": list(values) if fits else ["flag"] if flags == 1 else [f"flag {k + 1}" for k in range(flags)],
        "thresholds": list(values.values()) if fits else None,
        "monitor": asdict(method.monitor) if method.monitor else {},
        "vocabulary": list(vocabulary),
        "tokens": _bytes(np.array(indices, dtype=f"<u{width}")),
        "width": width,
        "probs": _bytes(flat),
        "names": {column: list(codes) for column, codes in names.items()},
        "rows": rows,
    }


def _bytes(array: Any) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
