"""The public surface is exactly `redflag.__all__`, and it costs nothing to import."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import redflag
import redflag.cli
import redflag.errors
import redflag.terminal.generate


def test_all_is_sorted_complete_and_importable():
    assert redflag.__all__ == sorted(redflag.__all__) == sorted(redflag._HOME)
    for name in redflag.__all__:
        assert getattr(redflag, name).__doc__


def test_importing_redflag_or_asking_for_help_loads_no_engine():
    code = (
        "import sys, redflag, redflag.cli; assert redflag.cli.main(['--help']) == 0; "
        "heavy = {'torch', 'transformers', 'trl', 'numpy', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "calibrate" in done.stdout


@pytest.mark.parametrize(
    ("words", "prompt", "observe"),
    [
        (["--model", "D", "--observe", "hello"], "hello", True),
        (["--model", "D", "hello", "--observe"], "hello", True),
        (["--observe", "false", "--model", "D", "hi"], "hi", False),
        (["--observe", "--model", "D", "--", "hi"], "hi", True),
    ],
)
def test_a_switch_before_the_last_word_does_not_swallow_it(words, prompt, observe):
    arguments, policy = redflag.cli.parse(redflag.terminal.generate, words, "redflag generate")
    assert (arguments.prompt, policy.observe) == (prompt, observe)


def test_every_verb_has_a_module_that_can_be_called():
    for module, _ in redflag.cli.VERBS.values():
        found = importlib.import_module(module)
        assert callable(found.run) and found.ARGUMENTS
        assert found.POSITIONAL is None or isinstance(found.POSITIONAL, str)


def test_train_takes_the_options_of_the_verb_by_name(monkeypatch):
    calls = []
    monkeypatch.setattr("redflag.training.train.run", lambda *found: calls.append(found) or {"steps": 3})
    told = {"categories": ["harm", "fraud"], "lora_r": 4, "learning_rate": 0.5, "use_cpu": True}
    assert redflag.train("base", rows="rows.jsonl", output_dir="flagged", **told) == {"steps": 3}
    ((arguments, config),) = calls
    assert (arguments.model, arguments.input, arguments.categories, arguments.lora_r) == (
        "base",
        "rows.jsonl",
        ["harm", "fraud"],
        4,
    )
    assert (config.output_dir, config.learning_rate, config.use_cpu) == ("flagged", 0.5, True)
    with pytest.raises(TypeError, match="lora_rank"):
        redflag.train("base", rows="rows.jsonl", output_dir="flagged", lora_rank=4)


def test_calibrate_tells_a_folder_from_measured_responses():
    with pytest.raises(redflag.errors.RedflagError, match="rows must be given with a model's folder"):
        redflag.calibrate("flagged", target_fpr=0.01)
    with pytest.raises(redflag.errors.RedflagError, match="spec must be given with measured responses"):
        redflag.calibrate([[[0.1]]], rows="harmless.jsonl")
