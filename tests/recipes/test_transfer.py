"""The recipe on transfer: the same conversation in velni, public rows as they are labelled, thresholds from English."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from redflag.cli import parse
from redflag.lab.nano.judge import from_velni
from redflag.lab.nano.rows import nano_rows, velni
from redflag.scoring.recording import Recording
from redflag.training import train

RECIPE = Path(__file__).parents[2] / "recipes" / "papers" / "transfer"
location = importlib.util.spec_from_file_location("transfer_measure", RECIPE / "measure.py")
assert location is not None and location.loader is not None
measure = importlib.util.module_from_spec(location)
location.loader.exec_module(measure)


def test_S1_8_a_conversation_in_velni_is_the_same_one_and_its_onset_stands_before_the_same_words():
    for row in nano_rows("test", 200):
        other = measure.in_velni(row)
        assert (other.lang, other.category, other.group) == ("velni", row.category, row.group)
        assert [turn["content"] for turn in other.messages] == [velni(turn["content"]) for turn in row.messages]
        if row.onset is not None:
            assert other.response[other.onset :] == velni(row.response[row.onset :])
            back = from_velni(other.response[other.onset :]).lower().split()
            known = set(row.response[row.onset :].lower().split())
            assert sum(word in known for word in back) >= 0.8 * len(back) > 0


def test_S1_8_the_flags_training_is_the_demos():
    import inspect

    from redflag.lab.nano import demo

    settings = yaml.safe_load((RECIPE / "train.yaml").read_text())
    source = inspect.getsource(demo._flags)
    for name in ("learning_rate", "keep_coef", "max_length", "per_device_train_batch_size", "train_sampling_strategy"):
        value = settings[name]
        assert f"{name}={value!r}" in source.replace('"', "'").replace("5e-3", "0.005"), name
    arguments, config = parse(train, ["--config", str(RECIPE / "train.yaml"), "--output_dir", "x"], "redflag train")
    assert arguments.categories == ["harm"] and config.placement == "dense"


def test_S1_8_public_rows_keep_their_labels_and_answers_to_one_request_are_a_group(tmp_path):
    path = tmp_path / "some-set" / "train.jsonl.gz"
    path.parent.mkdir()
    rows = [
        {"id": "a", "prompt": "问", "response": "坏", "label": "harmful", "lang": "zh", "extra": {"pair_id": "1"}},
        {"id": "b", "prompt": "问", "response": "好", "label": "benign", "lang": "zh", "extra": {"pair_id": "1"}},
        {"id": "c", "prompt": "问", "response": None, "label": None, "lang": "zh"},
        {"id": "d", "messages": [{"role": "user", "content": "x"}], "response": "y", "label": "benign", "lang": "zh"},
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = measure.public_rows(path)
    assert [(row.id, row.category, row.group, row.lang) for row in found] == [
        ("a", "harm", "pair 1", "zh"),
        ("b", None, "pair 1", "zh"),
        ("d", None, "d", "zh"),
    ]


def recording(seed, harmful, harmless, shift=0.0):
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(harmful + harmless):
        top = draw.normal(2.0 if i < harmful else -2.0) + shift
        probs = 1 / (1 + np.exp(-(top + draw.normal(-4, 0.1, 6))))
        probs[3] = 1 / (1 + np.exp(-top))
        category = "harm" if i < harmful else None
        rows.append({"flag_probs": probs[:, None].tolist(), "id": f"{seed}-{i}", "category": category})
    return Recording.of(("harm",), rows)


def test_S1_8_the_threshold_comes_from_english_rows_alone():
    calibration, test = recording(0, 20, 400), recording(1, 300, 300)
    here = measure.figures(test, calibration)
    assert here["auroc"] > 0.99 and here["auroc_interval"][0] < here["auroc"] < here["auroc_interval"][1]
    assert here["in_force"]["realised_fpr"] < 0.04 and here["in_force"]["tpr"] > 0.8
    # Elsewhere all probabilities lie higher: the order stays, and with the English threshold half are false alarms.
    there = measure.figures(recording(1, 300, 300, shift=2.5), calibration)
    assert there["threshold"] == here["threshold"] and there["auroc"] == pytest.approx(here["auroc"])
    assert there["in_force"]["realised_fpr"] > 0.4
    # Without harmful rows there is a rate of false alarms and nothing to tell apart.
    only = measure.figures(recording(2, 0, 200), calibration)
    assert only["auroc"] is None and only["in_force"]["tpr"] is None and only["in_force"]["realised_fpr"] < 0.05
    text = measure.markdown({"part": {"flagged in English": {"0": {"English": here, "only": only}}}})
    assert "| only | 0, 200 | - | - | - | - |" in text and f"{here['auroc']:.3f}" in text


def test_public_rows_are_looked_for_only_in_the_folder_that_was_given(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["measure.py", "small-real", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        measure.main()
    assert "--data DATA" in capsys.readouterr().err and not list(tmp_path.iterdir())
