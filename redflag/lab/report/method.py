"""The figures of one method as they stand in `report.json`: these types are its schema.

None means not measured. Shares lie in [0, 1], intervals cover 95% (a bound is None if there are too few rows for it),
delays and onsets are in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from redflag.watching.monitor import MonitorConfig
from redflag.watching.thresholds import Thresholds


def _ordered(ends: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    low, high = ends
    if low is not None and high is not None and low > high:
        raise ValueError("an interval goes from low to high")
    return ends


Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Interval = Annotated[tuple[Number | None, Number | None], AfterValidator(_ordered)]
# Metadata of fields that few methods have: written only if not None.
RARE = {"rare": True}


@dataclass(frozen=True)
class Part:
    """Any part of an evaluation: read strictly, unknown keys are refused."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Cost(Part):
    """What watching costs per response token, the model's own forward pass not counted."""

    microseconds_per_token: Number | None  # measured while scoring, on the machine that scored; None: not yet
    flops_per_token: Number | None  # multiplications and additions, by formula; None: unknown
    note: str | None  # what is counted and what is not


@dataclass(frozen=True)
class Compute(Part):
    """What a method adds to the model's own pass, as a share of it: by formula, and as measured."""

    flops: Number | None = None
    seconds: Number | None = None


@dataclass(frozen=True)
class Caught(Part):
    """What the best threshold catches that keeps a false-alarm rate on these same rows."""

    tpr: Share | None = None
    realised_fpr: Share | None = None
    threshold: Number | None = None  # None: no threshold keeps the rate and catches anything
    interval: Interval | None = None  # of `tpr`


@dataclass(frozen=True)
class InForce(Part):
    """The rates on these rows of thresholds that were set on other rows."""

    tpr: Share | None = None
    tpr_interval: Interval | None = None
    realised_fpr: Share | None = None
    realised_fpr_interval: Interval | None = None
    right_category: Share | None = None  # of the detected, whose first alarm names their own; None: a single flag


@dataclass(frozen=True)
class Slice(Part):
    """Some harmful responses against some harmless ones."""

    harmful: Count
    harmless: Count
    few: bool | None = None
    against: str | None = None  # which harmless responses these are
    auroc: Share | None = None
    auroc_interval: Interval | None = None
    average_precision: Share | None = None
    average_precision_interval: Interval | None = None
    tpr: dict[str, Caught | None] | None = None  # by false-alarm rate, such as "0.01"
    partial: str | None = None  # which figures so few responses cannot give
    in_force: InForce | None = None

    def at(self, rate: str) -> Caught:
        """What is caught at a false-alarm rate."""
        return (self.tpr or {}).get(rate) or Caught()


@dataclass(frozen=True)
class Roc(Part):
    """As `redflag.stats.curves.roc`."""

    fpr: list[Share]
    tpr: list[Share]
    low: list[Share] | None = None
    high: list[Share] | None = None

    def __post_init__(self) -> None:
        _check_columns(self, len(self.fpr))


@dataclass(frozen=True)
class Earliness(Part):
    """As `redflag.stats.curves.earliness`."""

    k: list[Count]
    auroc: list[Share | None] | None = None
    low: list[Share | None] | None = None
    high: list[Share | None] | None = None
    detected: list[Share | None] | None = None
    false_alarms: list[Share | None] | None = None

    def __post_init__(self) -> None:
        _check_columns(self, len(self.k))


@dataclass(frozen=True)
class Bin(Part):
    """Of `redflag.stats.curves.reliability`."""

    low: Number
    high: Number
    count: Count
    mean: Share | None = None
    rate: Share | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class StepReliability(Part):
    """Of the probabilities at single steps."""

    bins: list[Bin]
    brier: Number | None = None


@dataclass(frozen=True)
class Reliability(Part):
    """As `redflag.stats.curves.reliability`, of responses and of the steps that are labelled."""

    bins: list[Bin] | None = None
    brier: Number | None = None
    of: str | None = None
    per_step: StepReliability | None = None


