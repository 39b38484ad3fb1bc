"""The categories of refusals: a YAML file, read and checked.

```yaml
name: Mine
source: where the names come from         # may be left out, as all but names and families
phrases: [i cannot help with]             # in any refusal
categories:
  - name: Private matters
    family: should_not                    # or cannot
    also: [privacy]                       # other spellings in labels
    description: Data of other people.
    phrases: [personal information]       # in a refusal of this kind
    subcategories: [{name: addresses}]    # the same keys, without a family
```
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from redflag.errors import RedflagError

Family = Literal["cannot", "should_not"]
Level = Literal["category", "subcategory"]
FAMILIES: tuple[str, ...] = get_args(Family)
SHIPPED = "coconot.yaml"
# Characters in which a refusal gives its reason.
REASON = 500

_KEYS = {"name", "source", "phrases", "categories"}
_CATEGORY_KEYS = {"name", "family", "also", "description", "phrases", "subcategories"}


@dataclass(frozen=True)
class Category:
    """One kind of refusal.

    Attributes:
        name: As it stands in labels, tables and flags.
        family: "cannot" or "should_not"; a subcategory has its category's.
        description: A sentence.
        phrases: Texts, in small letters, that refusals of this kind often hold.
        also: Other spellings in labels.
        subcategories: Finer kinds.
    """

    name: str
    family: str
    description: str = ""
    phrases: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    subcategories: tuple[Category, ...] = ()

    @property
    def spellings(self) -> tuple[str, ...]:
        """All names that labels may use, in small letters."""
        return tuple(_plain(name) for name in (self.name, *self.also))


@dataclass(frozen=True)
class Taxonomy:
    """All categories.

    Attributes:
        name: What it is called; shown wherever categories are.
        categories: The categories.
        phrases: Texts, in small letters, that refusals of any kind hold.
        source: Where the names come from.
    """

    name: str
    categories: tuple[Category, ...]
    phrases: tuple[str, ...] = ()
    source: str = ""

    def classes(self, level: str = "category") -> tuple[str, ...]:
        """Names of all categories, or of all subcategories as `category/subcategory`.

        >>> taxonomy = load_taxonomy()
        >>> taxonomy.classes()[:2], taxonomy.classes("subcategory")[6]
        (('Requests with safety concerns', 'Incomplete requests'), 'Incomplete requests/underspecified')
        """
        if level == "category":
            return tuple(category.name for category in self.categories)
        return tuple(
            f"{category.name}/{part.name}" if part is not category else category.name
            for category in self.categories
            for part in category.subcategories or (category,)
        )

    def family(self, name: str) -> str:
        """Family of a category or subcategory.

        >>> load_taxonomy().family("Incomplete requests/underspecified")
        'cannot'
        """
        head = name.partition("/")[0]
        return next(category.family for category in self.categories if category.name == head)

    def label(self, text: str, level: str = "category") -> str | None:
        """What a row's label means; None: not in this taxonomy at that level.

        >>> taxonomy = load_taxonomy()
        >>> taxonomy.label("requests with safety concerns/false information", "subcategory")
        'Requests with safety concerns/misinformation'
        >>> taxonomy.label("Incomplete requests"), taxonomy.label("Incomplete requests", "subcategory")
        ('Incomplete requests', None)
        """
        head, _, rest = text.partition("/")
        for category in self.categories:
            if _plain(head) in category.spellings:
                if level == "category" or not category.subcategories:
                    return category.name
                subcategories = [part.name for part in category.subcategories if _plain(rest) in part.spellings]
                return f"{category.name}/{subcategories[0]}" if subcategories else None
        return None

    def reasons(self, response: str) -> list[int]:
        """Numbers of the categories whose phrases an answer holds near its beginning.

        >>> load_taxonomy().reasons("I can’t tell you: that would share personal information.")
        [0]
        """
        text = plain(response[:REASON])
        return [i for i, phrases in enumerate(self._phrases) if any(phrase in text for phrase in phrases)]

    @functools.cached_property
    def _phrases(self) -> list[tuple[str, ...]]:
        """Phrases of each category, those of its subcategories among them."""
        return [
            (*category.phrases, *(phrase for part in category.subcategories for phrase in part.phrases))
            for category in self.categories
        ]

    def to_dict(self) -> dict[str, Any]:
        """As `load_taxonomy` and `parse_taxonomy` take it."""
        return {
            "name": self.name,
            **({"source": self.source} if self.source else {}),
            "phrases": list(self.phrases),
            "categories": [{**_as_dict(category), "family": category.family} for category in self.categories],
        }


def load_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """Reads a taxonomy; without a path the shipped one, which is CoCoNot's.

    Raises:
        RedflagError: The file cannot be read or is not a taxonomy; the message names the place.
    """
    import yaml

    name = SHIPPED if path is None else str(path)
    try:
        if path is None:
            text = resources.files("redflag.lab.refusals").joinpath(SHIPPED).read_text(encoding="utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
        record = yaml.safe_load(text)
    except OSError as error:
        raise RedflagError(f"the taxonomy {name} cannot be read ({error.strerror}). Check its name.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RedflagError(f"the taxonomy {name} must be YAML ({error}).") from error
    return parse_taxonomy(record, name)


def parse_taxonomy(record: Any, where: str) -> Taxonomy:
    """Checks what a file held.

    Raises:
        RedflagError: It is not a taxonomy.
    """
    try:
        _keys(record, _KEYS, "the file")
        if not isinstance(record.get("categories"), list) or len(record["categories"]) < 2:
            raise ValueError("categories must be a list of two or more: one alone classifies nothing")
        categories = tuple(_category(one, f"categories[{i}]", None) for i, one in enumerate(record["categories"]))
        _distinct(categories, "categories")
        return Taxonomy(
            _text(record, "name", "the file"),
            categories,
            _phrases(record, "phrases", "the file"),
            _text(record, "source", "the file", needed=False),
        )
    except ValueError as error:
        raise RedflagError(f"the taxonomy {where} is invalid ({error}). Fix it.") from None


def plain(text: str) -> str:
    """Small letters, straight apostrophes, single blanks: how phrases and texts are compared."""
    return _plain(text.replace("’", "'").replace("`", "'"))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _category(record: Any, place: str, family: str | None) -> Category:
    _keys(record, _CATEGORY_KEYS - ({"family", "subcategories"} if family else set()), place)
    name = _text(record, "name", place)
    if "/" in name:
        raise ValueError(f"{place}.name is {name!r}: a slash divides category and subcategory, and can be in neither")
    if family is None:
        family = record.get("family")
        if family not in FAMILIES:
            raise ValueError(f"{place}.family must be one of {', '.join(FAMILIES)} (got {family!r})")
    parts = record.get("subcategories") or []
    if not isinstance(parts, list):
        raise ValueError(f"{place}.subcategories must be a list")
    subcategories = tuple(_category(one, f"{place}.subcategories[{i}]", family) for i, one in enumerate(parts))
    _distinct(subcategories, f"{place}.subcategories")
    return Category(
        name,
        family,
        _text(record, "description", place, needed=False),
        _phrases(record, "phrases", place),
        _phrases(record, "also", place),
        subcategories,
    )


def _keys(record: Any, allowed: set[str], place: str) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} must be a mapping")
    if unknown := sorted(str(key) for key in record if key not in allowed):
        raise ValueError(f"keys of {place} must be among {', '.join(sorted(allowed))} (got {unknown[0]!r})")


def _text(record: Mapping[str, Any], key: str, place: str, needed: bool = True) -> str:
    value = record.get(key)
    if value is None and not needed:
        return ""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}.{key} must be a text (got {value!r})")
    return " ".join(value.split())


def _phrases(record: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    values = record.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) and len(value.strip()) > 2 for value in values):
        raise ValueError(f"{place}.{key} must be a list of texts of three or more characters")
    return tuple(plain(value) for value in values)


def _distinct(categories: tuple[Category, ...], place: str) -> None:
    seen: set[str] = set()
    for category in categories:
        for spelling in category.spellings:
            if spelling in seen:
                raise ValueError(f"{place} has {spelling!r} twice")
            seen.add(spelling)


def _as_dict(category: Category) -> dict[str, Any]:
    record: dict[str, Any] = {"name": category.name}
    record |= {"description": category.description} if category.description else {}
    record |= {key: list(value) for key in ("phrases", "also") if (value := getattr(category, key))}
    record |= {"subcategories": [_as_dict(part) for part in category.subcategories]} if category.subcategories else {}
    return record
