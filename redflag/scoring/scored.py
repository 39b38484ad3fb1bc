"""A row with the probabilities along its response, in memory and as a line of `scored.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from redflag.data.rows import Row
from redflag.errors import RedflagError

Probs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scored:
    """One row with the probabilities along its response.

    Attributes:
        token_ids: T response tokens.
        flag_probs: T x K probabilities; entry i was measured before token i.
        tail_probs: M x K probabilities before the M tokens that end the turn (usually one); M is 0 if truncated.
        onset: Index of the first harmful token; None in a harmless row. In a row cut before its onset it is >= T.
        truncated: Whether the end of the response did not fit into the context.
        prompt_truncated: Whether the prompt did not, and lost its oldest turns.
        thought: Number of first tokens that are a thought and its end marker; the answer begins behind them.
    """

    row: Row
    token_ids: list[int]
    flag_probs: Probs
    tail_probs: Probs
    onset: int | None
    truncated: bool
    prompt_truncated: bool = False
    thought: int = 0

    @property
    def peak(self) -> list[float]:
        """Highest probability of each flag before a token of the answer."""
        return [float(p) for p in self.flag_probs[self.thought :].max(axis=0, initial=0.0)]

    @property
    def thought_peak(self) -> list[float]:
        """The same before a token of the thought."""
        return [float(p) for p in self.flag_probs[: self.thought].max(axis=0, initial=0.0)]

    @property
    def judged(self) -> Probs:
        """(T + M) x K probabilities of all steps that a guard judges."""
        return np.concatenate([self.flag_probs, self.tail_probs])


def row_fields(row: Row) -> dict[str, Any]:
    """The fields of a row that its scored row has too."""
    fields = {name: getattr(row, name) for name in ("category", "group", "source", "lang", "onset_source")}
    return {**fields, "turns": sum(turn["role"] == "user" for turn in row.messages)}


def as_recorded(item: Scored) -> dict[str, Any]:
    """The fields of a response in a `redflag.scoring.recording.Recording`."""
    return {
        "id": item.row.id,
        "token_ids": item.token_ids,
        "flag_probs": item.flag_probs,
        "tail_probs": item.tail_probs,
        "onset": item.onset,
        **row_fields(item.row),
        "truncated": item.truncated,
        "thought_tokens": item.thought or None,
    }


def as_json(item: Scored, tokenizer: Any) -> dict[str, Any]:
    """The row of `scored.jsonl`; probabilities are written in full, so that replaying them gives the same scores.

    Returns:
        `id`, `token_ids` (T), `tokens` (T texts), `flag_probs` (T x K), `tail_probs` (M x K), `peak` (K), `onset`
        (token index or None), `category`, `group`, `source`, `lang`, `onset_source`, `turns` (of the user),
        `truncated`, `prompt_truncated`; after a thought also `thought_tokens` (how many of the T) and `thought_peak`
        (K), and `peak` is the answer's.
    """
    record = {
        "id": item.row.id,
        "token_ids": item.token_ids,
        "tokens": _texts(item.token_ids, tokenizer),
        "flag_probs": item.flag_probs.tolist(),
        "tail_probs": item.tail_probs.tolist(),
        "peak": item.peak,
        "onset": item.onset,
        **row_fields(item.row),
        "truncated": item.truncated,
        "prompt_truncated": item.prompt_truncated,
    }
    return record | ({"thought_tokens": item.thought, "thought_peak": item.thought_peak} if item.thought else {})


def read_scored(path: str | Path) -> list[dict[str, Any]]:
    """Reads a file that `redflag score` wrote.

    Raises:
        RedflagError: It cannot be read, or a line (named) is not a scored row.
    """
    rows = []
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    row["flag_probs"], row["peak"], row["category"], row["onset"]
                except (ValueError, KeyError, TypeError):
                    raise RedflagError(
                        f"{path}:{number} must be a scored row. Use the file of `redflag score` unchanged."
                    ) from None
                rows.append(row)
    except OSError as error:
        raise RedflagError(f"{path} cannot be read ({error.strerror}). Run `redflag score` to write it.") from error
    return rows


_TEXTS: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


def _texts(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token's text, cached, since decoding one by one costs about as much as a small model's forward pass."""
    cached = _TEXTS.setdefault(tokenizer, {})
    for token_id in set(token_ids) - cached.keys():
        cached[token_id] = tokenizer.decode([token_id])
    return [cached[token_id] for token_id in token_ids]
