from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import redflag.trace
from redflag.errors import RedflagError
from redflag.trace import (
    Alarm,
    Done,
    Escalation,
    Event,
    Forced,
    Halt,
    Reflection,
    Resume,
    Step,
    Text,
    Thought,
    Trace,
    read_traces,
    write_traces,
)


def example(**changes) -> Trace:
    values = {
        "id": "r-1",
        "categories": ("weapons", "fraud"),
        "token_ids": [5, 6, 7],
        "flag_probs": [(0.1, 0.0), (0.2, 1e-300), (0.9, 0.1 + 0.2)],
        "scores": [(0.0, 0.0), (0.2, 1e-300), (0.9, 0.3)],
        "events": [
            Text(0, (5,), "He"),
            Text(1, (6,), "llo"),
            Alarm(2, "weapons", 0.9, 0.5, "halt"),
            Halt(2, "alarm", "weapons"),
        ],
        "meta": {"run_id": "run-1", "onset": 2},
        "text": "Hello",
    }
    return Trace(**(values | changes))


def without_text(trace: Trace) -> Trace:
    events = [Text(e.position, e.token_ids, "") if isinstance(e, Text) else e for e in trace.events]
    return Trace(**{name: getattr(trace, name) for name in Trace.__slots__} | {"events": events, "text": None})


def test_a_line_holds_one_array_per_column_and_numbers_only(tmp_path):
    assert write_traces(tmp_path / "t.jsonl", [example()]) == 1
    (line,) = (tmp_path / "t.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "format": 1,
        "id": "r-1",
        "categories": ["weapons", "fraud"],
        "token_ids": [5, 6, 7],
        "flag_probs": [[0.1, 0.2, 0.9], [0.0, 1e-300, 0.1 + 0.2]],
        "scores": [[0.0, 0.2, 0.9], [0.0, 1e-300, 0.3]],
        "events": [
            {"kind": "text", "position": 0, "counts": [1, 1]},
            {"kind": "alarm", "position": 2, "category": "weapons", "score": 0.9, "threshold": 0.5, "action": "halt"},
            {"kind": "halt", "position": 2, "reason": "alarm", "category": "weapons", "detail": "", "text": ""},
        ],
        "meta": {"run_id": "run-1", "onset": 2},
        "text": None,
    }


def test_text_is_kept_on_request_only(tmp_path):
    path = tmp_path / "t.jsonl"
    write_traces(path, [example()])
    assert "llo" not in path.read_text()
    assert list(read_traces(path)) == [without_text(example())]
    write_traces(path, [example()], text=True)
    assert list(read_traces(path)) == [example()]


TRACES = [
    ("no steps", Trace()),
    ("no steps, one flag", Trace(categories=("a",), events=[Done(0, "length")])),
    ("no flags", Trace(token_ids=[1, 2], flag_probs=[(), ()])),
    ("no scores", Trace(categories=("a",), token_ids=[1], flag_probs=[(0.5,)])),
    (
        "text on both sides of an alarm",
        Trace(
            categories=("a",),
            token_ids=[1, 2, 3],
            flag_probs=[(0.5,)] * 3,
            scores=[(0.5,)] * 3,
            events=[
                Text(0, (1,), ""),
                Alarm(1, "a", 0.5, 0.5, "continue"),
                Text(1, (2, 3), ""),
                Text(3, (), ""),
                Done(3, "stop"),
            ],
        ),
    ),
    ("a fault", Trace(events=[Halt(0, "fault", detail='lost: "\n\u2028" \ud800')])),
]


@pytest.mark.parametrize("trace", [row[1] for row in TRACES], ids=[row[0] for row in TRACES])
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_what_is_written_is_read(tmp_path, trace, name):
    assert write_traces(tmp_path / name, iter([trace, example(), trace]), text=True) == 3
    assert list(read_traces(tmp_path / name)) == [trace, example(), trace]


def test_gz_is_compressed_and_the_same_traces_give_the_same_bytes(tmp_path):
    write_traces(tmp_path / "a.gz", [example()])
    write_traces(tmp_path / "b.gz", [example()])
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "a.gz").read_bytes()))["id"] == "r-1"


