"""Lines appended to a file that others may be appending to."""

from __future__ import annotations

import os
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCKS = fcntl is not None  # whether this system has the locks that `append_line(lock=True)` needs

# In text mode Windows would write \r\n for \n, and count other bytes than it was given.
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def append_line(path: str | os.PathLike[str], line: bytes, *, lock: bool = False, sync: bool = False) -> None:
    """Hands a line over in one piece; a file that is made for it is its owner's alone.

    Args:
        path: The file.
        line: Ends in a newline. Empty: the file is only opened.
        lock: One writer at a time, where `LOCKS`. Without it, a writer that reads the last byte while another one
            writes may put an empty line between two.
        sync: Return when the disk has it.

    Raises:
        OSError: It did not arrive whole.
    """
    descriptor = os.open(path, _APPEND, 0o600)
    try:
        if lock:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # goes with the descriptor
        if line and os.fstat(descriptor).st_size:
            os.lseek(descriptor, -1, os.SEEK_END)
            if os.read(descriptor, 1) != b"\n":
                line = b"\n" + line  # A line that was cut off must not swallow this one.
        written = os.write(descriptor, line) if line else 0
        if written != len(line):
            raise OSError(f"{written} of {len(line)} bytes could be written")
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
