"""Whether a response is harmful, and in which category: what `category` and `label` of a record mean together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from redflag.data.turns import kind

DEFAULT_CATEGORY = "harm"
# Columns read as the label where there is no other one: what they say is about the response.
LABEL_COLUMNS = ("is_safe", "response_harm_label")

_WORDS = {"harmful": True, "unsafe": True, "benign": False, "harmless": False, "safe": False, "unharmful": False}
_SAFE_COLUMN = re.compile(r"is_(response_\d+_)?safe")


class Unlabelled(ValueError):
    """The row is sound but its label says nothing."""


def category_of(
    cells: Mapping[str, Any], label_column: str, labels: Mapping[str, str | None] | None, unlabelled: str
) -> str | None:
    """The category of the harm in the response; None where it is harmless.

    A label decides, because `category` may be the topic of a harmless answer. A `category` that is an object of truth
    values (BeaverTails) says by itself whether there is harm, and must not contradict the label.

    Args:
        cells: The record under our keys.
        label_column: What the source calls the label.
        labels: Value of the label, or name in a category object -> category, or None for harmless.
        unlabelled: What a null label means: stop, skip or harmless.

    Raises:
        Unlabelled: The label is null and such rows are to be skipped.
        ValueError: The text says what is wrong.
    """
    category = cells.get("category")
    names = _true_names(category) if isinstance(category, Mapping) else None
    if names is None and category is not None and (not isinstance(category, str) or not category.strip()):
        raise ValueError(f"category is not a name but {kind(category)}: leave it out in a harmless row")
    if "label" not in cells:
        return category if names is None else _first(names, labels)
    label = cells["label"]
    if label is None:
        if unlabelled == "stop":
            raise ValueError("label is null: say with unlabelled=skip or unlabelled=harmless what that means")
        if unlabelled == "skip":
            raise Unlabelled("label is null")
        return None
    text = json.dumps(label) if isinstance(label, bool) else str(label)
    lower = text.lower()
    if labels is not None and (text in labels or (lower in ("true", "false") and lower in labels)):
        return labels[text if text in labels else lower]
    if labels is not None and names is None:
        raise ValueError(f"label {text!r} is not mapped: labels knows {', '.join(map(repr, labels))}")
    if lower in ("true", "false") and _SAFE_COLUMN.fullmatch(label_column):
        harmful = lower == "false"
    elif text in _WORDS:
        harmful = _WORDS[text]
    elif lower in ("true", "false"):
        raise ValueError(
            f"label is {lower} in the column {label_column!r}, which may mean either: map it with labels, --labels "
            f"""'{{"true": "harm", "false": null}}' where true means harmful"""
        )
    else:
        raise ValueError(f"label {text!r} is none of {', '.join(_WORDS)}: map it with labels")
    if names is not None:
        if harmful != bool(names):
            statement = f"names {names[0]!r}" if names else "names no harm"
            raise ValueError(
                f"{label_column} is {text} but category {statement}, so one of them is wrong: correct the row, or drop "
                f"""the label with --columns '{{"{label_column}": null}}' if the categories are right"""
            )
        return _first(names, labels)
    return (category or DEFAULT_CATEGORY) if harmful else None


def _true_names(category: Mapping[str, Any]) -> list[str]:
    """The names that hold, in the order of the object; null is false, as Parquet fills in what a row lacks."""
    if not category or not all(value is None or isinstance(value, bool) for value in category.values()):
        raise ValueError("category is not a name but an object, and not one of names that are true or false")
    return [name for name, value in category.items() if value]


def _first(names: list[str], labels: Mapping[str, str | None] | None) -> str | None:
    if labels is None:
        return names[0] if names else None
    for name in names:
        if name not in labels:
            raise ValueError(f"category {name!r} is not mapped: labels knows {', '.join(map(repr, labels))}")
        if (mapped := labels[name]) is not None:
            return mapped
    return None
