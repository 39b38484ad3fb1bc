"""A model's folder is an older model's or the new one's, whole, whatever lay there and wherever a kill strikes."""

from __future__ import annotations

import copy
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import build, make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from redflag import cli
from redflag.backends.load import load_flagged
from redflag.data.rows import write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.training import saving
from redflag.training.adapter import lora_config


def train(folder: Path, output: str, **extra: object) -> int:
    fixed = {
        "model": folder / "base",
        "input": folder / "rows.jsonl",
        "output_dir": folder / output,
        "max_length": 64,
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "dtype": "float32",
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return cli.main(["train", *(word for key, value in fixed.items() for word in (f"--{key}", str(value)))])


@pytest.fixture
def world(tmp_path, tokenizer):
    """A base model whose tokenizer has two chat templates, and rows."""
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    build("llama", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", make_rows(48))
    return tmp_path


def test_a_second_run_into_the_folder_of_a_model_with_several_templates(world):
    assert train(world, "out") == 0
    assert (world / "out" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert train(world, "out", resume=True, max_steps=4) == 0
    assert json.loads((world / "out" / "train.json").read_text())["steps"] == 4
    assert set(AutoTokenizer.from_pretrained(world / "out").chat_template) == {"default", "tool_use"}
    load_flagged(world / "out", None)


@pytest.mark.parametrize("first, then", [(False, True), (True, False)], ids=["adapter, merged", "merged, adapter"])
def test_nothing_of_a_run_with_other_settings_is_loaded_with_the_new_model(world, first, then):
    for name, merge in (("out", first), ("clean", then)):
        assert train(world, name, merge=merge) == 0
        assert train(world, name, merge=then, resume=True, max_steps=4) == 0
    names = {path.name for path in (world / "out").iterdir() if not path.name.startswith("checkpoint")}
    clean = {path.name for path in (world / "clean").iterdir() if not path.name.startswith("checkpoint")}
    assert names - {"README.md"} == clean - {"README.md"}
    (measured,), (expected,) = (
        load_flagged(world / name, None)[0].score([([20, 30, 40], [50, 60, 70])]) for name in ("out", "clean")
    )
    assert measured == pytest.approx(expected, rel=1e-5)


# What each kind of save leaves, and what tells one model from another by the weights alone.
def flagged_folder(flagged, output: Path, run: int, *, merge=True, shards=False):
    model, tokenizer, spec, _ = flagged
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float(run))
    if not merge:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, spec, 2))
        model.config.name_or_path = model.peft_config["default"].base_model_name_or_path = str(output.parent / "base")
    if shards:
        real = model.save_pretrained
        model.save_pretrained = lambda folder, **options: real(folder, max_shard_size="20KB", **options)
    result = saving.save(model, tokenizer, spec, output, merge, {"arguments": {"run": run}})
    return result["run_id"]


@pytest.fixture
def base(flagged, tmp_path):
    """What adapters are put on, whose norm is 1."""
    model, tokenizer, _, _ = flagged
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return flagged


KINDS = {"one file": {}, "shards": {"shards": True}, "adapter": {"merge": False}}
NORM = {"one file": (2.0, 3.0), "shards": (2.0, 3.0), "adapter": (1.0, 1.0)}


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_a_model_in_the_place_of_another_is_loaded_as_if_it_were_alone(base, tmp_path, old, new):
    flagged_folder(base, tmp_path / "out", 2, **KINDS[old])
    flagged_folder(base, tmp_path / "out", 3, **KINDS[new])
    flagged_folder(base, tmp_path / "alone", 3, **KINDS[new])
    names, alone = ({path.name for path in (tmp_path / name).iterdir()} for name in ("out", "alone"))
    assert names | {"README.md"} == alone | {"README.md"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.norm.weight[0].item() == NORM[new][1]


class Killed(BaseException):
    pass


def kill_at(monkeypatch, step: int) -> None:
    """The process ends before the step-th change on disk that moves or removes something."""
    done = 0

    def counted(real):
        def change(*args, **kwargs):
            nonlocal done
            done += 1
            if done == step:
                raise Killed
            return real(*args, **kwargs)

        return change

    monkeypatch.setattr(saving.os, "replace", counted(os.replace))
    monkeypatch.setattr(saving, "_remove", counted(saving._remove))


@pytest.mark.parametrize("old, new", [("shards", "one file"), ("one file", "adapter"), ("adapter", "shards")])
def test_a_kill_at_any_point_leaves_the_old_model_the_new_one_or_none(base, tmp_path, monkeypatch, old, new):
    seen = set()
    for step in range(1, 100):
        output = tmp_path / f"kill-{step}"
        runs = {"old": flagged_folder(base, output, 2, **KINDS[old])}
        with monkeypatch.context() as patch, suppress(Killed):
            kill_at(patch, step)
            runs["new"] = flagged_folder(base, output, 3, **KINDS[new])
        try:
            run = FlagSpec.load(output).run_id
        except RedflagError:
            run = None
        try:
            model = AutoModelForCausalLM.from_pretrained(output)
        except (OSError, ValueError):
            assert run is None
            seen.add("none")
            continue
        norm, adapter = model.model.norm.weight[0].item(), hasattr(model, "peft_config")
        is_old = (norm, adapter) == (NORM[old][0], old == "adapter")
        is_new = (norm, adapter) == (NORM[new][1], new == "adapter")
        assert is_old != is_new
        assert run in (None, runs["old"] if is_old else runs.get("new"))
        seen.add("old" if is_old else "new")
        if "new" in runs:
            assert run == runs["new"]
            break
    assert seen == {"old", "none", "new"}


def test_a_save_after_a_killed_one_is_whole(base, tmp_path, monkeypatch):
    flagged_folder(base, tmp_path / "out", 2)
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            flagged_folder(base, tmp_path / "out", 3)
    run = flagged_folder(base, tmp_path / "out", 3)
    assert FlagSpec.load(tmp_path / "out").run_id == run and not (tmp_path / "out" / ".saving").exists()
    load_flagged(tmp_path / "out", None)


def test_a_base_that_is_gone_by_the_end_costs_nothing(base, tmp_path):
    base[0].config.name_or_path = str(tmp_path / "gone")
    flagged_folder(base, tmp_path / "out", 2)
    load_flagged(tmp_path / "out", None)


def test_files_of_the_user_stay(base, tmp_path):
    flagged_folder(base, tmp_path / "out", 2)
    for name in ("notes.txt", "thresholds.json", "other.safetensors", "checkpoint-4/trainer_state.json"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    flagged_folder(base, tmp_path / "out", 3)
    for name in ("notes.txt", "thresholds.json", "other.safetensors", "checkpoint-4/trainer_state.json"):
        assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_full_disk_does_not_speak_of_checkpoints_that_are_not_there(base, tmp_path, monkeypatch, checkpoints):
    def full(self, folder, **options):
        raise saving.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(base[0]), "save_pretrained", full)
    monkeypatch.setattr(saving, "last_checkpoint", lambda output: output if checkpoints else None)
    with pytest.raises(RedflagError, match="No space left") as caught:
        flagged_folder(base, tmp_path / "out", 2)
    assert ("--resume" in str(caught.value)) == checkpoints
