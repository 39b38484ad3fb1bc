"""S2.6, the refusal rate against thresholds, bias and temperature, swept over a recording."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusal_sweep import KINDS, RESPOND, sweep

from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec
from redflag.scoring.recording import Recording
from redflag.trace import Halt, Step
from redflag.watching.first_token import FirstTokenRule
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds


@pytest.fixture
def recording(tmp_path) -> Path:
    """40 refusals of two kinds, 20 contrast rows, 40 plain ones; a second step that would fire at any threshold."""
    spec = FlagSpec(flags=tuple(Flag(category=name, token=f"<{name}>") for name in (*KINDS[:2], RESPOND)), run_id="r1")
    rows = []
    for i in range(100):
        kind = KINDS[i % 2] if i < 40 else None
        p = [0.02, 0.02, 0.9] if i >= 60 else [0.3, 0.1, 0.5] if i >= 40 else [0.1, 0.1, 0.2]
        if kind is not None:
            p[i % 2] = 0.4 + 0.01 * (i % 20)
        source = "refusal" if i < 40 else "contrast" if i < 60 else "plain"
        row = {"flag_probs": np.array([p, [1.0, 1.0, 0.0]]), "id": str(i), "group": str(i), "source": source}
        rows.append(row | {"category": kind, "onset": 0 if kind else None, "turns": 1})
    spec.save(tmp_path)
    path = tmp_path / "first.parquet"
    Recording.of(spec.categories, rows, {"run_id": "r1", "template_hash": spec.template_hash}).save(path)
    return path


def swept(recording: Path, *words: str) -> dict[str, Any]:
    out = recording.with_suffix(".json")
    assert sweep.main([str(recording), "--by", "source", "category", "--json", str(out), *words]) == 0
    return json.loads(out.read_text())


def rates(found: dict[str, Any], name: str) -> list[float]:
    return [point["rate"] for point in found["sets"][name]["rates"]]


def test_S2_6_the_refusal_rate_against_the_threshold(recording, capsys):
    found = swept(recording, "--rule", "threshold", "--respond", "respond", "--values", "0.05", "0.3", "0.495", "0.9")
    assert rates(found, "source=contrast harmless") == [1.0, 1.0, 0.0, 0.0]
    assert rates(found, "source=plain harmless") == [0.0] * 4
    # 0.40 to 0.59 in steps of 0.01, twice each: from 0.50 on are half.
    assert rates(found, "source=refusal harmful") == [1.0, 1.0, 0.5, 0.0]
    assert found["moved"] == ["safety", "incomplete"] and found["first_step"] and found["rule"] == "threshold"
    assert "at the first step" in capsys.readouterr().out


def test_S2_6_one_category_by_itself(recording):
    found = swept(
        recording, "--rule", "threshold", "--respond", "respond", "--flag", "safety", "--thresholds",
        str(_thresholds(recording)), "--values", "0.3", "0.9",
    )  # fmt: skip
    assert rates(found, "category=safety") == [1.0, 0.0] and rates(found, "category=incomplete") == [1.0, 1.0]


def _thresholds(recording: Path) -> Path:
    values = {"safety": 0.4, "incomplete": 0.4, RESPOND: 1.0}
    Thresholds(values, MonitorConfig("first")).save(recording.parent)
    return recording.parent


def test_S2_6_over_bias_and_temperature_and_selected_categories(recording):
    base = ("--rule", "compare", "--respond", "respond")
    found = swept(recording, *base, "--over", "bias", "--values", "-3", "0", "1", "9")
    assert rates(found, "source=contrast harmless") == [0.0, 0.0, 1.0, 1.0]
    assert rates(found, "source=refusal harmful") == [0.0, 1.0, 1.0, 1.0]
    assert rates(found, "source=plain harmless") == [0.0, 0.0, 0.0, 1.0]
    # Comparing does not depend on the temperature; a threshold does.
    assert set(rates(swept(recording, *base, "--over", "temperature"), "source=refusal harmful")) == {1.0}
    base = ("--rule", "threshold", "--respond", "respond", "--over", "temperature", "--threshold", "0.45")
    found = swept(recording, *base, "--values", "0.5", "1", "3")
    falling = rates(found, "source=refusal harmful")
    assert falling[0] > falling[1] > falling[2] == 0.0
    # What is not selected is compared with responding, whatever the threshold.
    base = ("--rule", "threshold", "--respond", "respond", "--selected", "incomplete", "--values", "0.99")
    found = swept(recording, *base)
    assert rates(found, "category=safety") == [1.0] and rates(found, "category=incomplete") == [0.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--over", "temperature"], "--rule"),
        (["--selected", "safety"], "--rule"),
        (["--rule", "compare"], "without a threshold"),
        (["--rule", "threshold", "--over", "bias"], "--thresholds or --threshold"),
        (["--rule", "threshold", "--threshold", "0.5"], "--values"),
        (["--rule", "threshold", "--selected", "cats"], "'cats'"),
        (["--rule", "threshold", "--respond", "cats"], "'cats'"),
        (["--rule", "threshold", "--respond", "respond", "--flag", "respond"], "must not be the --respond flag"),
        (["--rule", "compare", "--over", "temperature", "--values", "0"], "temperature"),
    ],
)
def test_S2_6_mistakes_are_named_in_one_sentence(recording, capsys, words, message):
    assert sweep.main([str(recording), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_S2_6_the_sweep_and_the_session_agree(recording):
    limits = Thresholds.load(_thresholds(recording))
    whole = Recording.load(recording)
    rule = FirstTokenRule(respond=RESPOND)
    refused = 0
    for i in range(len(whole)):
        session = Session(limits, Policy(first_token=rule), whole.categories)
        events = session.feed(Step(5, tuple(map(float, whole.steps(i)[0]))))
        refused += isinstance(events[-1] if events else None, Halt)
    found = swept(recording, "--rule", "threshold", "--respond", "respond", "--values", "0.4")
    total = sum(point["rates"][0]["alarms"] for name, point in found["sets"].items() if name.startswith("source"))
    assert refused == total > 0


def test_S2_6_the_rule_is_refused_where_it_could_not_be_kept():
    with pytest.raises(RedflagError, match="the monitor must be first"):
        Session(Thresholds.manual(0.5, KINDS), Policy(first_token=FirstTokenRule()), KINDS)
