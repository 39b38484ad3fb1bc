"""Memory over turns: the scores of earlier responses of a conversation raise those of the next one.

Harm that is split over several turns may stay below the threshold in each. With x_i the peak of one flag in the i-th of
n earlier responses, oldest first, and the fields of `Memory`, the odds of every score s of the next response are
multiplied by w:

    e_i = max(0, logit(x_i) - logit(prior))                 evidence above a benign step's, nats
    log w = weight * max over i of decay^(n - i) * e_i
    s / (1 - s)  ->  w * s / (1 - s)

`prior` is the monitor's (`MonitorConfig.prior`). Without earlier responses, or with all of them at or below the prior,
or with `weight` 0, w is 1 and scores stay the same, bit by bit. Earlier responses never lower a score, a score of 0
stays 0, and the raised score is monotonic in the score and in every earlier peak. The highest evidence counts and not
the sum, which would grow with every harmless turn of a long conversation. Thresholds are compared with raised scores,
so they have to be calibrated with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from redflag.watching.checks import check_number
from redflag.watching.monitor import MonitorConfig, UnjudgedError, _logit, judged, peaks

_MOST = 30.0  # nats; a raised probability of 1e-6 is then as good as certain


@dataclass(frozen=True)
class Memory:
    """How much earlier responses count.

    Attributes:
        weight: Nats that are added to a score's log-odds for each nat of evidence; 0 remembers nothing.
        decay: Share of its weight that evidence keeps from one response to the next: 0 remembers only the last
            response, 1 all of them alike.

    Raises:
        RedflagError: A value is out of bounds.

    Example:
        >>> Memory(weight=0.5).factors([], prior=0.01, flags=2)
        (1.0, 1.0)
        >>> factors = Memory(weight=0.5).factors([(0.5, 0.001)], prior=0.01, flags=2)
        >>> [round(factor, 2) for factor in factors]
        [9.95, 1.0]
        >>> round(raised(0.1, factors[0]), 2), raised(0.1, factors[1])
        (0.53, 0.1)
    """

    weight: float = 0.0
    decay: float = 0.5

    def __post_init__(self) -> None:
        check_number("memory weight", self.weight, "a number finite and not negative", lambda x: 0 <= x < math.inf)
        check_number("memory decay", self.decay, "a number at least 0 and at most 1", lambda x: 0 <= x <= 1)

    def factors(self, earlier: Sequence[Sequence[float]], prior: float, flags: int) -> tuple[float, ...]:
        """The K factors by which the odds of the next response's scores are multiplied, all at least 1.

        Args:
            earlier: K peaks of each earlier response, oldest first.
            prior: Probability of a flag at a benign step.

        Raises:
            UnjudgedError: A peak is not K numbers in [0, 1].
        """
        benign = _logit(prior)
        evidence = [0.0] * flags
        for peak in earlier:
            measured = judged(peak, flags)
            evidence = [max(self.decay * e, _logit(x) - benign) for e, x in zip(evidence, measured, strict=True)]
        return tuple(math.exp(min(_MOST, self.weight * e)) for e in evidence)


def raised(score: float, factor: float) -> float:
    """A score in [0, 1] whose odds are multiplied by a factor of at least 1.

    In this form rounding keeps it monotonic in both, and never below the score.
    """
    if factor == 1.0 or score == 0.0:
        return score
    return max(score, 1.0 / (1.0 + (1.0 - score) / score / factor))


def earlier_peaks(
    measured: Sequence[Sequence[Sequence[float]]] | None, lengths: Sequence[int], monitor: MonitorConfig, flags: int
) -> list[tuple[float, ...]]:
    """The K peaks of earlier responses, each scored by a monitor of its own.

    Args:
        measured: For each earlier response, T x K probabilities; None where the engine measured none.
        lengths: The expected numbers T.

    Raises:
        UnjudgedError: They were not measured, not all of them, or one is not a number in [0, 1].
    """
    if measured is None or [len(response) for response in measured] != list(lengths):
        raise UnjudgedError("the engine did not measure the earlier responses of the conversation.")
    try:
        return [peaks(monitor, response, flags) for response in measured]
    except UnjudgedError as error:
        raise UnjudgedError(f"an earlier response cannot be judged: {error}") from error
