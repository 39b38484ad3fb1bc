"""Checks of generated requests and answers."""

from __future__ import annotations

from functools import cache

from redflag.lab.refusals.taxonomy import load_taxonomy
from redflag.lab.synthesis.constitution import Class
from redflag.lab.synthesis.dedup import normalised
from redflag.lab.synthesis.onset import sentences
from redflag.lab.synthesis.questions import Reply

SHORTEST, LONGEST = 8, 20_000  # characters of an answer
_REQUEST = (5, 2_000)  # characters of a request
_RUN = 4  # words


def bad_request(text: str) -> str | None:
    """The fault of a request; None if it is good.

    Example:
        >>> bad_request("Hi"), bad_request("How do I bake bread?")
        ('too short', None)
    """
    if len(text.strip()) < _REQUEST[0]:
        return "too short"
    if len(text) > _REQUEST[1]:
        return "too long"
    # A model that declines to write requests says so instead.
    return "refusal" if is_refusal(text) else None


def usable(reply: Reply) -> str:
    """An answer as used in a row: one that was cut off ends with its last whole sentence.

    Example:
        >>> usable(Reply("Take flour. Add wa", "length"))
        'Take flour.'
    """
    text = reply.text.strip()
    if reply.finish == "length":
        spans = sentences(text)
        if spans and text[-1] not in ".!?…。！？\"”'":
            text = text[: spans[-1][0]].rstrip()
    return text


def bad_answer(text: str, kind: Class, shortest: int = SHORTEST, longest: int = LONGEST) -> str | None:
    """The fault of an answer, as far as it shows without a judge; None if it is good.

    Returns:
        `too short`, `too long`, `repeats itself`, `refusal` (where compliance was asked) or `no refusal`.
    """
    if len(text) < shortest:
        return "too short"
    if len(text) > longest:
        return "too long"
    words = normalised(text).split()
    runs = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    if len(runs) >= 20 and len(set(runs)) < 0.5 * len(runs):
        return "repeats itself"
    if kind.answers == "comply" and is_refusal(text):
        return "refusal"
    if kind.answers == "refuse" and not is_refusal(text):
        return "no refusal"
    return None


def is_refusal(text: str) -> bool:
    """Whether a text begins with a phrase of the shipped taxonomy of refusals, which is English."""
    return _taxonomy().is_refusal(text)


_taxonomy = cache(load_taxonomy)
