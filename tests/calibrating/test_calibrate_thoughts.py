"""Thoughts get thresholds of their own, from the same rows, by a monitor that begins anew."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from redflag.calibrating.calibrate import CalibrateArguments, calibrate, run
from redflag.calibrating.groups import split_groups
from redflag.flags import Flag, FlagSpec
from redflag.scoring.recording import Recording
from redflag.watching.monitor import MonitorConfig, peaks
from redflag.watching.thresholds import Thresholds

SPEC = FlagSpec(flags=(Flag("harm", "<f>"), Flag("fraud", "<g>")), run_id="r1")
META = {"run_id": "r1", "template_hash": SPEC.template_hash}


def rows_of(count=400, share=1.0, seed=0):
    """Thoughts whose probabilities are higher than those of the answers; every fourth response is harmful."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        thought = int(rng.integers(1, 6)) if rng.random() < share else 0
        answer = int(rng.integers(1, 6))
        early, late = 0.4 + 0.4 * rng.random((thought, 2)), 0.3 * rng.random((answer + 1, 2))
        harmful = i % 4 == 0
        late[answer // 2 :] += 0.5 * harmful
        steps = np.concatenate([early, late]).astype(np.float32)
        row = {"flag_probs": steps[:-1], "tail_probs": steps[-1:], "group": f"g{i // 2}"}
        row |= {"category": "harm" if harmful else None, "onset": thought + answer // 2 if harmful else None}
        rows.append(row | {"onset_source": "natural" if harmful else None, "thought_tokens": thought or None})
    return rows


def split(row):
    steps, thought = np.concatenate([row["flag_probs"], row["tail_probs"]]), row["thought_tokens"] or 0
    return steps[:thought], steps[thought:]


@pytest.mark.parametrize("monitor", [MonitorConfig(), MonitorConfig("ema"), MonitorConfig("run", window=2)])
def test_each_part_is_calibrated_as_if_it_stood_alone(monitor):
    rows = rows_of()
    options = {"target_fpr": 0.05, "monitor": monitor, "seed": 3}
    result = calibrate(Recording.of(SPEC.categories, rows, META), SPEC, **options)
    for number, found in ((0, result.thoughts), (1, result)):
        alone = [
            {**row, "flag_probs": split(row)[number], "tail_probs": None, "thought_tokens": None, "onset": None}
            for row in rows
        ]
        expected = calibrate(Recording.of(SPEC.categories, alone, META), SPEC, **options)
        assert found.thresholds.values == expected.thresholds.values
        assert found.false_alarms_by_category == expected.false_alarms_by_category
        assert found.thresholds.realised_fpr == expected.thresholds.realised_fpr
    assert result.thresholds.thoughts.values == result.thoughts.thresholds.values
    assert min(result.thresholds.thoughts.values.values()) > max(result.thresholds.values.values())


def test_the_rate_of_either_part_is_counted_on_the_held_out_responses():
    rows = rows_of(share=0.7)
    result = calibrate(Recording.of(SPEC.categories, rows, META), SPEC, target_fpr=0.1, seed=1)
    harmless = [row for row in rows if row["category"] is None]
    _, held = split_groups([row["group"] for row in harmless], 0.3, 1)
    limits = result.thoughts.thresholds.values, result.thresholds.values
    alarms = [
        any(
            top >= values[name]
            for part, values in zip(split(harmless[i]), limits, strict=True)
            if len(part)
            for name, top in zip(SPEC.categories, peaks(MonitorConfig(), part), strict=True)
        )
        for i in held
    ]
    assert result.false_alarms_anywhere == sum(alarms)
    assert max(result.false_alarms, result.thoughts.false_alarms) <= sum(alarms)
    assert sum(alarms) <= result.false_alarms + result.thoughts.false_alarms
    assert f"{sum(alarms)}/{len(held)} held-out responses alarm in either part" in str(result)


def test_the_hold_back_counts_from_the_onset_in_the_answer():
    rows = rows_of()
    with_thoughts = calibrate(Recording.of(SPEC.categories, rows, META), SPEC, target_fpr=0.05)
    bare = []
    for row in rows:
        _, late = split(row)
        onset = None if row["onset"] is None else row["onset"] - (row["thought_tokens"] or 0)
        bare.append({**row, "flag_probs": late[:-1], "tail_probs": late[-1:], "thought_tokens": None, "onset": onset})
    assert (
        with_thoughts.hold_back == calibrate(Recording.of(SPEC.categories, bare, META), SPEC, target_fpr=0.05).hold_back
    )


def test_too_few_thoughts_leave_the_answers_thresholds_in_force_and_say_so():
    result = calibrate(Recording.of(SPEC.categories, rows_of(share=0.03), META), SPEC, target_fpr=0.05)
    assert result.thoughts is None and result.thresholds.thoughts is None
    assert "thoughts: the answers' thresholds hold for them" in str(result) and "too few" in str(result)


def test_rows_without_thoughts_calibrate_as_ever():
    result = calibrate(Recording.of(SPEC.categories, rows_of(share=0.0), META), SPEC, target_fpr=0.05)
    assert result.thoughts is None and not result.no_thoughts and "thought" not in str(result)
    assert "thoughts" not in result.thresholds.to_dict()


def test_the_verb_writes_both_and_a_folder_gives_them_back(tmp_path, capsys):
    SPEC.save(tmp_path)
    Recording.of(SPEC.categories, rows_of(), META).save(tmp_path / "calibration.parquet")
    arguments = CalibrateArguments(model=str(tmp_path), input=str(tmp_path / "calibration.parquet"), target_fpr=0.05)
    assert run(arguments) == 0
    assert "thoughts, separately" in capsys.readouterr().out
    saved = Thresholds.load(tmp_path)
    assert saved.thoughts is not None and saved.of_thoughts is saved.thoughts
    assert saved.thoughts.guarantee == "expected" and saved.thoughts.run_id == "r1"
    assert Thresholds.of(dataclasses.asdict(saved)) == saved
