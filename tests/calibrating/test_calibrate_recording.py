"""A recording calibrates as its rows do, without the model, and only for the model that it is of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redflag.calibrating.calibrate import CalibrateArguments, calibrate, run
from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec
from redflag.scoring.recording import Recording
from redflag.watching.monitor import MonitorConfig
from redflag.watching.thresholds import Thresholds

SPEC = FlagSpec(flags=(Flag(category="harm", token="<f>"), Flag(category="fraud", token="<g>")), run_id="r1")
META = {"run_id": "r1", "template_hash": SPEC.template_hash}


def recording(count: int = 300, flags: int = 2, meta: dict[str, Any] | None = None, **changes: Any) -> Recording:
    """Every fourth response is harmful from a known step on; pairs share a group."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        steps = (rng.random((int(rng.integers(2, 12)), flags)) * 0.5).astype(np.float32)
        harmful = i % 4 == 0
        steps[len(steps) // 2 :] += np.float32(0.5 if harmful else 0.0)
        row = {"flag_probs": steps[:-1], "tail_probs": steps[-1:], "group": f"g{i // 2}"}
        rows.append(row | {"category": "harm" if harmful else None, "onset": len(steps) // 2 if harmful else None})
    return Recording.of(SPEC.categories[:flags], rows, META if meta is None else meta)


@pytest.mark.parametrize("aggregation", ["max", "run", "ema", "cusum", "first"])
def test_a_recording_calibrates_as_its_rows_do(aggregation: Any) -> None:
    whole, monitor = recording(), MonitorConfig(aggregation=aggregation, window=2, prior=0.2)
    harmless, harmful = (np.flatnonzero(part).tolist() for part in (~whole.harmful, whole.harmful))
    rows = calibrate(
        [whole.steps(i) for i in harmless],
        SPEC,
        target_fpr=0.05,
        monitor=monitor,
        harmful=[whole.steps(i).tolist() for i in harmful],
        onsets=[whole.columns["onset"][i] for i in harmful],
        groups=[whole.columns["group"][i] for i in harmless],
        hold_back_share=0.8,
        seed=3,
    )
    assert calibrate(whole, SPEC, target_fpr=0.05, monitor=monitor, hold_back_share=0.8, seed=3) == rows
    assert rows.hold_back.suggested is not None and rows.caught


def test_an_onset_beyond_the_judged_steps_is_not_known() -> None:
    whole = recording()
    whole.columns["onset"] = [None if onset is None else 99 for onset in whole.columns["onset"]]
    assert "no harmful response with a known onset" in str(calibrate(whole, SPEC, target_fpr=0.05))


def test_an_onset_at_the_first_token_that_nobody_marked_is_not_known() -> None:
    whole = recording()
    whole.columns["onset"] = [None if onset is None else 0 for onset in whole.columns["onset"]]
    assert "no harmful response with a known onset" in str(calibrate(whole, SPEC, target_fpr=0.05))
    whole.columns["onset_source"] = ["natural"] * len(whole)
    assert calibrate(whole, SPEC, target_fpr=0.05).hold_back.delays


def test_a_recording_that_cannot_be_judged_or_is_of_other_flags_is_refused() -> None:
    whole = recording()
    whole.probs[whole.starts[7] + 1, 1] = np.nan
    with pytest.raises(
        RedflagError, match=r"response 7 cannot be judged at step 1: a flag probability must be .*got nan"
    ):
        calibrate(whole, SPEC, target_fpr=0.05)
    with pytest.raises(RedflagError, match=r"the recording must be of the model's flags, harm, fraud .got harm"):
        calibrate(recording(flags=1), SPEC, target_fpr=0.05)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with flags and no weights: a model that was run would be missed."""

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("redflag.backends.load.load_flagged", load)
    SPEC.save(tmp_path)
    return tmp_path


def test_the_verb_takes_a_recording_of_the_model_and_runs_nothing(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = recording(meta=META | {"logprob_mode": "processed"})
    path = whole.save(model / "recording.parquet")
    run(CalibrateArguments(model=str(model), input=str(path), target_fpr=0.05))
    written = Thresholds.load(model)
    written.check("r1", SPEC.template_hash, "processed", SPEC.categories)
    assert written == calibrate(whole, SPEC, target_fpr=0.05, logprob_mode="processed").thresholds
    assert "realised" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta": {}}, r"names no run \(meta 'run_id'\), but the model has run 'r1'"),
        ({"meta": META | {"run_id": "r2"}}, "was recorded with run 'r2', but the model has run 'r1'"),
        ({"meta": {"run_id": "r1"}}, "names no prompt template"),
        ({"meta": META | {"template_hash": "t2"}}, "was recorded with prompt template 't2'"),
        ({"flags": 1}, r"was recorded with flags \['harm'\]"),
        ({"count": 20}, "15 harmless|11 harmless|1[0-9] harmless responses are too few"),
    ],
)
def test_the_verb_refuses_a_recording_of_anything_else(model: Path, change: dict[str, Any], message: str) -> None:
    path = recording(**change).save(model / "recording.parquet")
    with pytest.raises(RedflagError, match=message):
        run(CalibrateArguments(model=str(model), input=str(path)))
    assert not (model / "thresholds.json").exists()


def test_scored_lines_do_not_say_which_model_they_are_of_and_are_refused(model: Path) -> None:
    path = model / "scored.jsonl"
    path.write_text('{"flag_probs": [[0.5]], "peak": [0.5], "category": null, "onset": null}\n')
    with pytest.raises(RedflagError, match=r"scored\.jsonl names no run"):
        run(CalibrateArguments(model=str(model), input=str(path)))


def test_a_parquet_of_conversations_is_no_recording(model: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"]}), model / "rows.parquet")
    with pytest.raises(RedflagError, match="harmless responses are too few"):
        run(CalibrateArguments(model=str(model), input=str(model / "rows.parquet")))


def test_double_precision_of_given_rows_is_kept() -> None:
    # Two values that single precision cannot tell apart: the threshold lies just above the upper.
    harmless = [[[0.3 + 1e-12 * i]] for i in range(200)]
    found = calibrate(harmless, dataclasses.replace(SPEC, flags=SPEC.flags[:1]), target_fpr=0.05, held_out=0.0)
    assert 0.3 < found.thresholds.values["harm"] < 0.3 + 2e-10
