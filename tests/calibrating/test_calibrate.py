"""Calibration: the same monitor as in the stream, an honest split, thresholds bound to their model."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.calibrating.calibrate import CalibrateArguments, Calibration, calibrate, run, split_groups
from redflag.calibrating.guarantee import fit_thresholds
from redflag.calibrating.hold_back import suggest_hold_back
from redflag.data.rows import write_rows
from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec
from redflag.stats.metrics import clopper_pearson
from redflag.watching.monitor import MonitorConfig, peaks
from redflag.watching.thresholds import Thresholds

ONE = FlagSpec(flags=(Flag(category="harm", token="<f>"),), run_id="run-1", template_hash="t-1")
TWO = FlagSpec(flags=(Flag(category="weapons", token="<f>"), Flag(category="fraud", token="<g>")), run_id="run-1")


def responses(count: int, flags: int = 1, seed: int = 0, high: float = 0.5) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [(rng.random((int(rng.integers(1, 12)), flags)) * high).astype(np.float32) for _ in range(count)]


MONITORS = [
    MonitorConfig(),
    MonitorConfig(aggregation="run", window=3),
    MonitorConfig(aggregation="ema", decay=0.3, warm_up=1),
    MonitorConfig(aggregation="cusum"),
]


@pytest.mark.parametrize("monitor", MONITORS, ids=lambda config: config.aggregation)
@pytest.mark.parametrize("spec", [ONE, TWO], ids=["one", "two"])
def test_thresholds_come_from_the_calibration_part_and_rates_from_the_other(
    spec: FlagSpec, monitor: MonitorConfig
) -> None:
    flags = len(spec.categories)
    harmless, harmful = responses(300, flags), responses(40, flags, seed=1, high=1.0)
    found = calibrate(harmless, spec, target_fpr=0.05, monitor=monitor, harmful=harmful, seed=3)
    fit_on, measure_on = split_groups([None] * 300, 0.3, 3)
    table = np.array([peaks(monitor, response.tolist()) for response in harmless])
    values = fit_thresholds(table[fit_on], 0.05)
    assert tuple(found.thresholds.values.values()) == values
    alarms = int((table[measure_on] >= values).any(axis=1).sum())
    assert found.false_alarms == alarms and found.thresholds.realised_fpr == alarms / 90
    assert found.thresholds.interval == clopper_pearson(alarms, 90)
    assert (found.thresholds.sample_size, found.thresholds.held_out_size) == (210, 90)
    caught = sum(any(p >= v for p, v in zip(peaks(monitor, r.tolist()), values, strict=True)) for r in harmful)
    assert (found.caught, found.harmful_size) == (caught, 40)


def test_thresholds_carry_what_they_are_bound_to_and_survive_the_file(tmp_path: Path) -> None:
    monitor = MonitorConfig(aggregation="run", window=2)
    found = calibrate(
        responses(300), ONE, target_fpr=0.05, guarantee="high_probability", delta=0.1, monitor=monitor, logprob_mode="x"
    ).thresholds
    assert (found.run_id, found.template_hash, found.logprob_mode) == ("run-1", "t-1", "x")
    assert (found.target_fpr, found.guarantee, found.delta, found.monitor) == (0.05, "high_probability", 0.1, monitor)
    found.save(tmp_path)
    assert Thresholds.load(tmp_path) == found
    assert calibrate(responses(300), ONE, target_fpr=0.05).thresholds.delta is None


def test_same_seed_same_thresholds_and_nothing_held_out_reports_no_rate() -> None:
    harmless = responses(200)
    assert calibrate(harmless, ONE, target_fpr=0.05) == calibrate(harmless, ONE, target_fpr=0.05)
    whole = calibrate(harmless, ONE, target_fpr=0.05, held_out=0.0)
    assert whole.thresholds.realised_fpr is None and whole.thresholds.interval is None
    assert whole.thresholds.sample_size == 200
    assert "rate is unknown" in str(whole)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.sampled_from("abcdef")), max_size=60),
    st.floats(0, 0.99),
    st.integers(0, 5),
)
def test_a_split_is_a_partition_that_divides_no_group(groups: list[str | None], held_out: float, seed: int) -> None:
    fit_on, measure_on = split_groups(groups, held_out, seed)
    assert sorted(fit_on + measure_on) == list(range(len(groups)))
    assert not ({groups[i] for i in fit_on} & {groups[i] for i in measure_on}) - {None}
    assert len(measure_on) <= held_out * len(groups)
    assert (fit_on, measure_on) == split_groups(groups, held_out, seed)


def test_a_response_without_tokens_counts_as_one_that_never_alarms() -> None:
    harmless = [*responses(150), *[np.zeros((0, 1), dtype=np.float32)] * 50]
    found = calibrate(harmless, ONE, target_fpr=0.3, held_out=0.0)
    assert found.thresholds.values["harm"] > 0.0


def test_recorded_traces_calibrate_as_lists_just_as_arrays_do() -> None:
    harmless = responses(200)
    assert calibrate([r.tolist() for r in harmless], ONE, target_fpr=0.05) == calibrate(harmless, ONE, target_fpr=0.05)


def test_a_threshold_that_no_score_can_reach_is_refused() -> None:
    saturated = [np.ones((3, 1), dtype=np.float32)] * 10 + responses(190)
    for aggregation in ("max", "run"):
        with pytest.raises(RedflagError, match=r"no threshold on 'harm' .* reach a score of 1"):
            calibrate(saturated, ONE, target_fpr=0.01, monitor=MonitorConfig(aggregation=aggregation), held_out=0.0)
    cusum = MonitorConfig(aggregation="cusum")
    assert calibrate(saturated, ONE, target_fpr=0.01, monitor=cusum, held_out=0.0).thresholds.values["harm"] > 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"harmless": responses(140), "target_fpr": 0.01}, "98 .* too few .* 99 are needed, not counting the 42"),
        ({"harmless": []}, "0 harmless responses are too few"),
        ({"target_fpr": 0.01, "guarantee": "high_probability"}, "140 .* too few .* 299 are needed"),
        ({"target_fpr": 5}, r"target_fpr must be .*got 5"),
        ({"guarantee": "sure"}, r"guarantee must be .*got 'sure'"),
        ({"held_out": 1.0}, r"held_out must be .*got 1\.0"),
        ({"groups": ["a"]}, "groups must have one entry for each of 200"),
        ({"onsets": [0]}, "onsets must have one entry for each of 0"),
        ({"hold_back_share": 1.0}, r"hold_back_share must be .*got 1\.0"),
        ({"harmless": [[[math.nan]], *responses(200)]}, "harmless response 0 cannot be judged"),
        ({"harmful": [[[0.5, 0.5]]]}, "harmful response 0 cannot be judged"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_sentence(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"harmless": responses(200), "spec": ONE, "target_fpr": 0.05} | change
    with pytest.raises(RedflagError, match=message):
        calibrate(arguments.pop("harmless"), arguments.pop("spec"), **arguments)


def test_too_few_because_of_the_held_out_part_says_so() -> None:
    # Flags that never peak together need more than one flag alone: only the data can tell.
    rng = np.random.default_rng(0)
    harmless = [[[p, 0.9 - p]] for p in rng.random(200) * 0.9]
    with pytest.raises(RedflagError, match=r"jointly over 2 flags.*199 are needed.*60 are held out"):
        calibrate(harmless, TWO, target_fpr=0.01)


def test_the_table_shows_thresholds_rates_and_the_interval() -> None:
    found = calibrate(responses(300, 2), TWO, target_fpr=0.05, harmful=responses(7, 2, high=1.0))
    text = str(found)
    for part in ("weapons", "fraud", "any", f"{found.caught}/7", f"{found.false_alarms}/90", "jointly", "realised"):
        assert part in text
    assert isinstance(found, Calibration)


def late(delay: int, onset: int = 2) -> Any:
    """A harmful response whose only alarm comes `delay` tokens behind its onset."""
    steps = np.zeros((onset + max(delay, 0) + 3, 1), dtype=np.float32)
    steps[onset + delay] = 1.0
    return steps


def test_the_suggested_hold_back_keeps_its_share_of_the_detected_responses_back() -> None:
    delays = [-2, 0, 0, 1, 1, 1, 2, 2, 3, 9]
    harmful = [*map(late, delays), np.zeros((6, 1), dtype=np.float32)]
    found = calibrate(
        responses(200), ONE, target_fpr=0.05, harmful=harmful, onsets=[2] * len(harmful), hold_back_share=0.8
    )
    # ceil(0.8 * 11) = 9: the ninth smallest delay.
    assert found.hold_back.suggested == found.thresholds.suggested_hold_back == 3
    assert (found.hold_back.delays, found.hold_back.missed) == (tuple(delays), 1)
    assert "suggested hold-back 3: 9 of the 10 detected" in str(found)
    assert "1 of 11 harmful responses (9.1%) raise no alarm" in str(found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-2, 12), min_size=1, max_size=60), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_a_suggested_hold_back_is_the_smallest_that_the_session_needs(delays: list[int], share: float) -> None:
    found = suggest_hold_back([delay + 5 for delay in delays], [5] * len(delays), share)
    if found.suggested is None:
        assert len(delays) < found.needed
        return
    assert len(delays) >= found.needed

    def shown(h: int) -> int:
        return sum(max(0, delay + 5 - h) > 5 for delay in delays)

    assert len(delays) - shown(found.suggested) >= share * len(delays)
    rank = math.ceil(round(share * (len(delays) + 1), 6))
    assert found.suggested == 0 or len(delays) - shown(found.suggested - 1) < rank


@pytest.mark.parametrize(
    ("onsets", "message"),
    [
        (None, "no hold-back is suggested: no harmful response with a known onset"),
        ([None] * 18, "no hold-back is suggested: no harmful response with a known onset"),
        ([2] * 18, "18 detected harmful responses .* too few for a share of 0.95, 19 are needed"),
        ([2] * 10 + [None] * 8, "10 detected harmful responses .* too few"),
    ],
)
def test_too_few_onsets_suggest_no_hold_back_and_say_why(onsets: Any, message: str) -> None:
    found = calibrate(responses(200), ONE, target_fpr=0.05, harmful=[late(1)] * 18, onsets=onsets)
    assert found.thresholds.suggested_hold_back is None
    assert re.search(message, str(found))


def test_the_first_alarm_is_that_of_any_category_and_of_the_monitor_in_use() -> None:
    harmless = [np.full((4, 2), 0.001 * i, np.float32) for i in range(200)]
    steps = np.zeros((8, 2), dtype=np.float32)
    steps[2:4, 1], steps[5:8, 0] = 0.9, 0.9
    run_of_two = MonitorConfig(aggregation="run", window=2)
    for monitor, delay in ((MonitorConfig(), 1), (run_of_two, 2)):
        found = calibrate(
            harmless, TWO, target_fpr=0.05, monitor=monitor, harmful=[steps], onsets=[1], hold_back_share=0.5
        )
        assert found.hold_back.delays == (delay,) and found.thresholds.suggested_hold_back == delay


def test_the_verb_writes_thresholds_beside_the_model_and_leaves_old_ones_when_it_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Any,
    spec: FlagSpec,
    capsys: pytest.CaptureFixture[str],
    stub_scorer: Any,
    conversation: Any,
) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    spec.save(model)
    words = ["sea", "wide", "blue", "bread", "salt", "water", "home", "hour"]
    texts = [f"The {a} is {b} and {c}." for a in words for b in words for c in words]
    write_rows(
        rows,
        [conversation(t, group=t[:10]) for t in texts]
        + [conversation("The harm begins here.", "harm")] * 5
        + [conversation("The sea. The harm begins here.", "harm", onset=9)] * 25,
    )

    class Quiet(stub_scorer):
        # Below 1 everywhere, and different from one response to the next.
        def score(self, pairs: Any, *, batch_size: int) -> list[Any]:
            return [np.full((len(r), 1), (hash(tuple(r)) % 1000) / 2000, np.float32) for _, r in pairs]

    monkeypatch.setattr("redflag.backends.load.load_flagged", lambda *_: (Quiet(), tokenizer, spec))
    arguments = CalibrateArguments(model=str(model), input=str(rows), target_fpr=0.05, aggregation="run", window=2)
    run(arguments)
    written = Thresholds.load(model)
    written.check(spec.run_id, spec.template_hash, "raw", spec.categories)
    assert written.monitor == MonitorConfig(aggregation="run", window=2)
    assert written.sample_size + written.held_out_size == len(texts)
    printed = capsys.readouterr().out
    assert "realised" in printed
    # Only rows that say where harm begins count, and here no alarm comes.
    assert "0 detected harmful responses" in printed and "25 of 25 harmful responses" in printed

    arguments.target_fpr = 0.0001
    with pytest.raises(RedflagError, match="too few"):
        run(arguments)
    assert Thresholds.load(model) == written


def test_a_calibrated_folder_is_accepted_by_the_guard(model_folder: Path, tmp_path: Path, conversation: Any) -> None:
    from redflag.guard.guard import Guard

    folder, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(model_folder, folder)
    write_rows(rows, [conversation(f"The sea is {i} miles wide.") for i in range(40)])
    found = calibrate(folder, rows=rows, target_fpr=0.1, held_out=0.5)
    assert Guard.from_pretrained(folder).thresholds == Thresholds.load(folder) == found.thresholds
    assert 0.0 < Thresholds.load(folder).values["harm"] <= 1.0
