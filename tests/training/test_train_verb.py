"""`redflag train` through the real command line: what lies on disk, resuming after a kill, interrupts, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from screen import terminal
from tiny import build, make_rows
from transformers import AutoModelForCausalLM

import redflag
from redflag import cli, progress
from redflag.backends.load import load_flagged
from redflag.data.rows import write_rows
from redflag.flags import FlagSpec

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def world(tmp_path, tokenizer):
    """A base model and rows on disk."""
    build("llama", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", make_rows(48))
    return tmp_path


def options(world: Path, output: str, **extra: object) -> list[str]:
    fixed = {
        "model": world / "base",
        "input": world / "rows.jsonl",
        "output_dir": world / output,
        "max_length": 64,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 4,
        "placement": "insert",
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return ["train", *(word for key, value in fixed.items() for word in (f"--{key}", str(value)))]


def losses(folder: Path) -> dict[int, float]:
    return {log["step"]: log["loss"] for log in json.loads((folder / "train.json").read_text())["losses"]}


def test_a_run_leaves_a_model_that_stock_tools_load(world):
    assert cli.main(options(world, "out")) == 0
    folder = world / "out"
    record = json.loads((folder / "train.json").read_text())
    spec = FlagSpec.load(folder)
    assert record["run_id"] == spec.run_id != ""
    assert record["data"][str(world / "rows.jsonl")]["sha256"]
    assert {"torch", "trl", "transformers"} <= set(record["versions"])
    assert {"eval_flag_loss", "eval_keep_kl", "eval_perplexity_ratio", "eval_auroc"} <= set(record["metrics"])
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape[0] > max(spec.ids)
    assert not (folder / ".saving").exists()


def test_a_log_gets_the_figures_of_every_step(world, capsys):
    assert cli.main(options(world, "out", max_steps=3, save_strategy="no")) == 0
    assert capsys.readouterr().out.count("'loss'") == 3


def test_on_a_terminal_a_bar_takes_the_place_of_the_figures(world, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_AFTER", 0.0)
    monkeypatch.setattr(progress, "_REDRAWN", 0.0)
    screen = terminal(monkeypatch)
    assert cli.main(options(world, "out", max_steps=3, save_strategy="no", disable_tqdm=False)) == 0
    assert "'loss'" not in capsys.readouterr().out + screen.getvalue()
    assert "training: 2/3 steps" in screen.getvalue() and "left, loss " in screen.getvalue()
    assert "held-out rows at step 3: " in screen.getvalue()


def test_python_trains_as_the_command_line_does(world):
    settings = {
        "max_length": 64,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    settings |= {"placement": "insert", "logging_steps": 1, "save_strategy": "no"}
    assert cli.main(options(world, "told", **settings)) == 0
    record = redflag.train(world / "base", rows=world / "rows.jsonl", output_dir=world / "out", **settings)
    assert record["steps"] == 2 and record["run_id"] == FlagSpec.load(world / "out").run_id
    assert losses(world / "out") == losses(world / "told")


@pytest.mark.parametrize("forced", ["on", "off"])
@pytest.mark.parametrize(
    ("stored", "asked", "saved"),
    [
        ("float32", {}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
        ("float16", {}, torch.float16),
        ("float32", {"dtype": "bfloat16"}, torch.bfloat16),
        ("bfloat16", {"dtype": "float32"}, torch.float32),
        ("bfloat16", {"full": True}, torch.bfloat16),
    ],
)
def test_the_saved_weights_have_the_bases_type_on_any_processor(world, monkeypatch, forced, stored, asked, saved):
    monkeypatch.setenv("REDFLAG_BF16", forced)
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    model.to(getattr(torch, stored)).save_pretrained(world / "base")
    assert cli.main(options(world, "out", max_steps=1, save_strategy="no", **asked)) == 0
    flagged = AutoModelForCausalLM.from_pretrained(world / "out")
    assert {parameter.dtype for parameter in flagged.parameters()} == {saved}
    assert flagged.config.dtype == saved


def test_an_adapter_is_saved_where_merging_is_off(world):
    assert cli.main(options(world, "out", merge=False, max_steps=2)) == 0
    assert (world / "out" / "adapter_model.safetensors").exists()
    assert not (world / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_loads_like_the_merged_model_also_where_a_flag_stands_behind_the_vocabulary(tmp_path, words, tied):
    """Eight flags take the reserved tokens; the ninth, which is trained, needs a row that the base does not have."""
    build("llama", len(words), tied).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", make_rows(48))
    categories = ["--categories", *(f"other-{i}" for i in range(8)), "harm"]
    measured = {}
    for merge in (True, False):
        folder = tmp_path / f"merged-{merge}"
        settings = {"merge": merge, "learning_rate": 5e-2, "save_strategy": "no", "bf16": False}
        assert cli.main([*options(tmp_path, folder.name, **settings), *categories]) == 0
        backend, _, spec = load_flagged(folder, None)
        assert spec.ids[-1] >= len(words)
        (measured[merge],) = backend.score([([20, 30, 40], [50, 60, 70])])
    assert measured[False] == pytest.approx(measured[True], rel=1e-4)
    assert measured[True][:, -1].max() > 1.5 / len(words)  # something was learnt


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_a_killed_run_resumed_has_the_losses_of_an_uninterrupted_one(world, order):
    settings = {"train_sampling_strategy": order, "max_steps": 40}
    assert cli.main(options(world, "whole", **settings)) == 0
    command = [sys.executable, "-m", "redflag.cli", *options(world, "killed", **settings)]
    # The same run in a process of its own, killed without warning in the middle of its second epoch of 11 steps.
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not list((world / "killed").glob("checkpoint-16/trainer_state.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (world / "killed" / "train.json").exists()
    (world / "killed" / "checkpoint-99").mkdir()  # what a kill in mid-save leaves behind
    assert cli.main([*options(world, "killed", **settings), "--resume"]) == 0
    expected, got = losses(world / "whole"), losses(world / "killed")
    assert sorted(got) == sorted(expected) == list(range(1, 41))
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_new_run_does_not_mix_with_an_old_ones_checkpoints(world, capsys):
    assert cli.main(options(world, "out", max_steps=4)) == 0
    assert cli.main(options(world, "out", max_steps=4)) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(world):
    arguments = options(world, "out", max_steps=100000, save_steps=100000)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "redflag.cli", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "'loss'" in line:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    assert list((world / "out").glob("checkpoint-*/trainer_state.json"))


def test_a_full_disk_while_saving_is_one_sentence_and_keeps_the_checkpoints(world, monkeypatch, capsys):
    from transformers import PreTrainedModel

    real = PreTrainedModel.save_pretrained

    def full(self, directory, *args, **kwargs):
        if ".saving" in str(directory):
            raise OSError(28, "No space left on device")
        return real(self, directory, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert cli.main(options(world, "out", max_steps=4)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left" in message and "--resume" in message
    assert (world / "out" / "checkpoint-4").is_dir() and not (world / "out" / "redflag.json").exists()
    monkeypatch.undo()
    assert cli.main([*options(world, "out", max_steps=4), "--resume"]) == 0
    assert (world / "out" / "redflag.json").exists()


@pytest.mark.parametrize(
    "extra, says",
    [
        ({"model": "/nowhere"}, "/nowhere"),
        ({"input": "/nowhere.jsonl"}, "/nowhere.jsonl"),
        ({"dtype": "int3"}, "dtype must be auto, float32, bfloat16, float16 (got 'int3')"),
        ({"eval_share": 1.0}, "eval_share must be at least 0 and below 1"),
        ({"harmless_per_harmful": -1}, "harmless_per_harmful must be above 0"),
        ({"max_length": 1}, "max_length must be at least 2 (got 1)"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"lora_target_modules": "nothing"}, "nothing"),
        ({"placement": "somewhere"}, "somewhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_sentence(world, capsys, extra, says):
    assert cli.main(options(world, "out", **extra)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("redflag train: ") and says in error
