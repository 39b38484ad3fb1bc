"""Measured responses as input of calibration: which are harmless and harmful, their groups and onsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from redflag.calibrating import replay
from redflag.calibrating.observed import known_onset
from redflag.errors import RedflagError
from redflag.scoring.recording import Recording
from redflag.watching.memory import Memory
from redflag.watching.monitor import MonitorConfig, peaks


class Measured(NamedTuple):
    """Responses and which of them are harmless and harmful; one group and one onset for each of these."""

    responses: replay.Responses
    harmless_at: Sequence[int]
    groups: Sequence[str | None]
    harmful_at: Sequence[int]
    onsets: Sequence[int | None]


def of_recording(recording: Recording, categories: tuple[str, ...]) -> Measured:
    """Recorded responses.

    Raises:
        RedflagError: The recording is of other flags.
    """
    if recording.categories != categories:
        raise RedflagError(
            f"the recording must be of the model's flags, {', '.join(categories)} (got "
            f"{', '.join(recording.categories)}). Give a recording of this model."
        )
    harmless, harmful = (np.flatnonzero(part).tolist() for part in (~recording.harmful, recording.harmful))
    groups = recording.columns["group"]
    onsets = [onset if known_onset(recording, i) else None for i, onset in enumerate(recording.columns["onset"])]
    return Measured(recording, harmless, [groups[i] for i in harmless], harmful, [onsets[i] for i in harmful])


def of_responses(
    harmless: Sequence[Any],
    harmful: Sequence[Any],
    groups: Sequence[str | None] | None,
    onsets: Sequence[int | None] | None,
    flags: int,
) -> Measured:
    """Responses as `redflag.calibrating.calibrate.calibrate_responses` takes them, the harmless ones first."""
    groups = [None] * len(harmless) if groups is None else groups
    if len(groups) != len(harmless):
        raise RedflagError(f"groups must have one entry for each of {len(harmless)} responses (got {len(groups)}).")
    onsets = [None] * len(harmful) if onsets is None else onsets
    if len(onsets) != len(harmful):
        raise RedflagError(f"onsets must have one entry for each of {len(harmful)} responses (got {len(onsets)}).")
    first, second = replay.Steps.of(harmless, flags, "harmless"), replay.Steps.of(harmful, flags, "harmful")
    starts = np.concatenate([first.starts, first.starts[-1] + second.starts[1:]])
    responses = replay.Steps(np.concatenate([first.probs, second.probs]), starts)
    count = len(harmless)
    return Measured(responses, range(count), groups, range(count, count + len(harmful)), onsets)


def of_thoughts(
    recording: Recording, categories: tuple[str, ...], parts: Sequence[Sequence[int]]
) -> tuple[Measured, list[list[int]], list[list[int]]]:
    """The thoughts of recorded responses, and those of some parts of the harmless ones.

    `parts` are numbers of harmless responses, in the order of `Measured.groups` of the recording.

    Returns:
        The thoughts; for each part, the numbers of its thoughts among the harmless ones, and their positions in it.
    """
    has = recording.thoughts[~recording.harmful] > 0
    rank = np.cumsum(has) - 1
    numbers = [[int(rank[i]) for i in part if has[i]] for part in parts]
    places = [[at for at, i in enumerate(part) if has[i]] for part in parts]
    return of_recording(recording.part("thought"), categories), numbers, places


def factors_of(
    memory: Memory, config: MonitorConfig, earlier: Sequence[Sequence[Any]] | None, count: int, flags: int
) -> replay.Floats:
    """N x K factors by which the earlier answers multiply the odds of each response's scores.

    Raises:
        RedflagError: There is not one list of earlier answers for each of the `count` responses, or a probability
            cannot be judged.
    """
    if earlier is None or len(earlier) != count:
        got = "none" if earlier is None else len(earlier)
        raise RedflagError(f"earlier must have one list of answers for each of {count} responses (got {got}).")
    factors = [
        memory.factors([peaks(config, answer, flags) for answer in answers], config.prior, flags) for answers in earlier
    ]
    return np.array(factors, dtype=np.float64).reshape(count, flags)


def remembered(rows: Measured, factors: replay.Floats) -> Measured:
    """The same responses, their scores raised by N x K factors."""
    return rows._replace(responses=replay.Steps(rows.responses.probs, rows.responses.starts, factors))
