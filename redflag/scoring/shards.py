"""Lines of output worked out by one or many processes, in chunks that a kill neither loses nor repeats.

A chunk is a fixed span of rows, and chunk k belongs to process k mod n. So the batches inside it are the same wherever
a run was broken off, and the output is byte for byte that of one process (on equal machines, with as many threads each:
rounding depends on both). Files are all that processes share:

    <output>.parts/00007-...   the lines of chunk 7; takes this name, which says of what, once they are complete
    <output>.parts/process-1   locked by process 1 for as long as it works for this output

Process 0 puts the chunks together. The operating system takes a lock away from a process that dies: process 0 then
works on the chunks that the dead one has left, and the others see that process 0 is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

from redflag.errors import RedflagError
from redflag.files import LOCKS, atomic_write, fcntl
from redflag.progress import Progress
from redflag.scoring.processes import World

Lines = Callable[[int, int], Iterator[str]]
"""The lines, without their ends, of rows `start` to `stop`: one per row."""

_POLL = 0.2  # seconds between two looks at what the others have done


def kept_in(output: Path) -> Path:
    """The folder in which an unfinished run keeps its work."""
    return output.with_name(output.name + ".parts")


def write_lines(
    output: Path,
    total: int,
    lines: Lines,
    *,
    chunk: int,
    fingerprint: str,
    world: World | None = None,
    patience: float = 600.0,
) -> bool:
    """Writes one line per row, in order, and goes on where an interrupted run has stopped.

    Args:
        output: The file; it takes its name only once it is complete.
        total: Number of rows.
        lines: Gives the lines (without their ends) of a span of rows. A span begins at a multiple of `chunk`.
        chunk: Rows that are kept or lost as one.
        fingerprint: Of all that the lines depend on. What was kept under another one is thrown away.
        world: This process and the others; None asks the environment.
        patience: Seconds to wait for a process that has not begun. One that has begun and died is not waited for.

    Returns:
        Whether this process has written `output`. True in process 0 alone; the others return once it has.

    Raises:
        RedflagError: The operating system refuses to write, or process 0 is gone.
        KeyboardInterrupt: With a word on where the work is kept.
    """
    run = _Run(output, total, lines, chunk, fingerprint, world or World.here(), patience)
    folder = run.folder
    try:
        return run.lead() if run.world.rank == 0 else run.follow()
    except FileNotFoundError as error:
        raise RedflagError(f"{folder} was removed while it was worked in: give the same command again") from error
    except OSError as error:
        raise RedflagError(
            f"{output} cannot be written ({error.strerror or error}): what has been scored is kept in {folder}; fix "
            "the cause and give the same command again to continue"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on from what is kept in {folder}") from None


@dataclass
class _Run:
    """One process's part."""

    output: Path
    total: int
    lines: Lines
    chunk: int
    fingerprint: str
    world: World
    patience: float
    started: float = field(default_factory=time.monotonic)
    come: set[int] = field(default_factory=lambda: {0})  # processes that were seen at work
    working: set[int] = field(default_factory=set)  # and those that are, but for process 0

    def __post_init__(self) -> None:
        self.folder, self.mark = kept_in(self.output), self.fingerprint[:12]

    def lead(self) -> bool:
        """Process 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock() as mine:
            if not mine:
                raise RedflagError(
                    f"another run is writing {self.output}, and two would spoil each other's work: wait for it, or "
                    "give another name"
                )
            self._begin()
            try:
                with Progress("scoring", self.total, "rows", self._there()) as progress:
                    while self._left(progress) or self._damaged():
                        pass
            finally:
                if self.world.size == 1 and not self._parts():
                    shutil.rmtree(self.folder)  # Nothing was scored, so there is nothing to go on with.
            os.replace(self.folder / "merged", self.output)
            # Gone in one step: half a folder must not be taken for unfinished work.
            gone = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}")
            os.rename(self.folder, gone)
            shutil.rmtree(gone, ignore_errors=True)
        return True

    def follow(self) -> bool:
        """All others."""
        started = time.monotonic()
        while not self._works(0):
            if time.monotonic() - started > self.patience:
                raise RedflagError(
                    f"process 0 of {self.world.size} has not begun to write {self.output} for {self.patience:g} s, so "
                    "there is nothing to join: see what became of it, and give all processes the same options"
                )
            time.sleep(_POLL)
        try:
            while self._works(0):
                # One of an earlier launch, whose process 0 was killed, may still be at work in this one's place.
                with self._lock() as mine:
                    while mine and self._works(0):
                        self._adopt()
                        self._work([number for number in self._missing() if self._owner(number) == self.world.rank])
                        time.sleep(_POLL)
        except (FileNotFoundError, RedflagError):
            if self.folder.exists():
                raise
        if self.folder.exists():
            raise RedflagError(
                f"process 0 ended before it had put {self.output} together: what has been scored is kept in "
                f"{self.folder}; give the same command again to continue"
            )
        return False

    def _begin(self) -> None:
        """Throws away what does not fit."""
        if others := [path for path in self._parts() if not path.name.endswith(self.mark)]:
            print(f"{self.folder} was begun with other rows, settings or another model: starting over", file=sys.stderr)
        for path in others:
            path.unlink()
        self._adopt()
        for gone in self.folder.parent.glob(f".{self.folder.name}.*"):  # of a run that was killed at its very end
            shutil.rmtree(gone, ignore_errors=True)
        if done := self._there():
            print(f"continuing {self.folder}: {done} of {self.total} rows are there", file=sys.stderr)

    def _adopt(self) -> None:
        """Goes on with the chunks that were begun, whatever their size."""
        sizes = {int(path.name.split("-")[1]) for path in self._parts() if path.name.endswith(self.mark)}
        self.chunk = min(sizes, default=self.chunk)

    def _left(self, progress: Progress) -> bool:
        """Works on what is process 0's own, or was left by others; whether there is still something to wait for."""
        self._look(progress)
        late = time.monotonic() - self.started > self.patience
        missing = self._missing()
        if mine := [k for k in missing if self._owner(k) not in self.working and (late or self._owner(k) in self.come)]:
            self._work(mine, progress)
            return True
        absent = set(range(self.world.size)) - self.come
        if missing or (absent and not late):
            # One that came after all is put together would find nothing, and begin anew.
            time.sleep(_POLL)
            return True
        for rank in absent:
            print(f"process {rank} of {self.world.size} never came: finishing without it", file=sys.stderr)
        return False

    def _look(self, progress: Progress) -> None:
        """Which of the others are at work, and how far all are."""
        self.working = {rank for rank in range(1, self.world.size) if self._works(rank)}
        self.come |= self.working
        progress(self._there(), f"{self.world.size} processes" if self.world.size > 1 else "")

    def _work(self, numbers: list[int], progress: Progress | None = None) -> None:
        """Makes chunks. Those that follow each other are asked for as one, so that no server waits between them."""
        for _, group in groupby(enumerate(numbers), lambda item: item[1] - item[0]):
            run = [number for _, number in group]
            lines = self.lines(self._span(run[0]).start, self._span(run[-1]).stop)
            for number in run:
                there, rows, done = self._there(), len(self._span(number)), 0
                with atomic_write(self._part(number)) as file:
                    for done, line in enumerate(islice(lines, rows), 1):
                        file.write(line.encode() + b"\n")
                        if progress is not None and self.world.size == 1:
                            progress(there + done)
                    assert done == rows, f"{done} lines for {rows} rows"
                if progress is not None:
                    self._look(progress)

    def _damaged(self) -> bool:
        """Puts the chunks together, unless one of them is damaged, which then has to be made again."""
        with atomic_write(self.folder / "merged") as file:
            for number in range(self._count):
                part = self._part(number)
                data = part.read_bytes()
                if data.count(b"\n") != len(self._span(number)) or not data.endswith(b"\n"):
                    # It was complete when it was written, so a disk or a hand has done this.
                    print(f"{part} is damaged: its rows are scored again", file=sys.stderr)
                    part.unlink()
                    return True
                file.write(data)
        return False

    @property
    def _count(self) -> int:
        return -(-self.total // self.chunk)

    def _parts(self) -> list[Path]:
        return [self.folder / name for name in os.listdir(self.folder) if re.fullmatch(r"\d{5,}-\d+-\w+", name)]

    def _part(self, number: int) -> Path:
        # By its name, so that a process that outlived its launch cannot put its work among that of another one.
        return self.folder / f"{number:05}-{self.chunk}-{self.mark}"

    def _missing(self) -> list[int]:
        there = set(os.listdir(self.folder))
        return [number for number in range(self._count) if self._part(number).name not in there]

    def _there(self) -> int:
        return self.total - sum(len(self._span(number)) for number in self._missing())

    def _span(self, number: int) -> range:
        return range(number * self.chunk, min((number + 1) * self.chunk, self.total))

    def _owner(self, number: int) -> int:
        return number % self.world.size

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Whether this process is the only one of its number; until the block ends, or the process dies."""
        if not LOCKS and self.world.size == 1:
            yield True
            return
        with open(self._locked(self.world.rank), "ab") as file:
            tries = 20  # The others look whether it is locked by locking it, for an instant now and then.
            while not (mine := _flock(file, alone=self.world.size == 1)) and (tries := tries - 1):
                time.sleep(_POLL / 2)
            yield mine

    def _works(self, rank: int) -> bool:
        """Whether that process is at work."""
        try:
            with open(self._locked(rank), "rb") as file:
                # Shared: else two that look at the same time would take each other for that process.
                return not _flock(file, look=True)
        except FileNotFoundError:
            return False

    def _locked(self, rank: int) -> Path:
        return self.folder / f"process-{rank}"


def _flock(file: BinaryIO, *, look: bool = False, alone: bool = False) -> bool:
    """Tries to lock a file; a process that is alone does without where there are no locks."""
    if not LOCKS:
        reason = "this operating system has no file locks as Linux and macOS have"
    else:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            reason = f"{file.name} is on a file system without locks ({error.strerror})"
    if alone:
        return True
    raise RedflagError(f"{reason}, by which several processes divide their work: use one process, or another folder")
