"""From K flag probabilities per step to K scores per step.

With p_t the probability of one flag at step t = 0, 1, ..., and the fields of `MonitorConfig`, the score s_t is

| aggregation | score | state before the first step |
|---|---|---|
| `max` | s_t = p_t | none |
| `first` | s_0 = p_0; s_t = 0 for t > 0 | none |
| `run` | s_t = min(p_{t-n+1}, ..., p_t), n = `window`; 0 while t + 1 < n | none |
| `ema` | s_t = (1 - `decay`) s_{t-1} + `decay` p_t | s_{-1} = `prior` |
| `cusum` | s_t = max(0, s_{t-1} + logit(p_t) - logit(`prior`) - `drift`) | s_{-1} = 0 |

All are causal, take O(window) time and memory per step, and are monotonic in the probabilities. The peak of a response
is the largest of its scores, hence the name `max`. `first` is for models whose flags predict the response before it
begins (refusal tokens, arXiv 2412.06748; a marker before refusals); later positions are ignored. `run` requires n
consecutive high steps; `cusum` is Page's test (E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954) on
log-odds in nats: evidence above the benign level accumulates, and `drift` nats are subtracted at every step. `ema` and
`cusum` start from the level of a benign step instead of the first value; otherwise a first token that happens to be
high would weigh more than all others.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from redflag.errors import RedflagError
from redflag.watching.checks import check_number, check_one_of, check_whole

Aggregation = Literal["max", "ema", "run", "cusum", "first"]


class AggregationFacts(NamedTuple):
    """Properties of an aggregation besides its formula.

    Attributes:
        uses: Fields of `MonitorConfig` that its scores depend on, besides `warm_up`.
        tuned: Those of them that a search for the best monitor varies.
        bounded: Whether scores are at most 1, so that a threshold above 1 would never be reached.
        warms_up: Whether it supports a `warm_up`.
        in_engine: Whether the halt inside vLLM computes it.
    """

    uses: tuple[str, ...] = ()
    tuned: tuple[str, ...] = ()
    bounded: bool = True
    warms_up: bool = True
    in_engine: bool = False


AGGREGATIONS: dict[Aggregation, AggregationFacts] = {
    "max": AggregationFacts(in_engine=True),
    "ema": AggregationFacts(("decay", "prior"), tuned=("decay",), in_engine=True),
    "run": AggregationFacts(("window",), tuned=("window",), in_engine=True),
    "cusum": AggregationFacts(("prior", "drift"), tuned=("prior", "drift"), bounded=False),
    "first": AggregationFacts(warms_up=False),
}

# Probabilities are clipped to this distance from 0 and 1, about 13.8 nats: a rounded 1.0 is strong evidence, not
# infinite evidence.
LOGIT_CLIP = 1e-6


class UnjudgedError(RedflagError):
    """Flag probabilities that are missing, not numbers or outside [0, 1]: the step cannot be judged."""


@dataclass(frozen=True)
class MonitorConfig:
    """How probabilities become scores; the formulas are in the module's docstring.

    Attributes:
        aggregation: `max`, `ema`, `run`, `cusum` or `first`.
        window: Consecutive steps that must be high, for `run`.
        decay: Weight of the new value in (0, 1], for `ema`; 1 is `max`.
        prior: Probability of a flag at a benign step, in (0, 1), for `ema` and `cusum`.
        drift: Nats subtracted per step, for `cusum`.
        warm_up: Number of first steps with score 0 and no alarm; they still enter the state.

    Raises:
        RedflagError: A value is out of bounds.
    """

    aggregation: Aggregation = "max"
    window: int = 1
    decay: float = 0.2
    prior: float = 0.01
    drift: float = 0.5
    warm_up: int = 0

    def __post_init__(self) -> None:
        check_one_of("aggregation", self.aggregation, AGGREGATIONS)
        check_whole("window", self.window, 1)
        check_whole("warm_up", self.warm_up)
        if self.warm_up and not AGGREGATIONS[self.aggregation].warms_up:
            raise RedflagError(
                f"warm_up must be 0 for the monitor `{self.aggregation}`, which judges only the first step (got "
                f"{self.warm_up})."
            )
        check_number("decay", self.decay, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        check_number("prior", self.prior, "a number above 0 and below 1", lambda x: 0 < x < 1)
        check_number("drift", self.drift, "a number finite and not negative", lambda x: 0 <= x < math.inf)


class Monitor:
    """The scores of one response, step by step.

    Example:
        >>> monitor = Monitor(MonitorConfig(aggregation="run", window=2), flags=1)
        >>> [monitor.feed([p]) for p in (0.9, 0.1, 0.8, 0.7)]
        [(0.0,), (0.1,), (0.1,), (0.7,)]
        >>> monitor.peak
        (0.7,)
    """

    def __init__(self, config: MonitorConfig, flags: int) -> None:
        assert flags >= 1, "a monitor needs a flag"
        self.config = config
        self.flags = flags
        self._gain = _logit(config.prior) + config.drift
        self.reset()

    def reset(self) -> None:
        """Returns to the state before the first step."""
        zeros = (0.0,) * self.flags
        self._zeros = zeros
        self._steps = 0
        self._peak = zeros
        self._state = (self.config.prior,) * self.flags if self.config.aggregation == "ema" else zeros
        self._window: deque[tuple[float, ...]] = deque(maxlen=self.config.window)

    @property
    def peak(self) -> tuple[float, ...]:
        """K largest scores so far; zeros before the first step."""
        return self._peak

    def feed(self, flag_probs: Sequence[float]) -> tuple[float, ...]:
        """Adds the K probabilities of one step.

        Returns:
            K scores in [0, 1]; for `cusum` in nats, at least 0.

        Raises:
            UnjudgedError: Not K numbers in [0, 1]; the monitor is then unchanged.
        """
        probs = judged(flag_probs, self.flags)
        config = self.config
        if config.aggregation == "max":
            scores = probs
        elif config.aggregation == "first":
            scores = self._zeros if self._steps else probs
        elif config.aggregation == "run":
            self._window.append(probs)
            full = len(self._window) == config.window
            scores = tuple(map(min, zip(*self._window, strict=True))) if full else self._zeros
        elif config.aggregation == "ema":
            old, new = 1.0 - config.decay, config.decay
            scores = self._state = tuple(old * s + new * p for s, p in zip(self._state, probs, strict=True))
        else:
            gain = self._gain
            scores = self._state = tuple(
                max(0.0, s + _logit(p) - gain) for s, p in zip(self._state, probs, strict=True)
            )
        self._steps += 1
        if self._steps <= config.warm_up:
            return self._zeros
        self._peak = tuple(map(max, self._peak, scores))
        return scores


def peaks(
    config: MonitorConfig, flag_probs_TK: Sequence[Sequence[float]], flags: int | None = None
) -> tuple[float, ...]:
    """The K peaks of a recorded response: its probabilities folded through `Monitor`.

    Args:
        flags: K; needed only for a response that may be empty, whose peaks are 0.

    Raises:
        UnjudgedError: A step is not K numbers in [0, 1].
    """
    if flags is None:
        assert len(flag_probs_TK), "K of an empty response is unknown: pass flags"
        flags = len(flag_probs_TK[0])
    monitor = Monitor(config, flags)
    for flag_probs in flag_probs_TK:
        monitor.feed(flag_probs)
    return monitor.peak


def judged(flag_probs: Sequence[float], flags: int) -> tuple[float, ...]:
    """The K probabilities of one step as plain floats.

    Raises:
        UnjudgedError: They are not K numbers in [0, 1].
    """
    try:
        probs = tuple(map(float, flag_probs))
    except (OverflowError, TypeError, ValueError) as error:
        raise UnjudgedError(
            f"the flag probabilities of a step must be {flags} numbers (got {flag_probs!r}). The step cannot be judged."
        ) from error
    if len(probs) != flags:
        raise UnjudgedError(
            f"the flag probabilities of a step must be {flags} numbers (got {len(probs)}). The step cannot be judged."
        )
    for p in probs:
        if not 0.0 <= p <= 1.0:  # false for NaN
            raise UnjudgedError(
                f"a flag probability must be at least 0 and at most 1 (got {p}). The step cannot be judged."
            )
    return probs


def _logit(p: float) -> float:
    """Log-odds in nats, clipped."""
    p = min(max(p, LOGIT_CLIP), 1.0 - LOGIT_CLIP)
    return math.log(p / (1.0 - p))
