"""Lines of output computed by one or many processes, in chunks that a kill neither loses nor repeats.

A chunk is a fixed span of rows, and chunk k belongs to process k mod n. So the batches inside it are the same wherever
a run was interrupted, and the output is byte for byte that of one process (on equal machines, with as many threads
each: rounding depends on both). The processes share only files:

    <output>.parts/00007-...   the lines of chunk 7, renamed to this when complete; chunk size and fingerprint follow
    <output>.parts/process-1   locked by process 1 while it works on this output

Process 0 joins the chunks. The operating system releases the lock of a process that dies: process 0 then computes its
missing chunks, and the others notice if process 0 is gone.
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
"""The lines, without line ends, of rows `start` to `stop`: one per row."""

_POLL = 0.2  # seconds


def kept_in(output: Path) -> Path:
    """The folder of an unfinished run's chunks."""
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
    """Writes one line per row, in order, and continues an interrupted run.

    Args:
        lines: Called with spans that begin at a multiple of `chunk`.
        chunk: Rows that are kept or lost as one.
        fingerprint: Hash of all inputs of the lines. Chunks with another one are deleted.
        world: This process and the others; None: from the environment.
        patience: Seconds to wait for a process that has not started; one that has died is not waited for.

    Returns:
        Whether this process has written `output`: True in process 0 alone; the others return once it has.

    Raises:
        RedflagError: The operating system refuses to write, or process 0 is gone.
        KeyboardInterrupt: The message names the folder of the chunks.
    """
    run = _Run(output, total, lines, chunk, fingerprint, world or World.here(), patience)
    folder = run.folder
    try:
        return run.lead() if run.world.rank == 0 else run.follow()
    except FileNotFoundError as error:
        raise RedflagError(f"{folder} was removed during the run. Repeat the command.") from error
    except OSError as error:
        raise RedflagError(
            f"{output} cannot be written ({error.strerror or error}). Scored rows are kept in {folder}: fix the cause "
            "and repeat the command to continue."
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; scored rows are kept in {folder}: repeat the command to continue"
        ) from None


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
    seen: set[int] = field(default_factory=lambda: {0})  # processes that have worked at any time
    working: set[int] = field(default_factory=set)  # processes at work now, without process 0

    def __post_init__(self) -> None:
        self.folder, self.mark = kept_in(self.output), self.fingerprint[:12]

    def lead(self) -> bool:
        """Process 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock() as mine:
            if not mine:
                raise RedflagError(f"another run is writing {self.output}. Wait for it, or give another name.")
            self._begin()
            try:
                with Progress("scoring", self.total, "rows", self._done()) as progress:
                    while self._unfinished(progress) or self._damaged():
                        pass
            finally:
                if self.world.size == 1 and not self._parts():
                    shutil.rmtree(self.folder)
            os.replace(self.folder / "merged", self.output)
            # Removed in one step: half a folder must not be taken for unfinished work.
            removed = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}")
            os.rename(self.folder, removed)
            shutil.rmtree(removed, ignore_errors=True)
        return True

    def follow(self) -> bool:
        """All others."""
        while not self._works(0):
            if time.monotonic() - self.started > self.patience:
                raise RedflagError(
                    f"process 0 of {self.world.size} has not begun to write {self.output} for {self.patience:g} s. "
                    "Check whether it runs, and give all processes the same options."
                )
            time.sleep(_POLL)
        try:
            while self._works(0):
                # A process of an earlier launch, whose process 0 was killed, may still hold this one's lock.
                with self._lock() as mine:
                    while mine and self._works(0):
                        self._adopt_size()
                        self._work([number for number in self._missing() if self._owner(number) == self.world.rank])
                        time.sleep(_POLL)
        except (FileNotFoundError, RedflagError):
            if self.folder.exists():
                raise
        if self.folder.exists():
            raise RedflagError(
                f"process 0 ended before {self.output} was complete. Scored rows are kept in {self.folder}: repeat the "
                "command to continue."
            )
        return False

    def _begin(self) -> None:
        """Deletes chunks of other inputs, and what killed runs have left."""
        if others := [path for path in self._parts() if not path.name.endswith(self.mark)]:
            print(f"{self.folder} was begun with other rows, settings or another model: starting over", file=sys.stderr)
        for path in others:
            path.unlink()
        self._adopt_size()
        for removed in self.folder.parent.glob(f".{self.folder.name}.*"):  # by a run that was killed at its very end
            shutil.rmtree(removed, ignore_errors=True)
        if done := self._done():
            print(f"continuing {self.folder}: {done} of {self.total} rows are there", file=sys.stderr)

    def _adopt_size(self) -> None:
        """Takes over the size of the chunks that are there already."""
        sizes = {int(path.name.split("-")[1]) for path in self._parts() if path.name.endswith(self.mark)}
        self.chunk = min(sizes, default=self.chunk)

    def _unfinished(self, progress: Progress) -> bool:
        """Computes chunks of process 0 and of processes that ended; True while there are chunks to wait for."""
        self._look(progress)
        late = time.monotonic() - self.started > self.patience
        missing = self._missing()
        if mine := [k for k in missing if self._owner(k) not in self.working and (late or self._owner(k) in self.seen)]:
            self._work(mine, progress)
            return True
        absent = set(range(self.world.size)) - self.seen
        if missing or (absent and not late):
            # A process that starts after the chunks were joined would find none, and begin again.
            time.sleep(_POLL)
            return True
        for rank in absent:
            print(f"process {rank} of {self.world.size} did not start: finishing without it", file=sys.stderr)
        return False

    def _look(self, progress: Progress) -> None:
        """Updates which of the others are at work, and shows how far all are."""
        self.working = {rank for rank in range(1, self.world.size) if self._works(rank)}
        self.seen |= self.working
        progress(self._done(), f"{self.world.size} processes" if self.world.size > 1 else "")

    def _work(self, numbers: list[int], progress: Progress | None = None) -> None:
        """Computes chunks. Consecutive ones are requested as one span, so that no server idles between them."""
        for _, group in groupby(enumerate(numbers), lambda item: item[1] - item[0]):
            run = [number for _, number in group]
            lines = self.lines(self._span(run[0]).start, self._span(run[-1]).stop)
            for number in run:
                rows = len(self._span(number))
                part = list(islice(lines, rows))
                assert len(part) == rows, f"{len(part)} lines for {rows} rows"
                with atomic_write(self._part(number)) as file:
                    file.writelines(line.encode() + b"\n" for line in part)
                # Once a chunk: its lines come together, so the first alone would seem to take as long as all of them.
                if progress is not None:
                    self._look(progress)

    def _damaged(self) -> bool:
        """Joins the chunks, or deletes a damaged one and returns True."""
        with atomic_write(self.folder / "merged") as file:
            for number in range(self._count):
                part = self._part(number)
                data = part.read_bytes()
                # It was complete when it was written, so it was changed from outside.
                if data.count(b"\n") != len(self._span(number)) or not data.endswith(b"\n"):
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
        # Size and inputs are in the name, so that a process of an earlier launch cannot add chunks of other ones.
        return self.folder / f"{number:05}-{self.chunk}-{self.mark}"

    def _missing(self) -> list[int]:
        names = set(os.listdir(self.folder))
        return [number for number in range(self._count) if self._part(number).name not in names]

    def _done(self) -> int:
        """Number of rows in complete chunks."""
        return self.total - sum(len(self._span(number)) for number in self._missing())

    def _span(self, number: int) -> range:
        return range(number * self.chunk, min((number + 1) * self.chunk, self.total))

    def _owner(self, number: int) -> int:
        return number % self.world.size

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Locks this process's number, until the block ends or the process dies; False if another one has it."""
        if not LOCKS and self.world.size == 1:
            yield True
            return
        with open(self._lock_file(self.world.rank), "ab") as file:
            tries = 20  # Others test the lock by taking it for a moment.
            while not (mine := _flock(file, alone=self.world.size == 1)) and (tries := tries - 1):
                time.sleep(_POLL / 2)
            yield mine

    def _works(self, rank: int) -> bool:
        """Whether that process is at work."""
        try:
            with open(self._lock_file(rank), "rb") as file:
                # Shared: two processes that test at the same time must not block each other.
                return not _flock(file, shared=True)
        except FileNotFoundError:
            return False

    def _lock_file(self, rank: int) -> Path:
        return self.folder / f"process-{rank}"


def _flock(file: BinaryIO, *, shared: bool = False, alone: bool = False) -> bool:
    """Tries to lock a file; a process that is `alone` needs no lock if there are none."""
    if not LOCKS:
        reason = "this operating system has no file locks as Linux and macOS have"
    else:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            reason = f"{file.name} is on a file system without locks ({error.strerror})"
    if alone:
        return True
    raise RedflagError(f"{reason}, which several processes need. Use one process, or another folder.")
