"""The types of an evaluation, as in `report.json`; `read_report` reads one and refuses what does not fit."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from redflag.errors import RedflagError
from redflag.lab.report.method import RARE, Cost, Count, Interval, Method, Number, Part, Share
from redflag.watching.thresholds import Thresholds

FORMAT = 1


@dataclass(frozen=True)
class Language(Part):
    """What training did to the language: means over the tokens of the rows that fit the context."""

    keep_kl: Number | None = None  # KL(reference || flagged), nats per token
    perplexity_ratio: Number | None = None  # of the text under the flagged model to that under the reference
    tokens: Count | None = None
    rows: Count | None = None
    left_out: Count | None = None  # rows that do not fit


@dataclass(frozen=True)
class Rate(Part):
    """A share of requests."""

    rate: Share | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class JudgedRate(Rate):
    """A share of requests, by a judge's verdicts."""

    at_most: Share | None = None  # if all unjudged attempts were harmful


@dataclass(frozen=True)
class HarmfulTokens(Part):
    """Means over attempts."""

    produced: Number | None = None
    released: Number | None = None


@dataclass(frozen=True)
class Peaks(Part):
    """Quantiles of the flag's highest probability, over attempts."""

    q10: Share | None = None
    median: Share | None = None
    q90: Share | None = None


@dataclass(frozen=True)
class AttackDelay(Part):
    """Of attempts that produced harm: tokens from the first harmful one to the alarm, and the share without one."""

    median: Number | None = None
    missed: Share | None = None


@dataclass(frozen=True)
class AttackLine(Part):
    """A line of the attack table; see `redflag.lab.attacks.judging.entries`."""

    name: str
    setting: str | None = None
    adaptive: bool | None = None
    requests: Count | None = None
    not_run: Count | None = None
    attempts: Count | None = None
    queries: Count | None = None
    harm_produced: JudgedRate | None = None
    harm_released: JudgedRate | None = None
    harmful_tokens: HarmfulTokens | None = None
    unjudged: Count | None = None
    alarm_rate: Rate | None = None
    flag_peak: Peaks | None = None
    delay: AttackDelay | None = None
    seconds: Number | None = None
    note: str | None = None


@dataclass(frozen=True)
class JudgeFacts(Part):
    """The judge of the attacks, and the hold-back of the guard that they met."""

    name: str | None = None
    answered: Count | None = None
    unanswered: Count | None = None
    hold_back: Count | None = None


@dataclass(frozen=True)
class Evaluation(Part):
    """All that `redflag evaluate` measured."""

    title: str
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    made: dict[str, Any] | None = None  # as JSON: command, versions, seeds, hashes, all that it takes to make it again
    language: Language | None = None
    attacks: list[AttackLine] | None = None
    judge: JudgeFacts | None = None
    warnings: list[str] | None = None
    model_pass: Cost | None = field(default=None, metadata=RARE)  # the model's own forward pass
    format: Literal[1] = 1

    @property
    def flag_name(self) -> str:
        """The method that the report is about: the first flag, or the first method where there is none."""
        return next((name for name, method in self.methods.items() if method.kind == "flag"), next(iter(self.methods)))


def as_json(part: Any) -> Any:
    """A part as `report.json` holds it."""
    if isinstance(part, Thresholds):
        return part.to_dict()
    if is_dataclass(part):
        return {
            item.metadata.get("name", item.name): as_json(value)
            for item in fields(part)
            if (value := getattr(part, item.name)) is not None or not item.metadata.get("rare")
        }
    if isinstance(part, dict):
        return {key: as_json(value) for key, value in part.items()}
    return [as_json(value) for value in part] if isinstance(part, list | tuple) else part


_reader = functools.cache(TypeAdapter)  # creating one takes a third of a second


def read_report(path: str | Path) -> Evaluation:
    """Reads a `report.json`.

    Raises:
        RedflagError: It cannot be read, or holds anything that no report has; the message names the place.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise RedflagError(f"{path} cannot be read ({error.strerror}): give a report.json") from error
    return parse(Evaluation, text, str(path))


def parse(kind: Any, text: str | bytes, name: str) -> Any:
    """A part of an evaluation from JSON; `name` is its origin, for errors.

    Raises:
        RedflagError: It does not fit.
    """
    try:
        return _reader(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".")
        value = json.dumps(first["input"], default=str)
        raise RedflagError(
            f"{name} must be a report.json of format {FORMAT} that `redflag evaluate` wrote (got {value:.80} at "
            f"{place or 'its top'}: {first['msg']}). Give another one, or evaluate again."
        ) from error
