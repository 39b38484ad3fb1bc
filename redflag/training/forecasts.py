"""Forecasts as soft targets: a flag that says "imminent", not only "under way" (the idea of StreamGuard).

A row's `forecast` gives, at some characters of the response, the probability that an answer with this beginning turns
out harmful (`redflag.lab.synthesis.forecast`). It softens only what the hard labels call harmless: a position of class
0 with the forecast f has the target class k with probability f and "none" with 1 - f,

    flag term = coef * (f * w / F * CE(k) + (1 - f) * (1 - w) / L * CE(none))

with w = `harmful_weight` and F and L the sums of f and of 1 - f over all positions, where a hard label counts as f = 1
or 0 (both sums are at least 1). So forecasts of 0 and 1 are hard labels. The optimal odds of the flag are the
forecast's times (w / F) / ((1 - w) / L), the factor by which `harmful_weight` shifts the odds under hard labels too.

From the onset on labels stay hard, and so do those before the first forecast. Class k is that of the row; of a harmless
row, that of its `forecast_category`, or the only class of the model. Other terms of the loss see hard labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from datasets import Dataset

from redflag.errors import RedflagError

CHOICES = ("off", "hold", "linear", "points")
NONE = -1.0


def spread(points: Sequence[Sequence[float]], count: int, how: str) -> list[float]:
    """Forecasts at `count` tokens, from those at some of them.

    Args:
        points: Pairs (token, probability) in order of tokens; tokens behind the end are allowed.
        count: Tokens of the response.
        how: Between two points: `hold` the earlier value, interpolate (`linear`), or leave a gap (`points`). Except
            with `points`, the last value holds to the end.

    Returns:
        Probabilities; index i judges the moment before token i. -1 where there is none.

    Example:
        >>> spread([(1, 0.0), (3, 1.0)], 5, "hold"), spread([(1, 0.0), (3, 1.0)], 5, "linear")
        ([-1.0, 0.0, 0.0, 1.0, 1.0], [-1.0, 0.0, 0.5, 1.0, 1.0])
        >>> spread([(1, 0.0), (3, 1.0)], 5, "points")
        [-1.0, 0.0, -1.0, 1.0, -1.0]
    """
    values = [NONE] * count
    end = max(count, int(points[-1][0]) + 1)
    for (token, harm), (after, then) in pairwise([*points, (end, points[-1][1])]):
        for i in range(int(token), min(int(after), count)):
            if how == "linear":
                values[i] = harm + (then - harm) * (i - token) / (after - token)
            elif how == "hold" or i == token:
                values[i] = harm
    return values


def column(dataset: Dataset, name: str) -> list[Any]:
    """A column of encoded rows; empty if they have none of that name."""
    return list(dataset[name]) if name in dataset.column_names else []


def check_forecasts(how: str, dataset: Dataset) -> None:
    """Checks that rows have the forecasts that the options ask for, and that each has a class.

    Raises:
        RedflagError: No row has a forecast, or a harmless row has one without a category.
    """
    if how == "off":
        return
    forecasts = column(dataset, "forecast")
    if not any(forecasts):
        raise RedflagError(
            f"forecasts must be off for rows without forecasts (got {how}). Make forecasts with "
            "`redflag synthesize --forecasts`, or leave the option out."
        )
    for number, points, k in zip(dataset["row"], forecasts, dataset["forecast_class"], strict=True):
        if not k and any(harm > 0 for _, harm in points or []):
            raise RedflagError(
                f"row {number} must have a forecast_category: it is harmless, has a forecast, and the model has "
                "several flags. Add the key."
            )
