"""The key `forecast` of a row: its format and check."""

from __future__ import annotations

from typing import Any


def checked_forecast(points: Any, response: str) -> list[list[float]] | None:
    """Checks and normalises a forecast: points `[character, probability]` or `[character, probability, judged]`.

    None and an empty list mean no forecast. Characters are counted in `response`.

    Raises:
        ValueError: It is not such a list, its points are not in order or not in the response, or a probability is
            invalid.

    Example:
        >>> checked_forecast([[0, 0.25, 8], (12.0, 1, 8.0)], "One is fine. Two is not.")
        [[0, 0.25, 8], [12, 1.0, 8]]
    """
    if points is None:
        return None
    if not isinstance(points, (list, tuple)):
        raise ValueError("forecast must be a list of [character, probability]")
    checked: list[list[float]] = []
    for number, point in enumerate(points):
        numbers = isinstance(point, (list, tuple)) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in point
        )
        if not numbers or len(point) not in (2, 3):
            raise ValueError(f"forecast {number} must be [character, probability] or [character, probability, judged]")
        character, harm, *judged = point
        # Tables keep all numbers of a list in one type, so that 12 comes back as 12.0.
        for value in (character, *judged):
            if not value // 1 == value:
                raise ValueError(f"forecast {number} must hold whole numbers for character and judged (got {value})")
        if not 0 <= character < len(response):
            raise ValueError(
                f"forecast {number} must be within the response of {len(response)} characters (got {character}). It "
                "counts characters from 0 in the last assistant turn"
            )
        if checked and character <= checked[-1][0]:
            raise ValueError(
                f"forecast {number} must be behind the one before it, at {checked[-1][0]} (got {character}). Sort them"
            )
        if not 0 <= harm <= 1:
            raise ValueError(f"forecast {number} must be a probability, from 0 to 1 (got {harm})")
        checked.append([int(character), float(harm), *map(int, judged)])
    return checked or None
