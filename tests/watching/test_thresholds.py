from __future__ import annotations

import json
import math
import os

import pytest

from redflag.errors import RedflagError
from redflag.watching.monitor import MonitorConfig
from redflag.watching.thresholds import Thresholds

THINKING = Thresholds(
    values={"weapons": 0.37, "fraud": 0.2},
    run_id="run-1",
    thoughts=Thresholds(
        {"weapons": 0.9, "fraud": 3.5}, MonitorConfig("cusum"), 0.01, "expected", sample_size=300, run_id="run-1"
    ),
)
CALIBRATED = Thresholds(
    values={"weapons": 0.37, "fraud": 0.1 + 0.2},
    monitor=MonitorConfig(aggregation="run", window=3),
    target_fpr=0.01,
    guarantee="high_probability",
    delta=0.05,
    joint=True,
    sample_size=900,
    realised_fpr=0.008,
    interval=(0.002, 0.021),
    held_out_size=500,
    run_id="run-1",
    template_hash="abc",
)


def spoil(directory, change):
    CALIBRATED.save(directory)
    path = directory / "thresholds.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def nested(record):
    return {key: value for key, value in record.items() if key != "format"}


def test_thresholds_without_thoughts_are_written_as_older_versions_read_them(tmp_path):
    assert "thoughts" not in json.loads(CALIBRATED.save(tmp_path).read_text())
    assert CALIBRATED.of_thoughts is CALIBRATED
    THINKING.save(tmp_path)
    assert Thresholds.load(tmp_path).of_thoughts.values == {"weapons": 0.9, "fraud": 3.5}


@pytest.mark.parametrize(
    "thresholds",
    [
        CALIBRATED,
        Thresholds.manual(0.5, ["weapons"]),
        Thresholds({"w": 12.5}, MonitorConfig("cusum", drift=1), 0.05, "expected"),
        THINKING,
    ],
    ids=["calibrated", "manual", "cusum", "thoughts"],
)
def test_what_is_saved_is_loaded(tmp_path, thresholds):
    assert thresholds.save(tmp_path) == tmp_path / "thresholds.json"
    assert Thresholds.load(tmp_path) == thresholds
    assert Thresholds.load(str(tmp_path)) == thresholds


def test_the_file_is_flat_readable_json_with_a_format_number(tmp_path):
    record = json.loads(CALIBRATED.save(tmp_path).read_text())
    assert record["format"] == 1
    assert record["values"] == {"weapons": 0.37, "fraud": 0.1 + 0.2}
    assert record["monitor"]["aggregation"] == "run"
    assert record["interval"] == [0.002, 0.021]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(threshold=0.5), r"unknown keys \['threshold'\]"),
        (lambda r: r["monitor"].update(windows=2), r"unknown keys \['windows'\]"),
        (lambda r: r.pop("template_hash"), r"lacks the keys \['template_hash'\]"),
        (lambda r: r["monitor"].pop("prior"), r"lacks the keys \['prior'\]"),
        (lambda r: r.update(format=2), "format 2, and this version of redflag reads 1"),
        (lambda r: r.pop("format"), "format None"),
        (lambda r: r.update(values={}), "the thresholds must map each category"),
        (lambda r: r.update(values=[0.5]), "the thresholds must map each category"),
        (lambda r: r["values"].update(weapons="0.5"), r"threshold of 'weapons' must be .*\(got '0.5'"),
        (lambda r: r["values"].update(weapons=None), r"threshold of 'weapons' must be .*\(got None"),
        (lambda r: r["values"].update(weapons=50), r"threshold of 'weapons' must be .*\(got 50"),
        (lambda r: r["values"].update(weapons=10**400), "cannot be"),
        (lambda r: r.update(monitor="max"), "a monitor that is not an object"),
        (lambda r: r["monitor"].update(aggregation="mean"), r"aggregation must be .*\(got 'mean'"),
        (lambda r: r["monitor"].update(window=[3]), r"window must be .*\(got \[3\]"),
        (lambda r: r.update(guarantee="certain"), r"guarantee must be .*\(got 'certain'"),
        (lambda r: r.update(delta=None), r"delta must be .*\(got None"),
        (lambda r: r.update(target_fpr=1), r"target_fpr must be .*\(got 1"),
        (lambda r: r.update(interval=[0.1]), "interval"),
        (lambda r: r.update(interval=3), "cannot be"),
        (lambda r: r.update(realised_fpr=2), "realised_fpr and the two ends of interval must be .*got 2"),
        (lambda r: r.update(sample_size=-3), r"sample_size must be .*\(got -3"),
        (lambda r: r.update(run_id=None), r"run_id must be .*\(got None"),
        (lambda r: r.update(joint=1), r"joint must be .*\(got 1"),
        (lambda r: r.update(thoughts=0.5), "thoughts that is not an object"),
        (lambda r: r.update(thoughts={"values": {"weapons": 0.5}}), "lacks the keys"),
        (lambda r: r.update(thoughts={**nested(r), "thoughts": {}}), "thoughts of thoughts"),
        (lambda r: r.update(thoughts={**nested(r), "run_id": "other"}), "thoughts must have the answer's run_id"),
        (lambda r: r.update(thoughts={**nested(r), "values": {"weapons": 0.5}}), "would go unwatched"),
        (
            lambda r: r.update(thoughts={**nested(r), "values": {"weapons": 2, "fraud": 1}}),
            r"'weapons' must be .*\(got 2",
        ),
    ],
)
def test_a_file_that_is_not_right_is_refused_by_path_and_fault(tmp_path, change, says):
    spoil(tmp_path, change)
    with pytest.raises(RedflagError, match=says) as error:
        Thresholds.load(tmp_path)
    assert str(tmp_path / "thresholds.json") in str(error.value)
    assert "redflag calibrate" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1, "values": {"weapons": NaN}}', b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "not utf-8", "bare NaN", "deep"],
)
def test_a_file_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "thresholds.json").write_bytes(content)
    with pytest.raises(RedflagError, match="cannot be trusted"):
        Thresholds.load(tmp_path)


