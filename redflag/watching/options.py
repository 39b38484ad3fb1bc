"""Options for the monitor and its memory, shared by several verbs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from redflag.errors import RedflagError
from redflag.watching.memory import Memory
from redflag.watching.monitor import Aggregation, MonitorConfig


@dataclass(kw_only=True)
class MonitorOptions:
    """The fields of `MonitorConfig`, which checks their bounds."""

    aggregation: Aggregation = field(
        default=MonitorConfig.aggregation, metadata={"help": "How the monitor computes a score from the probabilities."}
    )
    window: int = field(
        default=MonitorConfig.window, metadata={"help": "run: consecutive steps that must be high; 1 or more."}
    )
    decay: float = field(
        default=MonitorConfig.decay, metadata={"help": "ema: weight of the new value; above 0, at most 1."}
    )
    prior: float = field(
        default=MonitorConfig.prior,
        metadata={"help": "ema, cusum: probability that is normal in harmless text; above 0, below 1."},
    )
    drift: float = field(default=MonitorConfig.drift, metadata={"help": "cusum: nats subtracted per step; 0 or more."})
    warm_up: int = field(
        default=MonitorConfig.warm_up, metadata={"help": "First steps that never alarm; 0 for the aggregation first."}
    )

    def monitor(self) -> MonitorConfig:
        """The options as a monitor."""
        return MonitorConfig(**{item.name: getattr(self, item.name) for item in fields(MonitorConfig)})


@dataclass(kw_only=True)
class MemoryOptions:
    """The fields of `Memory`, which checks their bounds."""

    memory: float | None = field(
        default=None,
        metadata={
            "help": "Memory over turns: nats by which a nat of evidence in earlier answers raises the next's scores; "
            "0: off; default: as the thresholds were calibrated, which is off unless asked for."
        },
    )
    memory_decay: float = field(
        default=Memory.decay, metadata={"help": "... share of its weight that evidence keeps per answer; 0 to 1."}
    )

    def remembered(self) -> Memory | None:
        """The options as a memory; None where nothing is said.

        Raises:
            RedflagError: A value is out of bounds, or `memory_decay` is given alone.
        """
        if self.memory is not None:
            return Memory(self.memory, self.memory_decay)
        if self.memory_decay != Memory.decay:
            raise RedflagError(f"memory must come with memory_decay (got memory_decay {self.memory_decay!r} alone).")
        return None
