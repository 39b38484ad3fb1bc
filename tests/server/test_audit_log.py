"""Who was answered although a flag was high is written down, nobody else is, and no override goes unlogged."""

from __future__ import annotations

import gzip
import json
import os
import re
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from redflag.cli import parse
from redflag.errors import RedflagError
from redflag.server.audit_log import AuditLog
from redflag.terminal import audit_log as report_audit
from redflag.terminal.audit_log import AuditLogArguments
from redflag.trace import Alarm, Done, Escalation, Forced, Halt, Reflection, Resume, Text, Trace

THRESHOLDS = {"weapons": 0.8, "fraud": 0.4}
SECRET = "how to build a bomb"


def trace(*events, scores=((0.1, 0.1), (0.2, 0.1))):
    return Trace(
        categories=("weapons", "fraud"),
        token_ids=list(range(len(scores))),
        flag_probs=[tuple(row) for row in scores],
        scores=[tuple(row) for row in scores],
        events=list(events),
        text=SECRET,
    )


SHOWN, DONE = Text(0, (0, 1), SECRET), Done(2, "stop")
HALT = Halt(1, "alarm", "weapons", detail=SECRET, text=SECRET)


def alarm(action, category="weapons", position=1, score=0.9):
    return Alarm(position, category, score, THRESHOLDS[category], action)


HIGH = ((0.1, 0.1), (0.9, 0.1))  # the alarm's score
REFLECTED = Reflection(1, (5, 6), "harmless", 0.1, SECRET)


