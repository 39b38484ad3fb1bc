from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from redflag.errors import RedflagError
from redflag.files import LOCKS, append_line, atomic_folder, atomic_write, keep_json, kept_json, require_writable


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "missing" / "d"
    with atomic_folder(folder) as new:
        (new / "old").touch()
        assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as new:
        (new / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(folder) == ["old"] and os.listdir(folder.parent) == ["d"]
    with atomic_folder(folder) as new:
        (new / "new").touch()
    assert os.listdir(folder) == ["new"] and os.listdir(folder.parent) == ["d"]


@pytest.mark.parametrize(
    ("before", "written", "after"),
    [
        (None, b"a\n", b"a\n"),
        (b"", b"a\n", b"a\n"),
        (b"x\n", b"a\n", b"x\na\n"),
        (b"cut of", b"a\n", b"cut of\na\n"),
        (b"cut of", b"", b"cut of"),
        (None, b"", b""),
    ],
)
@pytest.mark.parametrize("options", [{}, {"lock": True}, {"sync": True}, {"lock": True, "sync": True}])
def test_a_line_stands_by_itself(
    before: bytes | None, written: bytes, after: bytes, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "lines"
    if before is not None:
        path.write_bytes(before)
    append_line(path, written, **options)
    assert path.read_bytes() == after


def test_a_line_that_was_not_taken_whole_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
    with pytest.raises(OSError, match="3 of 4 bytes"):
        append_line(tmp_path / "lines", b"abc\n")


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize(("options", "permissions"), [({}, 0o600), ({"mode": 0o666}, 0o644)])
def test_a_file_that_is_made_for_a_line_is_its_owners_unless_said(
    options: dict[str, Any], permissions: int, tmp_path: Path
) -> None:
    path = tmp_path / "lines"
    before = os.umask(0o022)
    try:
        append_line(path, b"a\n", **options)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == permissions


@pytest.mark.skipif(not LOCKS, reason="this system has no file locks")
def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = [bytes([97 + writer]) * 5000 + b"\n" for writer in range(4)]

    def write(line: bytes) -> None:
        for _ in range(25):
            append_line(path, line, lock=True)

    threads = [threading.Thread(target=write, args=(line,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines * 25)


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b", "output_dir")
    require_writable(tmp_path / "a" / "scored.jsonl", "output", file=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("file", [False, True])
def test_a_file_in_the_place_of_a_folder_is_refused_with_the_option_that_names_it(file: bool, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(RedflagError, match=r"cannot be written \(.*taken is a file\)\. Choose another where, or fix"):
        require_writable(tmp_path / "taken" / "inner", "where", file=file)
    assert os.listdir(tmp_path) == ["taken"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_says_so_and_leaves_no_litter(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with (
        pytest.raises(RedflagError, match=r"cannot write .*f \(No space left on device\)\. Nothing was saved"),
        atomic_write(tmp_path / "f") as file,
    ):
        file.write(b"new")
    assert os.listdir(tmp_path) == []


def test_a_result_is_found_again_only_by_what_it_was_made_of(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    assert kept_json(path, made_of=["rows", 3]) is None
    record = {"made_of": ["rows", 3], "seconds": 0.1 + 0.2, "note": "é"}
    keep_json(path, record)
    assert kept_json(path, made_of=["rows", 3]) == record == kept_json(path)
    assert kept_json(path, made_of=["rows", 4]) is None
    assert kept_json(path, made_of=["rows", 3], identity=None) is None  # an entry that is not there is no None
    assert path.read_bytes() == json.dumps(record).encode()
    keep_json(path, record, indent=2)
    assert path.read_bytes() == json.dumps(record, indent=2).encode()


@pytest.mark.parametrize("spoilt", [b"", b'{"made_of": 1', b"[1]", b"1", b"null", b"\xff\xfe", b'{"other": 1}'])
def test_a_result_that_is_not_whole_must_be_made_anew(spoilt: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_bytes(spoilt)
    assert kept_json(path, made_of=1) is None
    keep_json(path, {"made_of": 1})
    assert kept_json(path, made_of=1) == {"made_of": 1}


def test_a_result_that_json_does_not_know_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    keep_json(path, {"made_of": 1})
    with pytest.raises(TypeError):
        keep_json(path, {"made_of": object()})
    assert kept_json(path, made_of=1) and os.listdir(tmp_path) == ["kept.json"]
