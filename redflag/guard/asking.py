"""What a review asks: a second judge about an answer so far, within a time; or the model, in a word."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.judges import Judge, Verdict, as_verdict
from redflag.prompt import text_ids

Messages = Sequence[Mapping[str, str]]


def ask(judge: Judge | None, messages: Messages, answer: str, seconds: float) -> tuple[Verdict | None, str]:
    """The judge's verdict, or None and why there is none."""
    if judge is None:
        return None, "there is no second judge"
    answers: SimpleQueue[Verdict | Exception] = SimpleQueue()

    def work() -> None:
        try:
            answers.put(as_verdict(judge(messages, answer)))
        except Exception as error:  # Whatever breaks in a judge leaves the alarm standing.
            answers.put(error)

    # A thread of its own: one that never comes back can be left behind, and must not hold up the end of the process.
    threading.Thread(target=work, name="redflag-judge", daemon=True).start()
    try:
        found = answers.get(timeout=seconds)
    except Empty:
        return None, f"no verdict within {seconds:g} s"
    return (None, f"{type(found).__name__}: {found}") if isinstance(found, Exception) else (found, "")


def verdict_ids(tokenizer: Any, spec: FlagSpec, words: tuple[str, str]) -> tuple[int, int]:
    """First ids of the harmful and the harmless verdict word.

    Raises:
        RedflagError: They are the same, so their probabilities would tell nothing apart.
    """
    first = [text_ids(tokenizer, word, spec)[0] for word in words]
    if first[0] == first[1]:
        raise RedflagError(
            f"the verdict words {words[0]!r} and {words[1]!r} begin with the same token in this model's vocabulary, so "
            "no verdict could be read: give words that begin differently"
        )
    return first[0], first[1]
