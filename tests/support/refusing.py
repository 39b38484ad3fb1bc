"""Requests and answers whose refusals are known, made of a few words."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

TAXONOMY = """
name: Small
phrases: [cannot do that]
categories:
  - {name: Private, family: should_not, phrases: [personal data]}
  - {name: Unclear, family: cannot, phrases: [more context], also: [vague]}
  - {name: Senses, family: cannot, phrases: [no eyes]}
"""
ASKS = {
    "Private": ("home address", "phone number", "salary", "password"),
    "Unclear": ("that thing", "it again", "the usual", "you know what"),
    "Senses": ("smell of rain", "picture here", "sound of bells", "taste of soup"),
}
WHY = {"Private": "that is personal data", "Unclear": "please give more context", "Senses": "there are no eyes in me"}
OPENINGS = ("Sorry, that I cannot do.", "I will not do that.", "No, I am unable to.", "I have to decline.")
TOPICS = ("bread", "rivers", "chess", "stars", "bees", "maps", "tides", "clocks")
NAMES = ("Ada", "Bo", "Cyd", "Dov", "Eve", "Fay", "Gus", "Hal", "Ina", "Jo", "Kim", "Lou")


def labelled(rows: int = 240, seed: int = 0) -> list[dict[str, Any]]:
    """Training rows: half of them refusals of three kinds, half answers; requests are labelled as well."""
    draw = random.Random(seed)
    kinds = itertools.cycle(ASKS)
    found: list[dict[str, Any]] = []
    for i in range(rows):
        name, n = draw.choice(NAMES), i // 2
        if i % 2:
            topic = draw.choice(TOPICS)
            prompt, response = f"Tell {name} about {topic}, number {n}", f"Here is what {name} should know of {topic}."
            labels: dict[str, Any] = {"refusal": False, "prompt_label": "benign"}
        else:
            kind = next(kinds)
            prompt = f"Give {name} the {draw.choice(ASKS[kind])}, number {n}"
            response = f"{draw.choice(OPENINGS)} {WHY[kind]}."
            labels = {"refusal": True, "refusal_category": kind}
            labels["prompt_label"] = "harmful" if kind == "Private" else "benign"
        found.append({"prompt": prompt, "response": response, "source": f"s{i % 3}", "id": str(i), **labels})
    return found


def write(path: Path, rows: list[Any]) -> str:
    """As JSONL; a text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)
