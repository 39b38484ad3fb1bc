"""Scoring by many processes: byte for byte the file of one, whoever is killed and whenever."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.scoring import shards
from redflag.scoring.processes import World
from redflag.scoring.shards import kept_in, write_lines

TOTAL, CHUNK = 23, 4
CHUNKS = -(-TOTAL // CHUNK)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_POLL", 0.01)


class KilledError(BaseException):
    """In place of SIGKILL where one process plays several."""


class Work:
    """Lines that say where their span began, and a count of the rows that were worked out."""

    def __init__(self, kill_at: int | None = None, pause: float = 0.0) -> None:
        self.kill_at, self.pause = kill_at, pause
        self.rows: list[int] = []

    def __call__(self, start: int, stop: int) -> Iterator[str]:
        assert start % CHUNK == 0, "the batches inside would not be the same again"
        for row in range(start, stop):
            if len(self.rows) == self.kill_at:
                raise KilledError
            if row % CHUNK == 0:
                time.sleep(self.pause)
            self.rows.append(row)
            yield line(row)


def line(row: int) -> str:
    # The batch that a row is scored in is that of its chunk: half a chunk anew would be another one.
    return json.dumps({"row": row, "chunk": row // CHUNK, "text": "é" * (row % 5)}, ensure_ascii=False)


EXPECTED = "".join(line(row) + "\n" for row in range(TOTAL)).encode()


def write(output: Path, work: Work, rank: int = 0, size: int = 1, **change: Any) -> bool:
    options: dict[str, Any] = {"chunk": CHUNK, "fingerprint": "f" * 64, "patience": 20.0} | change
    return write_lines(output, TOTAL, work, world=World(rank, size, rank), **options)


def launch(output: Path, works: list[Work], **change: Any) -> list[Any]:
    """All processes of one launch, as threads; what each returned or raised."""
    results: list[Any] = [None] * len(works)

    def one(rank: int) -> None:
        try:
            results[rank] = write(output, works[rank], rank, len(works), **change)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def alone_there(output: Path) -> None:
    assert output.read_bytes() == EXPECTED
    assert [path.name for path in output.parent.iterdir()] == [output.name], "something was left behind"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_file_is_the_same_for_any_number_of_processes_and_each_row_is_done_once(tmp_path: Path, size: int) -> None:
    works = [Work(pause=0.05) for _ in range(size)]
    assert launch(tmp_path / "out", works) == [rank == 0 for rank in range(size)]
    alone_there(tmp_path / "out")
    assert sorted(row for work in works for row in work.rows) == list(range(TOTAL))
    if size == 2:
        assert all(work.rows for work in works), "one of them did nothing"


@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, TOTAL), min_size=1, max_size=2), min_size=1, max_size=5))
def test_no_kill_loses_a_chunk_or_has_one_done_twice(launches: list[list[int]]) -> None:
    """Launches of one or two processes, killed at any row; then one that is left alone."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"redflag-shards-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    output = folder / "out"
    done: set[int] = set()
    for kills in launches:  # drawn before: which of two processes is the faster one is not hypothesis's to decide
        works = [Work(kill_at=row) for row in kills]
        before = chunks_there(output)
        assert done <= before, "a chunk that was done is gone"
        launch(output, works, patience=0.3)
        for work in works:
            assert not {row // CHUNK for row in work.rows} & before, "a chunk that was there was done again"
        if output.exists():
            break
        done = chunks_there(output)
    if not output.exists():
        assert launch(output, [Work(), Work()]) == [True, False]
    alone_there(output)
    shutil.rmtree(folder)


def chunks_there(output: Path) -> set[int]:
    return {int(path.name[:5]) for path in kept_in(output).glob("?????-*")}


def stopped(output: Path) -> Path:
    """A folder as a killed launch leaves it: two chunks are there."""
    with pytest.raises(KilledError):
        write(output, Work(kill_at=2 * CHUNK + 1))
    return output.with_name("out.parts")


def part(folder: Path, number: int) -> Path:
    (found,) = folder.glob(f"{number:05}-*")
    return found


def cut(by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(part(folder, 0), max(0, part(folder, 0).stat().st_size - by))


def to_a_line(folder: Path) -> None:
    path = part(folder, 0)
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")


DAMAGE: dict[str, tuple[Callable[[Path], None], int]] = {  # what happened, and the rows that are still to be done
    "nothing": (lambda folder: None, TOTAL - 2 * CHUNK),
    "a chunk without its last byte": (cut(1), TOTAL - CHUNK),
    "half a chunk": (cut(40), TOTAL - CHUNK),
    "an empty chunk": (cut(10_000), TOTAL - CHUNK),
    "a chunk cut at a line": (to_a_line, TOTAL - CHUNK),
    "a chunk is gone": (lambda folder: part(folder, 1).unlink(), TOTAL - CHUNK),
    "a half written file": (lambda folder: (folder / ".00002-x.1.2.tmp").write_text("{"), TOTAL - 2 * CHUNK),  # type: ignore[dict-item,return-value]
    "locks of the dead": (lambda folder: (folder / "process-1").touch(), TOTAL - 2 * CHUNK),
    "half a merged file": (lambda folder: (folder / "merged").write_text("{"), TOTAL - 2 * CHUNK),  # type: ignore[dict-item,return-value]
    "all is gone": (shutil.rmtree, TOTAL),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_whatever_a_kill_leaves_is_mended_and_what_is_sound_is_kept(tmp_path: Path, what: str, size: int) -> None:
    damage, left = DAMAGE[what]
    damage(stopped(tmp_path / "out"))
    works = [Work() for _ in range(size)]
    assert launch(tmp_path / "out", works) == [rank == 0 for rank in range(size)]
    alone_there(tmp_path / "out")
    assert sum(len(work.rows) for work in works) == left


@pytest.mark.parametrize(("kept", "chunks"), [(0, 0), (3, 0), (4, 1), (11, 2), (23, 6)])
def test_several_processes_take_over_what_one_has_kept(tmp_path: Path, kept: int, chunks: int) -> None:
    if kept < TOTAL:
        with pytest.raises(KilledError):
            write(tmp_path / "out", Work(kill_at=kept))
    else:
        killed_at_the_end(tmp_path / "out")
    works = [Work(), Work()]
    launch(tmp_path / "out", works)
    alone_there(tmp_path / "out")
    assert sum(len(work.rows) for work in works) == max(0, TOTAL - chunks * CHUNK)


def killed_at_the_end(output: Path) -> None:
    """All chunks are there, and nobody has put them together."""

    def killed(run: Any) -> bool:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(shards._Run, "_damaged", killed)
        write(output, Work())


def test_other_settings_begin_anew_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(tmp_path / "out")
    works = [Work(), Work()]
    launch(tmp_path / "out", works, fingerprint="e" * 64)
    assert "starting over" in capsys.readouterr().err
    alone_there(tmp_path / "out")
    assert sum(len(work.rows) for work in works) == TOTAL


def test_another_batch_size_goes_on_with_the_chunks_that_were_begun(tmp_path: Path) -> None:
    stopped(tmp_path / "out")
    work = Work()
    launch(tmp_path / "out", [work], chunk=16)
    alone_there(tmp_path / "out")
    assert len(work.rows) == TOTAL - 2 * CHUNK


@pytest.mark.parametrize("there", [0, TOTAL])
def test_a_process_that_comes_late_finds_its_launch(tmp_path: Path, there: int) -> None:
    """Its share waits for it; where all was done before, it must neither begin anew nor wait."""
    output, results = tmp_path / "out", []
    if there:
        killed_at_the_end(output)
    first = threading.Thread(target=lambda: results.append(write(output, Work(), 0, 2)))
    first.start()
    time.sleep(0.5)
    assert first.is_alive() and not output.exists(), "process 0 did not wait for it"
    late = Work()
    assert write(output, late, 1, 2) is False
    first.join()
    assert {row // CHUNK for row in late.rows} == (set() if there else {1, 3, 5}) and results == [True]
    alone_there(output)


def test_the_rows_of_a_process_that_died_are_done_by_process_0(tmp_path: Path) -> None:
    works = [Work(pause=0.1), Work(kill_at=CHUNK + 1)]
    first, killed = launch(tmp_path / "out", works)
    assert first is True and isinstance(killed, KilledError)
    assert {row // CHUNK for row in works[0].rows} == {0, 2, 3, 4, 5}
    alone_there(tmp_path / "out")


def test_what_several_processes_left_one_goes_on_with(tmp_path: Path) -> None:
    launch(tmp_path / "out", [Work(kill_at=2 * CHUNK), Work(kill_at=CHUNK)], patience=0.3)
    done = chunks_there(tmp_path / "out")
    assert {0, 2} <= done
    work = Work()
    assert write(tmp_path / "out", work) is True
    assert {row // CHUNK for row in work.rows} == set(range(CHUNKS)) - done
    alone_there(tmp_path / "out")


def test_one_process_needs_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LOCKS", False)
    assert write(tmp_path / "out", Work()) is True
    alone_there(tmp_path / "out")
    with pytest.raises(RedflagError, match="Use one process"):
        write(tmp_path / "more", Work(), 0, 2)


def test_one_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path / "out", Work(), 0, 3, patience=0.3) is True
    assert "process 1 of 3 did not start" in capsys.readouterr().err
    alone_there(tmp_path / "out")
    with pytest.raises(RedflagError, match="process 0 of 2 has not begun"):
        write(tmp_path / "other", Work(), 1, 2, patience=0.3)


def test_process_0_is_missed_and_its_death_keeps_what_is_done(tmp_path: Path) -> None:
    killed, missing = launch(tmp_path / "out", [Work(kill_at=0), Work(pause=0.1)], patience=0.5)
    assert isinstance(killed, KilledError)
    with pytest.raises(RedflagError, match=r"(process 0 ended|has not begun)"):
        raise missing
    launch(tmp_path / "out", [Work(), Work()])
    alone_there(tmp_path / "out")


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    slow = threading.Thread(target=lambda: write(tmp_path / "out", Work(pause=0.1), 0, 2, patience=0.1))
    slow.start()
    time.sleep(0.1)
    with pytest.raises(RedflagError, match="another run is writing"):
        write(tmp_path / "out", Work(), 0, 2)
    slow.join()
    alone_there(tmp_path / "out")


def test_a_bad_row_is_everybodys_error_and_nothing_is_lost(tmp_path: Path) -> None:
    def lines(start: int, stop: int) -> Iterator[str]:
        if start >= 8:
            raise RedflagError("row 9 is bad")
        yield from map(line, range(start, stop))

    results = launch(tmp_path / "out", [lines, lines], patience=0.5)  # type: ignore[list-item]
    assert {type(result) for result in results} == {RedflagError}
    # Process 1 may have had no time for its chunk before process 0 met the bad row.
    kept = sum(path.read_bytes().count(b"\n") for path in (tmp_path / "out.parts").glob("0*"))
    assert kept in (4, 8)
    works = [Work(), Work()]
    launch(tmp_path / "out", works)
    alone_there(tmp_path / "out")
    assert sum(len(work.rows) for work in works) == TOTAL - kept


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, World(3, 4, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 1)),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None),
        ({"RANK": "one", "WORLD_SIZE": "2"}, None),
    ],
)
def test_places_among_processes(environment: dict[str, str], expected: World | None) -> None:
    if expected is not None:
        assert World.here(environment) == expected
    else:
        with pytest.raises(RedflagError, match="RANK must be below WORLD_SIZE"):
            World.here(environment)
