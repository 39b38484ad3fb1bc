"""Checks what a request asks for, and begins a response for each of its choices."""

from __future__ import annotations

import secrets
from dataclasses import replace

from redflag.api.api_errors import invalid, unsupported
from redflag.api.doors import Body
from redflag.api.schema import NO_LIMIT, ChatRequest
from redflag.api.thinking import thinking_of
from redflag.api.tools import forced_call_refused
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
    """The responses to a request, each watched separately: `n` for the first prompt, `n` for the next, and so on.

    Their ids begin with `prefix`.

    Raises:
        ApiError: 400; the request asks for something that this server does not support.
    """
    key = caller.key
    tokens = _most_tokens(body, limits, key)
    if body.prefill and not limits.prefill:
        text = "the last message must be the user's, since prefill is off on this server (got the assistant's)"
        raise invalid(text, f"{body.prefill}.role")
    _check_choices(body, limits)
    _check_logprobs(body, limits, guard)
    policy, thresholds = (None, None) if key is None else (key.policy, key.thresholds)
    if caller.override is not None:
        policy = replace(policy or guard.policy, observe=True)
    schema_field, grammar = _grammar_of(body, guard)
    first = (policy or guard.policy).first_token is not None
    if tools is not None and tools.opening and first:  # a key's policy may differ from the server's
        raise forced_call_refused()
    if tools is not None and tools.definitions:
        for asked, param in ((grammar is not None, schema_field), (body.named_tokens is not None, "logprobs")):
            if asked:
                text = f"{param} is not supported beside tools; leave one of them out, or set tool_choice to none"
                raise unsupported(text, param)
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
                    # A stop text could end it before the simulated alarm.
                    sampling = replace(sampling, stop=(), grammar=None)
                response = guard.respond(prompt, sampling, policy, thinking, tools, thresholds)
                if key is not None:
                    response.trace.meta["key"] = key.name
                response.trace.id = f"{name}-{index}" if index else name
                responses.append(response)
    except RedflagError as error:
        raise invalid(str(error), body.param) from error
    return responses


def _grammar_of(body: Body, guard: Guard) -> tuple[str, Grammar | None]:
    """The field that asks for JSON, and the grammar of its schema."""
    wanted = body.asked_schema()
    if wanted is None:
        return "", None
    try:
        return wanted[0], guard.grammar(wanted[1])
    except RedflagError as error:
        raise invalid(str(error), wanted[0]) from error


def _most_tokens(body: Body, limits: Limits, key: Key | None) -> int:
    """The maximum of tokens of each response."""
    asked, most = body.asked_tokens, (key and key.max_tokens) or limits.max_tokens
    if asked is None:
        return min((key and key.default_tokens) or limits.default_tokens, most)
    if asked > most and limits.over_limit == "refuse":
        raise invalid(f"{asked} response tokens are more than the {most} that this server allows", body.limit)
    return most if asked == NO_LIMIT else min(asked, most)


def _check_choices(body: Body, limits: Limits) -> None:
    choices = len(body.inputs()) * (body.n or 1)
    if choices > limits.max_choices:
        param = "n" if (body.n or 1) > 1 else "prompt"
        text = f"{param} must ask for {limits.max_choices} answers at most (got {choices}); send several requests"
        raise invalid(text, param)


def _check_logprobs(body: Body, limits: Limits, guard: Guard) -> None:
    if body.named_tokens is None:
        return
    most = most_logprobs(guard.backend)
    if not limits.logprobs or most is None:
        why = "this engine does not give them" if limits.logprobs else "this server was started without them"
        raise unsupported(f"logprobs are not supported: {why}; leave them out", "logprobs")
    if body.named_tokens > most:
        param = "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
        raise unsupported(f"{param} must be {most} at most with this engine (got {body.named_tokens})", param)
