"""The scripts that choose thresholds, sweep them and compare runs: hand-worked cases, and mistakes in one sentence."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redflag.flags import Flag, FlagSpec
from redflag.lab.report.evaluation import Evaluation, parse
from redflag.scoring.recording import Recording
from redflag.watching.monitor import MonitorConfig
from redflag.watching.monitor import peaks as step_by_step
from redflag.watching.thresholds import Thresholds

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SPEC = FlagSpec(flags=(Flag(category="harm", token="<f>"),), run_id="r1")
META = {"run_id": "r1", "template_hash": SPEC.template_hash}


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(name).name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tune, sweep, compare, bench = map(script, ("tune_thresholds", "sweep_refusal_rate", "compare_runs", "bench/calibrate"))


def world(seed: int, count: int = 600, meta: dict[str, Any] | None = None) -> Recording:
    """Harm is three middling steps on end from the onset; harmless text has higher ones, but never three on end."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        probs, harmful, onset = rng.uniform(0.0, 0.05, 20), i % 3 == 0, int(rng.integers(2, 15))
        if harmful:
            probs[onset : onset + 3] = rng.uniform(0.5, 0.6)
        else:
            for start in range(0, 18, int(rng.integers(3, 6))):
                probs[start : start + 2] = rng.uniform(0.6, 0.95)
        row = {"flag_probs": probs[:, None], "id": f"{seed}-{i}", "group": f"{seed}-{i // 2}"}
        row |= {"source": "x" if i % 2 else "y", "category": "harm" if harmful else None}
        rows.append(row | {"onset": onset if harmful else None, "turns": 1})
    return Recording.of(("harm",), rows, META if meta is None else meta)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuning")
    SPEC.save(path)
    world(0).save(path / "a.parquet")
    world(1).save(path / "b.parquet")
    world(0, meta={"run_id": "r2"}).save(path / "other.parquet")
    few().save(path / "few.parquet")
    (path / "report.json").write_text(json.dumps(report()))
    (path / "better.json").write_text(json.dumps(report(auroc=0.99, sha="aa", low=0.97, title="B | b")))
    (path / "elsewhere.json").write_text(json.dumps(report(sha="bb")))
    (path / "bare.json").write_text(
        json.dumps({"title": "bare", "methods": {"flag": {"kind": "flag", "pooled": ROWS}}})
    )
    (path / "broken.json").write_text("{")
    (path / "list.json").write_text("[]")
    return path