@dataclass(frozen=True)
class Histogram(Part):
    """As `redflag.stats.curves.delay_histogram`; an edge that is None is infinitely far."""

    edges: list[Number | None]
    counts: list[Count]
    missed: Count | None = None

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts need {len(self.counts) + 1} edges, not {len(self.edges)}")


@dataclass(frozen=True)
class Exposed(Part):
    """As a policy of `redflag.lab.evaluating.exposure.exposure`."""

    mean: Number | None = None
    median: Number | None = None
    p90: Number | None = None
    none: Share | None = None


@dataclass(frozen=True)
class Delay(Part):
    """When alarms come, as `redflag.stats.metrics.delay_stats`, and what was shown before.

    The rate of false alarms is required: a flag that always alarms is never late.
    """

    responses: Count
    realised_fpr: Share
    early: Share | None = None
    on_time: Share | None = None
    late: Share | None = None
    missed: Share | None = None
    median: Number | None = None
    median_interval: Interval | None = None
    median_abs: Number | None = None
    tolerance: Number | None = None
    counted_from: Annotated[str | None, Field(alias="from")] = field(default=None, metadata={"name": "from"})
    histogram: Histogram | None = None
    exposed: dict[str, Exposed | None] | None = None  # by release policy


@dataclass(frozen=True)
class FalseAlarms(Part):
    """Harmless responses of one source at the thresholds in force."""

    harmless: Count | None = None
    alarms: Count | None = None
    rate: Share | None = None
    interval: Interval | None = None
    few: bool | None = None


@dataclass(frozen=True)
class Difference(Part):
    """How much better one method is than another, above 0 where it is."""

    difference: Number | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Lead(Part):
    """Of one method over another on the same rows, by AUROC and by TPR at false-alarm rates."""

    auroc: Difference | None = None
    tpr: dict[str, Difference | None] | None = None


@dataclass(frozen=True)
class FittedOn(Part):
    """Which rows thresholds were set on ("calibration" or "before"), and how many harmless ones."""

    split: str
    harmless: Count


@dataclass(frozen=True)
class FittedThresholds(Thresholds):
    """Thresholds as in `thresholds.json`, and what they were set on."""

    fitted_on: FittedOn | None = None


@dataclass(frozen=True)
class CascadeFacts(Part):
    """What the first stage of a cascade asked the second about the test rows."""

    asked: Share  # of harmless responses
    asked_interval: Interval | None = None
    asked_harmful: Share | None = None
    first: str | None = None
    second: str | None = None
    share: Share | None = None  # of harmless responses that was to be escalated
    thresholds: dict[str, Number] | None = None  # by category: scores that ask
    calls: Number | None = None  # per harmless response
    read: Number | None = None  # tokens that the second stage reads, per token of harmless responses


@dataclass(frozen=True)
class Method(Part):
    """All figures of one method on the test rows; see `redflag.lab.evaluating.tables.method`."""

    kind: Literal["flag", "baseline", "cascade"]
    pooled: Slice
    what: str | None = None
    monitor: MonitorConfig | None = None
    cost: Cost | None = None
    slices: dict[str, dict[str, Slice] | None] | None = None  # by dimension (source, category, lang, turns) and value
    roc: Roc | None = None
    threshold: FittedThresholds | None = None
    in_force: InForce | None = None
    delay: dict[str, Delay | None] | None = None  # by where onsets come from: constructed, natural, labelled, unknown
    earliness: Earliness | None = None
    reliability: Reliability | None = None
    over_refusal: dict[str, FalseAlarms] | None = None  # by source
    cut: Count | None = None  # rows left out because they end before their harm begins
    units: Count | None = None  # independent groups of responses
    notes: list[str] = field(default_factory=list)
    compute: Compute | None = field(default=None, metadata=RARE)
    flag_ahead: Lead | None = field(default=None, metadata=RARE)
    cascade: CascadeFacts | None = field(default=None, metadata=RARE)


def _check_columns(curve: Any, points: int) -> None:
    for item in fields(curve):
        column = getattr(curve, item.name)
        if column is not None and len(column) != points:
            raise ValueError(f"{item.name} has {len(column)} values for {points} points")