def test_a_missing_file_names_the_verb_that_makes_it(tmp_path):
    with pytest.raises(RedflagError, match="redflag calibrate --model"):
        Thresholds.load(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path):
    (tmp_path / "thresholds.json").mkdir()
    with pytest.raises(RedflagError, match="cannot be read"):
        Thresholds.load(tmp_path)


def test_check_accepts_what_the_thresholds_were_calibrated_with_in_any_order():
    CALIBRATED.check("run-1", "abc", "raw", ["fraud", "weapons"])
    CALIBRATED.check("run-1", "abc", "raw", ["weapons", "fraud"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run-2", "abc", "raw", ["weapons", "fraud"]), "run must be 'run-1', .*got 'run-2'"),
        (("", "abc", "raw", ["weapons", "fraud"]), "run must be 'run-1', .*got ''"),
        (("run-1", "abd", "raw", ["weapons", "fraud"]), "prompt template must be 'abc', .*got 'abd'"),
        (("run-1", "abc", "processed", ["weapons", "fraud"]), "log-probability mode must be 'raw'"),
        (("run-1", "abc", "raw", ["weapons"]), "categories"),
        (("run-1", "abc", "raw", ["weapons", "fraud", "malware"]), "categories"),
        (("run-1", "abc", "raw", ["weapons", "frauds"]), "categories"),
    ],
)
def test_check_names_the_mismatch(arguments, says):
    with pytest.raises(RedflagError, match=says):
        CALIBRATED.check(*arguments)


@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, 1.01, 50, 10**400, "0.5", None, True])
def test_a_threshold_that_no_score_or_every_score_reaches_is_refused(value):
    with pytest.raises(RedflagError, match="the threshold of 'weapons'"):
        Thresholds.manual(value, ["weapons"])


def test_cusum_thresholds_are_in_nats_and_may_be_above_one():
    assert Thresholds.manual(40.0, ["weapons"], MonitorConfig("cusum")).values == {"weapons": 40.0}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_older_file_and_no_litter(tmp_path, monkeypatch, failing):
    CALIBRATED.save(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(RedflagError, match="No space left on device"):
        Thresholds.manual(0.9, ["weapons"]).save(tmp_path)
    assert Thresholds.load(tmp_path) == CALIBRATED
    assert os.listdir(tmp_path) == ["thresholds.json"]


def test_saving_into_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RedflagError, match="cannot write"):
        CALIBRATED.save(tmp_path / "nowhere")
