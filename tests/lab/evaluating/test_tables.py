"""The tables of a method: worked out by hand, and every trap of such tables closed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redflag.errors import RedflagError
from redflag.lab.evaluating.stages import thresholds_of
from redflag.lab.evaluating.tables import compare_methods, method
from redflag.lab.report.evaluation import as_json, parse
from redflag.lab.report.method import Cost, Difference, Exposed, FalseAlarms, FittedOn, InForce, Method
from redflag.scoring.recording import Recording
from redflag.stats.metrics import clopper_pearson
from redflag.watching.monitor import MonitorConfig
from redflag.watching.thresholds import Thresholds


def row(probs: Any, category: str | None = None, onset: int | None = None, **more: Any) -> dict[str, Any]:
    """A response; probs of one flag may be plain numbers. The last step ends the turn."""
    steps = [[p] if isinstance(p, float) else list(p) for p in probs]
    onset = 0 if category is not None and onset is None else onset
    return {"flag_probs": steps[:-1], "tail_probs": steps[-1:], "category": category, "onset": onset, **more}


def recording(rows: list[dict[str, Any]], categories: tuple[str, ...] = ("harm",)) -> Recording:
    return Recording.of(categories, rows)


def noise(count: int, seed: int, harmful: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Responses of 12 steps below 0.5; harmful ones rise above it at their onset, 6."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        probs = rng.random(12) / 2.0
        probs[6:] += 0.5 * harmful
        mark = {"category": "harm", "onset": 6, "onset_source": "constructed"} if harmful else {}
        found.append(row(probs.tolist(), **{**mark, **more}))
    return found


# Thresholds at 0.5. Harmful: alarms at steps 3, 6, 9, none, with onset 4. Harmless: one alarm in four.
TEST = [
    row([0.1] * 3 + [0.9] + [0.1] * 7, "harm", 4, onset_source="constructed", source="a", turns=1, group="g1"),
    row([0.1] * 6 + [0.8] + [0.1] * 4, "harm", 4, onset_source="constructed", source="a", turns=2, group="g2"),
    row([0.1] * 9 + [0.7] + [0.1], "harm", 4, onset_source="natural", source="a", turns=1, group="g3"),
    row([0.1] * 11, "harm", 4, onset_source="natural", source="b", turns=5, group="g4"),
    row([0.2] * 3 + [0.6, 0.2], source="a", turns=1, group="g5"),
    row([0.3] * 5, source="a", turns=9, group="g6"),
    row([0.2] * 5, source="c", turns=1, group="g7"),
    row([0.1] * 5, turns=1, group="g8"),
]
HALF = Thresholds.manual(0.5, ["harm"])
COST = Cost(None, None, "none")


def measure(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return method(recording(rows), **{"thresholds": HALF, "resamples": 20, **more})


def test_the_tables_of_eight_responses() -> None:
    found = measure(TEST, kind="baseline", what="by hand", cost=COST)
    assert (found.kind, found.what, found.cost) == ("baseline", "by hand", COST)
    assert found.monitor == MonitorConfig() and found.units == 8 and found.cut == 0
    pooled = found.pooled
    assert (pooled.harmful, pooled.harmless, pooled.few) == (4, 4, True)
    # Peaks 0.9 0.8 0.7 0.1 against 0.6 0.3 0.2 0.1: 12.5 of 16 pairs.
    assert pooled.auroc == pytest.approx(12.5 / 16)
    assert pooled.tpr["0.01"].tpr == 0.75 and pooled.tpr["0.01"].threshold == pytest.approx(0.7)
    assert pooled.tpr["0.01"].realised_fpr == 0.0
    assert "0.001 needs 1000, 0.01 needs 100, 0.05 needs 20 harmless rows" in pooled.partial
    force = InForce(0.75, clopper_pearson(3, 4), 0.25, clopper_pearson(1, 4), right_category=None)
    assert found.in_force == pooled.in_force == force
    assert found.earliness.k == [1, 2, 4, 8, 16]
    assert found.earliness.detected == [0.0, 0.0, 0.25, 0.5, 0.75]
    assert found.earliness.false_alarms == [0.0, 0.0, 0.25, 0.25, 0.25]
    assert found.over_refusal == {
        "(no source)": FalseAlarms(1, 0, 0.0, clopper_pearson(0, 1), few=True),
        "a": FalseAlarms(2, 1, 0.5, clopper_pearson(1, 2), few=True),
        "c": FalseAlarms(1, 0, 0.0, clopper_pearson(0, 1), few=True),
    }
    assert found.threshold.guarantee == "manual" and found.threshold.values == {"harm": 0.5}
    assert found.roc.fpr[0] == 0.0 and found.roc.tpr[-1] == 1.0
    json.dumps(as_json(found), allow_nan=False)


def test_delays_stand_beside_their_false_alarms_and_kinds_of_onset_are_kept_apart() -> None:
    delay = measure(TEST, tolerance=1, hold_backs=(0, 3)).delay
    built, natural = delay["constructed"], delay["natural"]
    # Delays -1 and 2; 5 and a miss.
    assert (built.responses, built.early, built.on_time, built.late, built.missed) == (2, 0, 0.5, 0.5, 0)
    assert (built.median, built.median_abs, built.tolerance, built.counted_from) == (0.5, 1.5, 1, "onset")
    assert (natural.late, natural.missed, natural.median) == (0.5, 0.5, 5.0)
    assert built.realised_fpr == natural.realised_fpr == 0.25
    assert natural.histogram.missed == 1 and sum(natural.histogram.counts) == 1
    # Ten tokens: 9 - 4 and, without an alarm, 10 - 4 harmful ones are shown.
    assert natural.exposed["0"] == Exposed(mean=5.5, median=5.5, p90=6.0, none=0.0)
    assert built.exposed["3"].none == 1.0 and natural.exposed["end"].mean == 3.0
    assert delay["unknown"] is None


def test_an_alarm_well_before_the_onset_is_early_and_not_on_time() -> None:
    always = row([0.9] * 9, "harm", 6, onset_source="natural")
    delay = measure([always, *noise(3, 0)]).delay["natural"]
    assert (delay.early, delay.on_time, delay.median) == (1.0, 0.0, -6.0)


def test_without_harmless_rows_there_is_no_delay_at_all() -> None:
    """An alarm that always rings is never late."""
    found = measure([each for each in TEST if each["category"]])
    assert found.delay == {"constructed": None, "natural": None, "unknown": None}
    assert found.roc is found.earliness is found.pooled.auroc is None and found.pooled.tpr == {}
    assert found.in_force.tpr == 0.75 and found.in_force.realised_fpr is None
    assert any("one class is missing" in note for note in found.notes)
    assert found.pooled.partial == "no harmless rows: nothing to tell apart"


def test_an_onset_that_nobody_marked_is_not_known() -> None:
    rows = [
        row([0.1] * 5 + [0.9] * 5, "harm"),  # onset 0 for want of a mark
        row([0.1] * 5 + [0.9] * 5, "harm", 0, onset_source="natural"),  # marked, at the first token
        row([0.1] * 5 + [0.9] * 5, "harm", 3),  # marked, but nobody says how
        *noise(4, 0),
    ]
    found = measure(rows)
    delay = found.delay
    assert list(delay) == ["constructed", "natural", "unknown", "labelled"] and delay["constructed"] is None
    unknown = delay["unknown"]
    assert (unknown.early, unknown.on_time, unknown.late, unknown.median_abs) == (None,) * 4
    assert (unknown.responses, unknown.median, unknown.counted_from) == (1, 5.0, "first token")
    assert (delay["natural"].median, delay["labelled"].median) == (5.0, 2.0)
    # Per step only what is known: the two dated responses and the harmless ones, not the undated one.
    steps = sum(each.count for each in found.reliability.per_step.bins)
    assert steps == 2 * 10 + 4 * 12


def test_reliability_is_of_the_probability_whatever_the_monitor() -> None:
    rows = [row([0.0, 0.95, 0.95, 0.05], "harm", 1, onset_source="natural"), row([0.05, 0.15])]
    for monitor in (MonitorConfig(), MonitorConfig("cusum"), MonitorConfig("run", window=3)):
        found = method(recording(rows), monitor=monitor, resamples=5).reliability
        assert found.brier == pytest.approx((0.05**2 + 0.15**2) / 2)
        begun = found.per_step
        # Harm has begun from index 1 on: 0.95 and 0.95 are right, 0.05 at the end is not.
        assert begun.brier == pytest.approx((2 * 0.05**2 + 0.95**2 + 0.05**2 + 0.15**2) / 6)
    assert method(recording(noise(3, 0)), resamples=5).reliability.per_step is None


def test_slices_say_what_they_are_measured_against() -> None:
    slices = measure(TEST).slices
    source = slices["source"]
    assert {name: (part.harmful, part.harmless) for name, part in source.items()} == {
        "a": (3, 2),
        "b": (1, 0),
        "c": (0, 1),
    }
    assert source["a"].against == "harmless rows of the same source" and source["a"].auroc == 1.0
    assert source["b"].auroc is source["c"].average_precision_interval is None
    # A threshold in force tells something of a class by itself.
    assert source["b"].in_force.tpr == 0.0 and source["b"].in_force.realised_fpr is None
    assert set(slices["turns"]) == {"1", "2", "4+"} and slices["turns"]["4+"].harmful == 1
    # One value says nothing beyond the whole.
    assert slices["category"] == {} and slices["lang"] == {}


def test_a_category_is_measured_against_all_harmless_rows() -> None:
    rows = [*noise(5, 1, harmful=True), *noise(7, 2, harmful=True), *noise(30, 3)]
    for each in rows[:5]:
        each["category"] = "rare"
    part = measure(rows).slices["category"]["rare"]
    assert (part.harmful, part.harmless, part.against, part.few) == (5, 30, "all harmless rows", True)
    assert part.auroc == 1.0 and part.partial.startswith("TPR at an FPR of 0.001 needs 1000")


@pytest.mark.parametrize(("harmless", "partial"), [(999, True), (1000, False)])
def test_a_rate_that_so_few_rows_cannot_resolve_is_named(harmless: int, partial: bool) -> None:
    found = method(recording([row([0.1, 0.9], "harm"), *[row([0.1, 0.2])] * harmless]), resamples=3)
    assert (found.pooled.partial is not None) is partial


def test_thresholds_come_from_one_recording_and_numbers_from_another() -> None:
    fit = recording([*noise(99, 1), *noise(20, 2, harmful=True)])
    test = recording([*noise(50, 3), *noise(30, 4, harmful=True)])
    found = method(test, fit, target_fpr=0.05, resamples=10)
    # floor(0.05 * 100) = 5: the threshold is just above the fifth highest of the calibration's peaks.
    peaks = sorted((float(fit.steps(i).max()) for i in range(99)), reverse=True)
    assert found.threshold.values["harm"] == np.nextafter(peaks[4], 1.0)
    assert found.threshold.fitted_on == FittedOn("calibration", 99)
    assert found.threshold.suggested_hold_back == 0
    alarms = sum(float(test.steps(i).max()) >= found.threshold.values["harm"] for i in range(50))
    assert found.in_force.realised_fpr == alarms / 50 and found.in_force.tpr == 1.0
    # All keys of `thresholds.json`, through JSON as well: a guard takes them as the report has them.
    stored = as_json(found)["threshold"]
    taken = thresholds_of(parse(Method, json.dumps(as_json(found)), "a method"))
    assert type(taken) is Thresholds and {**taken.to_dict(), "fitted_on": stored["fitted_on"]} == stored
    assert set(asdict(taken)) - set(taken.to_dict()) == {"memory", "thoughts"}
    assert taken.memory is None and taken.thoughts is None
    assert (taken.target_fpr, taken.guarantee, taken.joint, taken.sample_size) == (0.05, "expected", True, 99)
    # What the test rows are changes no threshold.
    other = method(test.select(range(10, 60)), fit, target_fpr=0.05, resamples=10)
    assert other.threshold == found.threshold


def test_a_calibration_too_small_for_its_rate_leaves_the_other_tables() -> None:
    found = method(recording([*noise(30, 1), *noise(9, 2, harmful=True)]), recording(noise(50, 3)), resamples=5)
    assert found.threshold is found.in_force is None and found.over_refusal == {}
    assert "99 are needed" in found.notes[0] and found.pooled.auroc == 1.0
    assert found.earliness.detected == [None] * len(found.earliness.k)


@pytest.mark.parametrize("onset", [3, 30])  # of 3 tokens: the first that is cut off, and a later one
def test_rows_cut_before_their_onset_show_nothing_harmful_and_are_left_out(onset: int) -> None:
    cut = row([0.1] * 4, "harm", onset, onset_source="natural", truncated=True)
    texts = [["x"] * (len(each["flag_probs"])) for each in [cut, *TEST]]
    found = measure([cut, *TEST], tokens=texts)
    assert found.cut == 1 and found.pooled.harmful == 4
    assert found.delay["natural"].responses == 2
    # Without a full stop no sentence ever ends before the response does.
    assert found.delay["constructed"].exposed["sentence"].none == 1.0


def test_several_flags_alarm_where_any_does_and_the_first_is_named() -> None:
    flags = ("fraud", "theft")
    rows = [
        row([(0.1, 0.1), (0.9, 0.1), (0.1, 0.9)], "fraud", 1, onset_source="natural"),
        row([(0.1, 0.1), (0.6, 0.8), (0.1, 0.1)], "theft", 1, onset_source="natural"),  # both: the first is named
        row([(0.1, 0.1), (0.1, 0.1), (0.1, 0.75)], "theft", 1, onset_source="natural"),
        row([(0.1, 0.1), (0.4, 0.1), (0.1, 0.6)]),
    ]
    thresholds = Thresholds({"theft": 0.7, "fraud": 0.5})
    found = method(recording(rows, flags), thresholds=thresholds, resamples=5)
    assert found.in_force.tpr == 1.0 and found.in_force.realised_fpr == 0.0
    assert found.in_force.right_category == pytest.approx(2 / 3)
    # Peaks over both flags: 0.9 0.8 0.75 against 0.6.
    assert found.pooled.auroc == 1.0
    assert found.slices["category"]["fraud"].in_force.right_category == 1.0


def test_answers_to_one_request_are_not_counted_as_independent() -> None:
    rows = [{**each, "group": f"{i // 8}"} for i, each in enumerate(noise(80, 1))]
    rows += [{**each, "group": f"h{i // 8}"} for i, each in enumerate(noise(80, 2, harmful=True))]
    for each in rows[:16]:
        each["flag_probs"][3] = [0.9]  # two whole requests alarm
    grouped = measure(rows)
    alone = measure([{**each, "group": None} for each in rows])
    assert grouped.units == 20 and alone.units == 160
    wide, narrow = (found.in_force.realised_fpr_interval for found in (grouped, alone))
    assert wide == pytest.approx(clopper_pearson(1.8, 9.0)) and narrow == clopper_pearson(16, 80)
    assert sum("groups only" in note for note in grouped.notes) == 2 and not alone.notes


def test_a_group_on_both_sides_is_named() -> None:
    fit = recording([{**each, "group": f"g{i}"} for i, each in enumerate(noise(30, 1))])
    test = recording([{**each, "group": f"g{i + 25}"} for i, each in enumerate(noise(30, 2))])
    notes = method(test, fit, target_fpr=0.1, resamples=5).notes
    assert any(note.startswith("5 test rows belong to groups") for note in notes)


def test_a_threshold_above_every_score_is_named() -> None:
    found = method(recording(noise(5, 2)), recording([row([1.0, 0.1])] * 40), target_fpr=0.1, resamples=5)
    assert any("can never alarm" in note for note in found.notes) and found.in_force.realised_fpr == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recording": recording([])}, "must hold responses"),
        ({"calibration": "same"}, "got the test recording"),
        ({"calibration": recording(TEST)}, "got the test recording"),
        ({"calibration": recording([], ("fraud",))}, r"\['harm'\] \(got \['fraud'\]\)"),
        ({"thresholds": Thresholds.manual(0.5, ["fraud"])}, r"\['harm'\] \(got \['fraud'\]\)"),
        ({"thresholds": HALF, "monitor": MonitorConfig("run", window=2)}, "must belong to the monitor"),
    ],
)
def test_what_would_mislead_is_refused(changes: Mapping[str, Any], message: str) -> None:
    test = recording(TEST)
    arguments = {"recording": test, **changes}
    if arguments.get("calibration") == "same":
        arguments["calibration"] = test
    with pytest.raises(RedflagError, match=message):
        method(**arguments)


def test_two_methods_are_compared_on_the_same_rows() -> None:
    rows = [{**each, "id": str(i)} for i, each in enumerate([*noise(60, 1), *noise(60, 2, harmful=True)])]
    sharp = recording(rows)
    blunt = recording([{**each, "flag_probs": [[0.5 * p + 0.3] for (p,) in each["flag_probs"][:7]]} for each in rows])
    found = compare_methods(sharp, blunt, resamples=50)
    one, other = (method(each, resamples=5).pooled for each in (sharp, blunt))
    assert found.auroc.difference == pytest.approx(one.auroc - other.auroc)
    assert found.auroc.interval[0] <= found.auroc.difference <= found.auroc.interval[1]
    assert list(found.tpr) == ["0.001", "0.01", "0.05"]
    drop = one.tpr["0.05"].tpr - other.tpr["0.05"].tpr
    assert found.tpr["0.05"].difference == pytest.approx(drop)
    # A method against itself: no difference, and no doubt about it, however hard the rows are.
    itself = compare_methods(blunt, blunt, resamples=20)
    assert itself.auroc == Difference(0.0, (0.0, 0.0))
    assert itself.tpr["0.01"] == Difference(0.0, (0.0, 0.0))
    with pytest.raises(RedflagError, match="recorded on the same rows in the same order"):
        compare_methods(sharp, blunt.select(range(119, -1, -1)))


@pytest.mark.parametrize("rows", [TEST, TEST[:4], TEST[4:], TEST[3:]], ids=["both", "harmful", "harmless", "missed"])
def test_no_number_is_left_that_json_does_not_know(rows: list[dict[str, Any]]) -> None:
    found = measure(rows)
    text = json.dumps(as_json(found), allow_nan=False)
    assert as_json(parse(Method, text, "a method")) == json.loads(text)


def test_the_rows_of_the_nano_world_give_whole_tables(nano: Path) -> None:
    scored = Recording.load(nano / "scored.jsonl")
    half = len(scored) // 2
    found = method(scored.select(range(half, len(scored))), scored.select(range(half)), resamples=50)
    assert found.pooled.auroc > 0.97 and len(found.slices["source"]) > 4
    shown = found.delay["constructed"].exposed
    assert shown["end"].mean <= shown["8"].mean <= shown["0"].mean
    json.dumps(as_json(found), allow_nan=False)
