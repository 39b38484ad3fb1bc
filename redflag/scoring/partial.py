"""Lines of output that one process appends to a file, and goes on with after it was interrupted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from redflag.progress import Progress

Lines = Callable[[int, int], Iterator[str]]
"""The lines, without their ends, of rows `start` to `stop`: one per row."""


def append_lines(output: Path, partial: Path, total: int, lines: Lines, chunk: int, fingerprint: str) -> None:
    """Writes one line per row to `partial`, after those that are there, and renames it once it is complete.

    Args:
        output: The name that the complete file takes.
        partial: Where the lines go.
        total: Number of rows.
        lines: Gives the lines of a span of rows.
        chunk: What is there is cut to a multiple of so many rows.
        fingerprint: Of all that the lines depend on.
    """
    try:
        done = resume(partial, fingerprint, total, chunk)
        with partial.open("a", encoding="utf-8") as file, Progress("scoring", total, "rows", done) as progress:
            for line in lines(done, total):
                file.write(line + "\n")
                file.flush()
                progress(done := done + 1)
            os.fsync(file.fileno())
        os.replace(partial, output)
        side_of(partial).unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            if not partial.stat().st_size:  # Nothing was scored, so there is nothing to go on with.
                partial.unlink()
                side_of(partial).unlink()


def side_of(partial: Path) -> Path:
    """Where it is said what `partial` is a part of."""
    return partial.with_name(partial.name + ".json")


def resume(partial: Path, fingerprint: str, total: int, chunk: int) -> int:
    """Number of rows that an interrupted run with the same fingerprint has left in `partial`: whole chunks, or all."""
    side = side_of(partial)
    if partial.exists():
        if read_json(side).get("fingerprint") == fingerprint:
            # A kill can leave half a line at the end, and half a chunk, whose batches would not be the same again.
            ends = [0]
            with partial.open("rb+") as file:
                for line in islice(file, total):
                    if not line.endswith(b"\n"):
                        break
                    ends.append(ends[-1] + len(line))
                done = len(ends) - 1
                done = done if done == total else done // chunk * chunk
                file.truncate(ends[done])
            if done:
                print(f"continuing {partial}: {done} of {total} rows are there", file=sys.stderr)
            return done
        print(f"{partial} was begun with other rows, settings or another model: starting over", file=sys.stderr)
        partial.unlink()
    temporary = side.with_name(side.name + ".tmp")
    temporary.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
    os.replace(temporary, side)
    return 0


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
