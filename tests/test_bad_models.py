"""Bad models, thresholds and templates, and interrupted work, case by case, as in test_bad_input.py."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from bad_input import command, files, here, refused, turns
from safetensors.torch import load_file, save_file
from tiny import make_rows
from transformers import AutoTokenizer

from redflag import cli
from redflag.backends.hf import HFBackend
from redflag.data.rows import write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.prompt import FALLBACK_TEMPLATE, template_hash
from redflag.scoring.score import read_scored
from redflag.trace import Halt, read_traces

__all__ = ["here", "refused"]


LOST = object()


def edit(file, **change):
    """Spoils a JSON file: sets keys, drops those that are `LOST`."""

    def spoil(model):
        record = json.loads((model / file).read_text()) | change
        (model / file).write_text(json.dumps({key: value for key, value in record.items() if value is not LOST}))

    return spoil


def text(file, content):
    return lambda model: (model / file).write_text(content)


def another_flag_id(model):
    spec = FlagSpec.load(model)
    dataclasses.replace(spec, flags=(dataclasses.replace(spec.flags[0], id=77), spec.flags[1])).save(model)


def lost_weights(model):
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.0.mlp.gate_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})


BAD_MODELS = {
    "no folder": (shutil.rmtree, "model", "redflag train"),
    "no redflag.json": (lambda m: (m / "redflag.json").unlink(), "model/redflag.json does not exist", "redflag train"),
    "damaged redflag.json": (text("redflag.json", '{"format"'), "redflag.json cannot be read", "Restore it"),
    "later format": (
        edit("redflag.json", format=9),
        "must have the format 1 (got 9)",
        "Use the version of redflag that wrote it",
    ),
    "unknown key": (edit("redflag.json", secret=1), "secret", "redflag.json"),
    "no flags": (edit("redflag.json", flags=[]), "must have a list of flags", "Restore it"),
    "flags of another model": (another_flag_id, "(got 77 and 5)", "Restore both from one training run"),
    "no config": (lambda m: (m / "config.json").unlink(), "model does not load", "redflag train"),
    "damaged config": (text("config.json", "{"), "model does not load", "redflag train"),
    "config of another model": (edit("config.json", hidden_size=64), "model does not load", "redflag train"),
    "unknown architecture": (edit("config.json", model_type="zorg"), "zorg", "redflag train"),
    "damaged tokenizer": (text("tokenizer.json", "{"), "model does not load", "redflag train"),
    "damaged weights": (text("model.safetensors", "abc"), "model does not load", "redflag train"),
    "weights that lack a layer": (
        lost_weights,
        "must hold all of the model's weights (1 missing: model.layers.0.mlp",
        "train again",
    ),
    "another template": (text("chat_template.jinja", "{{ messages }}"), "prompt template in model", "Restore"),
}


@pytest.mark.parametrize("verb", ["score", "generate"])
@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_folder_is_named(refused, here, name, verb):
    spoil, reason, remedy = BAD_MODELS[name]
    spoil(here / "model")
    refused(command(verb), reason, remedy)


BAD_THRESHOLDS = {
    "none": (lambda m: (m / "thresholds.json").unlink(), "must hold thresholds.json", "thresholds=0.5"),
    "damaged": (text("thresholds.json", '{"format": 1,'), "is not JSON"),
    "no object": (text("thresholds.json", "[]"), "is not an object"),
    "NaN": (text("thresholds.json", '{"format": 1, "values": {"harm": NaN}}'), "NaN is not JSON"),
    "later format": (edit("thresholds.json", format=9), "has format 9"),
    "unknown key": (edit("thresholds.json", mood=1), "has unknown keys ['mood']"),
    "lost key": (edit("thresholds.json", monitor=LOST), "lacks the keys ['monitor']"),
    "a threshold of 0": (
        edit("thresholds.json", values={"harm": 0, "fraud": 0.5}),
        "the threshold of 'harm' must be above 0",
    ),
    "another run": (
        edit("thresholds.json", run_id="run-9"),
        "run must be 'run-9', which the thresholds were calibrated for (got 'run-1')",
    ),
    "another template": (edit("thresholds.json", template_hash="beef"), "prompt template must be 'beef'"),
    "another engine": (edit("thresholds.json", logprob_mode="processed"), "log-probability mode must be 'processed'"),
    "other flags": (edit("thresholds.json", values={"harm": 0.5}), "categories must be ['harm']"),
}


@pytest.mark.parametrize("name", BAD_THRESHOLDS)
def test_bad_thresholds_are_refused_and_calibration_is_named(refused, here, name):
    spoil, *says = BAD_THRESHOLDS[name]
    spoil(here / "model")
    refused(command("generate"), *says, "redflag calibrate")


def test_rows_that_do_not_fit_the_flags_are_named(refused, here):
    rows = make_rows(12)
    write_rows("mine.jsonl", [*rows, dataclasses.replace(rows[0], category="arson", id="r9")])
    train = command("train", "--categories", "harm", "fraud", "--eval_share", "0", rows="mine.jsonl")
    refused(train, "row r9: the category of a row must be one of the flags'", "Add a flag for it")
    write_rows("mine.jsonl", [row for row in rows if not row.harmful])
    refused(command("train", "--eval_share", "0", rows="mine.jsonl"), "got 8 rows, none of them harmful", "Add")
    write_rows("mine.jsonl", [row for row in rows if row.harmful])
    refused(command("train", "--eval_share", "0", rows="mine.jsonl"), "got 4 rows, none of them harmless", "Add")
    refused(command("calibrate", rows="mine.jsonl"), "0 harmless responses are too few", "Add harmless rows")


def set_template(model, template):
    """A model trained with another chat template (None: with none)."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    (model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model)
    for file in ("redflag.json", "thresholds.json"):
        edit(file, template_hash=template_hash(tokenizer))(model)


