"""S3.5, accuracy and refusals against relative compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redflag.calibrating import replay
from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.lab.baselines import Cost
from redflag.lab.baselines.shared import forward_flops
from redflag.lab.evaluating.cascade import CascadeStage, asking, measure
from redflag.lab.evaluating.cost import of_cascade, passes, relative
from redflag.lab.evaluating.evaluate import EvaluateArguments, evaluate
from redflag.lab.evaluating.stages import Models
from redflag.lab.nano.judge import NanoOracle
from redflag.scoring.recording import Recording
from redflag.watching.monitor import MonitorConfig

# ---- S3.5: accuracy and refusals against relative compute ----


def test_S3_5_relative_compute_is_this_table():
    own = Cost(microseconds_per_token=50.0, flops_per_token=8e9, note="")
    probe = Cost(microseconds_per_token=0.5, flops_per_token=377e3, note="")
    classifier = Cost(microseconds_per_token=60.0, flops_per_token=4e9, note="")
    unknown = Cost(microseconds_per_token=None, flops_per_token=None, note="")
    both = of_cascade(probe, classifier, 0.055)
    assert (both.microseconds_per_token, both.flops_per_token) == pytest.approx((3.8, 220.377e6))
    for cost, flops, seconds in [
        (probe, 4.7125e-5, 0.01),
        (classifier, 0.5, 1.2),
        (both, 4.7125e-5 + 0.055 * 0.5, 0.01 + 0.055 * 1.2),
        (of_cascade(probe, unknown, 0.055), None, None),
        (Cost(microseconds_per_token=55.0, flops_per_token=0.0, note="in the model's place"), 0.0, None),
        (None, None, None),
    ]:
        found = relative(cost, own)
        assert (found.flops, found.seconds) == (
            pytest.approx(flops) if flops is not None else None,
            pytest.approx(seconds) if seconds is not None else None,
        )


@pytest.fixture(scope="module")
def world(nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    for split, count in (("test", 60), ("calibration", 150), ("train", 90)):
        write_rows(folder / f"{split}.jsonl", load_rows(nano / "rows" / f"{split}.jsonl").rows[:count])
    return folder


def arguments(nano: Path, world: Path, **options):
    places = {split: str(world / f"{split}.jsonl") for split in ("test", "calibration", "train")}
    settings = {"model": str(nano / "model"), "base": str(nano / "base"), "output_dir": str(world / "out")}
    return EvaluateArguments(**{**places, **settings, "target_fpr": 0.02, "batch_size": 32, "responses": 5, **options})


@pytest.mark.slow
def test_S3_5_the_report_sets_flag_baselines_and_cascades_against_relative_compute(nano, world, monkeypatch):
    names = ["flag then last-layer probe", "last-layer probe then flag", "flag then judge"]
    judge = {"judge": "endpoint", "judge_url": "http://nowhere", "judge_name": "a judge", "judge_flops": 2e6}
    # What an endpoint would say, without one.
    monkeypatch.setattr("redflag.lab.evaluating.stages.judge_of", lambda arguments: NanoOracle())
    asked = arguments(nano, world, baselines=["last-layer probe"], cascades=names, escalation_share=0.1, **judge)
    report = evaluate(asked)
    methods, own = report.methods, report.model_pass
    assert list(methods) == ["flag", "last-layer probe", *names]
    assert own.flops_per_token == forward_flops(nano / "base") > 1e6 and own.microseconds_per_token > 0
    config = json.loads((nano / "base" / "config.json").read_text())
    flags = len(FlagSpec.load(nano / "model").flags)
    assert methods["flag"].cost.flops_per_token == 2 * config["hidden_size"] * flags
    for method in methods.values():
        cost, compute = method.cost, method.compute
        assert compute.flops == pytest.approx(cost.flops_per_token / own.flops_per_token)
        assert compute.seconds == pytest.approx(cost.microseconds_per_token / own.microseconds_per_token)
    for name in names[:2]:
        facts = methods[name].cascade
        cheap, second = (methods[stage].cost for stage in (facts.first, facts.second))
        for key in ("flops_per_token", "microseconds_per_token"):
            both = getattr(cheap, key) + facts.read * getattr(second, key)
            assert getattr(methods[name].cost, key) == pytest.approx(both)
        assert facts.asked_interval[0] <= facts.asked <= facts.asked_interval[1]
        assert 0 < facts.asked <= facts.calls and facts.asked_harmful > 5 * facts.asked
    judged = methods["flag then judge"]
    assert judged.cost.flops_per_token == 2 * config["hidden_size"] + judged.cascade.read * 2e6
    kept = json.loads((world / "out" / "cascades" / "judge.json").read_text())
    assert judged.cost.microseconds_per_token == pytest.approx(
        methods["flag"].cost.microseconds_per_token + judged.cascade.read * 1e6 * kept["seconds"] / kept["tokens"]
    )
    assert judged.in_force.realised_fpr == 0  # It knows the truth.

    # Which harmless test responses ask: those whose flag reaches the threshold that a tenth of the calibration reached.
    test, calibration = (Recording.load(world / "out" / f"{split}.parquet") for split in ("test", "calibration"))
    limits = asking(calibration, MonitorConfig(), 0.1).values
    raised = replay.peaks(MonitorConfig(), test)[:, 0] >= limits[test.categories[0]]
    assert methods[names[0]].cascade.asked == pytest.approx(raised[~test.harmful].mean())
    # A cascade catches nothing that its first stage passes over.
    assert methods[names[0]].pooled.tpr["0.05"].tpr <= raised[test.harmful].mean()

    text = (world / "out" / "report.md").read_text()
    table = text.partition("## Accuracy against compute")[2].partition("\n## ")[0]
    lines = {line.split("|")[1].strip(" *"): line for line in table.splitlines() if line.startswith("|")}
    for name in methods:
        share = 100 * methods[name].compute.flops
        assert f"+{share:.3g}%" in lines[name] or f"+{float(f'{share:.2g}'):f}".rstrip("0") + "%" in lines[name]
    page = (world / "out" / "report.html").read_text()
    assert "Accuracy against compute" in page and "last-layer probe then flag" in page

    # The pass is timed once: the same command says the same.
    monkeypatch.setattr("redflag.lab.evaluating.cost._timed", lambda *given: pytest.fail("it was timed again"))
    rows = load_rows(world / "test.jsonl")
    again, flag = passes(asked, Models(asked), rows, FlagSpec.load(nano / "model"), world / "out" / "passes.json")
    assert (again, flag) == (own, methods["flag"].cost)
    # Nor is the judge asked again, and what its verdicts took is remembered.
    monkeypatch.setattr(NanoOracle, "__call__", lambda *given: pytest.fail("it was asked again"))
    recordings = [Recording.load(world / "out" / f"{split}.parquet") for split in ("test", "calibration")]
    splits = {split: load_rows(world / f"{split}.jsonl") for split in ("test", "calibration")}
    stages = {"flag": CascadeStage(*recordings, flag)}
    found = measure(asked, ["flag", "judge"], stages, MonitorConfig(), splits, world / "out" / "cascades")
    assert found.cost == judged.cost and found.facts == judged.cascade


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cascades": ["flag"]}, "'FIRST then SECOND', .*got 'flag'"),
        ({"cascades": ["flag then nosuch"]}, "must be 'FIRST then SECOND'"),
        ({"cascades": ["flag then flag"]}, "must be 'FIRST then SECOND'"),
        ({"cascades": ["flag then judge"], "judge": "oracle"}, "judge must be endpoint or model"),
        (
            {"cascades": ["flag then tfidf"], "escalation_share": 0.0},
            r"escalation_share must be above 0 and below 1 \(got 0.0\)",
        ),
        ({"cascades": ["flag then tfidf"], "escalation_share": 0.001}, "at least 999 harmless rows"),
        (
            {"cascades": ["flag then tfidf"], "escalation_weight": 1.0},
            r"escalation_weight must be at least 0 and below 1 \(got 1.0\)",
        ),
    ],
)
def test_S3_5_a_cascade_that_cannot_be_measured_is_refused_before_anything_is_computed(
    nano, world, tmp_path, monkeypatch, options, words
):
    monkeypatch.setattr("redflag.scoring.score.score_to_file", lambda *a, **k: pytest.fail("it was begun"))
    with pytest.raises(RedflagError, match=words):
        evaluate(arguments(nano, world, baselines=["tfidf"], output_dir=str(tmp_path), **options))
