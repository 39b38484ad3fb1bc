"""Requests of the classes: the constitution's examples first, then from templates or written by a model."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redflag.lab.synthesis.constitution import Class, Constitution
from redflag.lab.synthesis.dedup import distinct, normalised
from redflag.lab.synthesis.quality import bad_request
from redflag.lab.synthesis.questions import KeptAnswers, Question
from redflag.lab.synthesis.wording import read_requests, requests_question

PER_QUESTION = 10  # requests per question: models lose track of longer lists
_TOKENS = 1024
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Request:
    """A request of a class.

    Attributes:
        kind: The class.
        text: The user's text.
        number: Position among the class's requests.
        group: Same for all rows that come from this text.
    """

    kind: Class
    text: str
    number: int
    group: str


def group_of(text: str) -> str:
    """Name of a group of rows: equal for requests that differ only in case, punctuation and white space."""
    return "request-" + hashlib.sha256(normalised(text).encode()).hexdigest()[:16]


def find_requests(
    constitution: Constitution,
    model: KeptAnswers,
    count: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    near: float = 0.8,
    seed: int = 0,
    dropped: Counter[str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Request]:
    """Requests of all classes, class by class; a class may get fewer than its share where the model repeats itself.

    Args:
        constitution: The classes.
        model: Who writes requests, for classes without templates.
        count: Of all classes together.
        temperatures: Taken in turn.
        near: Similarity from which written requests count as the same; drawn ones differ in a word by design, and only
            equal ones are dropped.
        seed: Same seed, same requests.
        dropped: Told why requests were left out.
        on_progress: Callback that gets how many questions have answers.
    """
    dropped = Counter() if dropped is None else dropped
    shares = constitution.shares(count)
    asked: list[tuple[int, Question]] = []
    for number, (kind, share) in enumerate(zip(constitution.classes, shares, strict=True)):
        for i in range(questions_for(kind, share)):
            style = constitution.styles[i % len(constitution.styles)]
            wanted = requests_question(constitution, kind, style, PER_QUESTION)
            temperature = temperatures[i % len(temperatures)]
            asked.append((number, Question(wanted, temperature, _TOKENS, seed + 1_000 * number + i)))
    replies = model.ask([question for _, question in asked], on_progress) if asked else []
    requests: list[Request] = []
    for number, (kind, share) in enumerate(zip(constitution.classes, shares, strict=True)):
        if kind.templates:
            texts, threshold = draw(constitution, kind, share, seed), 1.0
        else:
            texts, threshold = list(kind.examples), near
            for (owner, _), reply in zip(asked, replies, strict=True):
                texts += read_requests(reply.text) if owner == number else []
        good = []
        for text in texts:
            if reason := bad_request(text):
                dropped[f"request: {reason}"] += 1
            else:
                good.append(text)
        kept = distinct(good, threshold)
        dropped["request: repeated"] += len(good) - len(kept)
        requests += [Request(kind, good[i], n, group_of(good[i])) for n, i in enumerate(kept[:share])]
    return requests


def questions_for(kind: Class, share: int) -> int:
    """Number of questions to get this many requests, with some spare ones for repetitions."""
    if kind.templates:
        return 0
    return math.ceil(max(0, share - len(kind.examples)) * 1.2 / PER_QUESTION)


def draw(constitution: Constitution, kind: Class, count: int, seed: int) -> list[str]:
    """Different requests from a class's templates, at most `count`.

    A shorter result is a prefix of a longer one.
    """
    rng = random.Random(f"{constitution.name}:{kind.name}:{seed}")
    found: dict[str, None] = {}
    for _ in range(50 * count):
        if len(found) == count:
            break
        template = rng.choice(kind.templates)
        found[_SLOT.sub(lambda slot: rng.choice(constitution.slots[slot[1]]), template)] = None
    return list(found)
