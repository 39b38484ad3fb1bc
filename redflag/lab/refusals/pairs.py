"""Requests and answers, read from files of rows piece by piece: to be judged, or with labels to learn from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from redflag.data.labels import Unlabelled
from redflag.data.rows import BadRow, RecordReader, Row
from redflag.data.sources import Provenance, open_source
from redflag.errors import RedflagError

CHUNK = 2048

_HARMFUL = {"harmful": True, "unsafe": True, "benign": False, "harmless": False, "safe": False}


@dataclass(frozen=True)
class Pair:
    """A request and its answer.

    Attributes:
        prompt: The last user turn.
        response: The answer; empty where only the request is known.
        source: Where it comes from.
        id: Its name.
        line: Its line in the file, 1-based.
        prompt_harmful: Whether the request is harmful, where a label `prompt_label` says so.
        harmful: Whether the answer is labelled harmful.
        refusal: Label: whether the answer is a refusal.
        categories: Label: the kinds of refusal, the main one first, as the file has them.
        group: Pairs that ask the same share it.
    """

    prompt: str
    response: str
    source: str = ""
    id: str = ""
    line: int = 0
    prompt_harmful: bool | None = None
    harmful: bool = False
    refusal: bool | None = None
    categories: tuple[str, ...] = ()
    group: str = ""


def read_rows(
    source: str | Path,
    provenance: Provenance,
    reader: RecordReader,
    *,
    split: str = "train",
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> Iterator[tuple[list[tuple[Pair, Row]], list[BadRow]]]:
    """Rows of any file that `load_rows` reads, some thousands at a time.

    Args:
        source: File, folder, pattern or data set.
        provenance: Takes the files' names and digests.
        reader: Makes rows of records.
        split: As in `load_rows`.
        on_bad_row: "stop" raises at a row that cannot be used; "skip" yields it among the bad ones.

    Yields:
        Pairs with their rows, and the rows left out.

    Raises:
        RedflagError: The source cannot be read, or a row is bad.
    """
    for name, records in open_source(source, split, provenance):
        while chunk := list(itertools.islice(records, CHUNK)):
            pairs, bad = [], []
            for line, record in chunk:
                for row in reader.read(record):
                    if isinstance(row, Row):
                        pairs.append((_pair(line, record, row), row))
                        continue
                    bad.append(BadRow(name, line, str(row)))
                    if on_bad_row == "stop" and not isinstance(row, Unlabelled):
                        raise RedflagError(f"{bad[-1]}; mend the row, or skip such rows with on_bad_row=skip")
            yield pairs, bad


def read_labelled(sources: list[str], provenance: Provenance) -> list[Pair]:
    """Rows to learn from: `prompt` (or `messages`) and perhaps `response`, with at least one of three labels.

    `refusal` (true or false), `refusal_category` (a name, or several, the main one first) and `prompt_label` (harmful
    or benign); any may be null. Rows of one `group` are never divided between training and measuring; without it, those
    whose requests are the same but for case and blanks.

    Raises:
        RedflagError: A source cannot be read, or a row is bad.
    """
    pairs = []
    for name, records in open_source(list(sources), "train", provenance):
        for line, record in records:
            try:
                if isinstance(record, ValueError):
                    raise record
                pairs.append(_labelled(line, record))
            except ValueError as error:
                raise RedflagError(
                    f"{name}:{line}: {error}; mend the row, from which nothing could be learnt"
                ) from None
    if not pairs:
        raise RedflagError(f"no row to learn from in {', '.join(map(str, sources))}: give rows with labels")
    return pairs


def _pair(line: int, record: Mapping[str, Any], row: Row) -> Pair:
    prompt = next(turn["content"] for turn in reversed(row.messages) if turn["role"] == "user")
    return Pair(
        prompt,
        row.response,
        row.source or "",
        row.id or "",
        line,
        _HARMFUL.get(str(record.get("prompt_label")).casefold()),
        row.harmful,
    )


def _labelled(line: int, record: Any) -> Pair:
    if not isinstance(record, Mapping):
        raise ValueError("the row is not an object")
    turns = record.get("messages") or []
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("messages is not a list of turns")
    said = {turn.get("role"): turn.get("content") for turn in turns}
    prompt = record.get("prompt") or said.get("user")
    response = record.get("response") or said.get("assistant") or ""
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(response, str):
        raise ValueError("there is no request in it: give prompt (and response) as texts")
    refusal, categories = record.get("refusal"), record.get("refusal_category")
    if refusal is not None and not isinstance(refusal, bool):
        raise ValueError(f"refusal is {refusal!r}: say true or false, or null where it is not known")
    if refusal is not None and not response.strip():
        raise ValueError("refusal is given without a response that it could be about")
    categories = [categories] if isinstance(categories, str) else categories or []
    if not isinstance(categories, list) or not all(isinstance(name, str) for name in categories):
        raise ValueError("refusal_category is neither a name nor a list of names")
    if refusal is False and categories:
        raise ValueError(f"refusal is false, yet refusal_category says {categories[0]!r}")
    wanted = record.get("prompt_label")
    harmful = _HARMFUL.get(str(wanted).casefold())
    if wanted is not None and harmful is None:
        raise ValueError(f"prompt_label is {wanted!r}: say harmful or benign, or null where it is not known")
    if refusal is None and not categories and harmful is None:
        raise ValueError("it has no label: give refusal, refusal_category or prompt_label")
    group = record.get("group")
    return Pair(
        prompt,
        response,
        str(record.get("source") or ""),
        str(record.get("id") or ""),
        line,
        harmful,
        False,
        refusal,
        tuple(categories),
        str(group) if group is not None else " ".join(prompt.casefold().split()),
    )
