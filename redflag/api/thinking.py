"""Whether the answer to a request begins with a thought."""

from __future__ import annotations

from typing import NamedTuple

from redflag.api.api_errors import ApiError, unsupported


class AskedThinking(NamedTuple):
    """A request's settings for thoughts.

    Attributes:
        switch: Thinking is on or off; None leaves that to `effort`.
        effort: In the API's words.
        switch_field: Name of the request's field for `switch`; `effort_field`: for `effort`.
    """

    switch: bool | None
    effort: str | None
    switch_field: str
    effort_field: str


def thinking_of(
    asked: AskedThinking | None, ignored: list[str], *, possible: bool, refuse_unknown: bool
) -> bool | None:
    """Whether the answer begins with a thought; None if the client leaves that open.

    Args:
        asked: The request's settings; None if its route has no thoughts.
        ignored: The request's ignored fields; an effort is added if the model has no thinking mode.
        possible: The model has a thinking mode.
        refuse_unknown: As for `redflag.api.schema.parse`.

    Raises:
        ApiError: 400; thinking is on, but the model has no thinking mode.
    """
    if asked is None:
        return False
    switch, effort = asked.switch, asked.effort
    if switch and not possible:
        text = "thinking must be off, since this model has no thinking mode; leave it out"
        raise unsupported(text, asked.switch_field)
    if switch is not None or effort is None:
        return switch
    if not possible and effort != "none":
        if refuse_unknown:
            text = f"{asked.effort_field} has no effect, since this model has no thinking mode; leave it out"
            raise ApiError(400, text, "unknown_parameter", param=asked.effort_field)
        ignored.append(asked.effort_field)
    return possible and effort not in ("none", "minimal")