def test_a_tokenizer_without_chat_template_works_by_the_fallback(here, capsys):
    set_template(here / "model", None)
    assert AutoTokenizer.from_pretrained("model").chat_template is None and "### " in FALLBACK_TEMPLATE
    assert cli.main(command("generate", "--system", "be kind")) == 0
    assert cli.main(command("score")) == 0
    assert "done: " in capsys.readouterr().err and len(read_scored("scored.jsonl")) == 48


def test_turns_that_the_chat_template_refuses_are_named(refused, here):
    guard = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    set_template(here / "model", guard + "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>")
    refused(command("generate", "--system", "be kind"), "['system', 'user'] (no system turns)", "merge the system turn")
    (here / "mine.jsonl").write_text(turns(("system", "be kind"), ("user", "tell"), ("assistant", "no")) + "\n")
    refused(command("score", rows="mine.jsonl"), "row 1: the chat template refuses", "merge the system turn")


def test_a_chat_template_that_is_no_template_is_named(refused, here):
    set_template(here / "model", "{% if")
    refused(command("generate"), "the chat template", "unexpected 'end of template'")


def test_a_response_longer_than_the_context_is_cut_and_that_is_said(here, capsys):
    rows = make_rows(3)
    long = {"role": "assistant", "content": "cat " * 300}
    write_rows("mine.jsonl", [*rows, dataclasses.replace(rows[1], messages=[rows[1].messages[0], long])])
    assert cli.main(command("score", rows="mine.jsonl")) == 0
    assert "1 responses did not fit the context and were cut" in capsys.readouterr().err
    assert [row["truncated"] for row in read_scored("scored.jsonl")] == [False, False, False, True]