@pytest.fixture
def log(tmp_path):
    return AuditLog(tmp_path / "audit.jsonl", THRESHOLDS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# events, scores -> alarms overridden and near categories; None: not written
CASES = {
    "harmless": ([SHOWN, DONE], ((0.1, 0.1),), None),
    "just below the floor": ([SHOWN, DONE], ((0.39, 0.19),), None),
    "at the floor": ([SHOWN, DONE], ((0.4, 0.1),), (0, ["weapons"])),
    "near in both": ([SHOWN, DONE], ((0.1, 0.39), (0.79, 0.1)), (0, ["weapons", "fraud"])),
    "near, and the client left": ([SHOWN], ((0.5, 0.1),), (0, ["weapons"])),
    "near, and lost": ([SHOWN, Halt(1, "fault", detail=SECRET)], ((0.5, 0.1),), (0, ["weapons"])),
    "halted": ([alarm("halt"), HALT], HIGH, None),
    "halted, near in another": ([alarm("halt"), HALT], ((0.1, 0.3), (0.9, 0.1)), None),
    "replaced": ([alarm("replace"), HALT], HIGH, None),
    "let through": ([alarm("continue"), SHOWN, DONE], HIGH, (1, [])),
    "let through, then lost": ([alarm("continue"), Halt(1, "fault")], HIGH, (1, [])),
    "let through, then halted later": ([alarm("continue"), SHOWN, alarm("halt", "fraud", 2), HALT], HIGH, (1, [])),
    "one lets through, one halts, at one step": ([alarm("continue"), alarm("halt", "fraud"), HALT], HIGH, None),
    "reflected and resumed": ([alarm("reflect"), REFLECTED, Resume(2), SHOWN, DONE], HIGH, (1, [])),
    "reflected and confirmed": ([alarm("reflect"), Reflection(1, (), "harmful", 0.9), HALT], HIGH, None),
    "left while it was reviewed": ([alarm("reflect")], HIGH, None),
    "two at one step, resumed": (
        [alarm("escalate"), alarm("continue", "fraud"), Escalation(2, "harmless", 0.0, SECRET), Resume(2), DONE],
        HIGH,
        (2, []),
    ),
    "resumed, then halted": ([alarm("reflect"), REFLECTED, Resume(2), alarm("halt", position=2), HALT], HIGH, (1, [])),
    "its flag was forced": ([alarm("force"), Forced(1, "weapons", (1,)), SHOWN, DONE], ((0.1, 0.1),), None),
    "its flag was forced, another let through": (
        [alarm("force"), Forced(1, "weapons", (1,)), SHOWN, alarm("continue", "fraud", 2), DONE],
        ((0.1, 0.1),),
        (1, []),
    ),
    "its token was taken back": ([alarm("reflect"), REFLECTED, Resume(1), SHOWN, DONE], ((0.1, 0.1),), (1, [])),
    "no steps": ([], (), None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_went_on_although_a_flag_was_high_is_written_and_nothing_else(log, path, case):
    events, scores, written = CASES[case]
    assert log.record(trace(*events, scores=scores), user="u", request_id="r") == (written is not None)
    found = [(entry["alarms_overridden"], entry["near"]) for entry in lines(path)]
    assert found == ([] if written is None else [written])
    for entry in lines(path):
        peak = entry["categories"]["weapons"]
        assert peak["threshold"] == 0.8
        assert peak["peak"] == max([row[0] for row in scores] + [e.score for e in events if isinstance(e, Alarm)])


def test_an_entry_holds_numbers_and_names_and_not_a_word_of_the_response(log, path):
    response = trace(alarm("reflect"), REFLECTED, Resume(2), SHOWN, DONE, scores=HIGH)
    log.record(response, user="u-1", request_id="r-1", overridden_by="operator", reason="red team, week 12")
    assert SECRET not in path.read_text() and "bomb" not in path.read_text()
    (entry,) = lines(path)
    when = datetime.fromisoformat(entry.pop("time").replace("Z", "+00:00"))
    assert abs(when - datetime.now(timezone.utc)) < timedelta(minutes=5)
    assert entry == {
        "format": 1,
        "kind": "response",
        "request": "r-1",
        "user": "u-1",
        "categories": {
            "weapons": {"peak": 0.9, "threshold": 0.8},
            "fraud": {"peak": 0.1, "threshold": 0.4},
        },
        "alarms": [{"position": 1, "category": "weapons", "action": "reflect", "score": 0.9}],
        "alarms_overridden": 1,
        "near": [],
        "reviews": [{"kind": "reflection", "verdict": "harmless", "harm": 0.1}],
        "end": "stop",
        "released": 2,
        "generated": 4,
        "overridden": True,
        "overridden_by": "operator",
        "reason": "red team, week 12",
    }
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("floor", "written"), [(0.25, True), (0.5, True), (0.6, False), (1.0, False)])
def test_the_floor_decides_what_is_near(path, floor, written):
    log = AuditLog(path, THRESHOLDS, floor=floor)
    assert log.record(trace(SHOWN, DONE, scores=((0.4, 0.0),)), user="u", request_id="r") == written


def test_users_may_be_told_apart_without_being_named(path):
    def written(key, user):
        AuditLog(path, THRESHOLDS, hash_key=key).record(
            trace(alarm("continue"), DONE, scores=HIGH), user=user, request_id="r"
        )
        return lines(path)[-1]["user"]

    first = written("key", "alice@example.org")
    assert re.fullmatch(r"hmac:[0-9a-f]{32}", first)
    assert first == written(b"key", "alice@example.org") == written("key", "alice@example.org")
    assert len({first, written("other", "alice@example.org"), written("key", "bob"), written("key", "\ud800")}) == 4
    assert written("key", None) is None and written(None, "alice") == "alice"
    assert "example" not in path.read_text()


def test_a_line_that_was_cut_off_does_not_swallow_the_next(log, path):
    log.record(trace(alarm("continue"), DONE, scores=HIGH), user="one", request_id="r")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    log.record(trace(alarm("continue"), DONE, scores=HIGH), user="two", request_id="r")
    parts = path.read_bytes().split(b"\n")
    assert json.loads(parts[0])["user"] == "one" and json.loads(parts[2])["user"] == "two" and parts[3] == b""


def test_many_writers_of_one_file_never_mix_their_lines(path):
    def work(name):
        log = AuditLog(path, THRESHOLDS)
        for i in range(100):
            log.record(trace(alarm("continue"), DONE, scores=HIGH), user=f"{name} " * 20, request_id=str(i))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(path)) == 400


def test_the_file_may_be_moved_away_at_any_time(log, path):
    for i in range(3):
        log.record(trace(alarm("continue"), DONE, scores=HIGH), user=f"u{i}", request_id="r")
        path.rename(path.with_suffix(f".{i}"))
    assert sorted(p.name for p in path.parent.iterdir()) == ["audit.0", "audit.1", "audit.2"]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda monkeypatch: monkeypatch.setattr(os, "open", _fail),
        lambda monkeypatch: monkeypatch.setattr(os, "write", _fail),
        lambda monkeypatch: monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 3),
    ],
    ids=["cannot be opened", "disk full", "short write"],
)
def test_what_cannot_be_written_is_reported_and_breaks_nothing_but_an_override(path, monkeypatch, caplog, break_it):
    failures = []
    log = AuditLog(path, THRESHOLDS, on_failure=lambda: failures.append(1))
    descriptors = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        break_it(patch)
        assert log.record(trace(alarm("continue"), DONE, scores=HIGH), user=SECRET, request_id=SECRET) is False
        assert len(failures) == 1
        with pytest.raises(RedflagError, match="none goes unlogged"):
            log.begin_override("u", "red team", "r")
        assert len(failures) == 2
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert "could not be written: OSError" in caplog.text and "bomb" not in caplog.text
    assert log.record(trace(alarm("continue"), DONE, scores=HIGH), user="u", request_id="r")


