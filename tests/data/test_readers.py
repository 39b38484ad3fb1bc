"""Files of rows in every format, sound and damaged, and where in a name a configuration stands."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import stand_in_hub
from hypothesis import given
from hypothesis import strategies as st

from redflag.data.readers import TextRecord, read_file
from redflag.data.rows import load_rows
from redflag.data.sources import hub_address
from redflag.errors import RedflagError

RECORDS = [
    {"prompt": "Q, 1", "response": 'A "1"', "label": "harmful"},
    {"prompt": "Q\n2", "response": "Ä 2", "label": "benign"},
]
BOM = b"\xef\xbb\xbf"
CSV = b'prompt,response,label\n"Q, 1","A ""1""",harmful\n"Q\n2",\xc3\x84 2,benign\n'
TSV = CSV.replace(b'"Q, 1",', b"Q, 1\t").replace(b'""",', b'"""\t').replace(b'2",', b'2"\t').replace(b"t,r", b"t\tr")
TSV = TSV.replace(b"e,l", b"e\tl").replace(b" 2,", b" 2\t")
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)

FILES: dict[str, bytes] = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "rows.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "lines.json": LINES,
    "rows.csv": CSV,
    "rows.tsv": TSV,
}
WINDOWS = {
    "byte order mark": lambda data: BOM + data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n").replace(b'"Q\r\n2"', b'"Q\n2"'),
    "both, and blank lines at the end": lambda data: (
        BOM + data.replace(b"\n", b"\r\n").replace(b'"Q\r\n2"', b'"Q\n2"') + b"\r\n\r\n"
    ),
}


def read(name: str, data: bytes, **options: Any) -> Any:
    return list(read_file(Path(name), data, **options))


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows_also_compressed(tmp_path: Path, name: str) -> None:
    expected = load_rows(RECORDS).rows
    (tmp_path / name).write_bytes(FILES[name])
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(FILES[name]))
    assert load_rows(tmp_path / name).rows == expected
    assert load_rows(tmp_path / f"{name}.gz").rows == expected


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", WINDOWS)
def test_files_as_windows_writes_them_are_read(tmp_path: Path, name: str, how: str) -> None:
    (tmp_path / name).write_bytes(WINDOWS[how](FILES[name]))
    assert load_rows(tmp_path / name).rows == load_rows(RECORDS).rows


def test_an_empty_cell_is_null_and_a_cell_of_blanks_is_text() -> None:
    assert read("r.csv", b'a,b,c\n1,," "\n') == [(2, {"a": "1", "b": None, "c": " "})]


def test_a_long_answer_is_not_cut_at_the_limit_of_csv() -> None:
    assert len(read("r.csv", b"a,b\n1," + b"x" * 300_000)[0][1]["b"]) == 300_000


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                key: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1)
                for key in "ab"
            }
        )
    ),
    st.sampled_from([("r.csv", ","), ("r.tsv", "\t")]),
)
def test_whatever_csv_writes_is_read_as_it_was(records: list[dict[str, str]], kind: tuple[str, str]) -> None:
    import io

    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["a", "b"], delimiter=kind[1])
    writer.writeheader()
    writer.writerows(records)
    assert [record for _, record in read(kind[0], file.getvalue().encode())] == records


# What is wrong -> name, bytes, (line, reason) of everything that is bad, and the number of records that are not.
DAMAGED: dict[str, tuple[str, bytes, list[tuple[int, str]], int]] = {
    "a row too short": (
        "r.csv",
        b"a,b\n1,2\n3\n4,5\n",
        [(3, "the number of cells must be that of the header, 2 (got 1)")],
        2,
    ),
    "a row too long": (
        "r.csv",
        b'a,b\n"1\n1",2\n3,4,5\n',
        [(4, "the number of cells must be that of the header, 2 (got 3)")],
        1,
    ),
    "an open quote": ("r.csv", b'a,b\n1,2\n"3,4\n', [(3, "malformed CSV (unexpected end of data)")], 1),
    "text behind a quote": ("r.csv", b'a,b\n"1"x,2\n3,4\n', [(2, "malformed CSV (',' expected after '\"')")], 1),
    "a column twice": (
        "r.csv",
        b"a,b,a\n1,2,3\n",
        [(1, "the header must name each column once (got 'a' twice). Rename one")],
        0,
    ),
    "no UTF-8 in CSV": ("r.csv", b"a,b\n1,\xff\n", [(2, "not UTF-8 (byte 6)")], 0),
    "damaged CSV": ("r.csv.gz", b"a,b\n", [(1, "the compressed file is damaged or cut off here")], 0),
    "an array cut off": (
        "r.json",
        b'[{"a": 1},\n {"b": ',
        [(2, "malformed JSON (Expecting value at column 8), so the array is unread")],
        0,
    ),
    "no UTF-8 in an array": ("r.json", b'[{"a":\n"\xff"}]', [(2, "not UTF-8 (byte 8)")], 0),
    "an array nested without end": ("r.json", b"[" * 100_000, [(1, "malformed JSON (nested too deeply)")], 0),
    "damaged JSON": ("r.json.gz", b"[]", [(1, "the compressed file is damaged or cut off here")], 0),
    "lines cut off in a .json": ("r.json", b'{"a": 1}\n{"b"', [(2, "malformed JSON")], 1),
    "records that are none": ("r.json", b'[1, {"a": 1}]', [], 2),
}


