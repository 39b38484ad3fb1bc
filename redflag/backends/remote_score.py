"""Flag probabilities of given responses from an OpenAI-compatible server: teacher forcing without the weights.

So are the earlier answers of a conversation measured before the server continues it (`RememberingBackend`).

A server offers one of three ways (`find_way` tries them). For vLLM 0.32:

- `prefill`: one request per response. `/inference/v1/generate` takes `prompt_logprob_token_ids`: the log-probability of
  chosen ids at every position of a prompt, in one pass over it. Exact. Needs vLLM's second model runner (its choice on
  GPUs) and `vllm serve --enable-scale-out`.
- `steps`: one generated token per position of the response, with `logprob_token_ids`; a request holds up to 64 such
  prompts, and the prefix cache their common prefix. Exact. Any vLLM that `redflag serve` can use.
- `bound`: one request per response with `prompt_logprobs`, the 20 most likely tokens at every position. A flag among
  them is exact; for any other flag the twentieth's probability is used, which it cannot exceed.

Two other ways do not work: `prompt_logprobs` of -1 (the whole vocabulary at every position, refused by default), and
forcing a response token by token (structured output masks the logits before they are measured).
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from redflag.backends import Sampling
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_handshake import ordinary_ids, shake_hands
from redflag.backends.remote_link import Link
from redflag.backends.remote_wire import TOP, check_own, measured_in, probability_of
from redflag.errors import RedflagError
from redflag.trace import Step

Way = Literal["prefill", "steps", "bound"]
Probs = npt.NDArray[np.float32]
Measured = tuple[tuple[tuple[float, ...], ...], ...]

_AT_ONCE = 64  # prompts in one request
_TOLERANCE = 1e-3  # between two measurements of one probability; half precision changes it by about as much


class ServedScores:
    """Scores given responses with one server; finds its way once, and again after the server failed."""

    def __init__(self, backend: RemoteBackend) -> None:
        self._backend = backend
        self._way: Way | None = None

    async def way(self) -> Way:
        """How the server measures; errors as `find_way`."""
        if self._way is None:
            self._way = await find_way(self._backend)
        return self._way

    async def score(self, prompt: Sequence[int], response: Sequence[int]) -> Probs:
        """As `score_response`; also raises what `find_way` does."""
        way = await self.way()
        try:
            return await score_response(self._backend, way, prompt, response)
        except OSError:  # The server may come back with other options.
            self._way = None
            raise


class RememberingBackend(RemoteBackend):
    """As `RemoteBackend`; the first step carries what `Sampling.earlier` asks for.

    Earlier answers are measured as given responses are, before the stream begins.
    """

    measures_earlier = True

    @cached_property
    def _scores(self) -> ServedScores:
        return ServedScores(self)

    def prepare(self) -> None:
        """Finds out how the server measures, without an event loop.

        Raises:
            RedflagError: It cannot; names the server option, version or address to fix.
        """

        async def alone() -> None:
            try:
                await self._scores.way()
            finally:
                await self.aclose()

        asyncio.run(alone())

    def _steps(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int], link: Link | None
    ) -> AsyncGenerator[Step, None]:
        steps = super()._steps(token_ids, replace(sampling, earlier=()), watch, link)
        return self._with_earlier(steps, list(token_ids), sampling.earlier, link) if sampling.earlier else steps

    async def _with_earlier(
        self,
        steps: AsyncGenerator[Step, None],
        prompt: list[int],
        spans: Sequence[tuple[int, int]],
        link: Link | None,
    ) -> AsyncGenerator[Step, None]:
        try:
            earlier: Measured | None = await self.measure(prompt, spans)
            async for step in steps:
                yield step if earlier is None else step._replace(earlier=earlier)
                earlier = None
        finally:
            await steps.aclose()
            if link is not None:  # A loop of this stream's own: `ask` has opened further connections on it.
                await self.aclose()

    async def measure(self, prompt: Sequence[int], spans: Sequence[tuple[int, int]]) -> Measured:
        """T x K probabilities of each span.

        Raises:
            RedflagError: As `score_response`, as are all others.
        """
        if await self._scores.way() == "steps":  # No position between the spans is paid for.
            parts = [await self._scores.score(prompt[:start], prompt[start:end]) for start, end in spans]
        else:
            first, last = spans[0][0], spans[-1][1]
            probs = await self._scores.score(prompt[:first], prompt[first:last])
            parts = [probs[start - first : end - first] for start, end in spans]
        return tuple(tuple(map(tuple, part.tolist())) for part in parts)


async def find_way(backend: RemoteBackend) -> Way:
    """Checks that the server measures raw probabilities, and finds the fastest exact way to get them.

    A server with `upper_bound` is asked only for bounds.

    Raises:
        RedflagError: Names the server option, version or address to fix.
    """
    await shake_hands(backend)
    ids = ordinary_ids(backend)
    context, response = ids[:4], ids[4:]
    if backend.upper_bound:
        await score_response(backend, "bound", context, response)
        return "bound"
    exact = await score_response(backend, "steps", context, response)
    try:
        quick = await score_response(backend, "prefill", context, response)
    except (RedflagError, OSError):  # No such route, another model runner, more flags than --max-logprobs, ...
        return "steps"
    return "prefill" if float(np.abs(quick - exact).max()) <= _TOLERANCE else "steps"


async def score_response(backend: RemoteBackend, way: Way, prompt: Sequence[int], response: Sequence[int]) -> Probs:
    """Flag probabilities before each token of a given response.

    Args:
        way: Result of `find_way`.
        response: T ids.

    Returns:
        T x K float32. With `bound` they are upper bounds. NaN where the server returned none.

    Raises:
        RedflagError: The server refuses, or prompt and response do not fit its context.
        BusyError: The server was busy at every try.
        ConnectionError: The server cannot be reached, is lost, or sends an invalid answer.
        TimeoutError: No answer came in time.
    """
    if not prompt:
        raise RedflagError("the prompt must hold at least one token (got none).")
    size = len(prompt) + len(response)
    if backend.context_length is not None and size > backend.context_length:
        raise RedflagError(
            f"a conversation must have at most {backend.context_length} tokens, the server's context (got {size}). "
            "Shorten or leave out this row."
        )
    if not response:
        return np.zeros((0, len(backend.flag_ids)), dtype=np.float32)
    try:
        # A prompt that fills the context leaves no room for the one token that the server must generate.
        if way == "prefill" and size != backend.context_length:
            return await _prefill(backend, list(prompt), list(response))
        return await (_bound if way == "bound" else _steps)(backend, list(prompt), list(response))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ConnectionError(
            f"the server {backend.url} sent an answer of an unexpected shape ({type(error).__name__}: {error})"
        ) from error


async def _prefill(backend: RemoteBackend, prompt: list[int], response: list[int]) -> Probs:
    measured = [list(backend.flag_ids)] * len(response)
    sampling = {
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprob_token_ids": measured,
        "prompt_logprob_start": len(prompt) - 1,
    }
    answer = await backend.ask(
        "/inference/v1/generate", {"token_ids": prompt + response, "sampling_params": sampling, "stream": False}
    )
    scores = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])), allow_pickle=False)
    if scores.shape != (len(response), len(backend.flag_ids)) or scores.dtype.kind != "f":
        raise ValueError(f"log-probabilities of shape {scores.shape}")
    if (scores > 1e-3).any():
        raise ConnectionError(f"the server {backend.url} sent {scores.max()}, which is not a log-probability")
    # A raw logit is finite: -inf means that something masked the flag before it was measured.
    return np.where(np.isneginf(scores), np.nan, np.exp(np.minimum(scores, 0.0))).astype(np.float32)


async def _steps(backend: RemoteBackend, prompt: list[int], response: list[int]) -> Probs:
    names = [f"token_id:{token_id}" for token_id in backend.flag_ids]
    probs = np.full((len(response), len(names)), np.nan, dtype=np.float32)
    # One chunk after the other: each finds the previous one's keys and values in the prefix cache.
    for first in range(0, len(response), _AT_ONCE):
        positions = range(first, min(first + _AT_ONCE, len(response)))
        body = _one_token([prompt + response[:t] for t in positions])
        body |= {"logprobs": len(set(names)), "logprob_token_ids": list(dict.fromkeys(backend.flag_ids))}
        choices = (await backend.ask("/v1/completions", body))["choices"]
        if sorted(choice["index"] for choice in choices) != list(range(len(positions))):
            raise ValueError(f"{len(choices)} answers to {len(positions)} prompts")
        for choice in choices:
            (top,) = choice["logprobs"]["top_logprobs"]
            _check_chosen(choice["logprobs"], top)
            probs[first + choice["index"]] = [measured_in(name, top) for name in names]
    return probs


async def _bound(backend: RemoteBackend, prompt: list[int], response: list[int]) -> Probs:
    # The server measures at the tokens of a prompt. All of the response but its last token is sent as prompt, and the
    # one token that it generates stands at the last position.
    body = _one_token(prompt + response[:-1]) | {"logprobs": TOP, "prompt_logprobs": TOP}
    (choice,) = (await backend.ask("/v1/completions", body))["choices"]
    rows = []
    for token_id, entries in zip(response, choice["prompt_logprobs"][len(prompt) :], strict=False):
        if str(token_id) not in entries:
            raise ConnectionError(
                f"the server {backend.url} sent log-probabilities of another token: {token_id} is not among them"
            )
        # The prompt's own token is listed too, and may be less likely than some that are not.
        top = {int(name): entry["logprob"] for name, entry in entries.items() if entry["rank"] <= TOP}
        rows.append(_bounded(backend, top))
    (last,) = choice["logprobs"]["top_logprobs"]
    _check_chosen(choice["logprobs"], last)
    rows.append(_bounded(backend, {int(name.partition(":")[2]): value for name, value in last.items()}))
    if len(rows) != len(response):
        raise ValueError(f"{len(rows)} positions for {len(response)} tokens")
    return np.array(rows, dtype=np.float32)


def _check_chosen(logprobs: Mapping[str, Any], top: Mapping[str, float | None]) -> None:
    """Runs `check_own` for the one token that the server generated."""
    (name,) = logprobs["tokens"]
    (logprob,) = logprobs.get("token_logprobs") or [...]
    check_own(name, top, logprob)


def _bounded(backend: RemoteBackend, top: dict[int, float | None]) -> list[float]:
    if len(top) < TOP:
        raise ConnectionError(f"the server {backend.url} sent {len(top)} log-probabilities, not the {TOP} largest")
    probs = {token_id: probability_of(logprob) for token_id, logprob in top.items()}
    if any(map(math.isnan, probs.values())):
        return [math.nan] * len(backend.flag_ids)
    # A flag that is not listed is at most as likely as the least likely listed token.
    least = min(probs.values())
    return [probs.get(flag_id, least) for flag_id in backend.flag_ids]


def _one_token(prompt: list[int] | list[list[int]]) -> dict[str, Any]:
    """A request for one greedy token. It sends every option, since the server's defaults could differ."""
    return {
        "prompt": prompt,
        "stream": False,
        "n": 1,
        "max_tokens": 1,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "return_tokens_as_token_ids": True,
    }
