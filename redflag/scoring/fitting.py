"""Conversations as ids that fit the model's context."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.truncation import fit_row


@dataclass(frozen=True)
class Fitted:
    """A conversation as ids that fit the context; the fields of `Scored` before anything is measured."""

    prompt_ids: list[int]
    response_ids: list[int]
    tail_ids: list[int]
    onset: int | None
    truncated: bool
    prompt_truncated: bool
    thought: int = 0


def fit(tokenizer: Any, spec: FlagSpec, row: Row, index: int, max_length: int | None) -> Fitted:
    """Renders a conversation and cuts it to `max_length` tokens, as training does.

    `index` is its number, for error messages.

    Raises:
        RedflagError: The chat template refuses it.
    """
    try:
        fitted = fit_row(tokenizer, row.messages, spec, max_length)
    except RedflagError as error:
        raise RedflagError(f"{row_name(row, index)}: {error}") from error
    onset = None
    if row.harmful:
        start = row.onset or 0
        # The token that *holds* the character of the onset is the first harmful one, even if it begins before it.
        onset = next((i for i, (_, end) in enumerate(fitted.offsets) if end > start), len(fitted.offsets))
        if fitted.thought_offsets and row.onset is None:
            onset = len(fitted.thought_offsets)  # the answer's first token, even if it is white space
    return Fitted(
        fitted.prompt_ids,
        fitted.response_ids,
        fitted.tail_ids,
        onset,
        truncated=fitted.response_truncated,
        prompt_truncated=fitted.prompt_truncated,
        thought=len(fitted.thought_offsets),
    )


def renderable(tokenizer: Any, spec: FlagSpec, rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Splits rows into those that the chat template accepts, and errors of the others."""
    return split_by(lambda row, index: fit(tokenizer, spec, row, index, None), rows)


def split_by(render: Callable[[Row, int], object], rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Splits rows into those that `render` (given row and index) accepts, and errors of the others."""
    sound, bad = [], []
    for index, row in enumerate(rows):
        try:
            render(row, index)
            sound.append(row)
        except RedflagError as error:
            bad.append(str(error))
    return sound, bad


def row_name(row: Row, index: int) -> str:
    """Name of a row in errors: its id, or its number (`index` from 0)."""
    return f"row {row.id!r}" if row.id is not None else f"row {index + 1}"


def report_cut(cut: Mapping[str, int], by: str = "") -> None:
    """Prints to stderr how many rows were cut: `truncated` and `prompt_truncated`, with `by` in front."""
    lines = {
        "truncated": "responses did not fit the context and were cut at its end (`truncated`)",
        "prompt_truncated": "prompts did not fit the context and lost their oldest turns (`prompt_truncated`)",
    }
    for key, line in lines.items():
        if cut.get(key):
            print(f"{by}{cut[key]} {line}", file=sys.stderr)
