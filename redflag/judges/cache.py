"""A judge whose verdicts are cached in a file."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

from redflag.errors import RedflagError
from redflag.judges import Judge, Messages, UnansweredError, Verdict, ask
from redflag.kept import Kept


class CachedJudge:
    """Any judge, with its verdicts cached in a JSONL file (`redflag.kept.Kept`).

    The key is a hash of the judge's identity, the messages and the answer; texts are not written. Only verdicts are
    cached: an unanswered question is asked again the next time, and counts as unanswered, not as harmless. Thread-safe;
    the same question from two threads is asked once.

    Attributes:
        spans: The judge's function that locates the harm, or None.
        answered: Distinct questions with a verdict, including cached ones that were used.
        unanswered: Distinct questions without a verdict.
    """

    def __init__(self, judge: Judge, path: str | Path, identity: str | None = None) -> None:
        """Reads the cached verdicts.

        Args:
            identity: Identifies the judge, its model and its prompt; default: the judge's own.

        Raises:
            RedflagError: The judge has no identity, or the file cannot be read.
        """
        identity = identity or getattr(judge, "identity", None)
        if not identity:
            raise RedflagError(
                f"identity must be given for the judge {judge!r}, which has none. Its verdicts in {path} could be "
                "mixed up with another judge's."
            )
        self.identity: str = identity
        self.separates_prefill: bool = getattr(judge, "separates_prefill", False)
        self.spans = getattr(judge, "spans", None)
        self.asked = 0
        self._judge = judge
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._used: set[str] = set()
        self._open: set[str] = set()
        self._cache = Kept(path, Verdict)

    @property
    def answered(self) -> int:
        return len(self._used)

    @property
    def unanswered(self) -> int:
        return len(self._open)

    def __call__(self, messages: Messages, answer: str) -> Verdict:
        """The cached verdict, or a new one."""
        key = self.key(messages, answer)
        with self._lock:
            waiting = self._asking.setdefault(key, threading.Lock())
        with waiting:
            with self._lock:
                if key in self._cache:
                    self._used.add(key)
                    return self._cache[key]
                self.asked += 1
            try:
                verdict = ask(self._judge, messages, answer)
            except UnansweredError:
                with self._lock:
                    self._open.add(key)
                raise
            self._cache.add(key, verdict)
            with self._lock:
                self._used.add(key)
                self._open.discard(key)
            return verdict

    def key(self, messages: Messages, answer: str) -> str:
        """The key of a verdict: a SHA-256 in hex."""
        turns = [[message["role"], message["content"]] for message in messages]
        for turn, message in zip(turns, messages, strict=True):
            if calls := message.get("tool_calls"):  # Judges read them; keys of turns without calls stay what they were.
                turn.append(calls)
        return hashlib.sha256(json.dumps([self.identity, turns, answer]).encode()).hexdigest()