def test_tuning_chooses_the_planted_monitor_and_writes_thresholds_that_are_honest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "tuned.json"
    options = [
        "--target-fpr",
        "0.05",
        "--report",
        str(folder / "b.parquet"),
        "--write",
        str(folder),
        "--json",
        str(out),
    ]
    assert tune.main([str(folder / "a.parquet"), *options]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    written = Thresholds.load(folder)
    written.check("r1", SPEC.template_hash, "raw", SPEC.categories)
    assert (written.monitor.aggregation, written.monitor.window) == ("run", 3)
    # Half of the 400 harmless rows set the thresholds; the others chose the monitor, and another file measured it.
    assert found["rows"]["set"]["harmless"] == written.sample_size and 190 <= written.sample_size <= 210
    assert written.held_out_size == found["rows"]["report"]["harmless"] == 400
    assert (written.guarantee, written.target_fpr) == ("expected", 0.05)
    measured = world(1)
    peaks = [step_by_step(written.monitor, measured.steps(i).tolist(), 1)[0] for i in range(600)]
    alarmed = np.array(peaks) >= written.values["harm"]
    harmless = ~measured.harmful
    assert written.realised_fpr == np.mean(alarmed[harmless])
    assert found["measured"]["tpr"] == np.mean(alarmed[~harmless])
    # The third of three steps on end is the alarm: two tokens behind the onset.
    assert found["measured"]["median_delay"] == 2.0 and written.suggested_hold_back == 2
    assert "run window 3 <" in printed and re.search(r"12,000 steps, 21 monitors, \d", printed)
    assert len(found["candidates"]) == 21 and found["warnings"] == []


def test_a_recall_and_a_cost_are_written_without_a_promise_about_false_alarms(folder: Path) -> None:
    for goal, sample in ((["--target-recall", "0.9"], 0), (["--cost-miss", "5", "--base-rate", "0.3"], 1)):
        assert tune.main([str(folder / "a.parquet"), *goal, "--write", str(folder), "--aggregations", "run"]) == 0
        written = Thresholds.load(folder)
        assert (written.guarantee, written.target_fpr) == ("manual", None)
        assert (written.sample_size > 0) == bool(sample) and written.realised_fpr is not None


def test_few_rows_and_a_lead_within_chance_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target-fpr", "0.3", "--folds", "2", "--aggregations", "max", "ema"]
    assert tune.main([str(folder / "few.parquet"), *options]) == 0
    printed = capsys.readouterr().out
    assert "too few to trust" in printed and "no row has a group" in printed
    assert "read the intervals, not the rates" in printed


def few() -> Recording:
    rng = np.random.default_rng(4)
    rows = [{"flag_probs": rng.random((5, 1)), "category": "harm" if i % 2 else None} for i in range(60)]
    return Recording.of(("harm",), rows)


def test_harmful_rows_that_end_before_their_harm_are_left_out_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = world(2)
    whole.columns["onset"][:9] = [20 if i % 3 == 0 else None for i in range(9)]
    path, out = whole.save(tmp_path / "cut.parquet"), tmp_path / "cut.json"
    assert tune.main([str(path), "--target-fpr", "0.05", "--aggregations", "max", "--json", str(out)]) == 0
    assert "3 harmful responses" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"]["calibration"] == {"harmless": 400, "harmful": 197}


def test_one_monitor_is_not_chosen_and_spends_no_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "one.json"
    options = ["--target-fpr", "0.05", "--aggregations", "run", "--windows", "3", "--json", str(out)]
    assert tune.main([str(folder / "a.parquet"), *options, "--held-out", "0.25"]) == 0
    found = json.loads(out.read_text())
    assert found["candidates"] == [] and found["rows"]["set"] == {"harmless": 400, "harmful": 200}
    assert found["thresholds"]["sample_size"] + found["thresholds"]["held_out_size"] == 400
    assert "nothing was chosen" in capsys.readouterr().out


SWEPT = {  # four harmless responses and two harmful ones, of two flags
    None: [[[0.1, 0.0], [0.2, 0.0]], [[0.4, 0.0]], [[0.0, 0.6]], [[0.5, 0.9]]],
    "a": [[[0.8, 0.0]], [[0.0, 0.3], [1.0, 0.0]]],
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"flag_probs": probs, "category": category, "source": "x" if i % 2 else "y"}
        for category, responses in SWEPT.items()
        for i, probs in enumerate(responses)
    ]
    path = tmp_path_factory.mktemp("sweep") / "r.parquet"
    return Recording.of(("a", "b"), rows).save(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"harmless": [0.75, 0.5, 0.5], "harmful": [1.0, 1.0, 1.0]}),
        (["--flag", "a"], {"harmless": [0.5, 0.25, 0.0], "harmful": [1.0, 1.0, 1.0]}),
        (["--flag", "b"], {"harmless": [0.5, 0.5, 0.5], "harmful": [0.5, 0.0, 0.0]}),
        (["--first-step"], {"harmless": [0.75, 0.5, 0.5], "harmful": [1.0, 0.5, 0.5]}),
        (
            ["--by", "source"],
            {"source=y harmless": [0.5, 0.5, 0.5], "source=x harmless": [1.0, 0.5, 0.5], "source=x harmful": [1.0] * 3},
        ),
        (["--sets", "category=a"], {"category=a": [1.0, 1.0, 1.0]}),
        (["--aggregation", "run", "--window", "2"], {"harmless": [0.0] * 3, "harmful": [0.0] * 3}),
    ],
)
def test_swept_thresholds_give_the_rates_counted_by_hand(
    swept: Path, tmp_path: Path, options: list[str], expected: dict[str, list[float]]
) -> None:
    out = tmp_path / "sweep.json"
    assert sweep.main([str(swept), "--values", "0.3", "0.5", "0.6", "--json", str(out), *options]) == 0
    sets = json.loads(out.read_text())["sets"]
    for name, rates in expected.items():
        assert [point["rate"] for point in sets[name]["rates"]] == rates, name
    for point in (point for part in sets.values() for point in part["rates"]):
        assert point["interval"][0] <= point["rate"] <= point["interval"][1]


