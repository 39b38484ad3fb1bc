"""A grammar enforced on the client: the server generates freely, and each token is checked here.

A server that applies a grammar itself (vLLM's structured output) masks the logits before log-probabilities are taken:
a flag would read -9999 whatever the model computed. So no grammar is sent. The response is streamed and measured as any
other; at the first token that the grammar refuses the stream is closed, that one token is sampled again among those
that are allowed, and the response continues behind it.

This is rejection sampling: with q the model's distribution and A the allowed tokens, a token x of A is chosen with
probability q(x) + (1 - q(A)) q(x) / q(A) = q(x) / q(A), as if all others had been masked. (Cuts such as `top_p` see the
free distribution first.) If A is too large to be sent, the refused tokens are banned instead, one more at each try,
which samples from the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

import numpy as np

from redflag.backends import Matcher, Sampling
from redflag.backends.remote_link import Link
from redflag.trace import Step

# (maximum tokens, the only ids allowed or none, banned ids) -> steps that continue the response so far
Ask = Callable[[int, Sequence[int], Collection[int]], AsyncGenerator[Step, None]]

MOST_ALLOWED = 1024  # ids in allowed_token_ids; more would crash vLLM's second model runner, not just the request
_BANS = 16  # tries by banning, before only the first MOST_ALLOWED ids are allowed


class Server(Protocol):
    """The part of a `RemoteBackend` that is used here."""

    context_length: int | None

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def answer(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        measured: Sequence[int],
        banned: Collection[int],
        allowed: Sequence[int],
        link: Link | None,
    ) -> AsyncGenerator[Step, None]: ...


async def guided(
    backend: Server,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    measured: Sequence[int],
    banned: Collection[int],
    link: Link | None = None,
) -> AsyncGenerator[Step, None]:
    """As `RemoteBackend.answer`, for a `sampling` with a grammar."""
    assert sampling.grammar is not None
    matcher = sampling.grammar.begin()
    context, left, requests = list(prompt), sampling.max_new_tokens, 0

    async def ask(most: int, allowed: Sequence[int], bans: Collection[int]) -> AsyncGenerator[Step, None]:
        nonlocal requests
        # Another seed each time: with the same one, the same refused token would be sampled again.
        seed = sampling.seed_of(requests)
        requests += 1
        # A server that renders the conversation cannot continue a response, so all requests but the first send ids.
        chat = sampling.chat if context == list(prompt) else None
        settings = replace(sampling, max_new_tokens=most, seed=seed, grammar=None, chat=chat)
        answer = backend.answer(context, settings, measured=measured, banned=bans, allowed=allowed, link=link)
        async with aclosing(answer):
            async for step in answer:
                yield step

    # One pass per refused token: stream until the grammar refuses one, replace that token, go on behind it.
    while left > 0 and (backend.context_length is None or len(context) < backend.context_length):
        refused = None
        async with aclosing(ask(left, (), banned)) as steps:
            async for step in steps:
                if not matcher.accept(step.token_id):
                    refused = step
                    break
                yield step
                context.append(step.token_id)
                left -= 1
        if refused is None:
            return
        step = await _again(matcher, refused, ask, banned)
        yield step
        if step.token_id in backend.eos_ids or any(map(math.isnan, step.flag_probs)):
            return
        context.append(step.token_id)
        left -= 1


async def _again(matcher: Matcher, refused: Step, ask: Ask, banned: Collection[int]) -> Step:
    """The step that replaces one that the grammar refused."""
    if any(map(math.isnan, refused.flag_probs)):
        return refused  # An unjudged step ends the response.
    bits = np.unpackbits(np.frombuffer(matcher.mask(), dtype=np.uint8), bitorder="little")
    allowed = [int(token_id) for token_id in np.flatnonzero(bits) if token_id not in banned]
    if not allowed:
        raise RuntimeError("the grammar leaves no token to choose")
    # With one allowed token no request is needed: the flags were measured at this very position.
    if len(allowed) == 1 and refused.logprobs is None:
        matcher.accept(allowed[0])
        return Step(allowed[0], refused.flag_probs)
    bans = {*banned, refused.token_id}
    for tries in range(_BANS + 1):
        few = allowed[:MOST_ALLOWED] if len(allowed) <= MOST_ALLOWED or tries == _BANS else ()
        async with aclosing(ask(1, few, banned if few else bans)) as steps:
            step = await anext(steps, None)
        if step is None:
            raise ConnectionError("the server gave no token to replace one that the grammar refuses")
        if any(map(math.isnan, step.flag_probs)) or matcher.accept(step.token_id):
            return step
        if few:
            raise ConnectionError(f"the server chose token {step.token_id}, which is not in allowed_token_ids")
        bans.add(step.token_id)
    raise AssertionError("the last try is answered or raises")
