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
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter

from redflag.lab.yaml_file import Strict, Text, checked, read_yaml

Family = Literal["cannot", "should_not"]
Level = Literal["category", "subcategory"]
FAMILIES: tuple[str, ...] = get_args(Family)
SHIPPED = "coconot.yaml"
OPENING = 200  # characters in which a refusal says that it is one
REASON = 500  # characters in which it gives its reason


def plain(text: str) -> str:
    """Lower case, straight apostrophes, single spaces: how phrases and texts are compared."""
    return _plain(text.replace("’", "'").replace("`", "'"))


def _plain(text: str) -> str:
    return _line(text.casefold())


def _line(text: str) -> str:
    return " ".join(text.split())


def _name(text: str) -> str:
    if "/" in text:
        raise ValueError(f"a name must not contain a slash, which separates category and subcategory (got {text!r}).")
    return text


def _distinct(categories: tuple[Any, ...]) -> tuple[Any, ...]:
    spellings = [spelling for category in categories for spelling in category.spellings]
    if double := next((one for one in spellings if spellings.count(one) > 1), None):
        raise ValueError(f"each name must be used once (got {double!r} twice).")
    return categories


Line = Annotated[str, AfterValidator(_line)]
Words = Annotated[Text, AfterValidator(_line)]
Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=3), AfterValidator(plain)]


@dataclass(frozen=True, kw_only=True)
class Subcategory(Strict):
    """One kind of refusal."""

    name: Annotated[Words, AfterValidator(_name)]  # used in labels, tables and flags
    description: Line = ""
    phrases: tuple[Phrase, ...] = ()  # texts, in lower case, that refusals of this kind often contain
    also: tuple[Phrase, ...] = ()  # other spellings in labels

    @property
    def spellings(self) -> set[str]:
        """All names that labels may use, in lower case."""
        return {_plain(name) for name in (self.name, *self.also)}


@dataclass(frozen=True, kw_only=True)
class Category(Subcategory):
    """A kind of refusal, with finer kinds."""

    family: Family
    subcategories: Annotated[tuple[Subcategory, ...], AfterValidator(_distinct)] = ()


@dataclass(frozen=True, kw_only=True)
class Taxonomy(Strict):
    """All categories."""

    name: Words  # shown wherever categories are
    source: Line = ""  # where the names come from
    phrases: tuple[Phrase, ...] = ()  # texts, in lower case, that refusals of any kind contain
    categories: Annotated[tuple[Category, ...], Field(min_length=2), AfterValidator(_distinct)]

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

    def is_refusal(self, response: str) -> bool:
        """Whether an answer begins with a refusal's phrase: crude, and in the language of the phrases.

        >>> taxonomy = load_taxonomy()
        >>> taxonomy.is_refusal("I'm sorry, but I can't help with that."), taxonomy.is_refusal("Sorry to hear that.")
        (True, False)
        """
        opening = plain(response[:OPENING])
        return any(phrase in opening for phrase in self.phrases)

    def reasons(self, response: str) -> list[int]:
        """Indices of the categories whose phrases occur near the beginning of an answer.

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
        """As `parse_taxonomy` takes it."""
        record: dict[str, Any] = TypeAdapter(Taxonomy).dump_python(self, mode="json", exclude_defaults=True)
        return record


def load_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """Reads a taxonomy; without a path the shipped one, which is CoCoNot's.

    Raises:
        RedflagError: The file cannot be read or is not a taxonomy; the message names the place.
    """
    with resources.as_file(resources.files("redflag.lab.refusals") / SHIPPED) as shipped:
        file = shipped if path is None else Path(path)
        return parse_taxonomy(read_yaml(file, "taxonomy"), str(path or SHIPPED))


def parse_taxonomy(record: Any, where: str) -> Taxonomy:
    """A taxonomy from the decoded file `where`."""
    return checked(Taxonomy, record, f"the taxonomy {where}")
