"""Answers kept in a file: found again, whole or not at all."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import pytest

from redflag.errors import RedflagError
from redflag.judges import Verdict
from redflag.kept import Kept
from redflag.lab.synthesis.questions import Reply


@dataclass(frozen=True)
class Number:
    value: int
    note: str = ""


def test_what_is_added_is_found_by_its_key_and_by_the_next_process(tmp_path):
    path = tmp_path / "sub" / "kept.jsonl"
    kept = Kept(path, Number)
    assert "a" not in kept and not path.parent.exists()
    kept.add("a", Number(1, "one"))
    kept.add("a", Number(2))
    for found in (kept, Kept(path, Number)):
        assert (len(found), found["a"], "b" in found) == (1, Number(2), False)
    with pytest.raises(KeyError):
        kept["b"]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_that_was_cut_off_is_passed_over_and_swallows_none(tmp_path, cut):
    path = tmp_path / "kept"
    kept = Kept(path, Number)
    kept.add("a", Number(1))
    kept.add("b", Number(2))
    path.write_bytes(path.read_bytes()[:-cut])
    again = Kept(path, Number)
    assert "a" in again and ("b" in again) == (cut == 1)
    again.add("c", Number(3))
    assert Kept(path, Number)["c"] == Number(3)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "3",
        "null",
        '{"value": 1}',
        '{"key": "k"}',
        '{"key": "k", "value": 1, "other": 2}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_what_is_no_answer_is_passed_over(tmp_path, line):
    path = tmp_path / "kept"
    path.write_bytes(line.encode("latin-1") + b'\n{"key": "a", "value": 1}\n')
    kept = Kept(path, Number)
    assert len(kept) == 1 and kept["a"] == Number(1)


def test_lines_are_as_they_always_were(tmp_path):
    """Verdicts and answers of earlier versions are read, and written alike."""
    for value, line in (
        (Verdict(0.25, "d"), '{"key": "k", "harm": 0.25, "detail": "d"}\n'),
        (
            Reply("t", "length", 2, 3),
            '{"key": "k", "text": "t", "finish": "length", "tokens_in": 2, "tokens_out": 3}\n',
        ),
    ):
        path = tmp_path / type(value).__name__
        path.write_text(line)
        assert Kept(path, type(value))["k"] == value
        path.unlink()
        Kept(path, type(value)).add("k", value)
        assert path.read_text() == line


@pytest.mark.parametrize(
    ("kind", "record"), [(Verdict, {"harm": 2, "detail": ""}), (Verdict, {"harm": "x"}), (Reply, {"text": None})]
)
def test_an_answer_that_cannot_be_one_is_passed_over(tmp_path, kind, record):
    path = tmp_path / "kept"
    path.write_text(json.dumps({"key": "k", **record}) + "\n")
    assert len(Kept(path, kind)) == 0


def test_several_threads_lose_nothing(tmp_path):
    kept = Kept(tmp_path / "kept", Number)
    threads = [
        threading.Thread(target=lambda n=n: [kept.add(f"{n} {i}", Number(i)) for i in range(20)]) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Kept(tmp_path / "kept", Number)
    assert len(kept) == len(again) == 160 and again["7 19"] == Number(19)


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(RedflagError, match="must be readable"):
        Kept(tmp_path, Number)
    (tmp_path / "file").write_text("")
    with pytest.raises(RedflagError, match="must be writable"):
        kept = Kept(tmp_path / "new" / "kept", Number)
        (tmp_path / "new").write_text("")
        kept.add("a", Number(1))
    assert "a" not in kept
