"""Whether a request asks for an answer that begins with a thought."""

from __future__ import annotations

from typing import NamedTuple

from redflag.api.api_errors import ApiError


class AskedThinking(NamedTuple):
    """What a request says of thoughts.

    Attributes:
        told: Thinking is switched on or off; None leaves that open.
        effort: How much is to be thought, in the API's words; without `told` it decides.
        told_by: The field that says the first.
        effort_by: The field that says the second.
    """

    told: bool | None
    effort: str | None
    told_by: str
    effort_by: str


def thinking_of(
    asked: AskedThinking | None, ignored: list[str], *, possible: bool, refuse_unknown: bool
) -> bool | None:
    """Whether the answer shall begin with a thought; None where the client leaves that open.

    Args:
        asked: What the request says; None where there is no place for a thought.
        ignored: The request's fields that are left out of account; an effort that changes no token is added.
        possible: The model has a thinking mode; without one an effort changes no token.
        refuse_unknown: As for `redflag.api.schema.parse`.

    Raises:
        ApiError: 400; thinking is on and not possible.
    """
    if asked is None:
        return False
    told, effort = asked.told, asked.effort
    if told and not possible:
        text = "thinking must be off, since this model has no thinking mode; leave it out"
        raise ApiError(400, text, "unsupported_parameter", param=asked.told_by)
    if told is not None or effort is None:
        return told
    if not possible and effort != "none":
        if refuse_unknown:
            text = f"{asked.effort_by} does nothing, since this model has no thinking mode; leave it out"
            raise ApiError(400, text, "unknown_parameter", param=asked.effort_by)
        ignored.append(asked.effort_by)
    return possible and effort not in ("none", "minimal")
