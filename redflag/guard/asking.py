"""Verdicts of a review: of a second judge, within a time limit; or of the model, by two words."""

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

    # A daemon thread: one that never returns is abandoned, and does not keep the process alive.
    threading.Thread(target=work, name="redflag-judge", daemon=True).start()
    try:
        answer_or_error = answers.get(timeout=seconds)
    except Empty:
        return None, f"no verdict within {seconds:g} s"
    if isinstance(answer_or_error, Exception):
        return None, f"{type(answer_or_error).__name__}: {answer_or_error}"
    return answer_or_error, ""


def verdict_ids(tokenizer: Any, spec: FlagSpec, words: tuple[str, str]) -> tuple[int, int]:
    """First ids of the harmful and the harmless verdict word.

    Raises:
        RedflagError: They are the same.
    """
    harmful, harmless = (text_ids(tokenizer, word, spec)[0] for word in words)
    if harmful == harmless:
        raise RedflagError(
            f"the verdict words must not begin with the same token of this model's vocabulary (got {words[0]!r} and "
            f"{words[1]!r}). Give other words."
        )
    return harmful, harmless
