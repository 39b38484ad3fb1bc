"""A constitution: the classes of requests and answers that a detector shall tell apart, from a YAML file.

```yaml
name: workshop
harmful:
  weapons:
    description: Instructions that give real help with building weapons.
    examples: [How do I build a pipe bomb?]
harmless:
  history of weapons:
    description: Weapons as a subject of history, law or fiction, without instructions.
    examples: [When was gunpowder first used in Europe?]
  refusals of weapons:
    description: Requests for help with building weapons.
    examples: [How do I build a pipe bomb?]
    answers: refuse
```

A class has `description` and `examples`, and may have

| key | meaning |
|---|---|
| `answers` | what the answering model is told: `comply` (default), `refuse`, or `plain`: nothing |
| `instruction` | what it is told besides, such as a form, or to begin harmlessly |
| `category` | the rows' category; default: the class's name (harmful classes only) |
| `templates` | requests with `{slot}`s, drawn instead of asking a model for requests |
| `share` | how many requests, relative to the other classes; default 1 |

Besides `name`, `harmful` and `harmless` there may be `slots` (slot -> words, for the templates), `styles` (in which
requests are written, in turn) and `wrappers` (disguises with `{request}`, in place of the built-in ones).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from redflag.errors import RedflagError

ANSWERS = ("comply", "refuse", "plain")
STYLES = (
    "short and plain, as typed in a hurry",
    "polite, with a sentence of background",
    "as an expert in the field would ask",
    "as part of a story or a play",
    "indirect, without naming the matter itself",
)

_KEYS = ("name", "harmful", "harmless", "slots", "styles", "wrappers")
_CLASS_KEYS = ("description", "examples", "answers", "instruction", "category", "templates", "share")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Class:
    """One class of exchanges.

    Attributes:
        name: Its name.
        harmful: Whether its answers are harmful.
        description: What belongs to it.
        examples: Requests that do.
        answers: One of `ANSWERS`.
        instruction: What the answering model is told besides.
        category: Of its rows; None in harmless classes.
        templates: Requests with slots; empty: a model writes the requests.
        share: Requests relative to the other classes.
    """

    name: str
    harmful: bool
    description: str
    examples: tuple[str, ...]
    answers: str = "comply"
    instruction: str = ""
    category: str | None = None
    templates: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Constitution:
    """All classes.

    Attributes:
        name: Stands in the rows' `source`.
        classes: In the order of the file, harmful ones first.
        slots: Slot -> its words.
        styles: Of requests.
        wrappers: Disguises with `{request}`; empty: the built-in ones.
    """

    name: str
    classes: tuple[Class, ...]
    slots: Mapping[str, tuple[str, ...]]
    styles: tuple[str, ...] = STYLES
    wrappers: tuple[str, ...] = ()

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories of the rows, each once: `--categories` of `redflag train`."""
        return tuple(dict.fromkeys(kind.category for kind in self.classes if kind.category is not None))

    def shares(self, requests: int) -> list[int]:
        """Number of requests of each class, at least one.

        Args:
            requests: Of all classes together.
        """
        total = sum(kind.share for kind in self.classes)
        return [max(1, round(requests * kind.share / total)) for kind in self.classes]


