"""What the key `forecast` of a row may hold."""

from __future__ import annotations

from typing import Any


def checked_forecast(points: Any, response: str) -> list[list[float]] | None:
    """A row's forecast as it is kept: points `[character, probability]` or `[character, probability, judged]`.

    Args:
        points: What the row holds; None and an empty list mean that there is none.
        response: The text that characters count in.

    Raises:
        ValueError: It is no such list, its points are not in order or not in the response, or a probability is none.

    Example:
        >>> checked_forecast([[0, 0.25, 8], (12.0, 1, 8.0)], "One is fine. Two is not.")
        [[0, 0.25, 8], [12, 1.0, 8]]
    """
    if points is None:
        return None
    if not isinstance(points, (list, tuple)):
        raise ValueError("forecast is not a list of [character, probability]")
    found: list[list[float]] = []
    for number, point in enumerate(points):
        numbers = isinstance(point, (list, tuple)) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in point
        )
        if not numbers or len(point) not in (2, 3):
            raise ValueError(f"forecast {number} is not [character, probability], nor has it a third number, judged")
        character, harm, *judged = point
        # Tables keep all numbers of a list in one type, so that 12 comes back as 12.0.
        for value in (character, *judged):
            if not value // 1 == value:
                raise ValueError(f"forecast {number} holds {value} where a whole number is meant")
        if not 0 <= character < len(response):
            raise ValueError(
                f"forecast {number} is at {character}, outside the response of {len(response)} characters: "
                "it counts characters from 0 in the last assistant turn"
            )
        if found and character <= found[-1][0]:
            raise ValueError(f"forecast {number} is at {character} and the one before it at {found[-1][0]}: sort them")
        if not 0 <= harm <= 1:
            raise ValueError(f"forecast {number} is {harm}: it is a probability, from 0 to 1")
        found.append([int(character), float(harm), *map(int, judged)])
    return found or None
