from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from redflag.backends import Sampling
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.trace import Done, Halt
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

ASK = [{"role": "user", "content": "hello"}]


def test_a_calibrated_folder_streams(model_dir):
    guard = Guard.from_pretrained(model_dir, policy=Policy(hold_back=2))
    result = guard.generate(ASK, Sampling(max_new_tokens=12, seed=0))
    assert result.verdict == "completed" and len(result.trace.flag_probs) <= 12
    assert guard.thresholds.values == {"harm": 0.5, "theft": 0.5}
    assert isinstance(result.events[-1], Done)


def test_without_thresholds_the_error_names_calibration_and_the_override(model_dir):
    (model_dir / "thresholds.json").unlink()
    with pytest.raises(RedflagError, match=r"redflag calibrate.*thresholds=0\.5"):
        Guard.from_pretrained(model_dir)


def test_thresholds_can_be_set_by_hand(model_dir, spec):
    (model_dir / "thresholds.json").unlink()
    by_number = Guard.from_pretrained(model_dir, thresholds=1e-9)
    assert by_number.thresholds.guarantee == "manual"
    result = by_number.generate(ASK)
    assert (result.text, result.verdict) == ("", "halted")
    assert isinstance(result.events[-1], Halt)
    own = Thresholds.manual(0.7, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    assert Guard.from_pretrained(model_dir, thresholds=own).thresholds is own


@pytest.mark.parametrize("value", [0, -1.0, 1.5, float("nan")])
def test_a_threshold_that_says_nothing_is_refused(model_dir, value):
    with pytest.raises(RedflagError, match="threshold"):
        Guard.from_pretrained(model_dir, thresholds=value)


def test_thresholds_of_another_run_are_refused_before_the_weights_are_read(model_dir):
    path = model_dir / "thresholds.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": "run-9"}))
    (model_dir / "model.safetensors").write_bytes(b"")
    with pytest.raises(RedflagError, match="run-9"):
        Guard.from_pretrained(model_dir)


def test_a_changed_chat_template_is_refused(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(model_dir)
    with pytest.raises(RedflagError, match="template"):
        Guard.from_pretrained(model_dir)


@pytest.mark.parametrize(
    ("lost", "named"),
    [("redflag.json", "redflag.json"), ("model.safetensors", "model"), ("config.json", "model")],
)
def test_a_folder_that_lacks_something_is_refused(model_dir, lost, named):
    (model_dir / lost).unlink()
    with pytest.raises(RedflagError, match=named):
        Guard.from_pretrained(model_dir)


def test_a_cut_off_weights_file_is_refused(model_dir):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RedflagError, match="does not load"):
        Guard.from_pretrained(model_dir)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RedflagError, match="nowhere"):
        Guard.from_pretrained(tmp_path / "nowhere")
