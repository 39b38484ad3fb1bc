"""One method's scores, peaks and alarms on one set of rows, the input of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redflag.calibrating import replay
from redflag.scoring.recording import Recording
from redflag.stats.curves import running_peaks
from redflag.stats.intervals import rate_interval, unit_of
from redflag.stats.metrics import Bools, Floats
from redflag.watching.monitor import MonitorConfig


@dataclass(frozen=True)
class Observed:
    """N responses with S x K scores under one monitor: the input of every table of one method.

    Attributes:
        recording: The responses, without those that were cut before their harm began.
        peaks: N peaks, the highest score in any category.
        units: N numbers: responses that share one are not independent.
        alarms: N steps of the first alarm at the K thresholds, -1 = no alarm; None without thresholds.
    """

    recording: Recording
    scores: Floats
    peaks: Floats
    harmful: Bools
    units: replay.Indices
    alarms: replay.Indices | None
    thresholds: tuple[float, ...] | None


def cut_short(recording: Recording) -> Bools:
    """Harmful responses that end before their harm begins: nothing in them is harmful."""
    onsets = recording.columns["onset"]
    cut = [onset is not None and onset >= length for onset, length in zip(onsets, recording.lengths, strict=True)]
    return np.array(cut, dtype=bool) & recording.harmful


def observe(recording: Recording, config: MonitorConfig, thresholds: tuple[float, ...] | None) -> tuple[Observed, int]:
    """Folds a recording through a monitor.

    Returns:
        The observations, and the number of responses left out because they were cut before their harm began.
    """
    cut = cut_short(recording)
    whole = recording.select(~cut) if cut.any() else recording
    scores = replay.scores(config, whole)
    return Observed(
        whole,
        scores,
        running_peaks(scores.max(axis=1, initial=0.0), whole.starts, [len(scores)])[:, 0],
        whole.harmful,
        unit_of(whole.columns["group"], len(whole)),
        None if thresholds is None else replay.first_alarms(scores, whole, thresholds),
        thresholds,
    ), int(cut.sum())


def known_onset(recording: Recording, i: int) -> bool:
    """Whether the onset of response i was marked.

    A harmful row without a mark has onset 0 in a recording: it counts as harmful from its first token on.
    """
    onset = recording.columns["onset"][i]
    return onset is not None and (recording.columns["onset_source"][i] is not None or onset > 0)


def in_force(observed: Observed, harmful: Bools, harmless: Bools) -> dict[str, Any] | None:
    """Rates of the thresholds on some harmful and some harmless responses; None without thresholds."""
    if observed.alarms is None:
        return None
    raised = observed.alarms >= 0
    rates: dict[str, Any] = {}
    for name, rows in (("tpr", harmful), ("realised_fpr", harmless)):
        some = bool(rows.any())
        rates[name] = float(raised[rows].mean()) if some else None
        rates[f"{name}_interval"] = rate_interval(raised[rows], observed.units[rows]) if some else None
    rates["right_category"] = _right_category(observed, harmful)
    return rates


def _right_category(observed: Observed, harmful: Bools) -> float | None:
    """Share of the detected responses whose first alarm names their own category; None with a single flag."""
    assert observed.alarms is not None and observed.thresholds is not None
    names, labels = observed.recording.categories, observed.recording.columns["category"]
    detected = [i for i in np.flatnonzero(harmful & (observed.alarms >= 0)) if labels[i] in names]
    if len(names) < 2 or not detected:
        return None
    named = alarm_categories(observed.scores, observed.recording.starts, observed.alarms, observed.thresholds, names)
    return float(np.mean([named[int(i)] == labels[i] for i in detected]))


def alarm_categories(
    scores: Floats, starts: replay.Indices, alarms: replay.Indices, thresholds: Sequence[float], names: Sequence[str]
) -> dict[int, str]:
    """Response -> the category of its first alarm, if it has one; of several at one step the first, as in a session.

    `alarms` are steps, -1 for none, as `redflag.calibrating.replay.first_alarms` gives them.
    """
    raised = np.flatnonzero(alarms >= 0)
    flags = (scores[starts[raised] + alarms[raised]] >= np.asarray(thresholds)).argmax(axis=1)
    return {int(i): names[k] for i, k in zip(raised, flags, strict=True)}