def bits(rows):
    return [[value.hex() for value in row] for row in rows]


@given(
    rows=st.lists(st.tuples(st.floats(), st.floats()), max_size=8),
    ids=st.lists(st.integers(0, 2**63), min_size=8, max_size=8),
    name=st.text(),
    words=st.text(),
)
def test_any_float_and_any_text_come_back(tmp_path_factory, rows, ids, name, words):
    path = tmp_path_factory.getbasetemp() / "property.jsonl"
    token_ids = ids[: len(rows)]
    alarm = Alarm(0, words, math.nan, math.inf, words)
    events = [Text(0, tuple(token_ids), words), alarm]
    trace = Trace(name, ("a", "b"), token_ids, rows, rows, events, {words: words}, words)
    write_traces(path, [trace], text=True)
    (back,) = read_traces(path)
    assert bits(back.flag_probs) == bits(rows) == bits(back.scores)
    assert (back.id, back.token_ids, back.meta, back.text) == (name, token_ids, {words: words}, words)
    assert back.events[0] == events[0]
    assert repr(back.events[1]) == repr(alarm)  # NaN equals nothing


def test_no_bare_nan_is_written(tmp_path):
    trace = Trace(categories=("a",), token_ids=[1, 2, 3], flag_probs=[(math.nan,), (math.inf,), (-math.inf,)])
    write_traces(tmp_path / "t.jsonl", [trace])
    record = json.loads((tmp_path / "t.jsonl").read_text(), parse_constant=pytest.fail)
    assert record["flag_probs"] == [["nan", "inf", "-inf"]]


def test_steps_gives_back_what_the_engine_gave():
    assert list(example().steps())[1] == Step(6, (0.2, 1e-300))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"flag_probs": [(0.1, 0.0)]}, "flag_probs of trace 'r-1' must be 3 tokens x 2 categories"),
        ({"scores": [(0.1,)] * 3}, "scores of trace 'r-1' must be 3 tokens x 2 categories"),
        ({"token_ids": [5, 6, "x"]}, "as JSON"),
        ({"flag_probs": [("high", 0.1)] * 3}, "as JSON"),
        ({"meta": {"x": math.nan}}, "as JSON"),
        ({"meta": {"x": object()}}, "as JSON"),
        ({"events": [Text(0, (6,), "")]}, "must be those of trace"),
    ],
)
def test_a_trace_that_cannot_be_written_is_refused_and_the_older_file_stays(tmp_path, changes, says):
    path = tmp_path / "t.jsonl"
    write_traces(path, [example()])
    before = path.read_bytes()
    with pytest.raises(RedflagError, match=says):
        write_traces(path, [example(), example(**changes)])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.jsonl"]


def line(**changes) -> str:
    record = {
        "format": 1,
        "id": "x",
        "categories": ["a"],
        "token_ids": [1, 2],
        "flag_probs": [[0.1, 0.2]],
        "scores": [[0.1, 0.2]],
        "events": [{"kind": "text", "position": 0, "counts": [2]}, {"kind": "done", "position": 2, "reason": "stop"}],
        "meta": {},
        "text": None,
    }
    return json.dumps({key: value for key, value in (record | changes).items() if value is not ...})


def event(**values):
    return {"events": [{"position": 0} | values]}


