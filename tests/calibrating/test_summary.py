"""What the summary of scored rows says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from redflag.calibrating.summary import summarise
from redflag.watching.monitor import MonitorConfig
from redflag.watching.thresholds import Thresholds


def scored(probs: list[float], category: str | None = None, onset: int | None = None, **more: Any) -> dict[str, Any]:
    return {"flag_probs": [[p] for p in probs], "category": category, "onset": onset, "source": None, **more}


ROWS = [
    scored([0.1, 0.2, 0.1], source="a"),
    scored([0.1, 0.1, 0.6], source="a"),
    scored([0.1, 0.9, 0.9], "harm", 1, source="a"),
    scored([0.1, 0.1, 0.1, 0.1, 0.7], "harm", 1, source="b"),
    scored([0.1, 0.1], "harm", 1, source="b"),
    scored([0.1], "harm", 1, source="b", truncated=True),  # cut before its onset
]


def test_summary_is_plain_json_and_counts_what_it_leaves_out() -> None:
    found = summarise(ROWS, Thresholds.manual(0.65, ["harm"]), (0.01, 0.5))
    json.dumps(found, allow_nan=False)
    assert found["counts"] == {
        "rows": 6,
        "harmful": 3,
        "harmless": 2,
        "cut_before_onset": 1,
        "truncated": 1,
        "categories": {"harm": 3},
    }
    assert found["overall"]["auroc"] == pytest.approx(4 / 6)
    assert found["overall"]["tpr"]["0.01"] == {"tpr": 2 / 3, "realised_fpr": 0.0, "threshold": 0.7}
    assert found["overall"]["first"]["8"] == found["overall"]["auroc"]


def test_slices_with_few_rows_say_so_and_those_of_one_class_measure_nothing() -> None:
    found = summarise(ROWS)["sources"]
    assert found["a"]["few"] and found["a"]["auroc"] == 1.0
    assert found["b"] == {"harmful": 2, "harmless": 0, "few": True}
    many = [scored([0.1]) for _ in range(20)] + [scored([0.9], "harm", 0) for _ in range(20)]
    assert not summarise(many)["overall"]["few"]


def test_thresholds_in_force_give_rates_with_intervals_and_delays() -> None:
    found = summarise(ROWS, Thresholds.manual(0.65, ["harm"]))
    assert found["in_force"]["tpr"] == 2 / 3 and found["in_force"]["realised_fpr"] == 0.0
    low, high = found["in_force"]["tpr_interval"]
    assert low < 2 / 3 < high
    assert found["delay"] == {
        "responses": 3,
        "early": 0.0,
        "on_time": 1 / 3,
        "late": 1 / 3,
        "missed": 1 / 3,
        "median": 1.5,
        "median_abs": 1.5,
        "tolerance": 2,
    }


def test_scores_are_those_of_the_monitor_that_the_thresholds_belong_to() -> None:
    # A run of two high steps: the single spike of the second row is no longer seen.
    run = MonitorConfig(aggregation="run", window=2)
    assert summarise(ROWS, monitor=run)["overall"]["tpr"]["0.01"]["threshold"] == pytest.approx(0.9)
    found = summarise(ROWS, Thresholds.manual(0.65, ["harm"], run))
    assert found["in_force"]["tpr"] == 1 / 3


def test_several_categories_report_how_often_the_first_alarm_names_the_right_one() -> None:
    rows = [
        {"flag_probs": [[0.9, 0.1]], "category": "weapons", "onset": 0, "source": None},
        {"flag_probs": [[0.9, 0.1]], "category": "fraud", "onset": 0, "source": None},
        {"flag_probs": [[0.1, 0.1]], "category": None, "onset": None, "source": None},
    ]
    found = summarise(rows, Thresholds.manual(0.5, ["weapons", "fraud"]), categories=["weapons", "fraud"])
    assert found["in_force"]["right_category"] == 0.5


def test_nothing_but_harmless_rows_can_be_summarised_too() -> None:
    found = summarise(ROWS[:2], Thresholds.manual(0.5, ["harm"]))
    assert "auroc" not in found["overall"] and found["in_force"]["realised_fpr"] == 0.5
    assert found["delay"]["responses"] == 0 and found["delay"]["median"] is None
    json.dumps(found, allow_nan=False)


def test_what_the_first_tokens_tell_is_seen_in_them_alone() -> None:
    rows = [scored([0.1, 0.1, 0.9], "harm", 0), scored([0.2, 0.2, 0.2]), scored([])]
    assert summarise(rows, firsts=(1, 3))["overall"]["first"] == {"1": 0.5, "3": 1.0}
