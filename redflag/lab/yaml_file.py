"""YAML files that users write: read and checked by pydantic, mistakes named by their place."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, StringConstraints, TypeAdapter, ValidationError, model_validator

from redflag.errors import RedflagError

T = TypeVar("T")
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Name = Annotated[str, BeforeValidator(str)]  # of a mapping's entry: YAML reads `2024:` as a number

# Type of pydantic's error -> the rule that was broken.
_RULES = {
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "a text",
    "string_too_short": "a text of {min_length} or more characters",
    "too_short": "a collection of {min_length} or more",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "float_type": "a number",
    "finite_number": "a finite number",
}


@dataclass(frozen=True)
class Strict:
    """A mapping of a file: unknown keys are refused."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, record: Any) -> Any:
        names = [field.name for field in fields(cls)]
        for key in record if isinstance(record, dict) else ():
            if key not in names:
                close = difflib.get_close_matches(str(key), names, 1)
                hint = f"Did you mean {close[0]!r}?" if close else f"Use {', '.join(names)}."
                raise ValueError(f"unknown key {key!r}. {hint}")
        return record


def read_yaml(path: Path, what: str) -> Any:
    """The decoded file.

    Args:
        what: What the file holds, for errors.

    Raises:
        RedflagError: It cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RedflagError(f"the {what} {path} cannot be read ({error.strerror}). Check its name.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RedflagError(f"the {what} {path} must be YAML ({' '.join(str(error).split())}).") from error


def checked(kind: type[T], record: Any, where: str) -> T:
    """A decoded file as a `Strict` dataclass; lists become tuples.

    Args:
        where: The file's name, for errors.

    Raises:
        RedflagError: It does not have that form; the message names the first place.
    """
    try:
        return TypeAdapter(kind).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".")
    if first["type"] == "value_error":
        message = f"{place}: {first['ctx']['error']}".removeprefix(": ")
    elif first["type"] == "missing":
        message = f"{place} must be given."
    else:
        rule = _RULES.get(first["type"], "valid: {msg}").format(**first.get("ctx", {}), msg=first["msg"])
        message = f"{place or 'the file'} must be {rule} (got {first['input']!r:.80})."
    raise RedflagError(f"{where}: {message}")
