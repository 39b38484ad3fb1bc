"""Whether a request asks for an answer that begins with a thought."""

from __future__ import annotations

from redflag.api.api_errors import ApiError
from redflag.api.doors import Body
from redflag.api.schema import ChatRequest


def thinking_of(body: Body, *, possible: bool, refuse_unknown: bool) -> bool | None:
    """Whether the answer shall begin with a thought; None where the client leaves that open.

    Args:
        body: The request; only a chat has a place for a thought.
        possible: The model has a thinking mode; without one an effort changes no token.
        refuse_unknown: As for `redflag.api.schema.parse`.

    Raises:
        ApiError: 400; thinking is on and not possible.
    """
    if not isinstance(body, ChatRequest):
        return False
    told, effort = body.enable_thinking, body.reasoning_effort
    if told and not possible:
        text = "thinking must be off, since this model has no thinking mode; leave it out"
        raise ApiError(400, text, "unsupported_parameter", param="chat_template_kwargs")
    if told is not None or effort is None:
        return told
    if not possible and effort != "none":
        if refuse_unknown:
            text = "reasoning_effort does nothing, since this model has no thinking mode; leave it out"
            raise ApiError(400, text, "unknown_parameter", param="reasoning_effort")
        body.ignored.append("reasoning_effort")
    return possible and effort not in ("none", "minimal")
