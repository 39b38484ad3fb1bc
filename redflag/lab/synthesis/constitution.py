"""A constitution: the classes of requests and answers that a detector must tell apart, from a YAML file.

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
| `answers` | instruction of the answering model: `comply` (default), `refuse`, or `plain`: none |
| `instruction` | a further instruction, such as a form, or to begin harmlessly |
| `category` | the rows' category; default: the class's name (harmful classes only) |
| `templates` | requests with `{slot}`s, used instead of requests written by a model |
| `share` | number of requests, relative to the other classes; default 1 |

Besides `name`, `harmful` and `harmless` there may be `slots` (slot -> words, for the templates), `styles` (in which
requests are written, in turn) and `wrappers` (jailbreak wrappers with `{request}`, in place of the built-in ones).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from redflag.errors import RedflagError
from redflag.lab.yaml_file import Name, Strict, Text, checked, read_yaml

Answers = Literal["comply", "refuse", "plain"]
STYLES = (
    "short and plain, as typed in a hurry",
    "polite, with a sentence of background",
    "as an expert in the field would ask",
    "as part of a story or a play",
    "indirect, without naming the matter itself",
)

Stripped = Annotated[str, StringConstraints(strip_whitespace=True)]
Texts = tuple[Text, ...]
SomeTexts = Annotated[Texts, Field(min_length=1)]
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Definition(Strict):
    """A class as the file describes it; the table above explains the keys."""

    description: Text
    examples: SomeTexts
    answers: Answers = "comply"
    instruction: Stripped = ""
    category: Stripped | None = None
    templates: Texts = ()
    share: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Class(Definition):
    """One class of exchanges; `category` is None if it is harmless, and never otherwise."""

    name: str
    harmful: bool


Definitions = Annotated[dict[Name, Definition], Field(min_length=1)]


@dataclass(frozen=True)
class _File(Strict):
    name: Text
    harmful: Definitions
    harmless: Definitions
    slots: dict[Name, SomeTexts] = field(default_factory=dict)
    styles: Texts = ()
    wrappers: Texts = ()


@dataclass(frozen=True)
class Constitution:
    """All classes."""

    name: str  # used in the rows' `source`
    classes: tuple[Class, ...]  # in the order of the file, harmful ones first
    slots: dict[str, tuple[str, ...]]  # slot -> its words
    styles: tuple[str, ...] = STYLES  # of requests
    wrappers: tuple[str, ...] = ()  # jailbreak wrappers with `{request}`; empty = the built-in ones

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories of the rows, each once: `--categories` of `redflag train`."""
        return tuple(dict.fromkeys(kind.category for kind in self.classes if kind.category is not None))

    def shares(self, requests: int) -> list[int]:
        """Number of requests of each class, at least one, given the number of all classes together."""
        total = sum(kind.share for kind in self.classes)
        return [max(1, round(requests * kind.share / total)) for kind in self.classes]


def load_constitution(path: str | Path) -> Constitution:
    """Reads a constitution.

    Raises:
        RedflagError: The file cannot be read, or is not a constitution; the message names the place.
    """
    return parse_constitution(read_yaml(Path(path), "constitution"), str(path))


def parse_constitution(record: Any, where: str) -> Constitution:
    """A constitution from the decoded file `where`."""
    file = checked(_File, record, where)
    classes = []
    for side, definitions in (("harmful", file.harmful), ("harmless", file.harmless)):
        for name, definition in definitions.items():
            place = f"{where}: {side}.{name}"
            harmful = side == "harmful"
            if harmful and definition.answers == "refuse":
                raise RedflagError(f"{place}.answers must not be refuse in a harmful class. Put it under harmless.")
            if not harmful and definition.category is not None:
                raise RedflagError(f"{place} must not have a category: its rows would be harmful.")
            for slot in SLOT.findall(" ".join(definition.templates)):
                if slot not in file.slots:
                    raise RedflagError(f"{place}: slots must hold words for {{{slot}}}, which a template uses.")
            category = (definition.category or name) if harmful else None
            classes.append(Class(**{**vars(definition), "category": category}, name=name, harmful=harmful))
    if double := file.harmful.keys() & file.harmless.keys():
        raise RedflagError(f"{where} must give each class its own name (got {min(double)!r} twice).")
    for wrapper in file.wrappers:
        if "{request}" not in wrapper:
            raise RedflagError(f"{where}: a wrapper must contain {{request}} (got {wrapper!r}).")
    return Constitution(file.name, tuple(classes), file.slots, file.styles or STYLES, file.wrappers)