BAD_LINES = [
    ("cut", line()[:50], "not JSON"),
    ("no JSON", "hello", "not JSON"),
    ("two records", line() + line(), "not JSON"),
    ("bare NaN", line().replace("0.1", "NaN"), "NaN is not JSON"),
    ("deeply nested", "[" * 100_000, "not JSON"),
    ("list", "[]", "not an object"),
    ("null", "null", "not an object"),
    ("no format", line(format=...), "no format number"),
    ("other format", line(format=2), "format 2, this version reads 1"),
    ("unknown key", line(tokens=[]), r"unknown keys \['tokens'\]"),
    ("missing key", line(scores=...), r"missing keys \['scores'\]"),
    ("id", line(id=3), "id 3"),
    ("text", line(text=3), "text is not a string"),
    ("meta", line(meta=[]), "meta"),
    ("categories", line(categories="a"), "categories"),
    ("token ids", line(token_ids=[1, 2.0]), "token_ids"),
    ("boolean token id", line(token_ids=[1, True]), "token_ids"),
    ("a column is short", line(flag_probs=[[0.1]]), "flag_probs are not 2 long"),
    ("a column too many", line(flag_probs=[[0.1, 0.2]] * 2), "flag_probs are not 1 columns"),
    ("columns are no lists", line(flag_probs=["ab"]), "flag_probs are not columns"),
    ("scores are short", line(scores=[[0.1]]), "scores are not 2 long"),
    ("a word for a number", line(flag_probs=[[0.1, "high"]]), "'high' is not a number"),
    ("null for a number", line(flag_probs=[[0.1, None]]), "None is not a number"),
    ("a huge integer", line(flag_probs=[[0.1, 10**400]]), "not a trace"),
    ("events", line(events={}), "events are not a list"),
    ("an event is no object", line(events=[3]), "event 3"),
    ("an unknown event", line(**event(kind="laugh")), "'laugh'"),
    ("an event without kind", line(**event(reason="stop")), "None"),
    ("an event elsewhere", line(events=[{"kind": "done", "position": 3, "reason": "stop"}]), "position 3"),
    ("an event nowhere", line(events=[{"kind": "done", "reason": "stop"}]), "position"),
    ("an event with too much", line(**event(kind="done", reason="stop", why="")), "why"),
    ("an event with too little", line(**event(kind="done")), "reason"),
    ("an event with a number for a word", line(**event(kind="done", reason=3)), "words"),
    ("text beyond the end", line(**event(kind="text", counts=[2, 1])), "beyond the last token"),
    ("negative counts", line(**event(kind="text", counts=[2, -1])), "counts"),
    ("texts too few", line(**event(kind="text", counts=[1, 1], texts=["a"])), "differ in length"),
]


@pytest.mark.parametrize(("bad", "says"), [row[1:] for row in BAD_LINES], ids=[row[0] for row in BAD_LINES])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, bad, says):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{line()}\n\n{bad}\n{line()}\n")
    traces = read_traces(path)
    assert next(traces).token_ids == [1, 2]
    with pytest.raises(RedflagError, match=says) as error:
        next(traces)
    assert str(error.value).startswith(f"{path}, line 3: ")


