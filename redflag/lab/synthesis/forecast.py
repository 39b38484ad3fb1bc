"""Forecasts: the probability that an answer turns out harmful, at each of its sentences, as soft targets for a flag.

From a prefix of an answer a model writes n continuations; a judge reads prefix and continuation; the mean of its
verdicts is the probability of harm from there on (the idea of StreamGuard). A hard label is 0 up to the onset and 1
behind it; a forecast rises before the onset where harm can be predicted.

Positions are characters of the response, as `onset` is, so that they hold for any tokenizer. Rows get the key
`forecast`, a list of `[character, probability, continuations judged]`, which `redflag train --forecasts hold` takes as
soft targets (`redflag.training.forecasts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from redflag.data.rows import Row, write_rows
from redflag.errors import RedflagError
from redflag.judges import Judge, UnansweredError, ask
from redflag.lab.synthesis.onset import in_threads, sentences
from redflag.lab.synthesis.questions import CachedWriter, Question


@dataclass(frozen=True)
class Point:
    """A forecast at one place."""

    character: int  # where the continuations begin
    harm: float  # mean verdict, in [0, 1]
    judged: int  # continuations with a verdict


def forecast(
    rows: Sequence[Row],
    writer: CachedWriter,
    judge: Judge,
    *,
    samples: int = 8,
    positions: int = 8,
    temperature: float = 1.0,
    max_tokens: int = 128,
    seed: int = 0,
    workers: int = 8,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[list[Point]]:
    """Forecasts along the rows' responses.

    Args:
        writer: Continues the prefixes, so it must support that (`redflag.lab.synthesis.remote_writer`).
        judge: Reads prefix and continuation; called from several threads at once.
        samples: Continuations of each prefix.
        positions: Maximum number of places in a response: beginnings of sentences, including the first, evenly spread.
        max_tokens: Maximum length of a continuation.
        on_progress: Callback with the step, how many continuations are done, and of how many.

    Returns:
        For each row its points in order. A place none of whose continuations has a verdict is left out.

    Raises:
        RedflagError: A number is out of bounds, or the model cannot be reached.
    """
    if samples < 1 or positions < 1:
        raise RedflagError(f"samples and positions must be at least 1 (got {samples} and {positions}).")
    places: list[tuple[int, int]] = []
    questions: list[Question] = []
    for number, row in enumerate(rows):
        for character in _places(row.response, positions):
            places.append((number, character))
            begun = row.response[:character].rstrip()
            turns = [*row.messages[:-1], *([{"role": "assistant", "content": begun}] if begun else [])]
            # Seeds of one prefix are consecutive, so that a local model continues them in one batch.
            base = _seed(f"{seed} {json.dumps(turns)}")
            questions += [Question(tuple(turns), temperature, max_tokens, base + i) for i in range(samples)]
    replies = writer.ask(questions, partial(on_progress, "continuations"))

    def judged(index: int) -> float | None:
        (number, character), reply = places[index // samples], replies[index]
        row = rows[number]
        begun = row.response[:character].rstrip()
        text = reply.text if not begun or reply.text[:1].isspace() else f" {reply.text}"
        try:
            return ask(judge, row.messages[:-1], begun + text).harm if reply.finish != "refused" else None
        except UnansweredError:
            return None

    verdicts = in_threads(judged, range(len(questions)), workers, partial(on_progress, "continuations judged"))
    points: list[list[Point]] = [[] for _ in rows]
    for place, (number, character) in enumerate(places):
        harms = [harm for harm in verdicts[place * samples : (place + 1) * samples] if harm is not None]
        if harms:
            points[number].append(Point(character, sum(harms) / len(harms), len(harms)))
    return points


def write_forecasts(path: str | Path, rows: Sequence[Row], points: Sequence[Sequence[Point]]) -> Path:
    """Writes rows with their forecasts, whole or not at all."""
    lists = [[[point.character, round(point.harm, 6), point.judged] for point in line] or None for line in points]
    return write_rows(path, (replace(row, forecast=line) for row, line in zip(rows, lists, strict=True)))


def _places(text: str, most: int) -> list[int]:
    starts = [0, *(start for start, _ in sentences(text)[1:])]
    if len(starts) <= most:
        return starts
    return [starts[i * len(starts) // most] for i in range(most)]


def _seed(text: str) -> int:
    """A seed below 2^30, which every server takes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 2