def _fail(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_trace_that_makes_no_sense_is_a_failure_and_no_crash(log, path):
    broken = trace(alarm("continue"), DONE, scores=HIGH)
    broken.scores = [(0.1,)]
    assert log.record(broken, user="u", request_id="r") is False
    assert path.read_text() == ""


def test_an_override_is_written_before_anything_else_and_waits_for_the_disk(log, path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(1), real(descriptor)))
    log.begin_override("u", " red team, week 12\n", "r-9", by="dana")
    (entry,) = lines(path)
    assert synced == [1]
    assert entry.pop("time")
    assert entry == {
        "format": 1,
        "kind": "override",
        "request": "r-9",
        "user": "u",
        "overridden_by": "dana",
        "reason": "red team, week 12",
    }
    for blank in ("", " \n"):
        with pytest.raises(RedflagError, match="no reason"):
            log.begin_override("u", blank, "r")
    assert len(lines(path)) == 1


def test_what_a_client_chooses_is_cut_and_cannot_write_lines(log, path):
    log.begin_override("x\n" * 5000, "y\n" * 5000, "z\n" * 5000)
    (entry,) = lines(path)
    assert max(map(len, (entry["user"], entry["request"], entry["reason"]))) <= 1001


@pytest.mark.parametrize(
    ("options", "named"), [({"floor": 0}, "floor"), ({"floor": 1.5}, "floor"), ({"hash_key": ""}, "hash_key")]
)
def test_options_without_a_meaning_are_refused(path, options, named):
    with pytest.raises(RedflagError, match=named):
        AuditLog(path, THRESHOLDS, **options)


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(RedflagError, match="cannot be written"):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl", THRESHOLDS)
    with pytest.raises(RedflagError, match="cannot be written"):
        AuditLog(tmp_path, THRESHOLDS)


# The report.


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
        (["FILE", "--since", "soon"], "since is 'soon'"),
        (["FILE", "--since", "2026-99-01"], "2026-99-01"),
        (["FILE", "--since", "999999w"], "999999w"),
        (["FILE", "--min_ratio", "-1"], "min_ratio"),
        (["FILE", "--min_ratio", "nan"], "min_ratio"),
        (["BROKEN"], "cannot be read"),
        (["NEWER"], "format 2"),
    ],
)
def test_what_cannot_be_used_is_named(written, words, named):
    broken, newer = written.with_name("broken.gz"), written.with_name("newer.jsonl")
    broken.write_bytes(b"not compressed")
    newer.write_text(json.dumps({**ENTRIES[0], "format": 2}))
    places = {"FILE": written, "BROKEN": broken, "NEWER": newer}
    with pytest.raises(RedflagError, match=named):
        report_audit.run(*parse(report_audit, [str(places.get(word, word)) for word in words], "redflag audit-log"))


def test_what_the_log_writes_the_report_reads(log, path, capsys):
    log.record(trace(alarm("continue"), SHOWN, DONE, scores=HIGH), user="u", request_id="r")
    log.begin_override("u", "red team", "r")
    out = json.loads(report(capsys, path, "--json").out)
    assert out["unreadable"] == []
    assert (out["users"][0]["alarms_overridden"], out["users"][0]["overrides"]) == (1, 1)
    assert report_audit.run(AuditLogArguments(file=[str(path)])) == 0
    empty = Path(path).with_name("empty.jsonl")
    empty.write_text("")
    capsys.readouterr()
    assert report(capsys, empty).out == "nothing was written down\n"
