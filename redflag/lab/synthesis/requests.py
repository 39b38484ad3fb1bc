"""Requests of the classes: the constitution's examples first, then from templates or written by a model."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from redflag.lab.synthesis.constitution import SLOT, Class, Constitution
from redflag.lab.synthesis.dedup import distinct, normalised
from redflag.lab.synthesis.options import Settings
from redflag.lab.synthesis.quality import bad_request
from redflag.lab.synthesis.questions import CachedWriter, Question
from redflag.lab.synthesis.writer_prompts import read_requests, requests_question

PER_QUESTION = 10  # requests per question: models lose track of longer lists
_TOKENS = 1024


@dataclass(frozen=True)
class Request:
    """A user's text."""

    kind: Class
    text: str
    number: int  # among the class's requests
    group: str  # of all rows that come from this text


def group_of(text: str) -> str:
    """Name of a group of rows: equal for requests that differ only in case, punctuation and white space."""
    return "request-" + hashlib.sha256(normalised(text).encode()).hexdigest()[:16]


def find_requests(
    constitution: Constitution,
    writer: CachedWriter,
    settings: Settings,
    dropped: Counter[str],
    on_progress: Callable[[int, int], None],
) -> list[Request]:
    """Requests of all classes, class by class; a class gets fewer than its share if the writer repeats itself.

    Written requests that are nearly equal count as one; drawn ones differ in a word by design, and only equal ones are
    dropped.
    """
    shares = constitution.shares(settings.requests)
    counts = [questions_for(kind, share) for kind, share in zip(constitution.classes, shares, strict=True)]
    questions = []
    for number, (kind, count) in enumerate(zip(constitution.classes, counts, strict=True)):
        for i in range(count):
            style = constitution.styles[i % len(constitution.styles)]
            turns = requests_question(constitution, kind, style, PER_QUESTION)
            temperature = settings.temperatures[i % len(settings.temperatures)]
            questions.append(Question(turns, temperature, _TOKENS, settings.seed + 1_000 * number + i))
    replies = iter(writer.ask(questions, on_progress) if questions else [])
    requests: list[Request] = []
    for kind, share, count in zip(constitution.classes, shares, counts, strict=True):
        if kind.templates:
            texts, near = draw(constitution, kind, share, settings.seed), 1.0
        else:
            texts, near = list(kind.examples), settings.near
            for reply in islice(replies, count):
                texts += read_requests(reply.text)
        good = []
        for text in texts:
            if reason := bad_request(text):
                dropped[f"request: {reason}"] += 1
            else:
                good.append(text)
        unique = distinct(good, near)
        dropped["request: repeated"] += len(good) - len(unique)
        requests += [Request(kind, good[i], n, group_of(good[i])) for n, i in enumerate(unique[:share])]
    return requests


def questions_for(kind: Class, share: int) -> int:
    """Number of questions to get this many requests, with some spare ones for repetitions."""
    if kind.templates:
        return 0
    return math.ceil(max(0, share - len(kind.examples)) * 1.2 / PER_QUESTION)


def draw(constitution: Constitution, kind: Class, count: int, seed: int) -> list[str]:
    """Different requests from a class's templates, at most `count`; a shorter result is a prefix of a longer one."""
    rng = random.Random(f"{constitution.name}:{kind.name}:{seed}")
    texts: dict[str, None] = {}
    for _ in range(50 * count):
        if len(texts) == count:
            break
        template = rng.choice(kind.templates)
        texts[SLOT.sub(lambda slot: rng.choice(constitution.slots[slot[1]]), template)] = None
    return list(texts)