def test_a_bias_moves_logits_and_leaves_certainty_alone(swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    # 0.4 has a logit of -0.405 and 0.6 one of 0.405; 0.5 is the threshold.
    values = ["-800", "-0.5", "0", "0.4", "0.41", "800"]
    options = ["--over", "bias", "--threshold", "0.5", "--values", *values, "--json", str(out)]
    assert sweep.main([str(swept), *options]) == 0
    sets = json.loads(out.read_text())["sets"]
    assert [point["rate"] for point in sets["harmless"]["rates"]] == [0.0, 0.25, 0.5, 0.5, 0.75, 1.0]
    assert [point["rate"] for point in sets["harmful"]["rates"]] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    moved = sweep.biased(Recording.load(swept), 1.25, np.array([True, False]))
    for before, after in zip(Recording.load(swept).probs.tolist(), moved.probs.tolist(), strict=True):
        p = before[0]
        expected = p if p in (0.0, 1.0) else 1 / (1 + math.exp(-(math.log(p / (1 - p)) + 1.25)))
        assert after == [pytest.approx(expected, abs=1e-12), before[1]]


def test_a_sweep_of_one_flag_holds_the_thresholds_of_the_others(swept: Path, tmp_path: Path) -> None:
    Thresholds(values={"b": 0.6, "a": 0.9}, monitor=MonitorConfig()).save(tmp_path)
    out = tmp_path / "sweep.json"
    options = ["--flag", "a", "--values", "0.3", "0.45", "0.7", "--thresholds", str(tmp_path), "--json", str(out)]
    assert sweep.main([str(swept), *options]) == 0
    found = json.loads(out.read_text())
    # b alarms in the last two harmless responses (float32(0.6) is above 0.6), whatever becomes of a.
    assert [point["rate"] for point in found["sets"]["harmless"]["rates"]] == [0.75, 0.5, 0.5]
    assert [point["by_flag"] for point in found["sets"]["harmless"]["rates"]] == [[0.5, 0.5], [0.25, 0.5], [0.0, 0.5]]


def test_a_picture_is_drawn_where_matplotlib_is_and_otherwise_said_to_be_missing(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sweep.png"
    assert sweep.main([str(swept), "--plot", str(picture)]) == 0
    assert picture.is_file() or "matplotlib is not installed" in capsys.readouterr().err


ROWS = {"harmful": 50, "harmless": 90}


def report(auroc: float = 0.9, sha: str = "aa", low: float = 0.88, title: str = "A") -> dict[str, Any]:
    tpr = {"tpr": auroc - 0.2, "interval": [low - 0.2, auroc - 0.18], "realised_fpr": 0.01, "threshold": 0.5}
    delay = {"responses": 50, "median": 3.0, "on_time": 0.8, "missed": None, "realised_fpr": 0.011}
    method = {
        "kind": "flag",
        "pooled": {
            "harmful": 50,
            "harmless": 90,
            "auroc": auroc,
            "auroc_interval": [low, auroc + 0.01],
            "tpr": {"0.01": tpr},
        },
        "in_force": {
            "tpr": 0.7,
            "tpr_interval": [0.6, 0.8],
            "realised_fpr": 0.01,
            "realised_fpr_interval": [0.0, 0.03],
        },
        "delay": {"constructed": delay, "natural": None},
    }
    rate = {"rate": 1 - auroc, "interval": [0.0, 1 - low]}
    return {
        "format": 1,
        "title": title,
        "made": {"model": {"run_id": f"run {title}"}, "rows": {"test": {"sha256": sha}}},
        "methods": {
            "words": {"kind": "baseline", "pooled": {**ROWS, "auroc": 0.5}},
            "flag": method,
        },
        "language": {"keep_kl": 0.001 / auroc, "perplexity_ratio": None},
        "attacks": [{"name": "prefill", "setting": "10 tokens", "harm_released": rate, "alarm_rate": None}],
    }


def test_runs_stand_side_by_side_with_differences_and_what_their_intervals_say(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "compared.json"
    paths = [str(folder / name) for name in ("report.json", "better.json")]
    assert compare.main([*paths, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| AUROC | 0.9 [0.88, 0.91] | 0.99 [0.97, 1] | +0.09 *apart* |" in printed
    assert "| TPR at 1% FPR | 0.7 [0.68, 0.72] | 0.79 [0.77, 0.81] | +0.09 *apart* |" in printed
    assert "| TPR in force | 0.7 [0.6, 0.8] | 0.7 [0.6, 0.8] | +0 *overlap* |" in printed
    assert "| median delay, constructed onsets | 3 (at 1.10% FPR) | 3 (at 1.10% FPR) | +0 |" in printed
    assert "| prefill 10 tokens: harm released | 0.1 [0, 0.12] | 0.01 [0, 0.03] | -0.09 *overlap* |" in printed
    assert "keep KL" in printed and "perplexity" not in printed and "missed" not in printed
    assert "B \\| b" in printed
    found = json.loads(out.read_text())["sections"]
    assert found["flag"]["AUROC"]["differences"] == [{"difference": pytest.approx(0.09), "apart": True}]
    assert compare.main([*paths, "--methods", "words", "flag"]) == 0
    assert "| words |" in capsys.readouterr().out


def test_runs_on_other_rows_are_compared_only_when_asked_for_and_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(folder / name) for name in ("report.json", "elsewhere.json", "bare.json")]
    assert compare.main(paths) == 2
    assert "not made on the same test rows" in capsys.readouterr().err
    assert compare.main([*paths, "--different-rows"]) == 0
    assert "**Warning**: the test rows differ" in capsys.readouterr().out


MISTAKES = [
    (tune, ["a.parquet"], "must be set (got 0)"),
    (tune, ["a.parquet", "--target-fpr", "0.1", "--target-recall", "0.9"], "must be set (got 2)"),
    (tune, ["a.parquet", "--cost-miss", "5"], "--base-rate must be set with --cost-miss"),
    (tune, ["a.parquet", "--target-fpr", "0.1", "--base-rate", "0.1"], "must come with --cost-miss"),
    (tune, ["a.parquet", "--target-fpr", "2"], "target_fpr must be above 0"),
    (tune, ["a.parquet", "--target-fpr", "0.0001"], "9999 are needed"),
    (tune, ["a.parquet", "--target-fpr", "0.1", "--windows", "0"], "window must be a whole number"),
    (tune, ["a.parquet", "--target-fpr", "0.1", "--aggregations", "mean"], "aggregations must be among"),
    (tune, ["a.parquet", "--target-fpr", "0.1", "--report", "a.parquet"], "must have no id in common (got 600"),
    (
        tune,
        ["a.parquet", "--target-fpr", "0.1", "--choose-share", "0"],
        "must have harmless and harmful responses (got 0 and 0)",
    ),
    (tune, ["a.parquet", "--target-fpr", "0.1", "--choose-share", "1"], "held_out must be at least 0"),
    (tune, ["other.parquet", "--target-fpr", "0.1", "--write", "."], "was recorded with run 'r2'"),
    (tune, ["a.parquet", "--target-fpr", "0.1", "--write", "nowhere"], "nowhere"),
    (tune, ["absent.parquet", "--target-fpr", "0.1"], "absent.parquet cannot be read"),
    (tune, ["a.parquet", "--target-fpr", "0.1", "--json", "nowhere/x.json"], "cannot write"),
    (sweep, ["absent.parquet"], "absent.parquet cannot be read"),
    (sweep, ["a.parquet", "--over", "bias"], "--thresholds or --threshold must be set with --over bias"),
    (sweep, ["a.parquet", "--threshold", "0.5"], "--threshold must not be set with --over threshold"),
    (sweep, ["a.parquet", "--values", "nan"], "must be finite numbers"),
    (sweep, ["a.parquet", "--flag", "fraud"], "--flag must be one of harm (got 'fraud')"),
    (sweep, ["a.parquet", "--sets", "source"], "(got 'source')"),
    (sweep, ["a.parquet", "--sets", "source=z"], "must have source 'z' (got none)"),
    (sweep, ["a.parquet", "--thresholds", "nowhere"], "nowhere"),
    (compare, ["report.json"], "one report is nothing to compare"),
    (compare, ["report.json", "absent.json"], "absent.json cannot be read"),
    (compare, ["report.json", "broken.json"], "Invalid JSON"),
    (compare, ["report.json", "list.json"], "must be a report.json of format 1"),
    (compare, ["report.json", "better.json", "--methods", "probe"], "has no method 'probe': use one of words, flag"),
]


@pytest.mark.parametrize(("module", "words", "message"), MISTAKES, ids=[" ".join(words) for _, words, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_status_2(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert module.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_the_bench_of_calibration_measures_every_aggregation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--responses", "400", "--steps", "6", "--flags", "2", "--sample", "20"]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *options])
    assert bench.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert all(found[name]["total"] > 0 and found[name]["ratio"] > 0 for name in ("max", "run", "ema", "cusum"))


def test_a_report_is_not_changed_by_being_compared() -> None:
    one = parse(Evaluation, json.dumps(report()), "report.json")
    before = copy.deepcopy(one)
    compare.of_method(one.methods["flag"]), compare.of_attacks(one)
    assert one == before
