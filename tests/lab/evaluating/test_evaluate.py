"""One command measures everything, refuses what would make its numbers untrue, and does nothing twice."""

import json

import numpy as np
import pytest

from redflag.backends import load
from redflag.backends.load import read_model
from redflag.cli import main
from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.lab.evaluating.evaluate import EvaluateArguments, evaluate, headline
from redflag.lab.evaluating.stages import Models, record
from redflag.lab.report.evaluation import as_json, read_report
from redflag.scoring import score
from redflag.scoring.recording import Recording
from redflag.scoring.score import read_scored
from redflag.scoring.score import score as score_rows


@pytest.fixture(scope="module")
def world(nano, tmp_path_factory):
    """A part of the nano world's rows: enough for every stage, few enough for seconds."""
    folder = tmp_path_factory.mktemp("evaluate")
    for split, count in (("test", 120), ("calibration", 260), ("train", 150)):
        write_rows(folder / f"{split}.jsonl", load_rows(nano / "rows" / f"{split}.jsonl").rows[:count])
    return folder


def arguments(nano, world, **options):
    settings = {"model": nano / "model", "test": world / "test.jsonl", "calibration": world / "calibration.jsonl"}
    settings = {name: str(path) for name, path in settings.items()} | {"output_dir": str(world / "out")}
    return EvaluateArguments(**{**settings, "target_fpr": 0.02, "batch_size": 32, **options})


@pytest.fixture(scope="module")
def report(nano, world):
    return evaluate(
        arguments(
            nano,
            world,
            base=str(nano / "base"),
            train=str(world / "train.jsonl"),
            baselines=["tfidf"],
            attacks=["none", "prefill"],
            judge="oracle",
            requests=6,
            responses=30,
        )
    )


def test_every_part_is_there_and_the_three_files_say_it(report, world):
    assert list(report.methods) == ["flag", "tfidf"]
    flag = report.methods["flag"]
    assert flag.pooled.auroc > 0.99 and flag.in_force.tpr > 0.9
    ahead = report.methods["tfidf"].flag_ahead.auroc
    tfidf = report.methods["tfidf"].pooled.auroc
    assert ahead.difference == pytest.approx(flag.pooled.auroc - tfidf) and ahead.interval[0] > 0
    assert flag.threshold.fitted_on.split == "calibration"
    assert flag.delay["constructed"].realised_fpr == flag.in_force.realised_fpr
    assert {"0", "4", "8", "sentence", "end"} == set(flag.delay["constructed"].exposed)
    assert 0 < report.language.keep_kl < 0.02 and 0.98 < report.language.perplexity_ratio < 1.02
    prefills = [line for line in report.attacks if line.name == "prefill"]
    assert prefills and prefills[-1].harm_produced.rate >= prefills[-1].harm_released.rate
    assert report.judge.unanswered == 0 and report.judge.answered > 6
    written = json.loads((world / "out" / "report.json").read_text())
    assert written == json.loads(json.dumps(as_json(report)))
    assert read_report(world / "out" / "report.json") == report
    page, text = (world / "out" / "report.html").read_text(), (world / "out" / "report.md").read_text()
    share = f"{100 * flag.in_force.tpr:.3g}"
    assert "How far the flag is ahead" in text and f"{ahead.difference:+.4f}" in text
    assert share in page and share in text and "tfidf" in text and "prefill" in text
    assert "flag" in headline(report) and "prefill: any of" in headline(report)


