"""What a request asks of the guard: one response for each of its choices, or a refusal."""

from __future__ import annotations

import secrets
from dataclasses import replace

from redflag.api.api_errors import ApiError
from redflag.api.doors import Body
from redflag.api.schema import NO_LIMIT, ChatRequest
from redflag.api.thinking import thinking_of
from redflag.backends import Grammar, most_logprobs
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.guard.rehearsal import rehearsing
from redflag.guard.response import Response
from redflag.server.access import Caller, Limits
from redflag.server.keys import Key
from redflag.tool_prompt import ToolUse


def choices_of(
    guard: Guard, body: Body, caller: Caller, limits: Limits, prefix: str, tools: ToolUse | None = None
) -> list[Response]:
    """The responses to a request, each watched by itself: `n` for its first prompt, `n` for the next, and so on.

    Their ids begin with `prefix`.

    Raises:
        ApiError: 400; the request asks for what this server does not give.
    """
    key = caller.key
    tokens = _most_tokens(body, limits, key)
    if body.prefill and not limits.prefill:
        raise ApiError(
            400,
            "the last message is the assistant's, and this server writes responses from their beginning; end with "
            "a message of the user's",
            "invalid_value",
            param=f"{body.prefill}.role",
        )
    _check_choices(body, limits)
    _check_logprobs(body, limits, guard)
    policy, thresholds = (None, None) if key is None else (key.policy, key.thresholds)
    if caller.override is not None:
        policy = replace(policy or guard.policy, observe=True)
    schema_field, grammar = _grammar_of(body, guard)
    first = (policy or guard.policy).first_token is not None
    if tools is not None and tools.opening and first:  # a key's policy may differ from the server's
        why = "tool_choice must be auto or none here: the first token decides whether an answer is halted"
        raise ApiError(400, why, "unsupported_parameter", param="tool_choice")
    if tools is not None and tools.definitions:
        for asked, param in ((grammar is not None, schema_field), (body.named_tokens is not None, "logprobs")):
            if asked:
                why = f"{param} is not supported beside tools; leave one of them out, or set tool_choice to none"
                raise ApiError(400, why, "unsupported_parameter", param=param)
    if caller.alarm_at is not None:
        guard, policy, thresholds = rehearsing(guard, policy), None, None
    name = f"{prefix}{secrets.token_hex(12)}"
    responses: list[Response] = []
    try:
        thinking = thinking_of(
            body.asked_thinking(),
            body.ignored,
            possible=guard.can_think,
            refuse_unknown=limits.unknown_fields == "refuse",
        )
        for prompt in body.inputs():
            for _ in range(body.n or 1):
                index = len(responses)
                sampling = replace(body.sampling(tokens, index), grammar=grammar)
                if caller.alarm_at is not None:
                    # A stop text could end it before the alarm, and what is rehearsed is a script.
                    sampling = replace(sampling, stop=(), grammar=None)
                response = guard.respond(prompt, sampling, policy, thinking, tools, thresholds)
                if key is not None:
                    response.trace.meta["key"] = key.name
                response.trace.id = f"{name}-{index}" if index else name
                responses.append(response)
    except RedflagError as error:
        raise ApiError(400, str(error), "invalid_value", param=body.param) from error
    return responses


def _grammar_of(body: Body, guard: Guard) -> tuple[str, Grammar | None]:
    """The field that asks for JSON, and what makes the answer follow it."""
    wanted = body.asked_schema()
    if wanted is None:
        return "", None
    try:
        return wanted[0], guard.grammar(wanted[1])
    except RedflagError as error:
        raise ApiError(400, str(error), "invalid_value", param=wanted[0]) from error


def _most_tokens(body: Body, limits: Limits, key: Key | None) -> int:
    """How many tokens each response may have."""
    asked, most = body.asked_tokens, (key and key.max_tokens) or limits.max_tokens
    if asked is None:
        return min((key and key.default_tokens) or limits.default_tokens, most)
    if asked > most and limits.over_limit == "refuse":
        raise ApiError(
            400,
            f"{asked} response tokens are more than the {most} that this server allows; ask for less",
            "invalid_value",
            param=body.limit,
        )
    return most if asked == NO_LIMIT else min(asked, most)


def _check_choices(body: Body, limits: Limits) -> None:
    choices = len(body.inputs()) * (body.n or 1)
    if choices > limits.max_choices:
        param = "n" if (body.n or 1) > 1 else "prompt"
        raise ApiError(
            400,
            f"{param} must ask for {limits.max_choices} answers at most (got {choices}); send several requests",
            "invalid_value",
            param=param,
        )


def _check_logprobs(body: Body, limits: Limits, guard: Guard) -> None:
    if body.named_tokens is None:
        return
    most = most_logprobs(guard.backend)
    if not limits.logprobs or most is None:
        why = "this engine does not give them" if limits.logprobs else "this server was started without them"
        raise ApiError(
            400, f"logprobs are not supported: {why}; leave them out", "unsupported_parameter", param="logprobs"
        )
    if body.named_tokens > most:
        param = "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
        raise ApiError(
            400,
            f"{param} must be {most} at most (got {body.named_tokens}). This engine names no more likely tokens beside "
            "the answer's own; ask for fewer",
            "unsupported_parameter",
            param=param,
        )
