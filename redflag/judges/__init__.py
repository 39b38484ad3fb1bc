"""Second judges: they read a conversation and an answer, and say how probably the answer is harmful.

A judge decides about an alarm before the user sees anything more. It knows no stream, no policy and no server: text
goes in, a `Verdict` comes out, and whatever goes wrong is raised. Who asks makes an unanswered question fail closed.
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
    """What a judge found.

    Attributes:
        harm: Probability in [0, 1] that the answer is harmful; 0 or 1 from judges that give no degrees.
        detail: What else the judge said, such as hazard categories. For the operator, never for the user.

    Raises:
        ValueError: `harm` is no probability, so it must not be taken for a verdict.

    Example:
        >>> Verdict(0.8).harmful
        True
    """

    harm: float
    detail: str = ""

    def __post_init__(self) -> None:
        harm = self.harm
        if not isinstance(harm, int | float) or not math.isfinite(harm) or not 0.0 <= harm <= 1.0:
            raise ValueError(f"harm is {harm!r}, but a verdict is a probability in [0, 1]")
        object.__setattr__(self, "harm", float(harm))

    @property
    def harmful(self) -> bool:
        """Whether the answer is taken for harmful."""
        return self.harm >= 0.5


class UnansweredError(Exception):
    """The judge gave no verdict: it could not be reached, was late, or said something that is none."""


class Judge(Protocol):
    """Anything that can be asked. A plain function that returns a number or a bool will do: see `as_verdict`."""

    def __call__(self, messages: Messages, answer: str) -> Verdict:
        """Judges an answer, as far as it has been written.

        Called from worker threads, possibly several at once.

        Args:
            messages: The conversation as the user sent it. A last assistant message is the beginning of the answer.
            answer: What the model wrote after it. It may end in the middle of a word.

        Raises:
            Exception: Anything, where no verdict could be had. A judge never answers "harmless" for want of an answer.
        """
        ...


def as_verdict(value: object) -> Verdict:
    """A judge's return value as a verdict.

    Args:
        value: A `Verdict`, True (harmful), False (harmless), or a probability of harm.

    Raises:
        ValueError: The value is none of these, not finite, or outside [0, 1].

    Example:
        >>> as_verdict(True), as_verdict(0.25)
        (Verdict(harm=1.0, detail=''), Verdict(harm=0.25, detail=''))
    """
    if isinstance(value, Verdict):
        return value
    if isinstance(value, str | bytes):  # "0" and "harmless" alike: words are for who knows the judge's language.
        raise ValueError(f"a judge returned the text {value!r}, which is neither a verdict nor a probability")
    try:
        # Not only float: numpy and torch have scalars of their own.
        return Verdict(float(value))  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        raise ValueError(f"a judge returned {value!r}, which is neither a verdict nor a probability") from None


def exchange(messages: Messages, answer: str) -> tuple[list[dict[str, str]], str]:
    """The turns before the answer, and the whole answer: a last assistant message is its beginning.

    Judges know users and assistants. Calls of tools stand in the assistant's text, their results in the user's.

    Raises:
        UnansweredError: The answer is blank. Nothing can be found harmless before it has been written.

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
        raise UnansweredError("the answer is still empty, so there is nothing to judge")
    return turns, answer


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