def test_the_same_command_again_computes_nothing_and_says_the_same(report, nano, world, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("this was done before")

    monkeypatch.setattr("redflag.scoring.score.score_to_file", never)
    monkeypatch.setattr("redflag.lab.attacks.Target.answers", never)
    before = {path.name: path.stat().st_mtime_ns for path in (world / "out").glob("*.parquet")}
    again = evaluate(
        arguments(
            nano,
            world,
            train=str(world / "train.jsonl"),
            base=str(nano / "base"),
            baselines=["tfidf"],
            attacks=["none", "prefill"],
            judge="oracle",
            requests=6,
            responses=30,
        )
    )
    assert {path.name: path.stat().st_mtime_ns for path in (world / "out").glob("*.parquet")} == before
    for part in ("methods", "language", "judge", "warnings"):
        assert getattr(again, part) == getattr(report, part)


def test_the_flagged_model_and_its_base_are_opened_once(nano, world, tmp_path, monkeypatch):
    opened = []

    def opening(directory, *how):
        opened.append(str(directory))
        return read_model(directory, *how)

    monkeypatch.setattr(load, "read_model", opening)
    options = {"base": str(nano / "base"), "attacks": ["none"], "judge": "oracle", "requests": 1}
    assert evaluate(arguments(nano, world, output_dir=str(tmp_path), **options)).attacks
    assert opened == [str(nano / "model"), str(nano / "base")]


def test_rows_that_were_scored_before_a_kill_are_not_scored_again_and_the_recording_is_the_same(
    nano, world, tmp_path, monkeypatch
):
    asked = arguments(nano, world, batch_size=2)
    models, rows, spec = Models(asked), load_rows(world / "test.jsonl"), FlagSpec.load(nano / "model")
    measured = []

    def killed_behind(count):
        def scored(*given, **how):
            for item in score_rows(*given, **how):
                if len(measured) == count:
                    raise KeyboardInterrupt
                measured.append(item.row.id)
                yield item

        monkeypatch.setattr(score, "score", scored)

    whole = record(asked, models, rows, tmp_path / "whole", spec)
    killed_behind(45)
    with pytest.raises(KeyboardInterrupt):
        record(asked, models, rows, tmp_path / "killed", spec)
    killed_behind(-1)
    measured.clear()
    again = record(asked, models, rows, tmp_path / "killed", spec)
    assert measured == [row.id for row in rows][32:]  # Chunks of eight batches of two are kept as one.
    assert np.array_equal(again.probs, whole.probs) and again.columns == whole.columns
    assert np.array_equal(again.token_ids, whole.token_ids) and again.meta == whole.meta
    kept, file = Recording.load(tmp_path / "whole.parquet"), read_scored(tmp_path / "whole.scored.jsonl")
    for other in (kept, Recording.of(spec.categories, file, whole.meta)):
        assert np.array_equal(other.probs, whole.probs) and other.columns == whole.columns


def test_other_rows_under_the_same_name_are_measured_anew(nano, world, tmp_path):
    output = str(tmp_path)
    first = evaluate(arguments(nano, world, output_dir=output))
    rows = load_rows(world / "test.jsonl").rows
    fewer = write_rows(tmp_path / "fewer.jsonl", rows[:80])
    second = evaluate(arguments(nano, world, output_dir=output, test=str(fewer)))
    count = [method.pooled.harmful + method.pooled.harmless for method in map(_flag, (first, second))]
    assert count == [120, 80]


def _flag(report):
    return report.methods["flag"]


def test_helping_processes_score_and_leave(nano, world, tmp_path, monkeypatch):
    evaluate(arguments(nano, world, output_dir=str(tmp_path)))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "report.json").unlink()
    assert evaluate(arguments(nano, world, output_dir=str(tmp_path))) is None
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibration": "test"}, "must hold other rows than test"),
        ({"baselines": ["tfidf"]}, "train must be given"),
        ({"baselines": ["tfidf"], "train": "train"}, "base must be given"),
        ({"baselines": ["nosuch"], "train": "train", "base": "base"}, "baselines must be all, or among .*got 'nosuch'"),
        ({"attacks": ["nosuch"], "judge": "oracle"}, "attacks must be all, or among"),
        ({"attacks": ["prefill"]}, "judge must be endpoint or model"),
        ({"attacks": ["prefill"], "judge": "endpoint"}, "judge_name and judge_url must be given"),
        ({"attacks": ["prefill"], "judge": "oracle", "attack_options": {"prefill": {"size": 1}}}, "size"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"hold_back": -1}, "hold_back must be at least 0"),
        ({"target_fpr": 1.5}, "1.5"),
        ({"window": 0}, r"window must be .*\(got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(nano, world, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr("redflag.scoring.score.score_to_file", lambda *a, **k: pytest.fail("it was begun"))
    places = {"test": world / "test.jsonl", "train": world / "train.jsonl", "base": nano / "base"}
    options = {k: str(places[v]) if isinstance(v, str) and v in places else v for k, v in options.items()}
    with pytest.raises(RedflagError, match=words):
        evaluate(arguments(nano, world, output_dir=str(tmp_path), **options))


def test_rows_of_one_kind_cannot_be_told_apart(nano, world, tmp_path):
    harmless = [row for row in load_rows(world / "test.jsonl") if not row.harmful]
    path = write_rows(tmp_path / "harmless.jsonl", harmless)
    with pytest.raises(RedflagError, match="must hold harmful and harmless rows"):
        evaluate(arguments(nano, world, test=str(path), output_dir=str(tmp_path)))


def test_the_verb_reads_the_recipe_and_says_a_mistake_in_one_line(capsys, tmp_path):
    command = ["evaluate", "--config", "recipes/nano/evaluate.yaml", "--model", str(tmp_path)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("redflag evaluate: ") and error.count("\n") == 1
