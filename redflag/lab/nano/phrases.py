"""The words of the nano world, from `phrases.yaml`."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any, NamedTuple

import yaml


class Topic(NamedTuple):
    """A kind of harmless request. `key` names the slots that make two requests the same request."""

    key: tuple[str, ...]
    prompts: tuple[str, ...]
    openers: tuple[str, ...]
    steps: tuple[str, ...]
    closers: tuple[str, ...]


def _lists(record: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(texts) for name, texts in record.items()}


_FILE: dict[str, Any] = yaml.safe_load(
    resources.files("redflag.lab.nano").joinpath("phrases.yaml").read_text(encoding="utf-8")
)
SLOT = re.compile(r"\{(\w+)\}")  # in a template
SLOTS = _lists(_FILE["slots"])
ACTS = _lists(_FILE["acts"])  # by category of harm
TOPICS = {name: Topic(**_lists(topic)) for name, topic in _FILE["topics"].items()}
PIVOTS: tuple[str, ...] = tuple(_FILE["pivots"])
SYSTEMS: tuple[str, ...] = tuple(_FILE["systems"])
AFTERMATH: tuple[str, ...] = tuple(_FILE["aftermath"])
REQUESTS: tuple[str, ...] = tuple(_FILE["requests"])
PREAMBLES: tuple[str, ...] = tuple(_FILE["preambles"])
REFUSALS: tuple[str, ...] = tuple(_FILE["refusals"])
REDIRECTS: tuple[str, ...] = tuple(_FILE["redirects"])