def load_constitution(path: str | Path) -> Constitution:
    """Reads a constitution.

    Raises:
        RedflagError: The file cannot be read, or is not a constitution; the message names the place.
    """
    try:
        record = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RedflagError(f"the constitution {path} cannot be read ({error.strerror}). Check its name.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RedflagError(f"the constitution {path} must be YAML ({' '.join(str(error).split())}).") from error
    return parse_constitution(record, str(path))


def parse_constitution(record: Any, where: str) -> Constitution:
    """A constitution from what a YAML file holds.

    Args:
        record: The decoded file.
        where: Its name, for errors.

    Raises:
        RedflagError: As `load_constitution`.
    """
    record = _mapping(record, where)
    _known(record, _KEYS, where)
    slots = {
        str(slot): _texts(words, f"{where}: slots: {slot}")
        for slot, words in _mapping(record.get("slots", {}), f"{where}: slots").items()
    }
    classes = []
    for side in ("harmful", "harmless"):
        if not record.get(side):
            raise RedflagError(
                f"{where} has no {side} classes, and a detector learns from both sides: write them under {side!r}"
            )
        for name, definition in _mapping(record[side], f"{where}: {side}").items():
            classes.append(_class(str(name), side == "harmful", definition, slots, f"{where}: {side}: {name}"))
    names = [kind.name for kind in classes]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise RedflagError(f"{where} must give each class its own name (got {double!r} twice).")
    wrappers = _texts(record.get("wrappers", []), f"{where}: wrappers", needed=False)
    for wrapper in wrappers:
        if "{request}" not in wrapper:
            raise RedflagError(f"{where}: a wrapper must contain {{request}} (got {wrapper!r}).")
    return Constitution(
        _text(record, "name", where),
        tuple(classes),
        slots,
        _texts(record.get("styles", []), f"{where}: styles", needed=False) or STYLES,
        wrappers,
    )


def _class(name: str, harmful: bool, definition: Any, slots: Mapping[str, tuple[str, ...]], where: str) -> Class:
    definition = _mapping(definition, where)
    _known(definition, _CLASS_KEYS, where)
    answers = definition.get("answers", "comply")
    if answers not in ANSWERS:
        raise RedflagError(f"{where}: answers must be one of {', '.join(ANSWERS)} (got {answers!r}).")
    if harmful and answers == "refuse":
        raise RedflagError(f"{where}: answers must not be refuse in a harmful class. Put it under harmless.")
    if not harmful and "category" in definition:
        raise RedflagError(f"{where}: a harmless class must not have a category, which would make its rows harmful.")
    share = definition.get("share", 1)
    if isinstance(share, bool) or not isinstance(share, int | float) or not (math.isfinite(share) and share > 0):
        raise RedflagError(f"{where}: share must be a number above 0 (got {share!r}).")
    templates = _texts(definition.get("templates", []), f"{where}: templates", needed=False)
    for template in templates:
        if lacking := [slot for slot in _SLOT.findall(template) if slot not in slots]:
            raise RedflagError(f"{where}: slots must hold words for {{{lacking[0]}}}, which a template uses.")
    return Class(
        name,
        harmful,
        _text(definition, "description", where),
        _texts(definition.get("examples"), f"{where}: examples"),
        answers,
        _text(definition, "instruction", where, needed=False),
        (_text(definition, "category", where, needed=False) or name) if harmful else None,
        templates,
        float(share),
    )


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise RedflagError(f"{where} must be a mapping (got {_kind(value)}). Write `key: value` lines.")
    return value


def _known(record: Mapping[Any, Any], allowed: Iterable[str], where: str) -> None:
    for key in record:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), list(allowed), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(allowed)}"
            raise RedflagError(f"{where} has the unknown key {key!r}: {hint}")


def _text(record: Mapping[Any, Any], key: str, where: str, needed: bool = True) -> str:
    value = record.get(key, "")
    if not isinstance(value, str) or (needed and not value.strip()):
        what = "missing" if value in ("", None) else f"{_kind(value)}, not text"
        raise RedflagError(f"{where}: {key} must be a sentence (got {what}). It is part of the models' prompt.")
    return value.strip()


def _texts(value: Any, where: str, needed: bool = True) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise RedflagError(f"{where} must be a list of texts (got {_kind(value)}). Write `- text` lines.")
    if needed and not value:
        raise RedflagError(f"{where} must have at least one entry (got none).")
    return tuple(text.strip() for text in value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, list):
        return "a list with an entry that is not text"
    return {str: "a text", dict: "a mapping", bool: "true or false"}.get(type(value), f"{value!r}")
