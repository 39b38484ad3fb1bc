"""Atomic files and folders, cached results in JSON files, and appending lines to files shared by several writers."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from redflag.errors import RedflagError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCKS = fcntl is not None  # whether the system supports the locks of `append_line(lock=True)`

# In text mode Windows would write \r\n for \n, and return another number of bytes.
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` once it is complete; until then, and on any error, `path` is unchanged.

    Raises:
        RedflagError: When the operating system refuses (no space, no permission).
    """
    path = Path(path)
    # Not `tempfile`: only the owner can read its files, and a server may run as another user.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RedflagError(
            f"cannot write {path} ({error.strerror or error}). Nothing was saved; an older file of that name is "
            "unchanged. Free space or fix the permissions, and repeat."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder that replaces `folder` once it is complete; until then, and on any error, `folder` stays."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        new = Path(work) / "new"
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, Path(work) / "old")
        os.replace(new, folder)


def keep_json(path: str | os.PathLike[str], record: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes a result with the inputs that it was made from, atomically; `kept_json` reads it back.

    Raises:
        RedflagError: As `atomic_write`.
    """
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=indent).encode())


def kept_json(path: str | os.PathLike[str], **made_of: Any) -> dict[str, Any] | None:
    """The record written by `keep_json`, if it was made from the same inputs; None if it is missing or outdated.

    `made_of` are entries that the record must have, as JSON gives them back (lists, not tuples).
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or incomplete
        return None
    same = isinstance(record, dict) and all(key in record and record[key] == made_of[key] for key in made_of)
    return record if same else None


def require_writable(path: str | os.PathLike[str], option: str, *, file: bool = False) -> None:
    """Refuses a path that cannot be written, before any work is done.

    Args:
        path: A folder for files, which need not exist yet and is not created; or with `file` a file.
        option: The option that names it.

    Raises:
        RedflagError: The folder cannot be made, or no file can be written in it.
    """
    folder = Path(path).absolute().parent if file else Path(path).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    reason = "" if existing.is_dir() else f"{existing} is a file"
    try:
        if not reason:
            with tempfile.TemporaryFile(dir=existing):
                pass
    except OSError as error:
        reason = f"{existing}: {error.strerror or error}"
    if reason:
        raise RedflagError(f"{path} cannot be written ({reason}). Choose another {option}, or fix that.")


def append_line(
    path: str | os.PathLike[str], line: bytes, *, lock: bool = False, sync: bool = False, mode: int = 0o600
) -> None:
    """Appends a line in one write.

    Args:
        line: Ends in a newline. If empty, the file is only opened.
        lock: One writer at a time, if `LOCKS`. Without it, a writer that reads the last byte while another one writes
            may put an empty line between two.
        sync: Return only when the line is on disk.
        mode: Permissions of a new file, less the umask; by default only its owner can read it.

    Raises:
        OSError: It was not written completely.
    """
    descriptor = os.open(path, _APPEND, mode)
    try:
        if lock:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released with the descriptor
        if line and os.fstat(descriptor).st_size:
            os.lseek(descriptor, -1, os.SEEK_END)
            if os.read(descriptor, 1) != b"\n":
                line = b"\n" + line  # This line must not be joined to one that was cut off.
        written = os.write(descriptor, line) if line else 0
        if written != len(line):
            raise OSError(f"{written} of {len(line)} bytes could be written")
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
