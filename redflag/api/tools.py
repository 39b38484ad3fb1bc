"""How the model of a server calls tools, and what a request may call, at whichever door it came in."""

from __future__ import annotations

from redflag.api.api_errors import ApiError
from redflag.api.doors import Body
from redflag.api.messages_schema import CountRequest
from redflag.api.tool_calls import CallReader
from redflag.api.tool_fields import ToolFields
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.tool_definitions import checked_tools
from redflag.tool_prompt import MARK, ToolUse, find_format, mark_ids


class ToolSupport:
    """How the model of this server calls tools."""

    def __init__(self, guard: Guard, asked: str) -> None:
        """Looks at the chat template.

        Args:
            guard: The guarded model.
            asked: As `Limits.tool_format`.

        Raises:
            RedflagError: The template does not show tools, and the format asked for needs that.
        """
        self._format = None if asked == "off" else find_format(guard.tokenizer, guard.spec, asked)
        self._flags = tuple(flag.token for flag in guard.spec.flags)
        marks = mark_ids(guard.tokenizer, self._format).values() if self._format is not None else ()
        # Where the first token decides, a call that is begun in the prompt would be past the decision.
        policy, monitor = guard.policy, guard.thresholds.monitor
        self._may_force = policy.first_token is None and monitor.aggregation != "first"
        self._marks = frozenset(mark.removeprefix(MARK) for mark in marks)

    def use(self, body: Body | CountRequest) -> ToolUse | None:
        """What the response to a request may call; None where nothing of the request has to do with tools.

        Raises:
            ApiError: 400; a definition is malformed, or the choice does not fit, or there are no tools here.
        """
        if not isinstance(body, ToolFields):
            return None
        choice = body.choice
        if self._format is None:
            if body.tools and choice.mode != "none":
                raise ApiError(
                    400, "tools are switched off on this server; leave them out", "unsupported_parameter", param="tools"
                )
            return None
        try:
            tools = checked_tools(body.definitions())
        except RedflagError as error:
            raise ApiError(400, str(error), "invalid_value", param="tools") from error
        names = [tool["function"]["name"] for tool in tools]
        if choice.mode == "required" and (not tools or choice.name not in ("", *names)):
            wanted = repr(choice.name[:100]) if choice.name else "a call"
            raise ApiError(400, f"tool_choice wants {wanted}, and tools has none", "invalid_value", param="tool_choice")
        if choice.mode == "required" and not self._may_force:
            why = "tool_choice must be auto or none here: the first token decides whether an answer is halted"
            raise ApiError(400, why, "unsupported_parameter", param="tool_choice")
        if choice.mode == "none":
            tools = []
        if not tools and not any(turn["role"] == "tool" or "tool_calls" in turn for turn in body.input()):
            return None
        forced = (choice.name or (names[0] if len(names) == 1 else "")) if choice.mode == "required" else None
        return ToolUse(self._format, tuple(tools), forced)

    def reader(self, use: ToolUse | None, body: Body) -> CallReader | None:
        """What tells calls and content apart in a response with this `use`; None where nothing may be called."""
        if use is None or not use.definitions or not isinstance(body, ToolFields):
            return None
        return CallReader(use, self._marks, flags=self._flags, parallel=body.choice.parallel)
