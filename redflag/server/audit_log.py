"""Append-only log of responses that were given although a flag was high, by user.

It has three kinds of entries: a response that went on after an alarm, one whose score came near a threshold, and every
override of the watch, before its response begins. Numbers and names only, never a word of a prompt or a response.
`redflag audit-log FILE` reads it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from redflag.errors import RedflagError
from redflag.files import LOCKS, append_line
from redflag.trace import Facts, Trace

AUDIT_FORMAT = 1

_log = logging.getLogger(__name__)
_FLOOR = 0.5  # share of its threshold from which a score is near it
_LONGEST = 256  # characters of a user id or request id, which clients choose
_LONGEST_REASON = 1000


def check_system() -> None:
    """Checks, before a model is loaded, that the system has file locks.

    Raises:
        RedflagError: It does not.
    """
    if not LOCKS:
        raise RedflagError(
            "audit must be left out on this system, which does not have the file locks (fcntl) that keep two writers "
            "apart. Serve from Linux, macOS or WSL."
        )


class AuditLog:
    """Appends whole lines to a JSONL file. Safe for several threads and processes.

    The file is opened for every line, so it may be moved away at any time. A write takes microseconds on a local disk;
    that of an override waits until it is on the disk.

    Example:
        >>> import tempfile
        >>> from redflag.trace import Done, Text
        >>> log = AuditLog(Path(tempfile.mkdtemp()) / "audit.jsonl", {"weapons": 0.8})
        >>> trace = Trace(categories=("weapons",), token_ids=[5], flag_probs=[(0.6,)], scores=[(0.6,)],
        ...     events=[Text(0, (5,), "x"), Done(1, "stop")])
        >>> log.record(trace, user="u-17", request_id="r-1")  # 0.6 is more than half of 0.8
        True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thresholds: Mapping[str, float],
        *,
        on_failure: Callable[[], object] | None = None,
    ) -> None:
        """Creates the file if needed, for its owner alone; its folder must exist.

        Args:
            thresholds: `guard.thresholds.values`.
            on_failure: Callback if a line could not be written (`Metrics.audit_failed`).

        Raises:
            RedflagError: The file cannot be written, or the system has no file locks.
        """
        check_system()
        self._path = Path(path)
        self._thresholds = {name: float(value) for name, value in thresholds.items()}
        self._on_failure = on_failure
        try:
            append_line(self._path, b"", lock=True)
        except OSError as error:
            raise RedflagError(
                f"the audit log {self._path} cannot be written ({error.strerror or error}); fix the path or its "
                "permissions"
            ) from error

    def record(
        self,
        trace: Trace,
        *,
        user: str | None,
        request_id: str,
        reason: str | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> bool:
        """Logs a response if an alarm in it was overridden, or if a score was near its threshold without a halt.

        A failure to write is logged and counted, and not raised, since the response is over.

        Args:
            trace: The response, even if it was not finished.
            user: The end user, as the client names them.
            reason: The operator's reason for overriding the watch; None: it was not overridden.
            thresholds: Those of this response, if they are not the guard's.

        Returns:
            Whether a line was written.
        """
        try:
            entry = self._entry(trace, reason, thresholds or self._thresholds)
            if entry is None:
                return False
            self._append("response", user, request_id, entry)
        except Exception as error:
            self._failed(error)
            return False
        return True

    def begin_override(self, user: str | None, reason: str, request_id: str) -> None:
        """Logs an override before it begins; arguments as for `record`.

        Raises:
            RedflagError: There is no reason, or it could not be written: the override must be refused.
        """
        if not reason.strip():
            raise RedflagError("the override must give a reason, for its log")
        try:
            self._append("override", user, request_id, _override(reason.strip()), sync=True)
        except OSError as error:
            self._failed(error)
            raise RedflagError(
                f"the override of request {request_id} could not be logged ({error.strerror or error}), so it is "
                "refused; fix the audit log"
            ) from error

    def _entry(self, trace: Trace, reason: str | None, thresholds: Mapping[str, float]) -> dict[str, Any] | None:
        """The entry of a response, if it needs one."""
        facts = trace.facts()
        peaks = _peaks(facts, thresholds)
        near = [name for name, (peak, threshold) in peaks.items() if _FLOOR * threshold <= peak < threshold]
        if not facts.overridden and (facts.end == "halted" or not near):
            return None
        return {
            "categories": {name: {"peak": peak, "threshold": threshold} for name, (peak, threshold) in peaks.items()},
            "alarms": [
                {"position": alarm.position, "category": alarm.category, "action": alarm.action, "score": alarm.score}
                for alarm in facts.alarms
            ],
            "alarms_overridden": facts.overridden,
            "near": near,
            "reviews": [
                {"kind": type(event).__name__.lower(), "verdict": event.verdict, "harm": event.harm}
                for event in facts.reviews
            ],
            "end": facts.reason if facts.end == "done" else facts.end or "left",
            "released": facts.released,
            "generated": facts.generated,
            "overridden": reason is not None,
            **_override(reason),
        }

    def _append(
        self, kind: str, user: str | None, request_id: str, entry: Mapping[str, Any], *, sync: bool = False
    ) -> None:
        record = {
            "format": AUDIT_FORMAT,
            "kind": kind,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "request": _cut(request_id),
            "user": _cut(user),
            **entry,
        }
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        append_line(self._path, line, lock=True, sync=sync)

    def _failed(self, error: Exception) -> None:
        _log.error("an audit entry could not be written: %s", type(error).__name__)
        if self._on_failure is not None:
            self._on_failure()


def _peaks(facts: Facts, thresholds: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Category -> its highest score and its threshold."""
    limits = {**thresholds, **{alarm.category: alarm.threshold for alarm in facts.alarms}}
    return {name: (peak, limits[name]) for name, peak in facts.peaks.items() if name in limits and math.isfinite(peak)}


def _override(reason: str | None) -> dict[str, str | None]:
    by = None if reason is None else "operator"  # nobody else may
    return {"overridden_by": by, "reason": _cut(reason, _LONGEST_REASON)}


def _cut(text: str | None, longest: int = _LONGEST) -> str | None:
    return None if text is None else text if len(text) <= longest else text[:longest] + "…"
