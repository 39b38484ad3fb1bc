"""Judges texts of clients: `/v1/moderations`, and LiteLLM's Generic Guardrail API.

A text is treated as an answer: it is measured in one pass, as by `redflag score`, and a guard's session reports the
alarms that the same answer would have raised while it was written. There are no reviews: what a reflection would have
cleared is flagged. Only the operator gets scores; for others they are 0 or 1, as the categories are.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from redflag.api.api_errors import ApiError, invalid, late, refused_by_engine, unavailable
from redflag.api.moderations_schema import GuardrailRequest, ModerationRequest
from redflag.api.schema import parse
from redflag.backends import AsyncBackend, BusyError, ContextLengthError
from redflag.backends.open import event_loop_scorer
from redflag.earlier_answers import Span, answer_spans
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.prompt import render_prompt, render_response
from redflag.server.access import Limits, admit, check_model, shows_operator_key
from redflag.server.exchange import TIMEOUTS, timeout_at
from redflag.server.gate import Gate
from redflag.server.keys import Key
from redflag.trace import Alarm, Halt, Step
from redflag.watching.memory import earlier_peaks
from redflag.watching.monitor import UnjudgedError
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

Messages = list[dict[str, Any]]


class Rendered(NamedTuple):
    """A conversation in ids.

    Attributes:
        prompt: All before the answer.
        answer: The answer and its end; of a prompt that is to be judged any id, which is not measured.
        alone: The prompt is to be judged.
        earlier: Spans of earlier answers in the prompt, where they count (`redflag.watching.memory`).
    """

    prompt: list[int]
    answer: list[int]
    alone: bool = False
    earlier: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Judged:
    """Categories with an alarm, and category -> highest score."""

    flagged: frozenset[str]
    scores: dict[str, float]


class Moderations:
    """The two routes; they judge as `guard` does."""

    def __init__(self, guard: Guard, limits: Limits, gate: Gate) -> None:
        self._guard = guard
        self._limits = limits
        self._gate = gate
        self._score = event_loop_scorer(cast(AsyncBackend, guard.backend))

    async def moderate(self, request: Request) -> Response:
        """`/v1/moderations`."""
        _, judged, operator = await self._judge(request, self._texts)
        return JSONResponse(
            {
                "id": f"modr-{secrets.token_hex(12)}",
                "model": self._limits.name,
                "results": [self._result(item, operator) for item in judged],
            }
        )

    async def guardrail(self, request: Request) -> Response:
        """`/beta/litellm_basic_guardrail_api`."""
        body, judged, _ = await self._judge(request, self._guarded_texts)
        flagged = [name for name in self._guard.spec.categories if any(name in item.flagged for item in judged)]
        reason = f"flagged: {', '.join(flagged)}" if flagged else body.unreadable
        return JSONResponse({"action": "BLOCKED", "blocked_reason": reason} if reason else {"action": "NONE"})

    async def _judge(
        self, request: Request, work: Callable[[bytes], tuple[Any, list[Rendered]]]
    ) -> tuple[Any, list[Judged], bool]:
        with self._gate.passing(request.url.path.rstrip("/")):
            key, operator = None, shows_operator_key(request, self._limits)
            if not operator:
                key = admit(request, self._limits).key
                if self._limits.moderations == "operator":
                    text = (
                        "the operator key must be sent here. A client that may have any text judged can search for one "
                        "that passes. To let all clients ask, start with --moderations all"
                    )
                    raise ApiError(403, text, "operator_key_required")
            body, rendered = await self._gate.read(request, work)
            try:
                async with timeout_at(asyncio.get_running_loop().time() + self._limits.request_timeout):
                    judged = [await self._measured(item, key) for item in rendered]
            except TIMEOUTS:
                raise late() from None
        return body, judged, operator

    def _texts(self, content: bytes) -> tuple[ModerationRequest, list[Rendered]]:
        body = parse(ModerationRequest, content, refuse_unknown=self._limits.unknown_fields == "refuse")
        if not body.any_model:
            check_model(body.model, self._limits)
        return body, self._rendered(body.conversations())

    def _guarded_texts(self, content: bytes) -> tuple[GuardrailRequest, list[Rendered]]:
        body = parse(GuardrailRequest, content)
        return body, self._rendered(body.conversations())

    def _rendered(self, conversations: Sequence[Messages]) -> list[Rendered]:
        """Ids of conversations, whose last turn is the answer; the end of the turn is judged too."""
        rendered = []
        for number, messages in enumerate(conversations):
            alone = messages[-1]["role"] != "assistant"
            if not any(message["content"] for message in (messages if alone else messages[-1:])):
                rendered.append(Rendered([], []))
                continue
            if alone and self._guard.policy.prompt is None:
                raise invalid(
                    f"conversation {number + 1} ends with a turn of the {messages[-1]['role']}'s, and only answers are "
                    "judged: end it with the assistant's (mode: post_call in LiteLLM), or serve with --judge_prompt",
                    None,
                )
            try:
                if alone:
                    prompt = render_prompt(self._guard.tokenizer, messages, self._guard.spec)
                    rendered.append(Rendered(prompt, prompt[-1:], alone))
                else:
                    row = render_response(self._guard.tokenizer, messages, self._guard.spec)
                    earlier: tuple[Span, ...] = ()
                    if self._guard.thresholds.memory is not None:
                        thinks = bool(row.thought_offsets)
                        _, earlier = answer_spans(self._guard.tokenizer, messages[:-1], self._guard.spec, "", thinks)
                    rendered.append(Rendered(row.prompt_ids, row.response_ids + row.tail_ids, earlier=earlier))
            except RedflagError as error:
                raise invalid(str(error), None) from error
        return rendered

    async def _measured(self, item: Rendered, key: Key | None) -> Judged:
        if not item.answer:
            return Judged(frozenset(), dict.fromkeys(self._guard.spec.categories, 0.0))
        size, room = len(item.prompt) + len(item.answer), getattr(self._guard.backend, "context_length", None)
        try:
            if room is not None and size > room:  # a truncated part would not be judged
                raise ContextLengthError(size, room)
            # Earlier answers in the same pass.
            first = item.earlier[0][0] if item.earlier else len(item.prompt)
            probs = await self._score(item.prompt[:first], item.prompt[first:] + item.answer)
        except (RedflagError, BusyError) as error:
            raise refused_by_engine(error, "input") from error
        except TimeoutError:
            raise
        except Exception as error:
            raise unavailable() from error
        by = key if key is not None else self._guard
        thresholds, policy = by.thresholds, by.policy
        if item.alone:
            assert policy.prompt is not None, "such a conversation is refused"
            thresholds, policy = policy.prompt, Policy()
        # An answer is judged without its prompt.
        policy = replace(policy, prompt=None)
        earlier = [probs[start - first : end - first].tolist() for start, end in item.earlier]
        probs = probs[len(item.prompt) - first :].tolist()
        return judged_by(thresholds, policy, self._guard.spec.categories, item.answer, probs, earlier)

    def _result(self, item: Judged, operator: bool) -> dict[str, Any]:
        names = self._guard.spec.categories
        return {
            "flagged": bool(item.flagged),
            "categories": {name: name in item.flagged for name in names},
            "category_scores": {name: item.scores[name] if operator else float(name in item.flagged) for name in names},
            "category_applied_input_types": {name: ["text"] for name in names},
        }


def judged_by(
    thresholds: Thresholds,
    policy: Policy,
    categories: Sequence[str],
    token_ids: Sequence[int],
    flag_probs: Sequence[Sequence[float]],
    earlier: Sequence[Sequence[Sequence[float]]] = (),
) -> Judged:
    """Judges a measured response.

    Args:
        policy: Its rule for the first token counts, if it has one.
        token_ids: T tokens, with those that end the turn.
        flag_probs: T x K.
        earlier: The same of each earlier answer that counts.

    Raises:
        ApiError: 503; a step could not be judged.
    """
    session = Session(thresholds, replace(policy, observe=True), categories)
    try:
        session.remember(earlier_peaks(earlier, list(map(len, earlier)), thresholds.monitor, len(categories)))
    except UnjudgedError as error:
        raise unavailable() from error
    for token_id, probs in zip(token_ids, flag_probs, strict=True):
        session.feed(Step(token_id, tuple(probs)))
        if session.finished:
            break
    if isinstance(session.trace.end, Halt):
        raise unavailable()
    facts = session.trace.facts()
    alarms = frozenset(event.category for event in session.trace.events if isinstance(event, Alarm))
    return Judged(alarms, {name: facts.peaks[name] for name in categories})
