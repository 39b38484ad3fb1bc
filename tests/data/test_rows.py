"""Rows: what is understood, and what is refused with which reason."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.data.rows import BadRow, Row, load_rows, write_rows
from redflag.data.shapes import KEYS
from redflag.errors import RedflagError

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Good day to you."}
GOOD: dict[str, Any] = {"messages": [USER, ANSWER]}


def _file(tmp_path: Path, *lines: str | bytes, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


BAD: dict[str, tuple[str | bytes, str]] = {
    "malformed": ('{"messages": [', "malformed JSON"),
    "cut off": ('{"messages": [{"role": "us', "malformed JSON"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "not UTF-8"),
    "nested without end": ("[" * 100_000, "malformed JSON"),
    "a list": ("[1, 2]", "a record must be an object (got a list)"),
    "a text": ('"hello"', "a record must be an object (got the text 'hello')"),
    "null": ("null", "a record must be an object (got null)"),
    "nothing in it": ("{}", "a row must have messages or a prompt"),
    "messages a text": ('{"messages": "hi"}', "messages must be a list"),
    "messages empty": ('{"messages": []}', "messages must not be empty"),
    "message a text": ('{"messages": ["hi"]}', "message 0 must be an object"),
    "no assistant turn": (json.dumps({"messages": [USER]}), "no assistant turn"),
    "assistant not last": (json.dumps({"messages": [USER, ANSWER, USER]}), "the last turn is the user's"),
    "no user turn": (json.dumps({"messages": [ANSWER]}), "no user turn"),
    "empty user turn": (json.dumps({"messages": [{"role": "user", "content": " "}, ANSWER]}), "no user turn with text"),
    "empty response": (
        json.dumps({"messages": [USER, {"role": "assistant", "content": " \n"}]}),
        "the response is empty",
    ),
    "unknown role": (json.dumps({"messages": [{"role": "human", "content": "x"}, ANSWER]}), "(got 'human')"),
    "no role": (json.dumps({"messages": [{"content": "x"}, ANSWER]}), "(got None)"),
    "content a list": (
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}),
        "must be text or text parts",
    ),
    "content null": (
        json.dumps({"messages": [USER, {"role": "assistant", "content": None}]}),
        "must be text (got null)",
    ),
    "half a character": (
        json.dumps({"messages": [{"role": "user", "content": "\ud83d"}, ANSWER]}),
        "lone surrogate at 0",
    ),
    "onset a text": (json.dumps({**GOOD, "category": "harm", "onset": "3"}), "onset must be a whole number"),
    "onset a fraction": (
        json.dumps({**GOOD, "category": "harm", "onset": 3.0}),
        "onset must be a whole number (got 3.0)",
    ),
    "onset a truth value": (json.dumps({**GOOD, "category": "harm", "onset": True}), "onset must be a whole number"),
    "onset negative": (json.dumps({**GOOD, "category": "harm", "onset": -1}), "onset must be within"),
    "onset past the end": (json.dumps({**GOOD, "category": "harm", "onset": 16}), "within the response of 16 char"),
    "onset without category": (json.dumps({**GOOD, "onset": 3}), "onset must be left out in a row without category"),
    "category a number": (json.dumps({**GOOD, "category": 3}), "category must be a name"),
    "category empty": (json.dumps({**GOOD, "category": ""}), "category must be a name"),
    "category misspelt": (json.dumps({**GOOD, "catgory": "harm"}), "'catgory', which looks like 'category'"),
    "onset misspelt": (json.dumps({**GOOD, "category": "harm", "Onset": 3}), "'Onset', which looks like 'onset'"),
    "label misspelt": (json.dumps({**GOOD, "labels": "harmful"}), "'labels', which looks like 'label'"),
    "forecast a number": (json.dumps({**GOOD, "forecast": 0.5}), "forecast must be a list"),
    "forecast without probability": (json.dumps({**GOOD, "forecast": [[0]]}), "forecast 0 must be [character, prob"),
    "forecast a text": (json.dumps({**GOOD, "forecast": [[0, "0.5"]]}), "forecast 0 must be [character, probability]"),
    "forecast of truth": (json.dumps({**GOOD, "forecast": [[0, True]]}), "forecast 0 must be [character, probability]"),
    "forecast between characters": (json.dumps({**GOOD, "forecast": [[0.5, 0]]}), "forecast 0 must hold whole numbers"),
    "forecast behind the end": (json.dumps({**GOOD, "forecast": [[0, 0], [16, 1]]}), "forecast 1 must be within"),
    "forecast before the beginning": (json.dumps({**GOOD, "forecast": [[-1, 0]]}), "forecast 0 must be within"),
    "forecasts in no order": (
        json.dumps({**GOOD, "forecast": [[4, 0], [4, 1]]}),
        "forecast 1 must be behind the one before it, at 4",
    ),
    "forecast above 1": (
        json.dumps({**GOOD, "forecast": [[0, 1.01]]}),
        "forecast 0 must be a probability, from 0 to 1 (got 1.01)",
    ),
    "forecast no number": ('{"prompt": "Hi", "response": "Ho", "forecast": [[0, NaN]]}', "must be a probability"),
    "forecast of another harm": (
        json.dumps({**GOOD, "category": "harm", "forecast": [[0, 1]], "forecast_category": "fraud"}),
        "forecast_category must be left out in a row of category 'harm' (got 'fraud')",
    ),
    "group an object": (json.dumps({**GOOD, "group": {}}), "group must be a name (got an object"),
    "prompt without response": ('{"prompt": "Hi", "response": null, "label": "benign"}', "a prompt without response"),
    "two answers": (json.dumps({**GOOD, "response": "Hi."}), "Which one is the answer?"),
    "label null": ('{"prompt": "Hi", "response": "Ho", "label": null}', "label must not be null"),
    "label unknown": ('{"prompt": "Hi", "response": "Ho", "label": 1}', "label must be one of harmful"),
}


@pytest.mark.parametrize("line, reason", BAD.values(), ids=BAD.keys())
def test_a_bad_row_stops_the_run_and_is_named_by_file_line_and_reason(
    tmp_path: Path, line: str | bytes, reason: str
) -> None:
    path = _file(tmp_path, json.dumps(GOOD), "", line, json.dumps(GOOD))
    with pytest.raises(RedflagError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert reason in str(error.value)


@pytest.mark.parametrize("line, reason", BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_counted_and_skipped_when_asked(tmp_path: Path, line: str | bytes, reason: str) -> None:
    path = _file(tmp_path, json.dumps(GOOD), line, json.dumps(GOOD))
    rows = load_rows(path, on_bad_row="skip")
    assert len(rows) == 2
    (bad,) = rows.skipped
    assert (bad.file, bad.line) == (str(path), 2)
    assert reason in bad.reason


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"source": "no/such/file.jsonl"}, "must be a file or folder of rows"),
        ({"source": 5}, "the source must be a file, a folder, a data set's name or a list of rows .got a int"),
        ({"source": {"train": []}}, "Choose one split"),
        ({"source": []}, "it is empty"),
        ({"source": [GOOD], "on_bad_row": "ignore"}, r"on_bad_row must be .*\(got 'ignore'"),
        ({"source": [GOOD], "unlabelled": "drop"}, r"unlabelled must be .*\(got 'drop'"),
        ({"source": [GOOD], "columns": {"question": "prompt"}}, "got 'question'"),
        ({"source": [GOOD], "columns": {"category": "kind"}}, "no column 'kind'"),
        ({"source": [{}], "on_bad_row": "skip"}, "all 1 rows were left out"),
    ],
)
def test_an_unusable_source_is_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(RedflagError, match=reason):
        load_rows(**arguments)


def test_a_folder_without_rows_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RedflagError, match="must hold files"):
        load_rows(tmp_path)
    (tmp_path / "rows.txt").write_text("a,b")
    with pytest.raises(RedflagError, match="must end in one of"):
        load_rows(tmp_path / "rows.txt")
    with pytest.raises(RedflagError, match="no file matches"):
        load_rows(str(tmp_path / "*.jsonl"))


def test_a_file_cut_off_in_compression_gives_what_came_before_and_one_bad_row(tmp_path: Path) -> None:
    path = _file(tmp_path, *[json.dumps({**GOOD, "id": os.urandom(40).hex()}) for _ in range(2000)], name="r.jsonl.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = load_rows(path, on_bad_row="skip")
    assert 0 < len(rows) < 2000
    assert "damaged or cut off" in rows.skipped[-1].reason
    with pytest.raises(RedflagError, match="damaged or cut off"):
        load_rows(path)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(RedflagError, match="not a readable parquet file"):
        load_rows(path)


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = _file(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"\r", json.dumps(GOOD))
    assert len(load_rows(path)) == 2


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@st.composite
def rows_strategy(draw: st.DrawFn) -> Row:
    turns = draw(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=3))
    messages = [{"role": role, "content": content.encode("utf-8", "replace").decode()} for role, content in turns]
    messages += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
    category = draw(st.none() | texts)
    onset = draw(st.none() | st.integers(0, len(messages[-1]["content"]) - 1)) if category else None
    names = [draw(st.none() | texts) for _ in range(4)]
    return Row(messages, category, onset, *names)


@given(st.lists(rows_strategy(), min_size=1, max_size=5), st.sampled_from(["r.jsonl", "r.jsonl.gz"]))
def test_written_rows_are_read_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], name: str
) -> None:
    path = write_rows(tmp_path_factory.mktemp("rows") / name, rows)
    assert load_rows(path).rows == rows


def test_the_same_rows_give_the_same_bytes_and_hash(tmp_path: Path) -> None:
    rows = load_rows([GOOD, {**GOOD, "category": "harm", "onset": 5}]).rows
    for name in ("a.jsonl", "b.jsonl.gz"):
        first = write_rows(tmp_path / name, rows).read_bytes()
        digest = load_rows(tmp_path / name).sha256
        assert write_rows(tmp_path / name, rows).read_bytes() == first
        assert load_rows(tmp_path / name).sha256 == digest


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [Row([USER, ANSWER])])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RedflagError, match="No space left"):
        write_rows(path, [Row([USER, ANSWER], "harm")])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_every_source_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    records = [
        {**GOOD, "category": "harm", "onset": 5, "id": "1"},
        {**GOOD, "category": None, "onset": None, "id": "2"},
    ]
    expected = [Row([USER, ANSWER], "harm", 5, id="1"), Row([USER, ANSWER], id="2")]
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    path = write_rows(tmp_path / "folder" / "deep" / "rows.jsonl", expected)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    sources: list[Any] = [
        path,
        str(path),
        tmp_path / "folder",
        str(tmp_path / "fol*" / "**" / "*.jsonl"),
        [path],
        tmp_path / "rows.parquet",
        records,
        expected,
        (row for row in records),
        datasets.Dataset.from_list(records),
    ]
    for source in sources:
        assert load_rows(source).rows == expected, source
    both = load_rows([path, tmp_path / "rows.parquet"])
    assert both.rows == expected * 2
    assert both.files == (str(path), str(tmp_path / "rows.parquet"))
    assert load_rows(records).sha256 == load_rows(iter(records)).sha256 != load_rows(records[:1]).sha256


PAIR = {"prompt": "How?", "response": "So.", "lang": "en"}
FOREIGN: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    # the row, further arguments, the category expected
    ({**PAIR}, {}, None),
    ({**PAIR, "category": "fraud"}, {}, "fraud"),
    ({**PAIR, "label": "harmful"}, {}, "harm"),
    ({**PAIR, "label": "harmful", "category": "fraud"}, {}, "fraud"),
    ({**PAIR, "label": "benign", "category": "fraud"}, {}, None),  # the category is the prompt's topic
    ({**PAIR, "label": None, "category": "fraud"}, {"unlabelled": "harmless"}, None),
    ({**PAIR, "label": True}, {"labels": {"true": "toxic", "false": None}}, "toxic"),
    ({**PAIR, "label": 0}, {"labels": {"1": "toxic", "0": None}}, None),
    ({"q": "How?", "a": "So.", "y": "bad"}, {"labels": {"bad": "harm"}}, "harm"),
    ({"q": "How?", "a": "So.", "y": "ok", "prompt": "unused"}, {"labels": {"ok": None}}, None),
]


@pytest.mark.parametrize("record, arguments, category", FOREIGN)
def test_foreign_shapes_are_understood(record: dict[str, Any], arguments: dict[str, Any], category: str | None) -> None:
    if "q" in record:
        arguments = {**arguments, "columns": {"prompt": "q", "response": "a", "label": "y"}}
    (row,) = load_rows([record], **arguments).rows
    assert row.messages == [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    assert row.category == category
    assert row.harmful == (category is not None)


def test_messages_that_end_before_the_answer_are_completed_by_the_response() -> None:
    (row,) = load_rows([{"messages": [USER, ANSWER, USER], "response": "Yes.", "label": "benign"}]).rows
    assert [m["role"] for m in row.messages] == ["user", "assistant", "user", "assistant"]
    assert row.response == "Yes."


def test_unlabelled_rows_are_left_out_and_counted_when_asked() -> None:
    rows = load_rows([{**PAIR, "label": None}, {**PAIR, "label": "benign"}], unlabelled="skip")
    assert len(rows) == 1
    assert rows.skipped == [BadRow("<rows>", 1, "label is null")]


def test_a_column_that_rows_may_lack_may_be_lacking_in_mapped_rows() -> None:
    columns = {"onset": "start", "group": "topic"}
    rows = load_rows([{**GOOD}, {**GOOD, "category": "harm", "start": 5, "topic": 7}], columns=columns).rows
    assert [(row.onset, row.group) for row in rows] == [(None, None), (5, "7")]


def test_extra_keys_are_ignored_and_counted() -> None:
    rows = load_rows([{**GOOD, "license": "en", "extra": {}}, {**GOOD, "license": "de"}])
    assert rows.ignored == {"license": 2, "extra": 1}


def test_a_row_is_written_with_its_own_keys_only() -> None:
    assert Row([USER, ANSWER]).to_dict() == GOOD
    whole = Row([USER, ANSWER], "a", 0, "b", "c", "d", "e", "f", "natural", 0, [[0, 0.5]], "a", 0)
    assert set(whole.to_dict()) == set(KEYS)


def test_forecasts_come_back_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        Row([USER, ANSWER], "harm", 5, forecast=[[0, 0.25, 8], [5, 1.0, 7]]),
        Row([USER, ANSWER], forecast=[[3, 0.0]], forecast_category="harm"),
        Row([USER, ANSWER]),
    ]
    records = [row.to_dict() for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    for source in (write_rows(tmp_path / "rows.jsonl.gz", rows), tmp_path / "rows.parquet", records, rows):
        loaded = load_rows(source).rows
        if source == tmp_path / "rows.parquet":  # columns of the first row alone
            loaded = [*loaded[:1], *rows[1:]]
        assert loaded == rows
        assert [type(number) for number in loaded[0].forecast[1]] == [int, float, int]
    assert load_rows([{**GOOD, "forecast": []}]).rows == [Row([USER, ANSWER])]
    mapped = load_rows([{**GOOD, "ahead": [[0, 1]]}], columns={"forecast": "ahead"}).rows
    assert mapped == [Row([USER, ANSWER], forecast=[[0, 1.0]])]


def test_a_real_public_set_is_read_whole() -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "safe-rlhf-mini" / "train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no public data at {path}")
    rows = load_rows(path)
    assert sum(row.harmful for row in rows) == 1686
    assert len(rows) - 1686 == 1309