@pytest.mark.parametrize("name, data, bad, sound", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_named_by_line_and_what_is_sound_is_read(
    name: str, data: bytes, bad: list[tuple[int, str]], sound: int
) -> None:
    found = read(name, data)
    errors = [(line, str(record)) for line, record in found if isinstance(record, ValueError)]
    assert len(errors) == len(bad)
    for (line, reason), (expected_line, expected) in zip(errors, bad, strict=True):
        assert line == expected_line and reason.startswith(expected)
    assert len(found) - len(errors) == sound


def test_one_object_over_several_lines_is_one_row_and_a_wrapped_list_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(RECORDS[0], indent=1))
    assert len(load_rows(path)) == 1
    path.write_text(json.dumps({"data": RECORDS}, indent=1))
    with pytest.raises(RedflagError, match="Its 'data' is a list of objects: if those are the rows, write them as a J"):
        load_rows(path)


def test_only_a_format_of_text_makes_numbers_of_text(tmp_path: Path) -> None:
    header, cells = "prompt,response,category,onset,forecast,id", 'Q,Abcdef,harm,3,"[[0, 0.5]]",007'
    (tmp_path / "rows.csv").write_text(f"{header}\n{cells}\n")
    (row,) = load_rows(tmp_path / "rows.csv").rows
    assert (row.onset, row.forecast, row.id) == (3, [[0, 0.5]], "007")
    assert isinstance(read("r.csv", b"a\n1\n")[0][1], TextRecord)
    for cell, reason in (("-1", "onset must be within"), ("x", "onset must be a whole number .got the text 'x'")):
        (tmp_path / "rows.csv").write_text(f"{header}\n{cells.replace(',3,', f',{cell},')}\n")
        with pytest.raises(RedflagError, match=reason):
            load_rows(tmp_path / "rows.csv")


def test_a_csv_with_truth_values_as_pandas_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,is_safe,bad\nQ,A,True,False\nQ,B,False,True\n")
    assert [row.category for row in load_rows(path)] == [None, "harm"]
    mapped = load_rows(path, columns={"label": "bad"}, labels={"true": "toxic", "false": None})
    assert [row.category for row in mapped] == [None, "toxic"]
    path.write_text('prompt,response,category\nQ,A,"{""fraud"": true, ""theft"": true}"\nQ,B,{not JSON\n')
    assert [row.category for row in load_rows(path)] == ["fraud", "{not JSON"]


def test_a_folder_is_read_in_order_whatever_its_files_are_but_for_json(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    names = ["a.csv", "b.jsonl", "c/d.tsv", "e.ndjson", "f.parquet"]
    (tmp_path / "c").mkdir()
    for name in names:
        record = {"prompt": f"Q {name}", "response": "A"}
        if name.endswith((".csv", ".tsv")):
            mark = "," if name.endswith(".csv") else "\t"
            (tmp_path / name).write_text(f"prompt{mark}response\nQ {name}{mark}A\n")
        elif name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / name)
        else:
            (tmp_path / name).write_text(json.dumps(record))
    (tmp_path / "counts.json").write_text('{"rows": 5}')
    found = load_rows(tmp_path)
    assert [row.messages[0]["content"] for row in found] == [f"Q {name}" for name in names]
    assert found.files == tuple(str(tmp_path / name) for name in names)
    only = tmp_path / "only"
    only.mkdir()
    (only / "rows.json").write_text(json.dumps(RECORDS))
    with pytest.raises(
        RedflagError, match=r"must hold files .* \(got none \(.json files are read only if named themselves\)\)"
    ):
        load_rows(only)
    assert len(load_rows(str(only / "*.json"))) == 2


