"""Progress and remaining time of a stage, on stderr: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import progress as bars
from rich.console import Console

Item = TypeVar("Item")

# Shared: of two consoles on one screen each would overwrite the other's bars.
_CONSOLE = Console(stderr=True)

_AFTER = 2.0  # seconds; a stage that ends sooner shows nothing
_REDRAWN = 0.1  # seconds between two states of a bar
_LOGGED = 30.0  # seconds between two lines in a log


def on_terminal() -> bool:
    """Whether progress is a bar, not lines."""
    return _CONSOLE.is_terminal and not _CONSOLE.is_dumb_terminal


class Progress:
    """One stage. Lines printed meanwhile stand above its bar.

    Args:
        what: Name of the stage.
        total: Number of `unit`s; None: unknown.
        unit: What is counted.
        begin: Number that was done before, in no time.

    Example:
        >>> with Progress("reading", 2, "rows") as progress:
        ...     for done in (1, 2):
        ...         progress(done)
    """

    def __init__(self, what: str, total: int | None, unit: str, begin: int = 0) -> None:
        self.what = what
        self._total, self._unit, self._begin = total, unit, begin
        self._done, self._note, self._ended = begin, "", False
        self._start = self._shown = time.monotonic()
        self._bar: bars.Progress | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finished=kind is None)

    def __call__(self, done: int, note: str = "") -> None:
        """Reports how many are done, and a note to show beside it."""
        self._done, self._note = done, note
        if self._total is not None and done >= self._total:
            self.close()
            return
        now = time.monotonic()
        due = now - self._shown >= (_REDRAWN if on_terminal() else _LOGGED)
        if due and done > self._begin and now - self._start >= _AFTER and not self._ended:
            self._shown = now
            self._show()

    def close(self, finished: bool = True) -> None:
        """Ends the stage: its last line says how long it took, unless it was interrupted or never began."""
        silent = self._ended or not finished or self._done <= self._begin
        self._ended = True
        if not silent and time.monotonic() - self._start >= _AFTER:
            self._show()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self) -> str:
        spent = time.monotonic() - self._start
        total = "" if self._total is None else f"/{self._total:,}"
        parts = [f"{self.what}: {self._done:,}{total} {self._unit}"]
        if self._ended:
            parts.append(_duration(spent))
        elif self._total is not None:
            parts.append(f"{_duration(spent / (self._done - self._begin) * (self._total - self._done))} left")
        return ", ".join([*parts, *([self._note] if self._note else [])])

    def _show(self) -> None:
        if not on_terminal():
            print(self._line(), file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._bar = bars.Progress(
                bars.BarColumn(20),
                bars.TextColumn("{task.description}", markup=False),
                console=_CONSOLE,
                auto_refresh=False,
                # Results that go to a file or a pipe must not end on the screen.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._bar.add_task(self._line(), total=self._total, completed=self._done)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self._done, description=self._line(), refresh=True)


def track(items: Iterable[Item], what: str, total: int, unit: str, together: int = 1) -> Iterator[Item]:
    """Yields the items, and shows how many are done.

    Args:
        together: How many are made at a time. Counted in between, the first of them would seem to have taken as long as
            all.
    """
    with Progress(what, total, unit) as progress:
        for done, item in enumerate(items, 1):
            yield item
            if done % together == 0 or done >= total:
                progress(done)


def _duration(seconds: float) -> str:
    """
    >>> _duration(48), _duration(600), _duration(9000)
    ('48 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
