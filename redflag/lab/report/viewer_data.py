"""Responses for the trace viewer: columns in JSON, with the bulky ones as bytes, so that thousands fit into one page.

Probabilities stay float32 bit by bit: at the threshold in force the viewer counts what the report counts.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROWS = "rows"  # the set of the responses that are no attack


def pack(traces: Sequence[Mapping[str, Any]], flags: int, method: Mapping[str, Any]) -> dict[str, Any]:
    """Packs responses.

    Args:
        traces: Responses with `tokens`, `probs` (steps x K) and what is known about them.
        flags: K.
        method: The report's entry of the flag: its monitor and its thresholds go along.

    Returns:
        `flags`, `thresholds` (None: none was set), `monitor`, `vocabulary`, `tokens` (indices into it, little-endian,
        base64), `width` (bytes per index), `probs` (float32, little-endian, base64, response after response), `names`
        (column -> its distinct values) and `rows` (column -> one entry per response; indices into `names`, -1: none).
    """
    vocabulary: dict[str, int] = {}
    indices = [vocabulary.setdefault(token, len(vocabulary)) for trace in traces for token in trace["tokens"]]
    width = 2 if len(vocabulary) <= 1 << 16 else 4
    probs = [np.asarray(trace["probs"], dtype="<f4").reshape(-1, flags) for trace in traces]
    names: dict[str, dict[str, int]] = {"set": {}, "source": {}, "category": {}, "onset_source": {}}
    rows: dict[str, list[Any]] = {
        "id": [trace.get("id") or f"response {i}" for i, trace in enumerate(traces)],
        "tokens": [len(trace["tokens"]) for trace in traces],
        "steps": [len(table) for table in probs],
        "onset": [-1 if trace.get("onset") is None else trace["onset"] for trace in traces],
        "harmful": [int(trace["harmful"]) for trace in traces],
        # An answer to an attack that no judge has seen is covered too.
        "covered": [
            int(trace["harmful"] or (trace.get("judged") is None and (trace.get("set") or ROWS) != ROWS))
            for trace in traces
        ],
        "given": [trace.get("given") for trace in traces],
    }
    for column, known in names.items():
        rows[column] = [
            -1 if value is None else known.setdefault(value, len(known))
            for trace in traces
            for value in [trace.get(column) or (ROWS if column == "set" else None)]
        ]
    values = (method.get("threshold") or {}).get("values") or {}
    fits = len(values) == flags
    flat = np.concatenate(probs).astype("<f4") if probs else np.zeros((0, flags), "<f4")
    return {
        "flags": list(values) if fits else ["flag"] if flags == 1 else [f"flag {k + 1}" for k in range(flags)],
        "thresholds": list(values.values()) if fits else None,
        "monitor": dict(method.get("monitor") or {}),
        "vocabulary": list(vocabulary),
        "tokens": _bytes(np.array(indices, dtype=f"<u{width}")),
        "width": width,
        "probs": _bytes(flat),
        "names": {column: list(known) for column, known in names.items()},
        "rows": rows,
    }


def _bytes(array: Any) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
