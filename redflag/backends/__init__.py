"""Inference engines behind one seam: ids and sampling go in, steps come out.

A backend measures the flags at every position from raw logits and never chooses one. It knows no thresholds, no text
and no policy; what to do about a step is decided in `redflag.watching`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from redflag.errors import RedflagError
from redflag.trace import Step


class Matcher(Protocol):
    """One response on its way through a grammar."""

    def mask(self) -> bytes:
        """The ids that may come next, one bit per id, the least significant bit of a byte first.

        Ids beyond it may not. Special tokens are in it only as ends of the response.

        Raises:
            RuntimeError: The grammar cannot be followed any further.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Accepts the next token; returns False and does nothing if it is not allowed."""
        ...


class Grammar(Protocol):
    """The form of a response (`redflag.guard.grammar` makes one from a JSON schema). Immutable."""

    def begin(self) -> Matcher:
        """A matcher before the response's next token."""
        ...

    def after(self, token_ids: Sequence[int]) -> Grammar:
        """The grammar of what may follow these tokens of a response.

        Raises:
            RuntimeError: The grammar does not allow them.
        """
        ...


@dataclass(frozen=True)
class ChatInput:
    """A conversation for a server that renders it itself (`RemoteBackend` with `route="chat"`).

    Attributes:
        messages: The turns for the chat template; likewise `tools`, the definitions.
        thinking: Whether the template leaves room for a thought.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = False


_SEEDS = 2**62


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. It does not affect the flag probabilities, which are measured first.

    Attributes:
        max_new_tokens: Maximum number of response tokens, including the end-of-sequence token.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_p: Keep the smallest set of tokens with at least this much probability; 1 keeps all.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        min_p: Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: Above 1 makes tokens that already occur in prompt or response less likely.
        seed: Makes sampling reproducible; without one torch's global generator is used.
        stop: Texts that end the response and are not part of it. Backends ignore them: `redflag.guard.guard` checks.
        logprobs: Steps carry the log-probability of the chosen token and of this many of the most likely ones, at most
            the backend's `most_logprobs`; None = no log-probabilities.
        grammar: Which tokens may be chosen; None allows all. Flags are measured first, over all tokens. A backend that
            does not support grammars must refuse it.
        chat: The conversation that the prompt was rendered from, for a server that renders it itself, to the same ids.
            All other backends use the ids and may ignore it.
        earlier: Spans of the prompt, each its first token and the one behind its last, in ascending order and none with
            the prompt's first token: the first step carries the flag probabilities before their tokens
            (`Step.earlier`). A backend without `measures_earlier` must refuse it.

    Example:
        >>> Sampling(temperature=0.0).greedy
        True
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    chat: ChatInput | None = None
    earlier: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0.0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1 (1 = off)"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or above"),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 (off) and 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0.0 < self.repetition_penalty < math.inf,
                "above 0 (1 = off)",
            ),
            ("seed", self.seed, self.seed is None or abs(self.seed) < _SEEDS, "None or a whole number below 2**62"),
            ("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "None or 0 and above"),
            ("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "a tuple of texts, none empty"),
        )
        for name, value, valid, rule in checks:
            if not valid:
                raise RedflagError(f"{name} must be {rule} (got {value!r}).")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0.0

    def seed_of(self, stream: int) -> int | None:
        """The seed of a response's further streams, counted from 1: with the first one's they would repeat its draws.

        Example:
            >>> Sampling(seed=7).seed_of(2), Sampling(seed=2**62 - 1).seed_of(1)
            (9, 0)
        """
        if self.seed is None:
            return None
        seed = self.seed + stream
        return seed if seed < _SEEDS else seed - _SEEDS


class BusyError(RedflagError):
    """The engine is at capacity; the same request may succeed later."""


class ContextLengthError(RedflagError):
    """The prompt leaves no room for a response.

    `context_length` is the maximum number of tokens of prompt and response together.
    """

    def __init__(self, prompt_tokens: int, context_length: int, whose: str = "model") -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and the {whose}'s context holds {context_length}, which leaves no "
            "room for a response; shorten the prompt."
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


def room_for(prompt_tokens: int, sampling: Sampling, context_length: int | None, whose: str = "model") -> int:
    """How many tokens a response may have; `whose` context it is, for the error's text.

    Raises:
        RedflagError: The prompt is empty, or (`ContextLengthError`) leaves no room for a response.
    """
    if not prompt_tokens:
        raise RedflagError("the prompt must hold at least one token (got none).")
    if context_length is None:
        return sampling.max_new_tokens
    if prompt_tokens >= context_length:
        raise ContextLengthError(prompt_tokens, context_length, whose)
    return min(sampling.max_new_tokens, context_length - prompt_tokens)


MOST_LOGPROBS = 20  # of the most likely tokens, as at OpenAI and vLLM


def most_logprobs(engine: object) -> int | None:
    """For how many of the most likely tokens a backend gives log-probabilities; None if it gives none at all.

    Example:
        >>> most_logprobs(object()) is None
        True
    """
    return getattr(engine, "most_logprobs", None)


def measures_earlier(engine: object) -> bool:
    """Whether a backend measures spans of the prompt (`Sampling.earlier`).

    Example:
        >>> measures_earlier(object())
        False
    """
    return bool(getattr(engine, "measures_earlier", False))


def refuse_earlier(sampling: Sampling) -> None:
    """For backends that do not measure spans of the prompt.

    Raises:
        RedflagError: Some are asked for.
    """
    if sampling.earlier:
        raise RedflagError("earlier answers are not measured by this engine. Leave memory off.")


class Engine(Protocol):
    """Properties of all backends. One that gives log-probabilities also has `most_logprobs`; one that measures spans of
    the prompt has `measures_earlier`."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a response by themselves."""
        ...

    @property
    def logprob_mode(self) -> str:
        """Source of the probabilities: `raw` logits, before temperature, bias and penalties."""
        ...

    @property
    def upper_bound(self) -> bool:
        """Whether the probabilities are upper bounds: false alarms may then be more frequent, but none is missed."""
        ...


class Backend(Engine, Protocol):
    """Anything that can produce steps; `tests/backends/test_contract.py` is the contract."""

    def stream(self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()) -> Iterator[Step]:
        """Continues a prompt, one step at a time.

        If the end-of-sequence token is chosen, it is yielded as the last step; a stream that ends without one has
        reached a length limit. An engine that is lost, late or cut off raises. A step that could not be judged carries
        NaN. Closing the iterator, at any point, stops the engine's work on the stream.

        Args:
            token_ids: The prompt.
            watch: Ids that are measured in place of the flags. Flags are still never chosen.

        Yields:
            Steps, each with K flag probabilities (or those of `watch`) measured before its token was chosen.

        Raises:
            RedflagError: The prompt is empty or leaves no room for a response.
        """
        ...


class AsyncStreams(Protocol):
    """What a response is driven by on an event loop: an `AsyncBackend`, or something around one."""

    def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncGenerator[Step, None]:
        """As `Backend.stream`; `aclose` cleans up without waiting for anything."""
        ...


class AsyncBackend(Engine, AsyncStreams, Protocol):
    """The same for an event loop, which runs many streams without a thread for each."""

    async def aclose(self) -> None:
        """Ends all streams and frees their shared resources."""
        ...
