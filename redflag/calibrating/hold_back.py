"""The suggested hold-back, from the delays of alarms behind the onset.

A halting alarm at step a under hold-back h shows the first max(0, a - h) tokens, so nothing at or after the onset o is
shown just where h >= a - o, the delay. Let d_1 <= ... <= d_n be the delays of n detected harmful responses and m =
ceil(share * (n + 1)). If the response to come is exchangeable with them, its delay exceeds d_m with probability at
most 1 - m / (n + 1) <= 1 - share: the quantile of split conformal prediction (Vovk et al., "Algorithmic Learning in a
Random World", 2005). It applies to harmful responses like those measured, and only to detected ones: a response that
never alarms is shown in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median_low

from redflag.errors import RedflagError


@dataclass(frozen=True)
class HoldBack:
    """Delays of the first alarm behind the onset, and the hold-back that follows from them.

    Attributes:
        suggested: Smallest h that keeps back every token from the onset on in a share of the detected responses; None
            if they are fewer than `needed`.
        delays: Tokens from onset to first alarm, ascending, of the detected responses; negative where the alarm came
            before the onset.
        missed: Responses with a known onset that never alarmed.
    """

    suggested: int | None
    share: float
    delays: tuple[int, ...]
    missed: int
    needed: int

    def __str__(self) -> str:
        detected, measured = len(self.delays), len(self.delays) + self.missed
        if not measured:
            return "no hold-back is suggested: no harmful response with a known onset was measured. Add rows with one."
        missed = f"{self.missed} of {measured} harmful responses ({self.missed / measured:.1%}) raise no alarm at all"
        if self.suggested is None:
            return (
                f"no hold-back is suggested: {detected} detected harmful responses with a known onset are too few for "
                f"a share of {self.share:g}, {self.needed} are needed. Add rows or lower hold_back_share ({missed})."
            )
        inside = sum(delay <= self.suggested for delay in self.delays)
        return (
            f"delay of the alarm behind the onset: median {median_low(self.delays)}, most {self.delays[-1]} tokens "
            f"({detected} responses); {missed}\n"
            f"suggested hold-back {self.suggested}: {inside} of the {detected} detected show no token from the onset on"
        )


def suggest_hold_back(alarms: Sequence[int | None], onsets: Sequence[int], share: float = 0.95) -> HoldBack:
    """Suggests a hold-back.

    Args:
        alarms: Per harmful response, the step of its first alarm, if it has one.
        onsets: Per harmful response, the index of its first harmful token.
        share: Share of the detected harmful responses that are to show nothing from the onset on.

    Raises:
        RedflagError: The share is out of bounds.

    Example:
        >>> suggest_hold_back([5, 7, 30, None], [5, 5, 5, 5], share=0.5).suggested
        2
    """
    if not 0.0 < share < 1.0:
        raise RedflagError(f"hold_back_share must be above 0 and below 1 (got {share}).")
    assert len(alarms) == len(onsets)
    delays = tuple(sorted(a - o for a, o in zip(alarms, onsets, strict=True) if a is not None))
    # The share as the user wrote it: 0.95 is 95/100.
    exact = Fraction(repr(float(share)))
    rank = math.ceil(exact * (len(delays) + 1))
    suggested = max(0, delays[rank - 1]) if 0 < rank <= len(delays) else None
    needed = math.ceil(exact / (1 - exact))
    return HoldBack(suggested, share, delays, len(alarms) - len(delays), needed)
