"""Who was answered although a flag was high is written down, nobody else is, and no override goes unlogged."""

from __future__ import annotations

import json
import os
import threading
from datetime import datetime, timedelta, timezone

import pytest

from redflag.errors import RedflagError
from redflag.server.audit_log import AuditLog
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
    log.record(response, user="u-1", request_id="r-1", reason="red team, week 12")
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
        with pytest.raises(RedflagError, match=r"could not be logged .* so it is refused"):
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
    log.begin_override("u", " red team, week 12\n", "r-9")
    (entry,) = lines(path)
    assert synced == [1]
    assert entry.pop("time")
    assert entry == {
        "format": 1,
        "kind": "override",
        "request": "r-9",
        "user": "u",
        "overridden_by": "operator",
        "reason": "red team, week 12",
    }
    for blank in ("", " \n"):
        with pytest.raises(RedflagError, match="must give a reason"):
            log.begin_override("u", blank, "r")
    assert len(lines(path)) == 1


def test_what_a_client_chooses_is_cut_and_cannot_write_lines(log, path):
    log.begin_override("x\n" * 5000, "y\n" * 5000, "z\n" * 5000)
    (entry,) = lines(path)
    assert max(map(len, (entry["user"], entry["request"], entry["reason"]))) <= 1001


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(RedflagError, match="cannot be written"):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl", THRESHOLDS)
    with pytest.raises(RedflagError, match="cannot be written"):
        AuditLog(tmp_path, THRESHOLDS)
