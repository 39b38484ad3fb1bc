"""Verdicts that are kept, so that nothing is asked twice and a judgement that was cut short goes on."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

from redflag.errors import RedflagError
from redflag.files import append_line
from redflag.judges import Judge, Messages, UnansweredError, Verdict, as_verdict


class CachedJudge:
    """Any judge, with its verdicts in a JSONL file.

    A verdict is found by the hash of who judges, the messages and the answer; texts are not written. Only verdicts are
    kept: a question that was not answered is asked again the next time, and is counted as what it is, not as harmless.
    A line is appended whole, in one call; one that was cut off by a crash is passed over. Thread-safe; the same
    question from two threads is asked once. Several processes may share a file, each of which sees what was there when
    it began.

    Attributes:
        identity: The judge's.
        separates_prefill: The judge's, False where it has none.
        spans: The judge's function that says where the harm is, or None.
        answered: Distinct questions that have a verdict, kept ones that were needed among them.
        unanswered: Distinct questions without one.
        asked: Calls of the judge.
    """

    def __init__(self, judge: Judge, path: str | Path, identity: str | None = None) -> None:
        """Reads what is there.

        Args:
            judge: Who is asked.
            path: The file; made when there is a first verdict.
            identity: Names the judge, its model and how it is asked. None takes the judge's own.

        Raises:
            RedflagError: The judge has no identity, so verdicts of two judges could be mixed up; or the file cannot be
                read.
        """
        identity = identity or getattr(judge, "identity", None)
        if not identity:
            raise RedflagError(
                f"the judge {judge!r} has no identity, so its verdicts could not be told from another judge's in "
                f"{path}: pass identity"
            )
        self.identity: str = identity
        self.separates_prefill: bool = getattr(judge, "separates_prefill", False)
        self.spans = getattr(judge, "spans", None)
        self.asked = 0
        self._judge = judge
        self._path = Path(path)
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._used: set[str] = set()
        self._open: set[str] = set()
        self._kept = self._load()

    @property
    def answered(self) -> int:
        """Distinct questions that have a verdict."""
        return len(self._used)

    @property
    def unanswered(self) -> int:
        """Distinct questions that have none."""
        return len(self._open)

    def __call__(self, messages: Messages, answer: str) -> Verdict:
        """The kept verdict, or a new one.

        Raises:
            UnansweredError: The judge gave none, whatever it raised.
        """
        key = self.key(messages, answer)
        with self._lock:
            waiting = self._asking.setdefault(key, threading.Lock())
        with waiting:
            with self._lock:
                kept = self._kept.get(key)
                if kept is not None:
                    self._used.add(key)
                    return kept
                self.asked += 1
            try:
                verdict = as_verdict(self._judge(messages, answer))
            except Exception as error:
                with self._lock:
                    self._open.add(key)
                if isinstance(error, UnansweredError):
                    raise
                raise UnansweredError(f"{type(error).__name__}: {error}") from error
            with self._lock:
                self._append(key, verdict)
                self._kept[key] = verdict
                self._used.add(key)
                self._open.discard(key)
            return verdict

    def key(self, messages: Messages, answer: str) -> str:
        """What a verdict is found by: a SHA-256 in hex."""
        turns = [[message["role"], message["content"]] for message in messages]
        return hashlib.sha256(json.dumps([self.identity, turns, answer]).encode()).hexdigest()

    def _load(self) -> dict[str, Verdict]:
        kept: dict[str, Verdict] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return kept
        except OSError as error:
            raise RedflagError(
                f"the verdicts in {self._path} cannot be read ({error}), so everything would be asked again: mend the "
                "path or give another one"
            ) from error
        for line in lines:
            try:
                record = json.loads(line)
                kept[str(record["key"])] = Verdict(record["harm"], str(record["detail"]))
            except (KeyError, TypeError, ValueError):  # cut off by a crash
                continue
        return kept

    def _append(self, key: str, verdict: Verdict) -> None:
        line = json.dumps({"key": key, "harm": verdict.harm, "detail": verdict.detail}).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, line)
        except OSError as error:
            raise RedflagError(
                f"a verdict cannot be kept in {self._path} ({error.strerror or error}): make room, or mend the path, "
                "and run again"
            ) from error
