"""The verb `audit-log`: who was answered although a flag was high, by user, the severest first."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO, cast

from redflag.errors import RedflagError
from redflag.server.audit_log import AUDIT_FORMAT
from redflag.terminal.paint import printable

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass
class AuditLogArguments:
    """Who was answered although a flag was high, by user, the severest first."""

    file: list[str] = field(
        metadata={"help": "Audit logs of `redflag serve`, plain or .gz: files, folders, patterns such as 'audit*'."}
    )
    user: str | None = field(default=None, metadata={"help": "Only this user, as the log has it."})
    since: str | None = field(
        default=None, metadata={"help": "Only from this moment on: 2026-05-01, 2026-05-01T12:00Z, or 90m, 24h, 7d, 2w."}
    )
    min_ratio: float = field(
        default=0.0, metadata={"help": "Only responses with a score of at least this share of its threshold."}
    )
    json: bool = field(default=False, metadata={"help": "One JSON object instead of a table."})


ARGUMENTS = AuditLogArguments
POSITIONAL = "file"


@dataclass
class User:
    """What the log has of one user.

    Attributes:
        responses: Responses that were written down.
        alarms_overridden: Alarms after which a response went on.
        near_misses: Responses with a high score below its threshold, and no alarm that was overridden.
        overrides: Overrides of the watch by an operator.
        ratio: Highest score as a share of its threshold.
        categories: Category -> responses in which it alarmed or came near.
        first: Time of the first entry.
        last: Time of the last entry.
    """

    responses: int = 0
    alarms_overridden: int = 0
    near_misses: int = 0
    overrides: int = 0
    ratio: float = 0.0
    categories: dict[str, int] = field(default_factory=dict)
    first: str = ""
    last: str = ""

    def add(self, entry: Mapping[str, Any], ratio: float) -> None:
        """Counts one entry."""
        when = str(entry["time"])
        self.first, self.last = min(self.first or when, when), max(self.last, when)
        if entry["kind"] == "override":
            self.overrides += 1
            return
        self.responses += 1
        self.alarms_overridden += entry["alarms_overridden"]
        self.near_misses += not entry["alarms_overridden"]
        self.ratio = max(self.ratio, ratio)
        for name in sorted({*entry["near"], *(alarm["category"] for alarm in entry["alarms"])}):
            self.categories[name] = self.categories.get(name, 0) + 1


def run(arguments: AuditLogArguments) -> int:
    """The verb.

    Raises:
        RedflagError: A file cannot be read, or an option has no meaning.
    """
    since = _moment(arguments.since)
    if not arguments.min_ratio >= 0:
        raise RedflagError(f"min_ratio is {arguments.min_ratio}, but it is a share of a threshold: give 0 or above")
    unreadable: list[str] = []
    users = by_user(read(_files(arguments.file), unreadable), arguments.user, since, arguments.min_ratio)
    if arguments.json:
        record = {"users": [{"user": name, **vars(user)} for name, user in users], "unreadable": unreadable}
        print(json.dumps(record, indent=2))
    else:
        print("\n".join(table(users)))
    for where in unreadable:
        print(f"{printable(where)} cannot be read and is not counted", file=sys.stderr)
    return 0


def by_user(
    entries: Iterable[Mapping[str, Any]], user: str | None = None, since: datetime | None = None, min_ratio: float = 0.0
) -> list[tuple[str | None, User]]:
    """What a log has of its users, the severest first: alarms overridden, then the highest ratio.

    Args:
        entries: Lines of the log.
        user: Only this one.
        since: Only what is not older.
        min_ratio: Only responses with a score of at least this share of its threshold. Overrides count in any case.
    """
    users: dict[str | None, User] = {}
    for entry in entries:
        name = entry["user"]
        ratio = max((c["peak"] / c["threshold"] for c in entry.get("categories", {}).values()), default=0.0)
        wanted = entry["kind"] == "override" or ratio >= min_ratio
        if wanted and user in (None, name) and (since is None or _time(entry["time"]) >= since):
            users.setdefault(name, User()).add(entry, ratio)
    return sorted(
        users.items(),
        key=lambda item: (-item[1].alarms_overridden, -item[1].ratio, -item[1].responses, str(item[0])),
    )


def table(users: list[tuple[str | None, User]]) -> list[str]:
    """The report as lines of text."""
    if not users:
        return ["nothing was written down"]
    head = ("user", "responses", "alarms overridden", "near misses", "score/threshold", "overrides", "categories")
    rows = [(*head, "first", "last")]
    for name, user in users:
        categories = sorted(user.categories.items(), key=lambda item: (-item[1], item[0]))
        rows.append(
            (
                "(not named)" if name is None else _one_line(name),
                str(user.responses),
                str(user.alarms_overridden),
                str(user.near_misses),
                f"{user.ratio:.2f}",
                str(user.overrides),
                ", ".join(f"{_one_line(category)} {count}" for category, count in categories) or "-",
                _short(user.first),
                _short(user.last),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = range(1, 6)
    return [
        "  ".join(
            cell.rjust(width) if k in numbers else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def read(files: Iterable[Path], unreadable: list[str]) -> Iterator[dict[str, Any]]:
    """Entries of all files, in their order.

    Args:
        files: Audit logs.
        unreadable: Gets the places of lines that are no entries: a process that was killed leaves half a line behind.

    Raises:
        RedflagError: A file cannot be opened, or was written by another version.
    """
    for file in files:
        number = 0
        try:
            with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as lines:
                for line in cast(BinaryIO, lines):
                    number += 1
                    entry = _entry(line, f"{file}:{number}")
                    if entry is not None:
                        yield entry
                    elif line.strip():
                        unreadable.append(f"{file}:{number}")
        except (EOFError, zlib.error):  # compressed while it was being written
            unreadable.append(f"{file}:{number + 1}")
        except OSError as error:
            raise RedflagError(
                f"the audit log {file} cannot be read ({error.strerror or error}): check its name and permissions"
            ) from error


def _entry(line: bytes, where: str) -> dict[str, Any] | None:
    """The line as an entry; None where it is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or "format" not in entry:
        return None
    if entry["format"] != AUDIT_FORMAT:
        raise RedflagError(
            f"{where} has format {entry['format']!r}, and this version of redflag reads {AUDIT_FORMAT}: read it with "
            "the version that wrote it"
        )
    try:
        _time(entry["time"])
        whole = isinstance(entry["user"], str | None) and entry["kind"] in ("response", "override")
        if whole and entry["kind"] == "response":
            whole = all(type(entry[name]) is list for name in ("near", "alarms")) and all(
                isinstance(alarm["category"], str) for alarm in entry["alarms"]
            )
            whole = whole and type(entry["alarms_overridden"]) is int
            whole = whole and all(c["peak"] / c["threshold"] >= 0 for c in entry["categories"].values())
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return entry if whole else None


def _files(names: list[str] | str) -> list[Path]:
    """The files that are meant, each once, by name."""
    found: dict[Path, None] = {}
    for name in [names] if isinstance(names, str) else names:
        path = Path(name)
        if path.is_dir():
            matches = sorted([*path.glob("*.jsonl*")])
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
        if not matches:
            raise RedflagError(f"there is no audit log {name}: check the name, or whether anything was written yet")
        found |= dict.fromkeys(matches)
    return list(found)


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        if match := re.fullmatch(r"(\d{1,6})([mhdw])", text.strip()):
            return datetime.now(timezone.utc) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        return _time(text.strip())
    except (OverflowError, ValueError):
        raise RedflagError(
            f"since is {text!r}, which names no moment: give a date such as 2026-05-01, a time such as "
            "2026-05-01T12:00Z, or how long ago, such as 90m, 24h, 7d or 2w"
        ) from None


def _time(text: str) -> datetime:
    # Python 3.10 knows no Z.
    time = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    return time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)


def _short(time: str) -> str:
    return f"{_time(time).astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}" if time else ""


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
