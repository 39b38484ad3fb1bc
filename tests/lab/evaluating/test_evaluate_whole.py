"""An evaluation from end to end where flags stand behind the base's vocabulary; and what is tried before it begins."""

import dataclasses

import pytest
import torch
from real_models import tokenizer_of
from tiny import SIZES, make_rows
from transformers import LlamaConfig, LlamaForCausalLM

from redflag import cli
from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec, attach
from redflag.judges import UnansweredError, Verdict
from redflag.lab.baselines.record_baselines import record_baselines
from redflag.lab.evaluating.evaluate import EvaluateArguments, evaluate
from redflag.lab.report import read_report
from redflag.prompt import template_hash

PARTS = {
    "baselines": ["tfidf", "last-layer probe"],
    "attacks": ["prefill"],
    "judge": "oracle",
    "cascades": ["tfidf then flag"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tied model whose tokenizer, SmolLM2's in small, has no reserved tokens and whose matrix has no spare rows."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = tokenizer_of("smollm2")
    torch.manual_seed(3)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, **ends, vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True)
    )
    for part in (model, tokenizer):
        part.save_pretrained(folder / "base")
    words = len(tokenizer)
    spec = attach(model, tokenizer, FlagSpec.of("harm", "fraud"))
    assert min(spec.ids) >= words == LlamaConfig.from_pretrained(folder / "base").vocab_size
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    dataclasses.replace(spec, run_id="run-1", template_hash=template_hash(tokenizer)).save(folder / "model")
    rows = make_rows(90)
    for i, split in enumerate(("test", "calibration", "train")):
        chosen = [dataclasses.replace(row, id=f"{split}-{row.id}", group=None) for row in rows[i * 30 : i * 30 + 30]]
        write_rows(folder / f"{split}.jsonl", chosen)
    return folder


def arguments(world, output, **options):
    paths = {name: str(world / name) for name in ("model", "base")}
    paths |= {name: str(world / f"{name}.jsonl") for name in ("test", "calibration", "train")}
    settings = {"output_dir": str(output), "target_fpr": 0.2, "requests": 2, "responses": 4, "device": "cpu"}
    return EvaluateArguments(**{**paths, **settings, **options})


def test_every_part_runs_where_flags_stand_behind_the_vocabulary(world, tmp_path):
    report = evaluate(arguments(world, tmp_path / "out", **PARTS))
    assert list(report.methods) == ["flag", "tfidf", "last-layer probe", "tfidf then flag"]
    assert report.language.keep_kl > 1e-4 and report.language.rows == 20
    assert any(line.name == "prefill" for line in report.attacks) and report.judge.unanswered == 0
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "out" / name).stat().st_size
    assert read_report(tmp_path / "out" / "report.json").language == report.language
    assert not list((tmp_path / "out").glob(".trying*"))


def broken(*args, **kwargs):
    raise RuntimeError("this part breaks")


LAST_PARTS = {
    "language": "redflag.lab.evaluating.language.language_change",
    "tables": "redflag.lab.evaluating.tables.method",
    "report": "redflag.lab.report.write",
    "an answer": "redflag.backends.hf.HFBackend.complete",
    "hidden states": "redflag.lab.baselines.hidden.last_layers",
}


@pytest.mark.parametrize("part", LAST_PARTS)
def test_what_comes_last_is_tried_before_the_rows_are_scored(world, tmp_path, monkeypatch, part):
    monkeypatch.setattr("redflag.scoring.score.score_to_file", lambda *a, **k: pytest.fail("rows were scored"))
    monkeypatch.setattr(LAST_PARTS[part], broken)
    with pytest.raises(RuntimeError, match="this part breaks"):
        evaluate(arguments(world, tmp_path / "out", **PARTS))
    assert not (tmp_path / "out" / "rehearsal.json").exists()


