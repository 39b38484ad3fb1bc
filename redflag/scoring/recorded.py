"""Recordings instead of a model: thresholds from earlier measurements of the same model.

Thresholds belong to the run, the prompt template and the flags of a model. A recording's `meta` holds the `run_id` and
`template_hash` that it was made with; a recording without them, or with others, is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.scoring.recording import Recording


def recorded(path: str | Path, spec: FlagSpec) -> Recording | None:
    """The recording in a file; None if the file holds conversations or does not exist.

    Raises:
        RedflagError: It was not recorded with this run of the model and this prompt template, or does not say so.
    """
    path = Path(path)
    if not path.is_file() or not _is_recording(path):
        return None
    recording = Recording.load(path)
    meta = {**recording.meta, "categories": list(recording.categories)}
    for key, what, ours in (
        ("run_id", "run", spec.run_id),
        ("template_hash", "prompt template", spec.template_hash),
        ("categories", "flags", list(spec.categories)),
    ):
        if (theirs := meta.get(key)) != ours:
            fault = f"was recorded with {what} {theirs!r}" if theirs is not None else f"names no {what} (meta {key!r})"
            raise RedflagError(
                f"{path} {fault}, but the model has {what} {ours!r}. Thresholds from it would not hold. Give a "
                "recording of this model, or conversations to measure with it."
            )
    return recording


def _is_recording(path: Path) -> bool:
    """Whether a file holds probabilities; it is not checked any further."""
    try:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                return b"redflag" in (pq.read_schema(path).metadata or {})
            except pa.ArrowException:
                return False
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        return isinstance(first, dict) and "flag_probs" in first
    except (OSError, ValueError, RecursionError):
        return False
