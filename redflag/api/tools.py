"""How the server's model calls tools, and which tools a request may call, on any route."""

from __future__ import annotations

from redflag.api.api_errors import ApiError, invalid, unsupported
from redflag.api.doors import Body
from redflag.api.messages_schema import CountRequest
from redflag.api.tool_calls import CallReader
from redflag.api.tool_fields import ToolFields
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.tool_definitions import checked_tools
from redflag.tool_prompt import MARK, ToolUse, find_format, mark_ids


class ToolSupport:
    """How the server's model calls tools."""

    def __init__(self, guard: Guard, tool_format: str) -> None:
        """Reads the chat template; `tool_format` as in `Limits`.

        Raises:
            RedflagError: The format needs a template that shows tools, and this one does not.
        """
        self._format = None if tool_format == "off" else find_format(guard.tokenizer, guard.spec, tool_format)
        self._flags = tuple(flag.token for flag in guard.spec.flags)
        marks = mark_ids(guard.tokenizer, self._format).values() if self._format is not None else ()
        # A forced call begins in the prompt, so where the first token decides it would come after the decision.
        policy, monitor = guard.policy, guard.thresholds.monitor
        self._may_force = policy.first_token is None and monitor.aggregation != "first"
        self._marks = frozenset(mark.removeprefix(MARK) for mark in marks)

    def use(self, body: Body | CountRequest) -> ToolUse | None:
        """The tools that the response may call; None if the request has nothing to do with tools.

        Raises:
            ApiError: 400; a definition is malformed, the choice does not fit, or tools are switched off.
        """
        if not isinstance(body, ToolFields):
            return None
        choice = body.choice
        if self._format is None:
            if body.tools and choice.mode != "none":
                raise unsupported("tools are switched off on this server; leave them out", "tools")
            return None
        try:
            tools = checked_tools(body.definitions())
        except RedflagError as error:
            raise invalid(str(error), "tools") from error
        names = [tool["function"]["name"] for tool in tools]
        if choice.mode == "required" and (not tools or choice.name not in ("", *names)):
            wanted = repr(choice.name[:100]) if choice.name else "a call"
            raise invalid(f"tool_choice wants {wanted}, and tools has none", "tool_choice")
        if choice.mode == "required" and not self._may_force:
            raise forced_call_refused()
        if choice.mode == "none":
            tools = []
        if not tools and not any(turn["role"] == "tool" or "tool_calls" in turn for turn in body.input()):
            return None
        forced = (choice.name or (names[0] if len(names) == 1 else "")) if choice.mode == "required" else None
        return ToolUse(self._format, tuple(tools), forced)

    def reader(self, use: ToolUse | None, body: Body) -> CallReader | None:
        """Tells calls and content apart in the response; None if it may not call tools."""
        if use is None or not use.definitions or not isinstance(body, ToolFields):
            return None
        return CallReader(use, self._marks, flags=self._flags, parallel=body.choice.parallel)


def forced_call_refused() -> ApiError:
    """The policy decides at the first token, which a forced call has in the prompt."""
    text = "tool_choice must be auto or none here: the first token decides whether an answer is halted"
    return unsupported(text, "tool_choice")
