"""Requests and answers from files of rows, read in chunks: to be judged, or with labels to learn from."""

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
class RequestAndAnswer:
    """A request and its answer."""

    prompt: str  # the last user turn
    response: str  # the answer; empty if only the request is known
    source: str = ""  # where it comes from
    id: str = ""  # its name
    line: int = 0  # its line in the file, 1-based
    prompt_harmful: bool | None = None  # whether the request is harmful, where a label `prompt_label` says so
    harmful: bool = False  # whether the answer is labelled harmful
    refusal: bool | None = None  # label: whether the answer is a refusal
    categories: tuple[str, ...] = ()  # label: the kinds of refusal, the main one first, as the file has them
    group: str = ""  # pairs that ask the same share it


def read_rows(
    source: str | Path,
    provenance: Provenance,
    reader: RecordReader,
    *,
    split: str = "train",
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> Iterator[tuple[list[tuple[RequestAndAnswer, Row]], list[BadRow]]]:
    """Rows of any file that `load_rows` reads, some thousands at a time.

    Args:
        provenance: Takes the files' names and digests.
        on_bad_row: "stop" raises at a row that cannot be used; "skip" yields it among the bad ones.

    Yields:
        Pairs with their rows, and the rows left out.
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
                        raise RedflagError(f"{bad[-1]}. Fix the row, or skip such rows with on_bad_row=skip.")
            yield pairs, bad


def read_labelled(sources: list[str], provenance: Provenance) -> list[RequestAndAnswer]:
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
                raise RedflagError(f"{name}:{line}: {error}. Fix the row.") from None
    if not pairs:
        raise RedflagError(f"there must be rows with labels in {', '.join(map(str, sources))} (got none).")
    return pairs


def _pair(line: int, record: Mapping[str, Any], row: Row) -> RequestAndAnswer:
    prompt = next(turn["content"] for turn in reversed(row.messages) if turn["role"] == "user")
    return RequestAndAnswer(
        prompt,
        row.response,
        row.source or "",
        row.id or "",
        line,
        _HARMFUL.get(str(record.get("prompt_label")).casefold()),
        row.harmful,
    )


def _labelled(line: int, record: Any) -> RequestAndAnswer:
    if not isinstance(record, Mapping):
        raise ValueError("the row must be an object")
    turns = record.get("messages") or []
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("messages must be a list of turns")
    contents = {turn.get("role"): turn.get("content") for turn in turns}
    prompt = record.get("prompt") or contents.get("user")
    response = record.get("response") or contents.get("assistant") or ""
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(response, str):
        raise ValueError("a row must have a prompt (and optionally a response) as texts")
    refusal, categories = record.get("refusal"), record.get("refusal_category")
    if refusal is not None and not isinstance(refusal, bool):
        raise ValueError(f"refusal must be true, false or null (got {refusal!r})")
    if refusal is not None and not response.strip():
        raise ValueError("refusal must come with a response")
    categories = [categories] if isinstance(categories, str) else categories or []
    if not isinstance(categories, list) or not all(isinstance(name, str) for name in categories):
        raise ValueError("refusal_category must be a name or a list of names")
    if refusal is False and categories:
        raise ValueError(f"refusal is false, yet refusal_category says {categories[0]!r}")
    prompt_label = record.get("prompt_label")
    harmful = _HARMFUL.get(str(prompt_label).casefold())
    if prompt_label is not None and harmful is None:
        raise ValueError(f"prompt_label must be harmful, benign or null (got {prompt_label!r})")
    if refusal is None and not categories and harmful is None:
        raise ValueError("a row must have a label: refusal, refusal_category or prompt_label")
    group = record.get("group")
    return RequestAndAnswer(
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
