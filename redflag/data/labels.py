"""Whether a response is harmful, and in which category, from a record's `category` and `label`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from redflag.data.turns import kind

DEFAULT_CATEGORY = "harm"
# Columns about the response, read as the label if there is no other one.
LABEL_COLUMNS = ("is_safe", "response_harm_label")

_WORDS = {"harmful": True, "unsafe": True, "benign": False, "harmless": False, "safe": False, "unharmful": False}
_SAFE_COLUMN = re.compile(r"is_(response_\d+_)?safe")


class Unlabelled(ValueError):
    """The row is valid but its label is null."""


def category_of(
    cells: Mapping[str, Any], label_column: str, labels: Mapping[str, str | None] | None, unlabelled: str
) -> str | None:
    """The category of the harm in the response; None if it is harmless.

    A label decides, because `category` may be the topic of a harmless answer. A `category` that is an object of
    booleans (BeaverTails) says by itself whether there is harm, and must not contradict the label.

    Args:
        cells: The record under redflag's keys.
        label_column: The source's name of the label.
        labels: As in `load_rows`, like `unlabelled`.

    Raises:
        Unlabelled: The label is null and `unlabelled` is skip.
        ValueError: The label or the category is invalid; the message is the reason.
    """
    category = cells.get("category")
    names = _true_names(category) if isinstance(category, Mapping) else None
    if names is None and category is not None and (not isinstance(category, str) or not category.strip()):
        raise ValueError(f"category must be a name (got {kind(category)}). Leave it out in a harmless row")
    if "label" not in cells:
        return category if names is None else _first(names, labels)
    label = cells["label"]
    if label is None:
        if unlabelled == "stop":
            raise ValueError("label must not be null. Set unlabelled=skip or unlabelled=harmless for such rows")
        if unlabelled == "skip":
            raise Unlabelled("label is null")
        return None
    text = json.dumps(label) if isinstance(label, bool) else str(label)
    lower = text.lower()
    if labels is not None and (text in labels or (lower in ("true", "false") and lower in labels)):
        return labels[text if text in labels else lower]
    if labels is not None and names is None:
        raise ValueError(f"label must be one of {', '.join(map(repr, labels))}, which labels maps (got {text!r})")
    if lower in ("true", "false") and _SAFE_COLUMN.fullmatch(label_column):
        harmful = lower == "false"
    elif text in _WORDS:
        harmful = _WORDS[text]
    elif lower in ("true", "false"):
        raise ValueError(
            f"label {lower} in the column {label_column!r} is ambiguous. Map it with labels: if true means harmful, "
            f"""--labels '{{"true": "harm", "false": null}}'"""
        )
    else:
        raise ValueError(f"label must be one of {', '.join(_WORDS)} (got {text!r}). Map it with labels")
    if names is not None:
        if harmful != bool(names):
            statement = f"names {names[0]!r}" if names else "names no harm"
            raise ValueError(
                f"{label_column} is {text} but category {statement}. One of them is wrong. Fix the row, or drop the "
                f"""label with --columns '{{"{label_column}": null}}' if the categories are right"""
            )
        return _first(names, labels)
    return (category or DEFAULT_CATEGORY) if harmful else None


def _true_names(category: Mapping[str, Any]) -> list[str]:
    """The names that are true, in the order of the object; null is false, since Parquet fills missing keys with it."""
    if not category or not all(value is None or isinstance(value, bool) for value in category.values()):
        raise ValueError("category must be a name or an object of booleans")
    return [name for name, value in category.items() if value]


def _first(names: list[str], labels: Mapping[str, str | None] | None) -> str | None:
    if labels is None:
        return names[0] if names else None
    for name in names:
        if name not in labels:
            raise ValueError(
                f"category must be one of {', '.join(map(repr, labels))}, which labels maps (got {name!r})"
            )
        if (mapped := labels[name]) is not None:
            return mapped
    return None
