"""Checks with a few short requests that a server measures as asked, before the first user's request.

A server that measures after the ban or after temperature, that ignores `logprob_token_ids`, or that answers with text
instead of ids would blind the guard without any error. The handshake detects each of these and names the fix.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Sequence
from contextlib import aclosing
from dataclasses import replace

from redflag.backends import BusyError, ChatInput, Sampling
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_link import aiohttp
from redflag.backends.remote_wire import MOST_IDS, TOP, RefusalError
from redflag.errors import RedflagError
from redflag.trace import Step

_TOKENS = 4
_ROUNDS = 3
# Largest difference between two probabilities that count as equal. In half precision other requests in the batch
# sometimes change them by more, so a difference counts only if it occurs in all rounds.
_TOLERANCE = 1e-4
_CHAT_TOLERANCE = 1e-3
_MOST_TOKENS = 2_000_000  # larger than any vocabulary


def handshake(backend: RemoteBackend, *, chat: tuple[ChatInput, Sequence[int]] | None = None) -> None:
    """Runs `shake_hands` without an event loop; then `check_chat`, given a conversation and its prompt."""

    async def alone() -> None:
        try:
            await shake_hands(backend)
            if chat is not None:
                await check_chat(backend, *chat)
        finally:
            await backend.aclose()

    asyncio.run(alone())


async def shake_hands(backend: RemoteBackend) -> None:
    """Compares probabilities of several requests, and raises if they are not raw.

    The first request finds the most likely token of the first position, x, without any ban. Then the flags and x are
    measured while all of them are banned, at three temperatures. Raw probabilities are equal each time; after the ban,
    x's would be 0, and after temperature, they would differ between the three. x is needed because the flags' own
    probabilities may be too small to show a difference.

    Raises:
        RedflagError: Names the server option, version or address to fix.
    """
    try:
        listed = await backend.identify(backend.link())
    except RefusalError as error:
        advice = _BY_STATUS.get(error.status, "see its log")
        raise _refused(backend, f"refuses to name its models ({error.status}: {error.reason})", advice) from error
    except (OSError, asyncio.TimeoutError, aiohttp.ClientError) as error:
        advice = next((advice for kind, advice in _BY_ERROR if isinstance(error, kind)), "start it or fix the address")
        raise _refused(backend, f"does not answer ({error or type(error).__name__})", advice) from error
    if listed and backend.model not in listed:
        raise _refused(backend, f"serves {listed} and not {backend.model!r}", "name one of those")
    # Round 0: which token is the most likely one, and does the server measure at all?
    flags, prompt = backend.flag_ids, ordinary_ids(backend)
    first = await _ask(backend, prompt, Sampling(max_new_tokens=1, temperature=0.0), flags, ())
    likely = first[0].token_id
    measured = flags if likely in flags else (*flags[: MOST_IDS - 1], likely)
    banned = {*flags, likely}
    differences: list[str] = []
    for _ in range(_ROUNDS):
        # The same position without a ban, and with one at three temperatures: raw probabilities do not change.
        free = await _ask(backend, prompt, Sampling(max_new_tokens=1, temperature=0.0), measured, ())
        greedy, warm, cool = [
            await _ask(backend, prompt, Sampling(max_new_tokens=_TOKENS, temperature=t, seed=0), measured, banned)
            for t in (0.0, 1.0, 0.5)
        ]
        differences = [
            f"{what} changes the measured probabilities of {measured} from {one[0].flag_probs} to {other[0].flag_probs}"
            for what, one, other in (
                ("a ban", free, greedy),
                ("temperature", warm, cool),
                ("temperature", greedy, warm),
            )
            if not _same(one[0].flag_probs, other[0].flag_probs, _TOLERANCE)
        ]
        # The most likely of V tokens has at least probability 1 / V; a smaller value must be something else, say a
        # logit.
        if (most := free[0].flag_probs[measured.index(likely)]) < 1 / _MOST_TOKENS:
            raise _refused(backend, f"measures {most:.3g} for its most likely token, which is not a probability", _RAW)
        if not differences:
            return
    raise _refused(backend, f"does not measure raw probabilities: {differences[0]}", _RAW)


async def check_chat(backend: RemoteBackend, chat: ChatInput, prompt: Sequence[int]) -> None:
    """Checks that a conversation rendered by the server measures the same as the ids rendered by redflag.

    Raises:
        RedflagError: It does not.
    """
    flags, first = backend.flag_ids, Sampling(max_new_tokens=1, temperature=0.0)
    by_ids = await _ask(backend, prompt, first, flags, flags)
    by_chat = await _ask(backend, prompt, replace(first, chat=chat), flags, flags)
    if not _same(by_ids[0].flag_probs, by_chat[0].flag_probs, _CHAT_TOLERANCE):
        raise _refused(
            backend,
            f"measures {by_chat[0].flag_probs} by /v1/chat/completions and {by_ids[0].flag_probs} by /v1/completions",
            "use upstream_route completions",
        )


async def _ask(
    backend: RemoteBackend, prompt: Sequence[int], sampling: Sampling, measured: Sequence[int], banned: Collection[int]
) -> list[Step]:
    try:
        async with aclosing(backend.answer(prompt, sampling, measured=measured, banned=banned)) as stream:
            steps = [step async for step in stream]
    except TimeoutError as error:
        raise _refused(backend, f"is too slow: {error}", "check whether it is stuck, or allow more time") from error
    except RefusalError as error:
        advice = _BY_STATUS.get(error.status) or _advice(error.reason)
        raise _refused(backend, f"refuses to measure ({error.status}: {error.reason})", advice) from error
    except (ConnectionError, BusyError) as error:
        raise _refused(backend, f"cannot be used: {error}", _advice(str(error))) from error
    if not steps:
        raise _refused(backend, "answers without a token", "see its log")
    if any(math.isnan(prob) for step in steps for prob in step.flag_probs):
        raise _refused(backend, "measures NaN", "check the model's weights and precision")
    return steps


def _advice(message: str) -> str:
    """The fix for a fault, looked up by words of the message from `StreamReader` or vLLM."""
    return next((advice for words, advice in _BY_WORDS if words in message), "see its log")


_RAW = "start it with --logprobs-mode raw_logprobs (vLLM), and without what changes logits before they are measured"
_TOO_OLD = (
    "it is too old for logprob_token_ids: use vLLM 0.32 or later, or upper_bound=True, which needs only the "
    f"{TOP} most likely tokens"
)
_PROXY = "fix HTTP_PROXY or HTTPS_PROXY, or name the server in NO_PROXY"
_BY_ERROR = (
    (aiohttp.ClientProxyConnectionError, _PROXY),
    (aiohttp.ClientHttpProxyError, _PROXY),
    (aiohttp.ClientConnectorCertificateError, "name the file of its certificate authority in SSL_CERT_FILE"),
)
_BY_STATUS = {
    401: "give the API key that it expects",
    403: "give an API key that may use the model",
    404: "check that its address has /v1/completions and that the model's name is right",
}
_BY_WORDS = (
    ("greater than max allowed", f"start it with --max-logprobs {TOP} or more"),
    (f"not the {TOP} largest", f"start it with --max-logprobs {TOP} or more, and let it have no other clients"),
    ("out-of-vocab", "serve the model that the flags were attached to"),
    ("no log-probability of", _TOO_OLD),
    ("logprob_token_ids", _TOO_OLD),
    ("without log-probabilities", "use a server whose /v1/completions streams log-probabilities"),
    ("is not a log-probability", _RAW),
    ("its id is not certain", "use a server that knows return_tokens_as_token_ids, as vLLM does"),
    ("instead of its id", "use a server that knows return_tokens_as_token_ids, as vLLM does"),
    ("of another token", "use a server that gives every token its own log-probabilities, as vLLM does"),
    ("which logit_bias bans", "use a server that applies logit_bias, as vLLM does: a flag must never be chosen"),
    ("end-of-sequence ids", "give both sides the same generation_config.json"),
)


def _refused(backend: RemoteBackend, what: str, advice: str) -> RedflagError:
    return RedflagError(f"The upstream server {backend.url} {what}. Its responses could not be judged. Fix: {advice}.")


def _same(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def ordinary_ids(backend: RemoteBackend) -> list[int]:
    """Eight ids for a prompt, none of them a flag or an end of the response."""
    special = {*backend.flag_ids, *backend.eos_ids}
    return [token_id for token_id in range(10, 200) if token_id not in special][:8]