def test_a_last_line_that_was_cut_off_says_so(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{line()}\n{line()[:-5]}")
    with pytest.raises(RedflagError, match=r"line 2: .*the writer was probably killed"):
        list(read_traces(path))


def test_a_last_line_without_newline_is_read(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(line())
    assert len(list(read_traces(path))) == 1


def test_a_missing_file_and_a_damaged_archive_are_named(tmp_path):
    with pytest.raises(RedflagError, match=r"nowhere\.jsonl: cannot be read"):
        list(read_traces(tmp_path / "nowhere.jsonl"))
    path = tmp_path / "t.jsonl.gz"
    write_traces(path, [example(id=str(n)) for n in range(200)])
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"no archive", whole[:30] + b"\xff" * 30 + whole[60:]):
        path.write_bytes(damaged)
        with pytest.raises(RedflagError, match=r"t\.jsonl\.gz"):
            list(read_traces(path))


def test_appending_adds_lines_and_a_line_that_was_cut_off_spoils_only_itself(tmp_path):
    path = tmp_path / "t.jsonl"
    assert write_traces(path, [example(id="1")], append=True) == 1
    assert write_traces(path, [example(id="2"), example(id="3")], append=True) == 2
    assert [trace.id for trace in read_traces(path)] == ["1", "2", "3"]
    path.write_bytes(path.read_bytes()[:-10])
    write_traces(path, [example(id="4")], append=True)
    lines = path.read_bytes().splitlines()
    assert [json.loads(text)["id"] for text in (lines[0], lines[1], lines[3])] == ["1", "2", "4"]
    with pytest.raises(RedflagError, match="line 3"):
        list(read_traces(path))


def test_appending_to_an_archive_is_refused(tmp_path):
    with pytest.raises(RedflagError, match="cannot append"):
        write_traces(tmp_path / "t.jsonl.gz", [example()], append=True)


@pytest.mark.parametrize("append", [False, True])
def test_a_full_disk_is_one_sentence(tmp_path, append):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full to stand for a full disk")
    path = tmp_path / "t.jsonl"
    if append:
        path.symlink_to("/dev/full")
    else:
        # The temporary file's name is known: put the full device there.
        temporary = f".t.jsonl.{os.getpid()}.{threading.get_ident()}.tmp"
        (tmp_path / temporary).symlink_to("/dev/full")
    with pytest.raises(RedflagError, match="No space left on device"):
        write_traces(path, [example()], append=append)


def test_files_are_readable_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        write_traces(tmp_path / "t.jsonl", [])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t.jsonl").stat().st_mode) == 0o644


def test_traces_and_the_watching_room_load_no_engine():
    code = (
        "import sys, redflag.trace, redflag.watching.session\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    root = Path(redflag.trace.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_facts_are_what_the_events_say():
    trace = Trace(
        categories=("harm", "leak"),
        token_ids=[5, 6, 7],
        flag_probs=[(0.1, 0.2), (0.7, 0.1), (0.9, 0.1)],
        scores=[(0.1, 0.2), (0.7, 0.1), (0.9, 0.1)],
        events=[
            Text(0, (5,), "a"),
            Alarm(1, "harm", 0.7, 0.6, "reflect"),
            Reflection(1, (8, 9), "harmless", 0.2),
            Resume(1),
            Text(1, (6,), "b"),
            Alarm(2, "leak", 0.8, 0.6, "force"),
            Forced(2, "leak", (4,)),
            Alarm(2, "harm", 0.9, 0.6, "escalate"),
            Escalation(2, "harmful", 0.9),
            Halt(2, "alarm", "harm", "why"),
        ],
    )
    facts = trace.facts()
    assert (facts.released, facts.waited, facts.generated) == (2, 2, 6)
    assert facts.step_peaks == {"harm": 0.9, "leak": 0.2}
    assert facts.peaks == {"harm": 0.9, "leak": 0.8}
    assert [alarm.position for alarm in facts.alarms] == [1, 2, 2]
    assert facts.overridden == 1  # the reflected one; behind the forced flag the alarm's tokens are gone
    assert facts.reviews == (*facts.reflections, *facts.escalations) == (trace.events[2], trace.events[8])
    assert facts.resumes == 1
    assert facts.decisions == tuple(event for event in trace.events if not isinstance(event, Text))
    assert facts.halt == trace.events[-1]
    assert (facts.end, facts.reason, facts.category, facts.detail) == ("halted", "alarm", "harm", "why")
    assert [event.describe() for event in trace.events if event.describe()] == [
        "reflection at token 1: 2 hidden tokens, harmless 0.20",
        "resumed at token 1",
        "flag leak forced at token 2: 1 tokens taken back",
        "second judge on 2 tokens: harmful 0.90",
    ]


@pytest.mark.parametrize(
    ("events", "end"),
    [
        ([], (None, None, "")),
        ([Done(0, "length")], ("done", "length", "")),
        ([Halt(0, "fault", None, "step 0: nan")], ("fault", "fault", "step 0: nan")),
    ],
)
def test_facts_of_a_response_without_tokens(events, end):
    facts = Trace(categories=("harm",), events=events).facts()
    assert (facts.end, facts.reason, facts.detail) == end
    assert facts.step_peaks == facts.peaks == {} and facts.category is None


def test_an_event_says_by_itself_what_its_tokens_count_as_and_how_it_reads() -> None:
    for kind in get_args(Event):
        has_tokens = "token_ids" in {item.name for item in dataclasses.fields(kind)}
        assert has_tokens == bool(kind.counts_as or kind in (Text, Thought))
    events: list[Event] = [Reflection(2, (7, 8), "harmless", 0.1), Resume(2), Forced(1, "harm", (9,)), Done(1, "stop")]
    trace = Trace(token_ids=[1], flag_probs=[(0.0,)], categories=("harm",), events=events)
    assert (trace.waited, trace.taken, trace.generated) == (2, 1, 4)
    assert [event.mark() for event in events] == ["", "resumed", "flag harm", ""]
    assert [bool(event.describe()) for event in events] == [True, True, True, False]
