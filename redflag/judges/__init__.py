"""Second judges: they read a conversation and an answer, and return the probability that the answer is harmful.

A judge decides about an alarm before the user sees anything more. It is independent of streams, policies and servers:
text goes in, a `Verdict` comes out, and every failure is raised. The caller fails closed on an unanswered question.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict.

    Raises:
        ValueError: `harm` is not a probability.

    Example:
        >>> Verdict(0.8).harmful
        True
    """

    harm: float  # probability in [0, 1] that the answer is harmful; 0 or 1 from judges without probabilities
    detail: str = ""  # further output of the judge, such as hazard categories. For the operator, never for the user

    def __post_init__(self) -> None:
        harm = self.harm
        if not isinstance(harm, int | float) or not math.isfinite(harm) or not 0.0 <= harm <= 1.0:
            raise ValueError(f"harm must be a probability in [0, 1] (got {harm!r})")
        object.__setattr__(self, "harm", float(harm))

    @property
    def harmful(self) -> bool:
        """Whether the answer counts as harmful."""
        return self.harm >= 0.5


class UnansweredError(Exception):
    """The judge gave no verdict: it could not be reached, was late, or gave an invalid answer."""


class Judge(Protocol):
    """Any callable judge. A plain function that returns a number or a bool is enough: see `as_verdict`."""

    def __call__(self, messages: Messages, answer: str) -> Verdict:
        """Judges an answer, as far as it has been written.

        Called from worker threads, possibly several at once.

        Args:
            messages: The conversation as the user sent it. A last assistant message is the beginning of the answer.
            answer: The model's text after it, which may end in the middle of a word.

        Raises:
            Exception: Any, if there is no verdict. A judge never returns "harmless" because a verdict is missing.
        """


def as_verdict(value: object) -> Verdict:
    """A judge's return value as a verdict.

    Args:
        value: A `Verdict`, True (harmful), False (harmless), or a probability of harm.

    Raises:
        ValueError: The value is of another type, not finite, or outside [0, 1].

    Example:
        >>> as_verdict(True), as_verdict(0.25)
        (Verdict(harm=1.0, detail=''), Verdict(harm=0.25, detail=''))
    """
    if isinstance(value, Verdict):
        return value
    if isinstance(value, str | bytes):  # also "0" and "harmless": only the judge itself can interpret its words
        raise ValueError(f"a judge must return a verdict or a probability (got the text {value!r})")
    try:
        # Not only float: numpy and torch have scalars of their own.
        return Verdict(float(value))  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        raise ValueError(f"a judge must return a verdict or a probability (got {value!r})") from None


def ask(judge: Judge, messages: Messages, answer: str) -> Verdict:
    """A judge's verdict.

    Raises:
        UnansweredError: It gave no verdict, whatever it raised.
    """
    try:
        return as_verdict(judge(messages, answer))
    except UnansweredError:
        raise
    except Exception as error:
        raise UnansweredError(f"{type(error).__name__}: {error}") from error


def exchange(messages: Messages, answer: str) -> tuple[list[dict[str, str]], str]:
    """The turns before the answer, and the whole answer: a last assistant message is its beginning.

    Judges support the roles user and assistant. Tool calls are put into the assistant's text, results into the user's.

    Raises:
        UnansweredError: The answer is blank: an answer that is not written yet cannot be called harmless.

    Example:
        >>> exchange([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure"}], ", hello")
        ([{'role': 'user', 'content': 'Hi'}], 'Sure, hello')
    """
    turns: list[dict[str, str]] = []
    for message in messages:
        role, lines = message["role"], [message["content"]] if message["content"] else []
        for call in message.get("tool_calls") or ():
            lines.append(f"[calls {call['function']['name']}: {_as_text(call['function']['arguments'])}]")
        if role == "tool":
            role, lines = "user", [f"[result of a tool: {message['content']}]"]
            if turns and turns[-1]["role"] == "user":
                lines.insert(0, turns.pop()["content"])
        turns.append({"role": role, "content": "\n".join(lines)})
    if turns and turns[-1]["role"] == "assistant":
        answer = turns.pop()["content"] + answer
    if not answer.strip():
        raise UnansweredError("the answer is empty: there is nothing to judge")
    return turns, answer


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
