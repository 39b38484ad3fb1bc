"""Lines of output that many processes work out together, in chunks that a kill neither loses nor repeats.

A chunk is a fixed span of rows, whoever works on it and wherever a run was broken off; so the batches inside are the
same too, and the output is byte for byte that of one process (on equal machines, with as many threads each: rounding
depends on both). Files are all that processes share:

    <output>.parts/run.json     what is being made, and which launch makes it; written by process 0
    <output>.parts/leader       locked by process 0 for as long as it lives
    <output>.parts/00007.claim  locked by the process that works on chunk 7
    <output>.parts/00007-...    the lines of chunk 7; takes this name, which says of what, once they are complete
    <output>.parts/here-1       process 1 has come to this launch

The operating system takes a lock away from a process that dies, so a dead process's chunk is free for the others at
once, and nobody waits for it. Process 0 puts the chunks together. A single process needs no folder: it appends to
`<output>.partial`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from redflag.errors import RedflagError
from redflag.files import atomic_write
from redflag.progress import Progress
from redflag.scoring.partial import Lines, append_lines, read_json, resume, side_of
from redflag.scoring.processes import World

_POLL = 0.2  # seconds between two looks at what the others have done
_SAY = 30.0  # seconds between two words about waiting


def kept_in(output: Path, world: World) -> Path:
    """Where an unfinished run keeps its work: a file of one process, a folder of several."""
    folder = output.with_name(output.name + ".parts")
    return folder if world.size > 1 or folder.is_dir() else output.with_name(output.name + ".partial")


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
    world = world or World.here()
    kept = kept_in(output, world)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if kept.suffix == ".parts":
            return _Together(output, kept, total, lines, chunk, fingerprint, world, patience).run()
        append_lines(output, kept, total, lines, chunk, fingerprint)
        return True
    except OSError as error:
        raise RedflagError(
            f"{output} cannot be written ({error.strerror or error}): what has been scored is kept in {kept}; mend "
            "the cause and give the same command again to continue"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on from what is kept in {kept}") from None


class _FinishedError(Exception):
    """Process 0 has put everything together."""


class _Together:
    """One run of one process among several."""

    def __init__(
        self,
        output: Path,
        folder: Path,
        total: int,
        lines: Lines,
        chunk: int,
        fingerprint: str,
        world: World,
        patience: float,
    ) -> None:
        self.output, self.folder, self.total, self.lines = output, folder, total, lines
        self.chunk, self.fingerprint, self.world, self.patience = chunk, fingerprint, world, patience
        self.partial = output.with_name(output.name + ".partial")
        self.launch = ""

    def run(self) -> bool:
        if self.world.rank == 0:
            try:
                self.folder.mkdir(exist_ok=True)
                with self._lead():
                    self._begin()
                    self._work()
                    self._await_arrivals()
                    self._merge()
            except _FinishedError:
                raise RedflagError(
                    f"{self.folder} was removed while it was worked in, so nothing is kept: give the command again"
                ) from None
            return True
        try:
            self._join()
            self._work()
            while True:  # The work is done: process 0 puts it together.
                self._greet()
                time.sleep(_POLL)
        except _FinishedError:
            return False

    # Process 0

    @contextmanager
    def _lead(self) -> Iterator[None]:
        # The others look whether there is a process 0 by trying its lock, for an instant now and then.
        for _ in range(20):
            with _lock(self.folder / "leader") as mine:
                if mine:
                    yield
                    return
            time.sleep(_POLL / 2)
        raise RedflagError(
            f"another run is writing {self.output}, and two would spoil each other's work: wait for it, or give "
            "another name"
        )

    def _begin(self) -> None:
        """Takes over what is there and fits, throws away the rest, and opens the launch."""
        mine = list(self.folder.glob(f"*-*-{self.fingerprint[:12]}"))
        if mine:
            self.chunk = int(mine[0].name.split("-")[1])
        else:
            if any(self.folder.glob("*-*-*")):
                said = f"{self.folder} was begun with other rows, settings or another model: starting over"
                print(said, file=sys.stderr)
            for path in self.folder.iterdir():
                if path.name not in ("leader", "run.json"):  # Others look at these all the time.
                    path.unlink(missing_ok=True)
            self._adopt()
        for gone in self.folder.parent.glob(f".{self.folder.name}.*"):  # of a run that was killed at its very end
            shutil.rmtree(gone, ignore_errors=True)
        if done := self._there():
            print(f"continuing {self.folder}: {done} of {self.total} rows are there", file=sys.stderr)
        self.launch = uuid.uuid4().hex
        with atomic_write(self.folder / "run.json") as file:
            words = {"fingerprint": self.fingerprint, "chunk": self.chunk, "rows": self.total, "launch": self.launch}
            file.write(json.dumps(words).encode())
        self.partial.unlink(missing_ok=True)
        side_of(self.partial).unlink(missing_ok=True)

    def _adopt(self) -> None:
        """Takes over what a single process has kept."""
        if not self.partial.exists():
            return
        done = resume(self.partial, self.fingerprint, self.total, self.chunk)
        with suppress(FileNotFoundError), self.partial.open("rb") as file:
            for number in range(-(-done // self.chunk)):
                with atomic_write(self._part(number)) as part:
                    part.writelines(islice(file, len(self._span(number))))

    def _await_arrivals(self) -> None:
        """A process that came after all is done would find nothing, and begin anew."""
        started = said = time.monotonic()
        while True:
            late = [rank for rank in range(1, self.world.size) if self._here(rank) != self.launch]
            now = time.monotonic()
            if not late:
                return
            if now - started > self.patience:
                print(f"process {late[0]} of {self.world.size} never came: finishing without it", file=sys.stderr)
                return
            if now - said > _SAY:
                said = now
                print(f"all is scored; waiting for process {late[0]} of {self.world.size} to begin", file=sys.stderr)
            time.sleep(_POLL)

    def _merge(self) -> None:
        while not self._put_together():
            self._work()
        os.replace(self.folder / "merged", self.output)
        # Gone in one step: nobody may find half a folder and take it for unfinished work.
        gone = self.folder.with_name(f".{self.folder.name}.{self.launch}")
        os.rename(self.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _put_together(self) -> bool:
        with atomic_write(self.folder / "merged") as file:
            for number in range(self._count):
                data = self._part(number).read_bytes()
                if data.count(b"\n") != len(self._span(number)) or not data.endswith(b"\n"):
                    # It was complete when it was written, so a disk or a hand has done this.
                    print(f"{self._part(number)} is damaged: its rows are scored again", file=sys.stderr)
                    self._part(number).unlink()
                    return False
                file.write(data)
        return True

    # All others

    def _join(self) -> None:
        """Waits until process 0 has opened the launch."""
        started = said = time.monotonic()
        while True:
            begun = read_json(self.folder / "run.json")
            if begun.get("fingerprint") == self.fingerprint and self._led():
                self._greet()
                return
            now = time.monotonic()
            if now - started > self.patience:
                raise RedflagError(
                    f"process 0 of {self.world.size} has not begun to write {self.output} for {self.patience:g} s, "
                    "so there is nothing to join: see what became of it, and give all processes the same options"
                )
            if now - said > _SAY:
                said = now
                print(f"process {self.world.rank} waits for process 0 to begin", file=sys.stderr)
            time.sleep(_POLL)

    def _greet(self) -> None:
        """Tells process 0 of this one, once per launch; finds out whether process 0 is done, or gone."""
        begun = read_json(self.folder / "run.json")
        if begun and begun["fingerprint"] != self.fingerprint:
            raise RedflagError(f"another run has begun to write {self.output}: wait for it, or give another name")
        if begun and begun["launch"] != self.launch:
            self.chunk = begun["chunk"]
            # If this fails, process 0 is just clearing up, or gone: the next time will show.
            with suppress(RedflagError), atomic_write(self.folder / f"here-{self.world.rank}") as file:
                file.write(begun["launch"].encode())
            self.launch = self._here(self.world.rank) or ""
        if not self._led():
            if not self.folder.exists():
                raise _FinishedError
            raise RedflagError(
                f"process 0 ended before it had put {self.output} together: what has been scored is kept in "
                f"{self.folder}; give the same command again to continue"
            )

    def _led(self) -> bool:
        """Whether a process 0 lives."""
        try:
            # Shared: else two who look at the same time would take each other for process 0.
            with _lock(self.folder / "leader", look=True) as free:
                return not free
        except FileNotFoundError:
            return False

    # Everybody

    def _work(self) -> None:
        """Works on whatever nobody else works on, until all chunks are there."""
        with Progress("scoring", self.total, "rows", self._there()) as progress:
            while missing := self._missing():
                worked = False
                for number in missing:
                    if self.world.rank:
                        self._greet()
                    worked |= self._try(number)
                    if self.world.rank == 0:
                        progress(self._there(), f"{self.world.size} processes")
                if not worked:
                    time.sleep(_POLL)

    def _there(self) -> int:
        return self.total - sum(len(self._span(number)) for number in self._missing())

    def _try(self, number: int) -> bool:
        """Makes a chunk, unless it is there or another process is at it."""
        part, claim = self._part(number), self.folder / f"{number:05}.claim"
        if part.exists():
            return False
        try:
            with _lock(claim) as mine:
                if not mine or part.exists():
                    return False
                span = self._span(number)
                with atomic_write(part) as file:
                    for line in self.lines(span.start, span.stop):
                        file.write(line.encode() + b"\n")
                claim.unlink(missing_ok=True)
                return True
        except FileNotFoundError:
            if self.folder.exists():
                raise
            raise _FinishedError from None

    @property
    def _count(self) -> int:
        return -(-self.total // self.chunk)

    def _missing(self) -> list[int]:
        try:
            there = set(os.listdir(self.folder))
        except FileNotFoundError:
            raise _FinishedError from None
        return [number for number in range(self._count) if self._part(number).name not in there]

    def _part(self, number: int) -> Path:
        # By its name, so that a process that outlived its launch cannot put its work among that of another one.
        return self.folder / f"{number:05}-{self.chunk}-{self.fingerprint[:12]}"

    def _span(self, number: int) -> range:
        return range(number * self.chunk, min((number + 1) * self.chunk, self.total))

    def _here(self, rank: int) -> str | None:
        try:
            return (self.folder / f"here-{rank}").read_text(encoding="utf-8")
        except OSError:
            return None


@contextmanager
def _lock(path: Path, *, look: bool = False) -> Iterator[bool]:
    """Tries to lock a file; the lock ends with the block, or with the process.

    Args:
        path: The file; it is made where it is missing, unless one only looks.
        look: Keep nobody out but a process that wants the lock for itself.

    Yields:
        Whether it is ours.
    """
    try:
        import fcntl
    except ImportError as error:
        raise RedflagError(
            "this operating system has no file locks as Linux and macOS have, by which several processes divide their "
            "work: use one process"
        ) from error
    with open(path, "rb" if look else "ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise RedflagError(
                f"{path.parent} is on a file system without locks ({error.strerror}), by which several processes "
                "divide their work: give an output on another one, or use one process"
            ) from error
        yield True
