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

from redflag.bounds import check_bounds, option
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
    user: str | None = option(None, "Only this user, as the log has it.")
    since: str | None = option(None, "Only from this moment on: 2026-05-01, 2026-05-01T12:00Z, or 90m, 24h, 7d, 2w.")
    min_ratio: float = option(0.0, "Only responses with a score of at least this share of its threshold.", least=0)
    json: bool = option(False, "One JSON object instead of a table.")


ARGUMENTS = AuditLogArguments
POSITIONAL = "file"


@dataclass
class User:
    """A user's entries in the log.

    Attributes:
        alarms_overridden: Alarms after which a response went on.
        near_misses: Responses with a high score below its threshold, and no alarm that was overridden.
        ratio: Highest score as a share of its threshold.
        categories: Category -> responses in which it alarmed or came near.
        first: Time of the first entry; likewise `last`.
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
        RedflagError: A file cannot be read, or an option is invalid.
    """
    check_bounds(arguments)
    since = _moment(arguments.since)
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
    """Entries by user, the severest first: alarms overridden, then the highest ratio.

    The other arguments select entries, as the options of the verb; overrides have no ratio and are always counted.
    """
    users: dict[str | None, User] = {}
    for entry in entries:
        name = entry["user"]
        ratio = max((c["peak"] / c["threshold"] for c in entry.get("categories", {}).values()), default=0.0)
        high = entry["kind"] == "override" or ratio >= min_ratio
        if high and user in (None, name) and (since is None or _time(entry["time"]) >= since):
            users.setdefault(name, User()).add(entry, ratio)
    return sorted(
        users.items(), key=lambda item: (-item[1].alarms_overridden, -item[1].ratio, -item[1].responses, str(item[0]))
    )


def table(users: list[tuple[str | None, User]]) -> list[str]:
    """The report as lines of text."""
    if not users:
        return ["the log has no such entries"]
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
    """Entries of all files, in order.

    Args:
        unreadable: Filled with the places of invalid lines, such as the last one of a process that was killed.

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
            raise RedflagError(f"the audit log {file} cannot be read ({error.strerror or error}).") from error


def _entry(line: bytes, where: str) -> dict[str, Any] | None:
    """The line as an entry, if it is valid."""
    try:
        entry = json.loads(line)
        version = entry["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if version != AUDIT_FORMAT:
        raise RedflagError(
            f"the audit log must have format {AUDIT_FORMAT} (got {version!r} in {where}). Read it with the version of "
            "redflag that wrote it."
        )
    try:
        _time(entry["time"])
        valid = isinstance(entry["user"], str | None) and entry["kind"] in ("response", "override")
        if valid and entry["kind"] == "response":
            valid = (
                all(type(entry[name]) is list for name in ("near", "alarms"))
                and all(isinstance(alarm["category"], str) for alarm in entry["alarms"])
                and type(entry["alarms_overridden"]) is int
                and all(c["peak"] / c["threshold"] >= 0 for c in entry["categories"].values())
            )
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return entry if valid else None


def _files(names: list[str] | str) -> list[Path]:
    """The files behind names, folders and patterns, each once."""
    files: dict[Path, None] = {}
    for name in [names] if isinstance(names, str) else names:
        path = Path(name)
        if path.is_dir():
            matches = sorted(path.glob("*.jsonl*"))
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
        if not matches:
            raise RedflagError(f"there is no audit log {name}. Check the name, or whether anything was logged yet.")
        files |= dict.fromkeys(matches)
    return list(files)


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        if match := re.fullmatch(r"(\d{1,6})([mhdw])", text.strip()):
            return datetime.now(timezone.utc) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        return _time(text.strip())
    except (OverflowError, ValueError):
        raise RedflagError(
            f"since must be a time, such as 2026-05-01 or 2026-05-01T12:00Z, or an age, such as 90m, 24h, 7d or 2w "
            f"(got {text!r})."
        ) from None


def _time(text: str) -> datetime:
    # Python 3.10 does not parse Z.
    time = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    return time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)


def _short(time: str) -> str:
    return f"{_time(time).astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