ADDRESSES = {
    "allenai/wildguardmix": ("allenai/wildguardmix", None, None),
    "allenai/wildguardmix:wildguardtrain": ("allenai/wildguardmix", "wildguardtrain", None),
    "allenai/wildguardmix:wildguardtrain:train": ("allenai/wildguardmix", "wildguardtrain", "train"),
    "PKU-Alignment/BeaverTails::30k_train": ("PKU-Alignment/BeaverTails", None, "30k_train"),
    "PKU-Alignment/BeaverTails::30k_train[:100]": ("PKU-Alignment/BeaverTails", None, "30k_train[:100]"),
    "bench-llm/or-bench:or-bench-hard-1k:train": ("bench-llm/or-bench", "or-bench-hard-1k", "train"),
    "owner/set-v1.5": ("owner/set-v1.5", None, None),
    "C:\\rows.jsonl": None,
    "C:\\folder\\rows": None,
    "C:/rows": None,
    "C:rows": None,
    "D:/folder/rows.csv": None,
    "rows.jsonl": None,
    "folder/rows.jsonl": None,
    "folder/rows.csv:odd.csv": None,
    "a/b/c": None,
    "./a": None,
    "~/a": None,
    "a/b:*.csv": None,
    "set": None,
    "set:config:train": None,
}


@pytest.mark.parametrize("name, address", ADDRESSES.items(), ids=ADDRESSES.keys())
def test_names_of_data_sets_are_told_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, address: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_address(name) == address


def test_a_file_comes_before_a_data_set_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "set:a:b").touch()
    assert hub_address("owner/set:a:b") is None
    assert hub_address(Path("owner/set")) is None
    assert hub_address(f"{tmp_path}/owner:a:b") == (f"{tmp_path}/owner", "a", "b")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders that `load_dataset` takes for sets of the hub."""
    import datasets

    monkeypatch.chdir(stand_in_hub.make(tmp_path / "hub", n=6))
    # What is cached is told apart by name and not by content.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "hub"


def test_sets_are_read_by_configuration_and_split(hub: Path) -> None:
    rows = load_rows("allenai/wildguardmix:wildguardtrain:train", on_bad_row="skip")
    assert {row.category for row in rows} == {"harm", None} and len(rows) == 4 and len(rows.skipped) == 2
    assert len(load_rows("allenai/wildguardmix:wildguardtest", split="test", on_bad_row="skip")) == 4
    beaver = load_rows("PKU-Alignment/BeaverTails::330k_train")
    assert [row.category for row in beaver] == ["self_harm", None] * 3
    assert len(load_rows("PKU-Alignment/BeaverTails:", split="330k_train")) == 6
    assert len(load_rows("PKU-Alignment/BeaverTails::330k_train[:2]")) == 2
    both = load_rows("PKU-Alignment/PKU-SafeRLHF:")
    assert [row.category for row in both] == [None, "harm", "harm", None] * 3


def test_a_missing_configuration_or_split_is_named_with_those_there_are(hub: Path) -> None:
    with pytest.raises(RedflagError) as error:
        load_rows("allenai/wildguardmix:")
    assert str(error.value) == (
        "configuration must be one of wildguardtrain, wildguardtest for the data set allenai/wildguardmix (got none). "
        "Write it behind the name, such as allenai/wildguardmix:wildguardtrain:train"
    )
    with pytest.raises(RedflagError, match=r"must be one of wildguardtrain, wildguardtest for .* \(got wildguard\)"):
        load_rows("allenai/wildguardmix:wildguard:train")
    with pytest.raises(RedflagError) as error:
        load_rows("PKU-Alignment/BeaverTails:")
    assert str(error.value) == (
        "split must be one of 330k_train for the data set PKU-Alignment/BeaverTails (got train). Give --split "
        "330k_train, or write it behind the name: PKU-Alignment/BeaverTails::330k_train"
    )


def test_a_loading_script_is_named_as_such(hub: Path) -> None:
    shutil.rmtree(hub / "allenai" / "coconot")
    (hub / "allenai" / "coconot").mkdir()
    (hub / "allenai" / "coconot" / "coconot.py").touch()
    with pytest.raises(
        RedflagError, match=r"allenai/coconot must be files of rows .it is a loading script, which data"
    ):
        load_rows("allenai/coconot::train")


@pytest.mark.parametrize("name, delimiter", [("rows.csv", ","), ("rows.tsv", "\t")])
def test_a_csv_with_text_for_everything_gives_the_same_rows(tmp_path: Path, name: str, delimiter: str) -> None:
    records = [
        {
            "messages": [{"role": "user", "content": "Q, 1"}, {"role": "assistant", "content": 'A "1"\nline'}],
            "category": "harm",
            "onset": 3,
            "id": "1",
        },
        {
            "messages": [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}],
            "category": None,
            "onset": None,
            "id": "2",
        },
    ]
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**record, "messages": json.dumps(record["messages"])} for record in records)
    assert load_rows(tmp_path / name).rows == load_rows(records).rows
