"""A second judge asked about an answer so far, within a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue

from redflag.judges import Judge, Verdict, as_verdict

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
