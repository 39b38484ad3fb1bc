"""A recording comes back from disk as it was, and any part of it is that part."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.events import Trace
from redflag.scoring import recording as recording_module
from redflag.scoring.recording import COLUMNS, Recording
from redflag.trace import write_traces

LENGTHS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=6)


def build(lengths, flags=2, tokens=True):
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": f"r{i}",
            "category": "a" if i % 2 else None,
            "onset": i if i % 2 else None,
            "turns": i,
            "truncated": i % 3 == 0,
            "flag_probs": rng.random((t, flags)).astype(np.float32),
            "tail_probs": rng.random((m, flags)).astype(np.float32),
            **({"token_ids": list(range(t))} if tokens else {}),
        }
        for i, (t, m) in enumerate(lengths)
    ]
    return rows, Recording.of(["a", "b"][:flags], rows, {"seed": 3})


@given(LENGTHS, st.booleans())
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, lengths, tokens):
    path = tmp_path_factory.mktemp("recording") / "r.parquet"
    rows, recording = build(lengths, tokens=tokens)
    recording.save(path)
    again = Recording.load(path)
    assert (again.categories, again.meta, again.columns) == (recording.categories, {"seed": 3}, recording.columns)
    assert set(again.columns) == set(COLUMNS)
    for i, row in enumerate(rows):
        assert np.array_equal(again.steps(i), np.concatenate([row["flag_probs"], row["tail_probs"]]))
    assert again.lengths.tolist() == [len(row["flag_probs"]) for row in rows]
    if tokens and rows:
        assert again.token_ids.tolist() == [token for row in rows for token in row["token_ids"]]


@given(LENGTHS, st.data())
def test_a_part_is_that_part(lengths, data):
    rows, recording = build(lengths)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8) if rows else st.just([]))
    part = recording.select(chosen)
    assert len(part) == len(chosen) and part.columns["id"] == [rows[i]["id"] for i in chosen]
    for k, i in enumerate(chosen):
        assert np.array_equal(part.steps(k), recording.steps(i))
    if rows:
        assert part.token_ids.tolist() == [token for i in chosen for token in rows[i]["token_ids"]]
        assert recording.select(recording.harmful).columns["category"] == ["a"] * (len(rows) // 2)


def test_scored_rows_and_traces_are_recordings(tmp_path):
    scored = {"id": "x", "flag_probs": [[0.5]], "tail_probs": [[0.25]], "peak": [0.5], "category": None, "onset": None}
    (tmp_path / "s.jsonl").write_text(json.dumps(scored) + "\n")
    recording = Recording.load(tmp_path / "s.jsonl")
    assert recording.categories == ("harm",) and recording.steps(0).tolist() == [[0.5], [0.25]]
    write_traces(tmp_path / "t.jsonl", [Trace("t", ("w",), token_ids=[1], flag_probs=[(0.5,)], meta={"source": "s"})])
    recording = Recording.load(tmp_path / "t.jsonl")
    assert (recording.categories, recording.columns["source"]) == (("w",), ["s"])


def test_a_recording_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(recording_module, "FORMAT", 2)
    path = build([(1, 0), (2, 1)])[1].save(tmp_path / "newer.parquet")
    assert len(Recording.load(path)) == 2
    monkeypatch.undo()
    with pytest.raises(RedflagError, match="format 2, and this version of redflag reads 1"):
        Recording.load(path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.parquet", b"no"), ("a.jsonl", b"no\n"), ("b.jsonl", b""), ("c", None)]
)
def test_what_is_no_recording_is_said_to_be_none(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RedflagError, match=name):
        Recording.load(tmp_path / name)
