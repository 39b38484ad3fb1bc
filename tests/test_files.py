from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from redflag.files import append_line, atomic_write


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
