"""Formats of records: mapping a record's columns to redflag's keys, and splitting a record into rows.

`columns` takes precedence. Otherwise the columns of well-known sets are recognised: `conversations` (ShareGPT),
`is_safe` (BeaverTails), `response_harm_label` (WildGuardMix), `response_0` and `response_1` with their labels
(PKU-SafeRLHF: two rows to a record).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redflag.data.labels import LABEL_COLUMNS
from redflag.data.readers import TextRecord
from redflag.data.turns import kind
from redflag.errors import RedflagError

KEYS = (
    *("messages", "category", "onset", "group", "user", "source", "id", "lang", "onset_source", "prefill"),
    *("forecast", "forecast_category", "thought_onset"),
)
FOREIGN_KEYS = ("prompt", "response", "label")
ALL_KEYS = (*KEYS, *FOREIGN_KEYS)

# redflag's key -> the source's column, several columns (a row for each), or null; a source's column -> null drops it.
Columns = Mapping[str, str | Sequence[str] | None]

# Mapped columns may be missing in a record, except for these: without them a row would change its meaning.
_NEEDED = ("messages", "category", *FOREIGN_KEYS)
_CONVERSATIONS = ("conversations", "conversation")
# redflag's key -> the columns of PKU-SafeRLHF, for the first and the second answer.
_PAIR = {
    "response": ("response_0", "response_1"),
    "label": ("is_response_0_safe", "is_response_1_safe"),
    "category": ("response_0_harm_category", "response_1_harm_category"),
}


class Cells(NamedTuple):
    """One row of a record under redflag's keys.

    Attributes:
        values: redflag's key -> its value; other columns keep their own names.
        label_column: The source's name of the label.
    """

    values: Mapping[str, Any]
    label_column: str = "label"


def check_columns(columns: Columns) -> None:
    """Raises RedflagError if a mapping names an unknown key, or lists of columns differ in length."""
    for key, value in columns.items():
        if value is not None and key not in ALL_KEYS:
            raise RedflagError(f"columns must map keys of a row: {', '.join(ALL_KEYS)} (got {key!r}).")
        names = [value] if isinstance(value, str) else value
        if names is not None and (
            not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names)
        ):
            raise RedflagError(f"columns must map {key!r} to a column, a list of columns or null (got {value!r})")
    lengths = {key: len(value) for key, value in columns.items() if isinstance(value, (list, tuple))}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} for {key!r}" for key, length in lengths.items())
        raise RedflagError(f"columns must name equally many columns for each key that has several (got {counts})")


def rows_in(record: Any, columns: Columns) -> list[Cells]:
    """The rows of a record, each under redflag's keys.

    Rows of one record share its group: its own, or one derived from the prompt. Their ids are numbered.

    Raises:
        ValueError: The record is not an object, or lacks a column that `columns` maps.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object (got {kind(record)})")
    implied = _well_known(record, columns)
    if not columns and not implied and not isinstance(record, TextRecord):
        return [Cells(record)]
    for ours in _NEEDED:
        for name in _names(columns.get(ours)):
            if name not in record:
                raise ValueError(f"no column {name!r}, which columns maps")
    mapping = {ours: theirs for ours, theirs in (*columns.items(), *implied.items()) if theirs is not None}
    mapped = {name for theirs in mapping.values() for name in _names(theirs)}
    # A mapped column is not read under its own name too.
    rest = {
        key: value for key, value in record.items() if key not in mapped and key not in columns and key not in implied
    }
    count = max((len(theirs) for theirs in mapping.values() if not isinstance(theirs, str)), default=1)
    rows = []
    for number in range(count):
        names = {ours: theirs if isinstance(theirs, str) else theirs[number] for ours, theirs in mapping.items()}
        values = rest | {ours: record[name] for ours, name in names.items() if name in record}
        if isinstance(record, TextRecord):
            _read_texts(values)
        if any(not isinstance(theirs, str) for theirs in mapping.values()):
            _mark(values, number)
        rows.append(Cells(values, names.get("label", "label")))
    return rows


@functools.lru_cache(maxsize=4096)
def lookalike(key: str) -> str | None:
    """The key that an unknown key may be a misspelling of, if that would change the meaning of a row."""
    close = difflib.get_close_matches(key.lower(), ("category", "onset", "label"), 1, cutoff=0.77)
    return close[0] if close else None


def _well_known(record: Mapping[str, Any], columns: Columns) -> dict[str, str | tuple[str, ...] | None]:
    """Columns of well-known sets, unless the record or `columns` says otherwise."""
    implied: dict[str, str | tuple[str, ...] | None] = {}
    if "messages" not in record and "prompt" not in record and not {"messages", "prompt"} & columns.keys():
        name = next((name for name in _CONVERSATIONS if name in record and name not in columns), None)
        implied |= {} if name is None else {"messages": name}
    if "response_0" in record and "response" not in record and not {"response", "messages"} & columns.keys():
        for ours, theirs in _PAIR.items():
            if all(name in record and name not in columns for name in theirs) and not {ours} & columns.keys():
                implied[ours] = theirs
    if "label" not in record and "label" not in columns and "label" not in implied:
        for name in LABEL_COLUMNS:
            if name in record and name not in columns and "label" not in implied:
                implied["label"] = name
                if name == "response_harm_label" and "subcategory" not in columns:
                    implied["subcategory"] = None  # the topic of the prompt
    if implied and columns:
        mapped = {name for theirs in columns.values() for name in _names(theirs)}
        implied = {ours: theirs for ours, theirs in implied.items() if not mapped.intersection(_names(theirs))}
    return implied


def _names(columns: str | Sequence[str] | None) -> Sequence[str]:
    """The source's columns for one key; none if it is dropped."""
    return [columns] if isinstance(columns, str) else columns or ()


def _read_texts(values: dict[str, Any]) -> None:
    """Parses numbers, lists and objects of a text-only format; other values stay text, and fail their own checks."""
    for key in ("onset", "prefill"):
        if isinstance(text := values.get(key), str) and text.removeprefix("-").isdecimal():
            values[key] = int(text)
    for key, begin in (("messages", "["), ("prompt", "[{"), ("forecast", "["), ("category", "{")):
        if isinstance(text := values.get(key), str) and text.startswith(begin):
            try:
                values[key] = json.loads(text)
            except (ValueError, RecursionError):
                continue


def _mark(values: dict[str, Any], number: int) -> None:
    if values.get("group") is None:
        prompt = json.dumps(values.get("messages") or values.get("prompt"), sort_keys=True, default=str)
        values["group"] = hashlib.sha256(prompt.encode()).hexdigest()[:16]
    if values.get("id") is not None:
        values["id"] = f"{values['id']}-{number}"
