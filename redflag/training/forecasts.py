"""Forecasts as soft targets: a flag that says "imminent", not only "under way" (the idea of StreamGuard).

A row's `forecast` says at some characters of the response how probably an answer that begins so turns out harmful
(`redflag.lab.synthesis.forecast`). It softens what the hard labels call harmless, and nothing else: a position of class
0 with the forecast f asks for the flag of class k with probability f and for none with 1 - f,

    flag term = coef * (f * w / F * CE(k) + (1 - f) * (1 - w) / L * CE(none))

with w = `harmful_weight` and F and L the sums of f and of 1 - f over all positions, where a hard label counts as f = 1
or 0 (both are taken as 1 at least). So forecasts of 0 and 1 are hard labels. The best odds of the flag are those of the
forecast times (w / F) / ((1 - w) / L), by which `harmful_weight` moves the odds under hard labels as well.

From the onset on labels stay hard, and so do those before the first forecast. Class k is that of the row; of a harmless
row, that of its `forecast_category`, or the only one that there is. Other terms of the loss see hard labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from redflag.errors import RedflagError

CHOICES = ("off", "hold", "linear", "points")
NONE = -1.0


def spread(points: Sequence[Sequence[float]], count: int, how: str) -> list[float]:
    """Forecasts at `count` tokens, from those at some of them.

    Args:
        points: Pairs (token, probability), tokens in order, which may lie behind the end.
        count: Tokens of the response.
        how: Between two points: `hold` the earlier one, `linear` from one to the other, `points` nothing. The last one
            holds to the end, but for `points`.

    Returns:
        Probabilities; index i judges the moment before token i. -1 where there is none.

    Example:
        >>> spread([(1, 0.0), (3, 1.0)], 5, "hold"), spread([(1, 0.0), (3, 1.0)], 5, "linear")
        ([-1.0, 0.0, 0.0, 1.0, 1.0], [-1.0, 0.0, 0.5, 1.0, 1.0])
        >>> spread([(1, 0.0), (3, 1.0)], 5, "points")
        [-1.0, 0.0, -1.0, 1.0, -1.0]
    """
    found = [NONE] * count
    end = max(count, int(points[-1][0]) + 1)
    for (token, harm), (after, then) in pairwise([*points, (end, points[-1][1])]):
        for i in range(int(token), min(int(after), count)):
            if how == "linear":
                found[i] = harm + (then - harm) * (i - token) / (after - token)
            elif how == "hold" or i == token:
                found[i] = harm
    return found


def check_forecasts(how: str, dataset: Any) -> None:
    """Refuses forecasts that are asked for and not there, or of which nobody says what they forecast.

    Raises:
        RedflagError: No row has a forecast, or a harmless row has one that no category goes with.
    """
    if how == "off":
        return
    names = getattr(dataset, "column_names", None) or []
    forecasts = dataset["forecast"] if "forecast" in names else []
    if not any(forecasts):
        raise RedflagError(
            f"forecasts is {how} and no row has a forecast: make them with `redflag synthesize --forecasts`, or leave "
            "the option off"
        )
    for number, points, k in zip(dataset["row"], forecasts, dataset["forecast_class"], strict=True):
        if not k and any(harm > 0 for _, harm in points or []):
            raise RedflagError(
                f"row {number} is harmless and has a forecast, and of several flags none is named that it forecasts: "
                "give it a forecast_category"
            )
