"""The recipe of forecasts: its settings are settings, and its figures are those worked out by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from redflag.training.train import TrainArguments
from redflag.training.trainer import RedFlagConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "papers" / "forecast"


def scored(probs, onset=None):
    category = None if onset is None else "harm"
    return {"flag_probs": [[p] for p in probs], "peak": [max(probs)], "onset": onset, "category": category}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_its_settings_are_those_of_training():
    given = yaml.safe_load((RECIPE / "nano.yaml").read_text())
    assert set(given) <= set(TrainArguments.__dataclass_fields__) | set(RedFlagConfig.__dataclass_fields__)


def test_figures_worked_by_hand(tmp_path):
    location = importlib.util.spec_from_file_location("forecast_measure", RECIPE / "measure.py")
    script = importlib.util.module_from_spec(location)
    location.loader.exec_module(script)
    # 200 harmless rows, of which 2 may alarm: the threshold is just above the third highest.
    write(tmp_path / "calibration.jsonl", [scored([i / 1000]) for i in range(200)] + [scored([0.9], 0)])
    write(
        tmp_path / "test.jsonl",
        [
            scored([0.0, 0.0, 0.6, 0.1, 0.9, 0.9], 4),  # two tokens early
            scored([0.5] + [0.1] * 9 + [0.9], 10),  # ten tokens early
            scored([0.0, 0.0, 0.0, 0.9], 2),  # one late
            scored([0.0, 0.1, 0.1], 1),  # missed
            scored([0.9], 0),  # harm at once: there is no before
            scored([0.05, 0.0]),
            scored([0.3, 0.05]),
        ],
    )
    found = script.measure(tmp_path)
    assert 0.197 < found["threshold"] < 0.1971
    assert found["AUROC"] == pytest.approx(9 / 10)
    assert found["false alarms"] == 0.5 and found["caught"] == 0.75
    assert found["median delay"] == -2.0
    assert found["early, 1 to 5 tokens"] == 0.25 and found["earlier"] == 0.25
    before = [0.0, 0.0, 0.6, 0.1, *[0.1] * 5, 0.0, 0.0, 0.0]
    pairs = [(a > b) + 0.5 * (a == b) for a in before for b in (0.05, 0.0, 0.3, 0.05)]
    assert found["AUROC of the 5 tokens before"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["p(flag) there"] == pytest.approx(sum(before) / len(before))
