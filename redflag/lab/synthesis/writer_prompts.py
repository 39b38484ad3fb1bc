"""Prompts for generating rows."""

from __future__ import annotations

import re
from collections.abc import Mapping

from redflag.lab.synthesis.constitution import Class, Constitution

Turns = tuple[Mapping[str, str], ...]

REQUESTS = """\
We collect requests for training a safety monitor of an AI assistant. The class is "{name}": {description}

Examples:
{examples}
{border}
Write {count} different requests of this class, as users would type them, in the language of the examples. Vary the \
subject, the situation and the length. Style: {style}.
Number them, one request on each line, and write nothing else."""

_BORDER = """
The requests must not belong to any of these classes:
{others}
"""

COMPLY = "Answer the user's request in full and to the point."
REFUSE = (
    "Decline the user's request in your own words, in one to four sentences. You may say why, or what you can help "
    "with in its place. Do not give any part of what was asked for."
)

PARAPHRASE = """\
Say the following request in other words. Keep its meaning and all that it asks for; change words and order. Do not \
answer it. Write the new request and nothing else.

{text}"""

TRANSLATE = """\
Translate the following text into {language}. Do not answer it, shorten it or comment on it. Write the translation and \
nothing else.

{text}"""

_ITEM = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•])\s*(.+?)\s*$")


def requests_question(constitution: Constitution, kind: Class, style: str, count: int) -> Turns:
    """Asks for requests of a class."""
    border = ""
    if not kind.harmful and kind.answers != "refuse":
        harmful = [other for other in constitution.classes if other.harmful]
        border = _BORDER.format(others="\n".join(f"- {other.name}: {other.description}" for other in harmful))
    text = REQUESTS.format(
        name=kind.name,
        description=kind.description,
        examples="\n".join(f"- {example}" for example in kind.examples),
        border=border,
        count=count,
        style=style,
    )
    return ({"role": "user", "content": text},)


def read_requests(text: str) -> list[str]:
    """The requests in a numbered or bulleted list; other lines are left out.

    Example:
        >>> read_requests('Here you are:\\n1. How do I sail?\\n2) "Why sail?"')
        ['How do I sail?', 'Why sail?']
    """
    items = [match[1] for line in text.splitlines() if (match := _ITEM.match(line))]
    return [item[1:-1] if len(item) > 2 and item[0] == item[-1] == '"' else item for item in items]


def answer_question(kind: Class, request: str) -> Turns:
    """Asks for the answer to a request, in the way of its class."""
    user_turn = {"role": "user", "content": request}
    instruction = {"comply": COMPLY, "refuse": REFUSE, "plain": ""}[kind.answers]
    system = " ".join(part for part in (instruction, kind.instruction) if part)
    return ({"role": "system", "content": system}, user_turn) if system else (user_turn,)


def paraphrase_question(text: str) -> Turns:
    """Asks for a paraphrase of a request."""
    return ({"role": "user", "content": PARAPHRASE.replace("{text}", text)},)


def translate_question(text: str, language: str) -> Turns:
    """Asks for a translation."""
    return ({"role": "user", "content": TRANSLATE.replace("{language}", language).replace("{text}", text)},)
