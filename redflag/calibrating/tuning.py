"""Chooses monitor and thresholds from recorded responses, for a false-alarm rate, a recall or a cost.

The best of many monitors looks better on the rows used to choose it than it is, and thresholds set on the same rows
would not keep their guarantee. So the rows are split by group: on one part monitors are compared by cross-validation
(thresholds from all folds but one, figures from that one), on the second the thresholds of the chosen monitor are set,
and a third part, or another recording, measures them.

An `Objective` is the goal of the thresholds:

- `fpr`: as `redflag calibrate`: the lowest thresholds that keep a false-alarm rate with its guarantee
  (`redflag.calibrating.guarantee`); monitors are compared by the share of harmful responses that they catch.
- `recall`: the highest thresholds that keep the miss rate of harmful responses at 1 - recall, with the same guarantee
  (a miss is to a harmful response what an alarm is to a harmless one); of each category by the flag of its own.
  Monitors are compared by their false alarms.
- `cost`: `base_rate * cost_miss * P(miss | harmful) + (1 - base_rate) * cost_alarm * P(alarm | harmless)` per
  response, made as small as the rows allow. Several flags are cut at a common rank among the harmless peaks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from redflag.calibrating import replay
from redflag.calibrating.groups import folds
from redflag.calibrating.guarantee import Guarantee, Peaks, check_rates, fit_threshold, fit_thresholds
from redflag.calibrating.observed import known_onset
from redflag.errors import RedflagError
from redflag.scoring.recording import Recording
from redflag.stats.metrics import clopper_pearson
from redflag.watching.monitor import AGGREGATIONS, Aggregation, MonitorConfig

Interval = tuple[float, float]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Objective:
    """The goal of the thresholds; the module's docstring says how each is met.

    Attributes:
        rate: The false-alarm rate or the recall.
        guarantee: For `fpr` and `recall`; likewise `delta`, as in `redflag.calibrating.guarantee`.
        joint: The rate or cost is that of an alarm of any category; False: each category's own.
        cost_miss: Cost of a harmful response without an alarm; `cost_alarm`: of a harmless one with an alarm.
        base_rate: Share of harmful responses where the thresholds will be used.

    Raises:
        RedflagError: A rate or cost is out of bounds.
    """

    kind: Literal["fpr", "recall", "cost"] = "fpr"
    rate: float = 0.01
    guarantee: Guarantee = "expected"
    delta: float = 0.05
    joint: bool = True
    cost_miss: float = 1.0
    cost_alarm: float = 1.0
    base_rate: float = 0.5

    def __post_init__(self) -> None:
        check_rates(self.rate if self.kind == "fpr" else 0.5, self.guarantee, self.delta)
        for name, value in (("recall", self.rate), ("base_rate", self.base_rate)):
            if not 0.0 < value < 1.0:
                raise RedflagError(f"{name} must be above 0 and below 1 (got {value}). For example 0.9.")
        for name, value in (("cost_miss", self.cost_miss), ("cost_alarm", self.cost_alarm)):
            if not 0.0 < value < math.inf:
                raise RedflagError(f"{name} must be a finite number above 0 (got {value}).")

    def __str__(self) -> str:
        whose = "" if self.joint else ", each category by itself"
        sure = self.guarantee + (f", delta {self.delta:g}" if self.guarantee == "high_probability" else "")
        if self.kind == "cost":
            return (
                f"least cost: a miss {self.cost_miss:g}, a false alarm {self.cost_alarm:g}, "
                f"{self.base_rate:g} of responses harmful{whose}"
            )
        return f"{'false-alarm rate' if self.kind == 'fpr' else 'recall'} {self.rate:g} ({sure}{whose})"


@dataclass(frozen=True)
class Rates:
    """Rates of thresholds on responses.

    Attributes:
        harmless: Number of harmless responses; likewise `harmful`.
        fpr: Share of the harmless with an alarm in any category; None without any.
        fpr_interval: Its 95% Clopper-Pearson interval.
        tpr: The same of the harmful.
        own: Category -> share of its harmful responses that its own flag catches.
        median_delay: Median of first alarm - onset in tokens, of those with a known onset that alarmed.
        dated: Harmful responses with a known onset.
    """

    harmless: int
    harmful: int
    fpr: float | None
    fpr_interval: Interval | None
    tpr: float | None
    tpr_interval: Interval | None
    own: dict[str, float | None]
    median_delay: float | None
    dated: int


@dataclass(frozen=True)
class Candidate:
    """A monitor and its figures from cross-validation.

    Attributes:
        loss: The figure by which monitors are compared, lower is better: missed share, false alarms or cost per
            response.
        rates: Rates of its thresholds on the folds not used to set them.
    """

    monitor: MonitorConfig
    loss: float
    rates: Rates


@dataclass(frozen=True)
class Choice:
    """The outcome of a comparison.

    Attributes:
        best: Index of the first candidate with the lowest loss.
        lead: Difference of its loss to the first candidate's.
        lead_error: Standard error of that difference, response by response.
    """

    candidates: list[Candidate]
    best: int
    lead: float
    lead_error: float

    @property
    def beyond_chance(self) -> float:
        """Standard errors by which the best of this many equal monitors would lead by chance."""
        return math.sqrt(2.0 * math.log(max(2, len(self.candidates))))


def grid(
    aggregations: Sequence[Aggregation] = ("max", "run", "ema", "cusum"),
    *,
    windows: Sequence[int] = (2, 3, 5, 8),
    decays: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
    priors: Sequence[float] = (0.001, 0.01, 0.1),
    drifts: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
    warm_ups: Sequence[int] = (0,),
) -> list[MonitorConfig]:
    """Monitors to compare: every combination of the numbers that an aggregation has, in the order of `aggregations`."""
    values: dict[str, Sequence[Any]] = {"window": windows, "decay": decays, "prior": priors, "drift": drifts}
    if unknown := [name for name in aggregations if name not in AGGREGATIONS]:
        raise RedflagError(f"aggregations must be among {', '.join(AGGREGATIONS)} (got {unknown[0]!r}).")
    configs = []
    for name in aggregations:
        tuned, warms_up = AGGREGATIONS[name].tuned, AGGREGATIONS[name].warms_up
        for *numbers, warm_up in itertools.product(*(values[item] for item in tuned), warm_ups if warms_up else (0,)):
            configs.append(MonitorConfig(name, **dict(zip(tuned, numbers, strict=True)), warm_up=warm_up))
    return configs


def describe(config: MonitorConfig) -> str:
    """The monitor's aggregation and its tuned numbers, in a few words.

    >>> describe(MonitorConfig("cusum", prior=0.1, drift=1.0))
    'cusum prior 0.1 drift 1'
    """
    words = [f"{name} {getattr(config, name):g}" for name in AGGREGATIONS[config.aggregation].tuned]
    return " ".join([config.aggregation, *words, *([f"warm-up {config.warm_up}"] if config.warm_up else [])])


def fit(objective: Objective, peaks: Peaks, own: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """K thresholds that meet an objective.

    Args:
        peaks: N x K highest scores.
        own: Per response -1 if it is harmless, else the index of its category's flag, or K if it has none.

    Raises:
        RedflagError: Too few responses, or no threshold above 0 meets the objective.
    """
    flags = peaks.shape[1]
    harmless = peaks[own == -1]
    if objective.kind == "fpr":
        return fit_thresholds(harmless, objective.rate, objective.guarantee, objective.delta, objective.joint)
    if objective.kind == "cost":
        if objective.joint:
            return _least_cost(objective, harmless, peaks[own >= 0])
        return tuple(_least_cost(objective, harmless[:, [k]], peaks[own == k][:, [k]])[0] for k in range(flags))
    values = []
    for k in range(flags):
        scores = peaks[own == k, k]
        try:
            # With the sign of scores flipped, a miss becomes an alarm.
            upside_down = fit_threshold(-scores, _complement(objective.rate), objective.guarantee, objective.delta)
        except RedflagError as error:
            raise RedflagError(
                f"{len(scores)} harmful responses are too few for a recall of {objective.rate:g} "
                f"({objective.guarantee}). Add harmful rows with a category or lower the recall."
            ) from error
        values.append(-math.nextafter(upside_down, -math.inf))
        if not values[-1] > 0.0:
            raise RedflagError(
                f"no threshold above 0 keeps a recall of {objective.rate:g}: too many harmful responses have a score "
                "of 0. Lower the recall, check those rows or train again."
            )
    return tuple(values)


def owners(recording: Recording) -> npt.NDArray[np.int64]:
    """Per response -1 if it is harmless, else the index of its category's flag, or K if that has none.

    A single flag is that of all harm, whatever the rows' categories.
    """
    categories = recording.categories
    place = {None: -1} | {category: k for k, category in enumerate(categories)}
    other = 0 if len(categories) == 1 else len(categories)
    return np.array([place.get(category, other) for category in recording.columns["category"]], dtype=np.int64)


def dated(recording: Recording) -> list[int]:
    """The harmful responses that reach a marked onset."""
    onsets, steps = recording.columns["onset"], np.diff(recording.starts)
    harmful = np.flatnonzero(recording.harmful).tolist()
    return [i for i in harmful if known_onset(recording, i) and onsets[i] < steps[i]]


def rates(recording: Recording, config: MonitorConfig, thresholds: npt.ArrayLike, peaks: Peaks | None = None) -> Rates:
    """Rates of thresholds on responses that were not used to set them.

    Args:
        thresholds: K thresholds, or N x K: each response's own.
    """
    limits = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), (len(recording), len(recording.categories)))
    hits: Bools = np.asarray((replay.peaks(config, recording) if peaks is None else peaks) >= limits, dtype=np.bool_)
    own, onsets, with_onset = owners(recording), recording.columns["onset"], dated(recording)
    alarmed: Bools = np.asarray(hits.any(axis=1), dtype=np.bool_)
    first = replay.alarms(config, recording, limits[with_onset], with_onset).tolist()
    delays = [step - onsets[i] for step, i in zip(first, with_onset, strict=True) if step >= 0]
    fpr, fpr_interval = _share(alarmed[own == -1])
    tpr, tpr_interval = _share(alarmed[own >= 0])
    return Rates(
        harmless=int((own == -1).sum()),
        harmful=int((own >= 0).sum()),
        fpr=fpr,
        fpr_interval=fpr_interval,
        tpr=tpr,
        tpr_interval=tpr_interval,
        own={category: _share(hits[own == k, k])[0] for k, category in enumerate(recording.categories)},
        median_delay=float(np.median(delays)) if delays else None,
        dated=len(with_onset),
    )


def compare(
    recording: Recording, configs: Sequence[MonitorConfig], objective: Objective, *, parts: int = 5, seed: int = 0
) -> Choice:
    """Compares monitors by cross-validation by group: thresholds from all folds but one, figures from that one.

    Args:
        configs: Simple ones first: the first of several equal ones is chosen.

    Raises:
        RedflagError: Too few responses for the objective in some fold, or none that are harmful.
    """
    own = owners(recording)
    if parts < 2:
        raise RedflagError(f"the number of folds must be at least 2 (got {parts}).")
    if not (own >= 0).any() or not (own == -1).any():
        raise RedflagError(
            "a choice among monitors must have harmless and harmful responses (got "
            f"{int((own == -1).sum())} and {int((own >= 0).sum())}). Add rows, or name one monitor."
        )
    fold = folds(recording.columns["group"], parts, seed, own.tolist())
    tables = replay.peaks_of(configs, recording)
    weights = _weights(objective, own, len(recording.categories))
    candidates, losses = [], []
    for config, peaks in zip(configs, tables, strict=True):
        limits = np.empty_like(peaks)
        for number in range(parts):
            rest = fold != number
            try:
                limits[~rest] = fit(objective, peaks[rest], own[rest])
            except RedflagError as error:
                raise RedflagError(
                    f"{error} (to choose among {len(configs)} monitors, {int((own == -1).sum())} harmless and "
                    f"{int((own >= 0).sum())} harmful responses are divided into {parts} folds)"
                ) from error
        losses.append(weights * _wrong(objective, peaks >= limits, own))
        candidates.append(Candidate(config, float(losses[-1].sum()), rates(recording, config, limits, peaks)))
    best = min(range(len(candidates)), key=lambda c: candidates[c].loss)
    differences = losses[0] - losses[best]
    spread = sum(part.var() * len(part) for part in (differences[own == -1], differences[own >= 0]))
    return Choice(candidates, best, float(differences.sum()), math.sqrt(spread))


def _wrong(objective: Objective, hits: Bools, own: npt.NDArray[np.int64]) -> Bools:
    """Which responses the thresholds get wrong: a harmless one by an alarm, a harmful one by none."""
    caught: Bools = np.array(hits.any(axis=1), dtype=np.bool_)
    if not objective.joint or objective.kind == "recall":
        own_flag = (own >= 0) & (own < hits.shape[1])
        caught[own_flag] = hits[own_flag, own[own_flag]]
    return np.where(own == -1, caught, ~caught)


def _weights(objective: Objective, own: npt.NDArray[np.int64], flags: int) -> npt.NDArray[np.float64]:
    """Loss of each response if it is judged wrongly."""
    weights = np.zeros(len(own))
    harmless, harmful = own == -1, own >= 0
    miss, alarm = {"fpr": (1.0, 0.0), "recall": (0.0, 1.0)}.get(
        objective.kind,
        (objective.base_rate * objective.cost_miss, (1.0 - objective.base_rate) * objective.cost_alarm),
    )
    weights[harmless] = alarm / harmless.sum()
    if objective.joint:
        weights[harmful] = miss / harmful.sum()
    else:
        present = np.unique(own[harmful])
        for k in present:
            weights[own == k] = miss / (len(present) * (own == k).sum())
    return weights


def _least_cost(objective: Objective, harmless: Peaks, harmful: Peaks) -> tuple[float, ...]:
    """Thresholds just above the harmless peaks of a common rank with the lowest cost; the highest of several."""
    count = len(harmless)
    if not count or not len(harmful):
        raise RedflagError(
            f"a cost must be weighed on harmless and harmful responses (got {count} and {len(harmful)}). Add rows."
        )
    ascending = np.sort(harmless, axis=0)
    # Above the L-th highest harmless peak lie those with fewer than L harmless peaks at or above them.
    begins = [
        np.min([count - np.searchsorted(ascending[:, k], part[:, k]) for k in range(harmless.shape[1])], axis=0) + 1
        for part in (harmless, harmful)
    ]
    alarms, caught = (np.cumsum(np.bincount(begin, minlength=count + 2))[1 : count + 1] for begin in begins)
    misses = 1.0 - caught / len(harmful)
    costs = (
        objective.base_rate * objective.cost_miss * misses
        + (1.0 - objective.base_rate) * objective.cost_alarm * alarms / count
    )
    level = int(costs.argmin())
    return tuple(math.nextafter(float(peak), math.inf) for peak in ascending[count - 1 - level])


def _share(hits: Bools) -> tuple[float | None, Interval | None]:
    return (float(hits.mean()), clopper_pearson(int(hits.sum()), len(hits))) if len(hits) else (None, None)


def _complement(rate: float) -> float:
    """1 - rate, as the user would write it: 1 - 0.9 is 0.1."""
    return float(f"{1.0 - rate:.12g}")
