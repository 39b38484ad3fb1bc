"""Thresholds: one score per category, with everything that the number depends on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from redflag.errors import RedflagError
from redflag.files import atomic_write
from redflag.watching.checks import check_flag, check_number, check_one_of, check_whole, is_number
from redflag.watching.memory import Memory
from redflag.watching.monitor import AGGREGATIONS, MonitorConfig

THRESHOLDS_FILE = "thresholds.json"
PROMPT_THRESHOLDS_FILE = "prompt_thresholds.json"  # of `Policy.prompt`
THRESHOLDS_FORMAT = 1
_MAY_LACK = ("thoughts", "memory")  # keys that a file without them leaves out

Guarantee = Literal["expected", "high_probability", "manual"]


@dataclass(frozen=True)
class Thresholds:
    """Thresholds per category, with the monitor, model and measurement that they belong to.

    Attributes:
        values: Category -> score at and above which an alarm is raised; finite, above 0.
        target_fpr: The requested false-alarm rate per benign response; None when set by hand.
        guarantee: `expected` (the rate holds on average over calibration sets), `high_probability` (it holds with
            probability 1 - `delta` over them) or `manual` (set by hand, nothing was measured).
        joint: Whether the rate is that of an alarm of *any* category, instead of each one.
        sample_size: Benign responses that the thresholds were set on.
        realised_fpr: Share of held-out benign responses with an alarm.
        interval: 95% Clopper-Pearson interval of `realised_fpr`.
        held_out_size: Benign responses that it was measured on.
        logprob_mode: What the engine measures: `raw`, before temperature, bias and penalties; or another name.
        suggested_hold_back: h with which, in the harmful responses of the calibration, the first alarm came before the
            onset was shown; None if too few had an onset.
        thoughts: Thresholds for the thought before an answer, which may name harm without being harmful, set on
            thoughts only; None = those of the answer.
        memory: How earlier responses of the conversation raise the scores that the values are compared with; None = not
            at all.

    Raises:
        RedflagError: Values are invalid or contradict each other.
    """

    values: Mapping[str, float]
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    target_fpr: float | None = None
    guarantee: str = "manual"
    delta: float | None = None
    joint: bool = False
    sample_size: int = 0
    realised_fpr: float | None = None
    interval: tuple[float, float] | None = None
    held_out_size: int = 0
    run_id: str = ""
    template_hash: str = ""
    logprob_mode: str = "raw"
    suggested_hold_back: int | None = None
    thoughts: Thresholds | None = None
    memory: Memory | None = None

    def __post_init__(self) -> None:
        self._check_values()
        check_one_of("guarantee", self.guarantee, get_args(Guarantee))
        needs = {"target_fpr": self.guarantee != "manual", "delta": self.guarantee == "high_probability"}
        for name, needed in needs.items():
            value = getattr(self, name)
            if (value is None and needed) or not (value is None or (is_number(value) and 0 < value < 1)):
                raise RedflagError(
                    f"{name} must be above 0 and below 1 under the guarantee {self.guarantee!r} (got {value!r})."
                )
        rates = [rate for rate in (self.realised_fpr, *(self.interval or ())) if rate is not None]
        if not all(is_number(rate) and 0 <= rate <= 1 for rate in rates) or len(self.interval or (0, 0)) != 2:
            raise RedflagError(
                "realised_fpr and the two ends of interval must be between 0 and 1 (got "
                f"{self.realised_fpr!r} and {self.interval!r})."
            )
        check_whole("sample_size", self.sample_size)
        check_whole("held_out_size", self.held_out_size)
        for name in ("run_id", "template_hash", "logprob_mode"):
            if not isinstance(value := getattr(self, name), str):
                raise RedflagError(f"{name} must be a string (got {value!r}).")
        if self.suggested_hold_back is not None:
            check_whole("suggested_hold_back", self.suggested_hold_back)
        check_flag("joint", self.joint)
        if self.memory is not None and not isinstance(self.memory, Memory):
            raise RedflagError(f"memory must be a `Memory` or None (got {self.memory!r}).")
        check_memory(self.memory, self.monitor)
        if self.thoughts is not None:
            self._check_thoughts(self.thoughts)

    def _check_thoughts(self, thoughts: Thresholds) -> None:
        if not isinstance(thoughts, Thresholds) or thoughts.thoughts is not None:
            raise RedflagError(f"thoughts must be thresholds without thoughts of their own (got {thoughts!r})")
        for name in ("run_id", "template_hash", "logprob_mode", "memory"):
            if (theirs := getattr(thoughts, name)) != (ours := getattr(self, name)):
                raise RedflagError(
                    f"thoughts must have the answer's {name} {ours!r} (got {theirs!r}). Both belong to one model."
                )
        if set(thoughts.values) != set(self.values):
            raise RedflagError(
                f"thoughts must have a threshold for each of {sorted(self.values)} (got {sorted(thoughts.values)}). A "
                "category would go unwatched."
            )

    @property
    def of_thoughts(self) -> Thresholds:
        """The thresholds for thoughts."""
        return self.thoughts or self

    def _check_values(self) -> None:
        if not isinstance(self.values, Mapping) or not self.values:
            raise RedflagError(f"the thresholds must map each category to a number (got {self.values!r}).")
        # A calibration on saturated probabilities gives a threshold one unit above 1; 50 would be a percentage.
        highest = math.nextafter(1.0, 2.0) if AGGREGATIONS[self.monitor.aggregation].bounded else math.inf
        for category, value in self.values.items():
            if not isinstance(category, str):
                raise RedflagError(f"categories of thresholds must be strings (got {category!r}).")
            rule = f"above 0{'' if highest == math.inf else ' and at most 1'} for {self.monitor.aggregation!r} scores"
            check_number(f"the threshold of {category!r}", value, rule, lambda x: 0 < x <= highest and x < math.inf)
        object.__setattr__(self, "values", {category: float(value) for category, value in self.values.items()})

    @classmethod
    def manual(
        cls,
        value: float,
        categories: Iterable[str],
        monitor: MonitorConfig | None = None,
        *,
        run_id: str = "",
        template_hash: str = "",
        logprob_mode: str = "raw",
    ) -> Thresholds:
        """One threshold for all categories, set by hand instead of calibrated, without any guarantee."""
        return cls(
            values=dict.fromkeys(categories, value),
            monitor=monitor or MonitorConfig(),
            run_id=run_id,
            template_hash=template_hash,
            logprob_mode=logprob_mode,
        )

    def check(self, run_id: str, template_hash: str, logprob_mode: str, categories: Iterable[str]) -> None:
        """Checks that thresholds are used with the model, template, mode and categories they were calibrated for.

        Args:
            categories: Categories of the model's flags, in any order.

        Raises:
            RedflagError: Naming the first mismatch.
        """
        for what, theirs, ours in (
            ("categories", sorted(self.values), sorted(categories)),
            ("run", self.run_id, run_id),
            ("prompt template", self.template_hash, template_hash),
            ("log-probability mode", self.logprob_mode, logprob_mode),
        ):
            if theirs != ours:
                raise RedflagError(
                    f"{what} must be {theirs!r}, which the thresholds were calibrated for (got {ours!r}). Their "
                    "false-alarm rate holds for nothing else. Run `redflag calibrate` again for this model."
                )

    def remembering(self, memory: Memory | None) -> Thresholds:
        """These thresholds, with the memory that a guard was asked for; None = what they were calibrated with.

        Raises:
            RedflagError: They were calibrated with another memory, or without any.
        """
        asked = memory if memory is not None and memory.weight else None
        if memory is None or asked == self.memory:
            return self
        if self.guarantee == "manual" and self.memory is None:
            thoughts = None if self.thoughts is None else replace(self.thoughts, memory=asked)
            return replace(self, thoughts=thoughts, memory=asked)
        raise RedflagError(
            f"memory must be {self.memory or 'off'}, which the thresholds were calibrated with (got {asked or 'off'}). "
            "Their false-alarm rate holds for nothing else. Run `redflag calibrate` again with this memory, or leave "
            "it out."
        )

    def save(self, directory: str | os.PathLike[str], name: str = THRESHOLDS_FILE) -> Path:
        """Writes `thresholds.json` (or another name) into an existing directory, whole or not at all.

        Raises:
            RedflagError: The file cannot be written; an older file is then unchanged.
        """
        path = Path(directory) / name
        record = {"format": THRESHOLDS_FORMAT, **self.to_dict()}
        with atomic_write(path) as file:
            file.write(json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")
        return path

    def to_dict(self) -> dict[str, Any]:
        """The contents of the file; without `thoughts` or `memory` if there is none, so that older versions can read
        it."""
        record = {key: value for key, value in asdict(self).items() if value is not None or key not in _MAY_LACK}
        if self.thoughts is not None:
            record["thoughts"] = self.thoughts.to_dict()
        return record

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Thresholds:
        """Reads the result of `to_dict` or `dataclasses.asdict`, also after a round trip through JSON.

        Raises:
            RedflagError: Values are invalid or contradict each other.
        """
        interval = record["interval"]
        values = {**record, "monitor": MonitorConfig(**record["monitor"])}
        if record.get("thoughts") is not None:
            values["thoughts"] = cls.of(record["thoughts"])
        if record.get("memory") is not None:
            values["memory"] = Memory(**record["memory"])
        return cls(**{**values, "interval": tuple(interval) if isinstance(interval, list) else interval})

    @classmethod
    def load(cls, directory: str | os.PathLike[str], name: str = THRESHOLDS_FILE) -> Thresholds:
        """Reads `thresholds.json` (or another name) of a directory.

        Raises:
            RedflagError: The file does not exist, or is incomplete or of another format.
        """
        path = Path(directory) / name
        try:
            record = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        except FileNotFoundError as error:
            raise RedflagError(
                f"{path} does not exist. It holds the thresholds. Run `redflag calibrate --model "
                f"{path.parent} --input rows.jsonl{' --prompts' if name == PROMPT_THRESHOLDS_FILE else ''}`, or set a "
                "threshold by hand."
            ) from error
        except OSError as error:
            raise RedflagError(
                f"{path} cannot be read ({error.strerror}). It holds the thresholds. Fix its permissions."
            ) from error
        except (ValueError, RecursionError) as error:
            raise _spoilt(path, f"is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise _spoilt(path, "is not an object")
        # Before the keys: another format may have other keys.
        if (version := record.pop("format", None)) != THRESHOLDS_FORMAT:
            raise _spoilt(path, f"has format {version!r}, and this version of redflag reads {THRESHOLDS_FORMAT}")
        record.setdefault("suggested_hold_back", None)  # absent in older files
        for part in (record, record.get("thoughts")):
            if part is not None:
                _check_keys(path, part, cls, _MAY_LACK)
                _check_keys(path, part["monitor"], MonitorConfig)
        if (record.get("thoughts") or {}).get("thoughts") is not None:
            raise _spoilt(path, "has thoughts of thoughts")
        try:
            return cls.of(record)
        except (OverflowError, RedflagError, TypeError) as error:
            raise _spoilt(path, f"holds an invalid value ({str(error).rstrip('.')})") from error


def check_memory(memory: Memory | None, monitor: MonitorConfig) -> None:
    """Refuses a memory with a monitor whose scores are no probabilities: they have no odds."""
    if memory is not None and not AGGREGATIONS[monitor.aggregation].bounded:
        raise RedflagError(
            f"memory must be off for the monitor {monitor.aggregation!r}, whose scores are no probabilities (got "
            f"{memory!r})."
        )


def _check_keys(
    path: Path, record: Any, kind: type[Thresholds] | type[MonitorConfig], may_lack: Collection[str] = ()
) -> None:
    if not isinstance(record, dict):
        what = "a monitor" if kind is MonitorConfig else "thoughts"
        raise _spoilt(path, f"has {what} that is not an object")
    allowed = {item.name for item in fields(kind)}
    if unknown := sorted(set(record) - allowed):
        raise _spoilt(path, f"has unknown keys {unknown}")
    if missing := sorted(allowed - set(record) - set(may_lack)):
        raise _spoilt(path, f"lacks the keys {missing}")


def _spoilt(path: Path, fault: str) -> RedflagError:
    return RedflagError(f"{path} {fault}. Its thresholds cannot be trusted. Run `redflag calibrate` again.")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