def spoil_numbers(model):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def test_a_model_of_nan_is_never_believed(refused, here, capsys):
    spoil_numbers(here / "model")
    refused(command("score"), "row '0': the model gave [nan, nan] as flag probability", "Check the weights")
    refused(command("calibrate"), "the model gave [nan, nan] as flag probability", "Check the weights")
    assert cli.main(command("generate", "--record", "t.jsonl")) == 1
    out, err = capsys.readouterr()
    assert (
        out.strip() == ""
        and "halted: fault, step 0: a flag probability must be at least 0 and at most 1 (got nan)" in err
    )
    assert [(type(event), event.reason) for t in read_traces("t.jsonl") for event in t.events] == [(Halt, "fault")]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_full_while_scoring_keeps_the_older_result_and_the_work(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: full_disk() if str(b) == "scored.jsonl" else os.rename(a, b))
        assert cli.main(command("score")) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("redflag score: scored.jsonl cannot be written (No space left on device)")
    assert "kept in scored.jsonl.parts" in error and "repeat the command" in error
    assert Path("scored.jsonl").read_text() == "an older result\n"
    assert cli.main(command("score")) == 0
    assert "48 of 48 rows are there" in capsys.readouterr().err and len(read_scored("scored.jsonl")) == 48


def test_a_disk_full_while_calibrating_keeps_the_older_thresholds(refused, monkeypatch):
    monkeypatch.setattr(os, "replace", full_disk)
    refused(command("calibrate"), "cannot write model/thresholds.json (No space left on device)", "unchanged", "repeat")


def test_a_disk_full_while_recording_keeps_the_older_traces(here, refused, monkeypatch, capsys):
    assert cli.main(command("generate", "--record", "t.jsonl")) == 0
    monkeypatch.setattr(os, "write", full_disk)
    refused(command("generate", "--record", "t.jsonl"), "cannot append to t.jsonl (No space left on device)", "repeat")
    monkeypatch.undo()
    assert len(list(read_traces(here / "t.jsonl"))) == 1


def test_a_disk_full_while_writing_rows_keeps_the_older_rows(here, monkeypatch):
    before = files(here)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RedflagError, match=r"rows\.jsonl \(No space left on device\).*older file.*unchanged.*repeat"):
        write_rows("rows.jsonl", make_rows(3))
    assert files(here) == before


def test_ctrl_c_while_scoring_loses_nothing(here, monkeypatch, capsys):
    score, calls = HFBackend.score, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*arguments, **options)

    one_by_one = command("score", "--batch_size", "1")
    with monkeypatch.context() as patch:
        patch.setattr(HFBackend, "score", interrupted)
        assert cli.main(one_by_one) == 130
    assert capsys.readouterr().err.endswith(
        "redflag score: interrupted; scored rows are kept in scored.jsonl.parts: repeat the command to continue\n"
    )
    assert Path("scored.jsonl").read_text() == "an older result\n"
    assert sum(len(read_scored(path)) for path in Path("scored.jsonl.parts").glob("?????-*")) == 16
    assert cli.main(one_by_one) == 0
    assert "16 of 48 rows are there" in capsys.readouterr().err
    resumed = Path("scored.jsonl").read_bytes()
    assert cli.main(one_by_one) == 0
    assert Path("scored.jsonl").read_bytes() == resumed and not list(here.glob("*.parts*"))


def test_an_output_in_a_missing_folder_is_made(here):
    assert cli.main(command("score", "--output", "new/deep/scored.jsonl")) == 0
    assert len(read_scored("new/deep/scored.jsonl")) == 48


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"format": 9, "events": []}', "half"], ids=["damaged", "no object", "later format", "cut off"]
)
def test_a_damaged_trace_is_named_by_its_line(refused, here, capsys, line):
    assert cli.main(command("generate", "--record", "t.jsonl")) == 0
    whole = (here / "t.jsonl").read_text()
    (here / "t.jsonl").write_text(whole + (whole[: len(whole) // 2] if line == "half" else line + "\n"))
    refused(["show", "t.jsonl"], "t.jsonl, line 2: not ", "Delete the line or record it again")
