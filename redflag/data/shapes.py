"""The shapes of records: which of our keys a record's columns are, and how many rows a record holds.

What `columns` says comes first. Where it is silent, the columns of well-known sets are known: `conversations`
(ShareGPT), `is_safe` (BeaverTails), `response_harm_label` (WildGuardMix), `response_0` and `response_1` with their
labels (PKU-SafeRLHF: two rows to a record).
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

# Our key -> the source's column, several columns (a row for each), or null; a source's column -> null drops it.
Columns = Mapping[str, str | Sequence[str] | None]

_OURS = frozenset((*KEYS, *FOREIGN_KEYS))
# What may be left out of a row may be left out of a mapped one; but without these a row would change its meaning.
_NEEDED = ("messages", "category", *FOREIGN_KEYS)
_CONVERSATIONS = ("conversations", "conversation")
# Our key -> the columns of PKU-SafeRLHF, for the first and the second answer.
_PAIR = {
    "response": ("response_0", "response_1"),
    "label": ("is_response_0_safe", "is_response_1_safe"),
    "category": ("response_0_harm_category", "response_1_harm_category"),
}


class Cells(NamedTuple):
    """One row of a record under our keys.

    Attributes:
        values: Our key -> its value; columns that are no key of ours stand under their own names.
        label_column: What the source calls the label.
    """

    values: Mapping[str, Any]
    label_column: str = "label"


def check_columns(columns: Columns) -> None:
    """Raises RedflagError where a mapping names no key of ours, or as many columns for one key as for no other."""
    for key, value in columns.items():
        if value is not None and key not in _OURS:
            raise RedflagError(
                f"columns maps {key!r}, which is no key of a row: map from one of {', '.join((*KEYS, *FOREIGN_KEYS))}"
            )
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
    """The rows of a record, each under our keys.

    Rows of one record share its group: its own, else one made of the prompt. Their ids are numbered.

    Raises:
        ValueError: It is no object, or a column that `columns` maps is not there.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"not an object but {kind(record)}")
    known = _well_known(record, columns)
    if not columns and not known and not isinstance(record, TextRecord):
        return [Cells(record)]
    for ours, theirs in columns.items():
        if ours in _NEEDED and theirs is not None:
            for name in [theirs] if isinstance(theirs, str) else theirs:
                if name not in record:
                    raise ValueError(f"no column {name!r}, which columns maps")
    mapping = {ours: theirs for ours, theirs in (*columns.items(), *known.items()) if theirs is not None}
    taken = {name for theirs in mapping.values() for name in ([theirs] if isinstance(theirs, str) else theirs)}
    # A column that is mapped from is not read under its own name as well.
    rest = {key: value for key, value in record.items() if key not in taken and key not in columns and key not in known}
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
    """The key that an unknown one looks like a misspelling of, where that would change what a row means."""
    close = difflib.get_close_matches(key.lower(), ("category", "onset", "label"), 1, cutoff=0.77)
    return close[0] if close else None


def _well_known(record: Mapping[str, Any], columns: Columns) -> dict[str, str | tuple[str, ...] | None]:
    """Columns of well-known sets, where neither the record nor `columns` says otherwise."""
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
        mapped = {name for v in columns.values() if v is not None for name in ([v] if isinstance(v, str) else v)}
        implied = {ours: v for ours, v in implied.items() if not mapped & set([v] if isinstance(v, str) else v or ())}
    return implied


def _read_texts(values: dict[str, Any]) -> None:
    """Numbers, lists and objects from a format that knows only text; what is none stays, and is bad for its reason."""
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
