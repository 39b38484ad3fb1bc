"""The verb `audit-log`: who overrode the watch or came near its thresholds, by user."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from redflag.cli import parse
from redflag.errors import RedflagError
from redflag.server.audit_log import AuditLog
from redflag.terminal import audit_log as report_audit
from redflag.terminal.audit_log import AuditLogArguments
from redflag.trace import Alarm, Done, Text, Trace


def entry(user, when, weapons=0.1, fraud=0.0, overridden=0, near=(), alarms=()):
    return {
        "format": 1,
        "kind": "response",
        "time": when,
        "request": "r",
        "user": user,
        "categories": {
            "weapons": {"peak": weapons, "threshold": 0.8},
            "fraud": {"peak": fraud, "threshold": 0.4},
        },
        "alarms": [{"position": 1, "category": c, "action": "continue", "score": 0.9} for c in alarms],
        "alarms_overridden": overridden,
        "near": list(near),
        "reviews": [],
        "end": "stop",
        "released": 2,
        "generated": 2,
        "overridden": False,
        "overridden_by": None,
        "reason": None,
    }


def override(user, when):
    return {"format": 1, "kind": "override", "time": when, "request": "r", "user": user, "overridden_by": "operator"}


ENTRIES = [
    entry("carol", "2026-05-01T10:00:00.000Z", weapons=0.5, near=["weapons"]),
    entry("bob", "2026-05-02T10:00:00.000Z", fraud=0.3, near=["fraud"]),
    entry("alice", "2026-05-03T10:00:00.000Z", weapons=0.9, overridden=1, alarms=["weapons"]),
    entry("bob", "2026-05-04T10:00:00.000Z", fraud=0.39, weapons=0.5, near=["weapons", "fraud"]),
    entry("alice", "2026-05-05T10:00:00.000Z", weapons=0.5, near=["weapons"]),
    entry(None, "2026-05-06T10:00:00.000Z", weapons=0.4, near=["weapons"]),
    override("dana", "2026-05-07T10:00:00.000Z"),
]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "logs" / "audit.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(e) + "\n" for e in ENTRIES))
    return path


def report(capsys, *words):
    assert report_audit.run(*parse(report_audit, list(map(str, words)), "redflag audit-log")) == 0
    return capsys.readouterr()


def test_the_table_has_the_severest_user_first(written, capsys):
    out, err = report(capsys, written)
    assert err == ""
    assert [re.split(r"  +", line.strip()) for line in out.splitlines()] == [
        re.split(r"\|", "user|responses|alarms overridden|near misses|score/threshold|overrides|categories|first|last"),
        ["alice", "2", "1", "1", "1.12", "0", "weapons 2", "2026-05-03 10:00:00", "2026-05-05 10:00:00"],
        ["bob", "2", "0", "2", "0.97", "0", "fraud 2, weapons 1", "2026-05-02 10:00:00", "2026-05-04 10:00:00"],
        ["carol", "1", "0", "1", "0.62", "0", "weapons 1", "2026-05-01 10:00:00", "2026-05-01 10:00:00"],
        ["(not named)", "1", "0", "1", "0.50", "0", "weapons 1", "2026-05-06 10:00:00", "2026-05-06 10:00:00"],
        ["dana", "0", "0", "0", "0.00", "1", "-", "2026-05-07 10:00:00", "2026-05-07 10:00:00"],
    ]


@pytest.mark.parametrize(
    ("options", "users"),
    [
        ([], ["alice", "bob", "carol", None, "dana"]),
        (["--user", "bob"], ["bob"]),
        (["--user", "nobody"], []),
        (["--min_ratio", "0.9"], ["alice", "bob", "dana"]),
        (["--min_ratio", "1"], ["alice", "dana"]),
        (["--since", "2026-05-03"], ["alice", "bob", None, "dana"]),
        (["--since", "2026-05-06T10:00:00.001Z"], ["dana"]),
        (["--since", "2026-05-06T12:00+02:00"], [None, "dana"]),
        (["--since", "1d"], []),
        (["--since", "9999w"], ["alice", "bob", "carol", None, "dana"]),
    ],
)
def test_options_choose_what_is_counted(written, capsys, options, users):
    out, _ = report(capsys, written, "--json", *options)
    assert [user["user"] for user in json.loads(out)["users"]] == users


def test_the_machine_readable_form_says_the_same(written, capsys):
    first = json.loads(report(capsys, written, "--json").out)["users"][0]
    assert first == {
        "user": "alice",
        "responses": 2,
        "alarms_overridden": 1,
        "near_misses": 1,
        "overrides": 0,
        "ratio": pytest.approx(1.125),
        "categories": {"weapons": 2},
        "first": "2026-05-03T10:00:00.000Z",
        "last": "2026-05-05T10:00:00.000Z",
    }


def test_several_files_folders_patterns_and_compressed_ones_are_read_each_once(written, capsys):
    old = written.with_name("audit.jsonl.1.gz")
    old.write_bytes(gzip.compress(json.dumps(entry("old", "2026-01-01T00:00:00Z", weapons=0.7)).encode() + b"\n"))
    for words in ([written.parent], [f"{written.parent}/audit*"], ["--file", written, old, written]):
        users = json.loads(report(capsys, *words, "--json").out)["users"]
        assert {user["user"]: user["responses"] for user in users} == {
            "alice": 2,
            "bob": 2,
            "carol": 1,
            None: 1,
            "dana": 0,
            "old": 1,
        }


def test_a_line_that_was_cut_off_is_counted_and_does_no_harm(written, capsys):
    whole = written.read_text()
    torn = json.dumps(ENTRIES[0])[:50]
    written.write_text(whole + torn + "\n\n" + json.dumps(ENTRIES[2]) + "\n" + torn)
    zipped = written.with_name("audit.jsonl.gz")
    zipped.write_bytes(gzip.compress(whole.encode())[:-20])
    out, err = report(capsys, "--file", written, zipped, "--json")
    found = json.loads(out)
    count = len(ENTRIES)
    assert found["unreadable"][:2] == [f"{written}:{count + 1}", f"{written}:{count + 4}"]
    assert len(found["unreadable"]) == 3 and found["unreadable"][2].startswith(f"{zipped}:")
    assert err.count("cannot be read and is not counted") == 3
    assert found["users"][0]["user"] == "alice" and found["users"][0]["responses"] >= 3


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "17",
        '{"format": 1}',
        json.dumps({**ENTRIES[0], "time": "yesterday"}),
        json.dumps({**ENTRIES[0], "time": 5}),
        json.dumps({**ENTRIES[0], "user": 5}),
        json.dumps({**ENTRIES[0], "kind": "other"}),
        json.dumps({**ENTRIES[0], "alarms_overridden": "3"}),
        json.dumps({**ENTRIES[0], "alarms": [{}]}),
        json.dumps({**ENTRIES[0], "near": None}),
        json.dumps({**ENTRIES[0], "categories": {"weapons": {"peak": 1, "threshold": 0}}}),
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_entry_is_named_and_left_out(written, capsys, line):
    written.write_text(line + "\n" + json.dumps(ENTRIES[2]) + "\n")
    out, err = report(capsys, written)
    assert f"{written}:1 cannot be read" in err
    assert out.splitlines()[1].startswith("alice")


def test_nothing_steers_the_terminal(written, capsys):
    written.write_text(json.dumps(entry("\x1b[2J\nroot", "2026-05-01T00:00:00Z", weapons=0.7, near=["weapons"])) + "\n")
    out, _ = report(capsys, written)
    assert "\x1b" not in out and len(out.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["/nowhere.jsonl"], "/nowhere.jsonl"),
        (["FILE", "--since", "soon"], "got 'soon'"),
        (["FILE", "--since", "2026-99-01"], "2026-99-01"),
        (["FILE", "--since", "999999w"], "999999w"),
        (["FILE", "--min_ratio", "-1"], "min_ratio"),
        (["FILE", "--min_ratio", "nan"], "min_ratio"),
        (["BROKEN"], "cannot be read"),
        (["NEWER"], "got 2 in"),
    ],
)
def test_what_cannot_be_used_is_named(written, words, named):
    broken, newer = written.with_name("broken.gz"), written.with_name("newer.jsonl")
    broken.write_bytes(b"not compressed")
    newer.write_text(json.dumps({**ENTRIES[0], "format": 2}))
    places = {"FILE": written, "BROKEN": broken, "NEWER": newer}
    with pytest.raises(RedflagError, match=named):
        report_audit.run(*parse(report_audit, [str(places.get(word, word)) for word in words], "redflag audit-log"))


def test_what_the_log_writes_the_report_reads(tmp_path, capsys):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, {"weapons": 0.8})
    events = [Alarm(1, "weapons", 0.9, 0.8, "continue"), Text(0, (0, 1), "a bomb"), Done(2, "stop")]
    trace = Trace(
        categories=("weapons",), token_ids=[0, 1], flag_probs=[(0.1,), (0.9,)], scores=[(0.1,), (0.9,)], events=events
    )
    log.record(trace, user="u", request_id="r")
    log.begin_override("u", "red team", "r")
    out = json.loads(report(capsys, path, "--json").out)
    assert out["unreadable"] == []
    assert (out["users"][0]["alarms_overridden"], out["users"][0]["overrides"]) == (1, 1)
    assert report_audit.run(AuditLogArguments(file=[str(path)])) == 0
    empty = Path(path).with_name("empty.jsonl")
    empty.write_text("")
    capsys.readouterr()
    assert report(capsys, empty).out == "the log has no such entries\n"
