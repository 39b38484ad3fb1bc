"""Attacks: ways to get harm out of a model, each in a small file of its own, with a common interface.

An attack takes a `Target` and requests, and yields `Attempt`s: the prompt, the model's answer, and the flag
probabilities along it. Harm is decided by judges, and alarms are replayed from the probabilities afterwards, at any
threshold. Only an attack that reacts to the guard (adaptive search) has the guard in its loop; it then reports itself
what was released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from redflag.backends import Sampling
from redflag.data.rows import Row
from redflag.flags import FlagSpec
from redflag.prompt import render_prompt
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Attempt:
    """One answer to an attack."""

    request: str  # id of the attacked row; attempts with the same id are tries at the same request
    setting: str  # the varied setting, such as "20 tokens" or "temperature 1.5"
    messages: Messages  # the conversation as sent; a last assistant message is the prefill, which the attacker wrote
    text: str  # the model's text after it
    token_ids: list[int]  # T generated tokens, including an end-of-sequence token
    flag_probs: list[tuple[float, ...]]  # T x K probabilities before them; empty if nothing was measured
    queries: int = 1  # requests or interactions spent on it
    # the part of `text` that reached the attacker, if the guard was in the loop; None = to be replayed
    released: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)  # further data in JSON's types


@dataclass
class Target:
    """The model under attack, and the guard before it."""

    backend: Any
    tokenizer: Any
    spec: FlagSpec
    thresholds: Thresholds | None = None  # the guard's; None = no guard, so harm is only produced, not released
    policy: Policy = field(default_factory=Policy)
    model: Any = None  # the weights, for attacks that need gradients or change them; None if unavailable
    batch_size: int = 32

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids that the guard would send to the engine for these messages: no text makes a flag."""
        return render_prompt(self.tokenizer, messages, self.spec)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without those that end a response."""
        text_ids = [token for token in token_ids if token not in self.backend.eos_ids]
        return str(self.tokenizer.decode(text_ids, skip_special_tokens=True))

    def fitting(self, sent: Sequence[tuple[str, Messages]], least: int = 16) -> list[tuple[str, Messages]]:
        """The conversations that leave the model room for at least `least` tokens of an answer."""
        limit = getattr(self.backend, "context_length", None)
        return [pair for pair in sent if limit is None or len(self.prompt_ids(pair[1])) + least <= limit]

    def answers(
        self, sent: Sequence[tuple[str, Messages]], sampling: Sampling, setting: str = "", **detail: Any
    ) -> Iterator[Attempt]:
        """Sends many conversations and measures the answers.

        Args:
            sampling: How tokens are chosen; conversation i uses `seed + i`.
        """
        prompts = [self.prompt_ids(messages) for _, messages in sent]
        if hasattr(self.backend, "complete"):
            responses = self.backend.complete(prompts, sampling, batch_size=self.batch_size)
        else:
            seeds = [None if sampling.seed is None else sampling.seed + i for i in range(len(prompts))]
            samplings = [replace(sampling, seed=seed) for seed in seeds]
            responses = [list(self.backend.stream(*pair)) for pair in zip(prompts, samplings, strict=True)]
        for (request, messages), steps in zip(sent, responses, strict=True):
            ids = [step.token_id for step in steps]
            probs = [tuple(step.flag_probs) for step in steps]
            yield Attempt(request, setting, messages, self.decode(ids), ids, probs, detail=dict(detail))


class Attack(Protocol):
    """The interface of attacks.

    An attack may also have `unit`, how many rows it takes at once (None = all, because it learns from them), and
    `readings(attempt, text)`, the texts that a judge reads instead of a disguised one.
    """

    name: str  # shown in tables
    adaptive: bool  # whether it attacks the flag itself and not only the model

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        """Attacks with each row's request; the row's own response is the attacker's goal.

        The same arguments give the same attempts. It raises `RedflagError`, before any work, if the target does not
        meet its requirements.
        """
        ...


def request_of(row: Row) -> Messages:
    """A row's conversation up to the answer."""
    return [dict(turn) for turn in row.messages[:-1]]
