"""Whether a server measures what it is asked to: a few short requests, before the first user makes one.

A server that measures after the ban or after temperature, that ignores `logprob_token_ids`, or that answers with text
instead of ids would leave the watch blind without any error. Each is found here, and named with what mends it.
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
_MOST_TOKENS = 2_000_000  # more than any vocabulary


def handshake(
    backend: RemoteBackend, prompt: Sequence[int] = (), *, chat: tuple[ChatInput, Sequence[int]] | None = None
) -> None:
    """As `shake_hands`, where no event loop runs; then `check_chat` with a conversation and its prompt."""

    async def alone() -> None:
        try:
            await shake_hands(backend, prompt)
            if chat is not None:
                await check_chat(backend, *chat)
        finally:
            await backend.aclose()

    asyncio.run(alone())


async def shake_hands(backend: RemoteBackend, prompt: Sequence[int] = (), tolerance: float = 1e-4) -> None:
    """Asks, compares, and raises where something is wrong.

    The most likely token of the first position, x, is looked for without any ban. Then the flags and x are measured
    while all of them are banned, at three temperatures. Raw probabilities are the same each time; taken after the ban,
    x's would be 0, and taken after temperature, they would differ between the three. x is needed because the flags' own
    probabilities may be too small to show anything.

    Args:
        backend: The server, and what is asked of it.
        prompt: What to ask with, as ids; a few ids that are no flags, if empty.
        tolerance: Greatest difference between two probabilities that are the same. In half precision a neighbour in the
            batch moves them by more now and then, so a difference counts if it is there in three rounds.

    Raises:
        RedflagError: With the server option, version or address to mend.
    """
    try:
        listed = await backend.identify(backend.link())
    except RefusalError as error:
        advice = _BY_STATUS.get(error.status, "see what it logs")
        raise _refused(backend, f"refuses to name its models ({error.status}: {error.reason})", advice) from error
    except (OSError, asyncio.TimeoutError, aiohttp.ClientError) as error:
        advice = next((advice for kind, advice in _BY_ERROR if isinstance(error, kind)), "start it or mend the address")
        raise _refused(backend, f"does not answer ({error or type(error).__name__})", advice) from error
    if listed and backend.model not in listed:
        raise _refused(backend, f"serves {listed} and not {backend.model!r}", "name one of those")
    flags = backend.flag_ids
    prompt = prompt or _some_ids(set(flags) | backend.eos_ids)
    first = await _ask(backend, prompt, Sampling(max_new_tokens=1, temperature=0.0), flags, ())
    likely = first[0].token_id
    measured = flags if likely in flags else (*flags[: MOST_IDS - 1], likely)
    banned = {*flags, likely}
    differences: list[str] = []
    for _ in range(_ROUNDS):
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
            if not _same(one[0].flag_probs, other[0].flag_probs, tolerance)
        ]
        # The most likely of V tokens has at least 1 / V; less is no probability but, say, a logit.
        if (most := free[0].flag_probs[measured.index(likely)]) < 1 / _MOST_TOKENS:
            raise _refused(backend, f"measures {most:.3g} for its most likely token, which is no probability", _RAW)
        if not differences:
            return
    raise _refused(backend, f"does not measure raw probabilities: {differences[0]}", _RAW)


async def check_chat(backend: RemoteBackend, chat: ChatInput, prompt: Sequence[int], tolerance: float = 1e-3) -> None:
    """Whether the server renders a conversation as redflag does, and measures there what it measures by ids.

    Raises:
        RedflagError: It does not.
    """
    flags, first = backend.flag_ids, Sampling(max_new_tokens=1, temperature=0.0)
    by_ids = await _ask(backend, prompt, first, flags, flags)
    by_chat = await _ask(backend, prompt, replace(first, chat=chat), flags, flags)
    if not _same(by_ids[0].flag_probs, by_chat[0].flag_probs, tolerance):
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
        raise _refused(backend, f"is too slow: {error}", "see whether it is stuck, or give it longer") from error
    except RefusalError as error:
        advice = _BY_STATUS.get(error.status) or _advice(error.reason)
        raise _refused(backend, f"refuses to measure ({error.status}: {error.reason})", advice) from error
    except (ConnectionError, BusyError) as error:
        raise _refused(backend, f"cannot be used: {error}", _advice(str(error))) from error
    if not steps:
        raise _refused(backend, "answers without a token", "see what it logs")
    if any(math.isnan(prob) for step in steps for prob in step.flag_probs):
        raise _refused(backend, "measures NaN", "see whether the model's weights and precision are sound")
    return steps


def _advice(said: str) -> str:
    """What to do about a fault, by the words in which `StreamReader` or vLLM tells of it."""
    return next((advice for words, advice in _BY_WORDS if words in said), "see what it logs")


_RAW = "start it with --logprobs-mode raw_logprobs (vLLM), and without what changes logits before they are measured"
_TOO_OLD = (
    "it is too old for logprob_token_ids: use vLLM 0.32 or later, or upper_bound=True, which makes do with the "
    f"{TOP} most likely tokens"
)


_PROXY = "mend HTTP_PROXY or HTTPS_PROXY, or name the server in NO_PROXY"
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
    (f"not the {TOP} greatest", f"start it with --max-logprobs {TOP} or more, and let it have no other clients"),
    ("out-of-vocab", "serve the model that the flags were attached to"),
    ("no log-probability of", _TOO_OLD),
    ("logprob_token_ids", _TOO_OLD),
    ("without log-probabilities", "use a server whose /v1/completions streams log-probabilities"),
    ("is no log-probability", _RAW),
    ("its id is not certain", "use a server that knows return_tokens_as_token_ids, as vLLM does"),
    ("instead of its id", "use a server that knows return_tokens_as_token_ids, as vLLM does"),
    ("of another token", "use a server that gives every token its own log-probabilities, as vLLM does"),
    ("which logit_bias bans", "use a server that heeds logit_bias, as vLLM does: a flag must never be chosen"),
    ("end-of-sequence ids", "give both sides the same generation_config.json"),
)


def _refused(backend: RemoteBackend, what: str, advice: str) -> RedflagError:
    return RedflagError(
        f"The upstream server {backend.url} {what}; its responses could not be judged, so it is not used: {advice}."
    )


def _same(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def _some_ids(excluded: Collection[int]) -> list[int]:
    return [token_id for token_id in range(10, 200) if token_id not in excluded][:8]