def test_an_option_that_a_baseline_does_not_take_is_found_before_the_rows_are_scored(world, tmp_path, monkeypatch):
    monkeypatch.setattr("redflag.scoring.score.score_to_file", lambda *a, **k: pytest.fail("rows were scored"))
    options = {"refusal tokens": {"tunning": {}}}
    with pytest.raises(RedflagError, match="invalid options of the baseline 'refusal tokens'"):
        evaluate(arguments(world, tmp_path / "out", baselines=["refusal tokens"], baseline_options=options))


def test_a_judge_that_does_not_answer_is_found_before_the_rows_are_scored(world, tmp_path, monkeypatch):
    def silent(messages, answer):
        raise UnansweredError("connection refused")

    monkeypatch.setattr("redflag.scoring.score.score_to_file", lambda *a, **k: pytest.fail("rows were scored"))
    monkeypatch.setattr("redflag.lab.evaluating.stages.judge_of", lambda arguments: silent)
    with pytest.raises(RedflagError, match=r"must answer \(got UnansweredError: connection refused"):
        evaluate(arguments(world, tmp_path / "out", **PARTS))


def test_what_was_tried_is_not_tried_again_unless_it_changed(world, tmp_path, monkeypatch):
    asked = []

    def judge(messages, answer):
        asked.append(answer)
        return Verdict(0.0)

    class Begun(Exception):
        pass

    def begun(*arguments, **options):
        raise Begun

    monkeypatch.setattr("redflag.lab.evaluating.stages.judge_of", lambda arguments: judge)
    monkeypatch.setattr("redflag.scoring.score.score_to_file", begun)
    for baselines, times in ((["tfidf"], 1), (["tfidf"], 1), ([], 2)):
        with pytest.raises(Begun):
            evaluate(arguments(world, tmp_path / "out", attacks=["none"], baselines=baselines))
        assert len(asked) == times


@pytest.mark.parametrize(
    "verb, words",
    [
        ("evaluate", ["--model", "model", "--test", "test.jsonl", "--calibration", "calibration.jsonl"]),
        ("score", ["--model", "model", "--input", "test.jsonl"]),
        ("synthesize", ["--constitution", "none.yaml", "--model", "base"]),
        ("audit", ["--input", "test.jsonl"]),
        ("train", ["--model", "base", "--input", "test.jsonl", "--use_cpu", "true"]),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_a_model_is_loaded(world, capsys, monkeypatch, verb, words):
    monkeypatch.chdir(world)
    monkeypatch.setattr("redflag.backends.load.read_model", lambda *a: pytest.fail("a model was loaded"))
    option = "--output" if verb == "score" else "--output_dir"
    assert cli.main([verb, *words, option, "test.jsonl/below"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "is a file). Choose another" in error


def test_thresholds_that_could_not_be_saved_are_found_before_anything_is_scored(world, capsys, monkeypatch):
    import tempfile

    def read_only(dir):  # as on a file system without writing, also for an administrator
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr("redflag.backends.load.read_model", lambda *a: pytest.fail("a model was loaded"))
    argv = ["calibrate", "--model", str(world / "model"), "--input", str(world / "calibration.jsonl")]
    assert cli.main([*argv, "--target_fpr", "0.2"]) == 2
    assert "thresholds.json cannot be written" in (error := capsys.readouterr().err) and "Read-only file" in error


@pytest.mark.parametrize("name", ["token head", "refusal tokens", "deep alignment", "refusal at every position"])
def test_every_baseline_reads_a_base_that_has_no_place_for_the_flags(world, tmp_path, name):
    rows = {split: load_rows(world / f"{split}.jsonl").rows for split in ("train", "test", "calibration")}
    folders = (world / "base", world / "model")
    recorded = record_baselines([name], *folders, *rows.values(), tmp_path, most_rows=8)[name]
    assert len(recorded.test) == 30 and recorded.test.probs.min() >= 0 and recorded.test.probs.max() <= 1
