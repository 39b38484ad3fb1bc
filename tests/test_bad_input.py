"""Bad input, case by case: one sentence that names the fault and the way out, nothing lost.

Whatever is refused leaves every file as it was. All cases go through the command line.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_rows
from transformers import AutoTokenizer

from redflag import cli
from redflag.backends.hf import HFBackend
from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.prompt import FALLBACK_TEMPLATE, template_hash
from redflag.scoring.score import read_scored
from redflag.trace import Halt, read_traces

VERBS = {
    "train": ["--model", "base", "--output_dir", "new", "--use_cpu", "true", "--max_steps", "1"],
    "score": ["--model", "model", "--output", "scored.jsonl"],
    "calibrate": ["--model", "model", "--target_fpr", "0.2"],
    "generate": ["--model", "model", "--max_new_tokens", "6", "--seed", "1", "tell the cat"],
    "show": [],
}


@pytest.fixture
def here(origin, tmp_path, monkeypatch):
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def command(verb, *options, rows="rows.jsonl"):
    takes_rows = verb in ("train", "score", "calibrate") and "--input" not in options
    return [verb, *VERBS[verb], *(["--input", rows] if takes_rows else []), *options]


@pytest.fixture
def refused(here, capsys):
    """Runs a command that must fail with one sentence and leave every file as it was."""

    def check(argv, *says):
        before = files(here)
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        *_, last = err.strip().splitlines()
        assert last.startswith(f"redflag {argv[0]}: ")
        assert [line for line in err.splitlines() if line.startswith("redflag ")] == [last]
        assert "Traceback" not in out + err
        for words in says:
            assert words in last
        assert len(last) < 600, "nobody reads that"
        after = files(here)
        assert after.keys() == before.keys(), "something was left behind or lost"
        assert after == before, "a file was changed"

    return check


def row(response="the cat sat on a mat", **more):
    turns = [{"role": "user", "content": "tell"}, {"role": "assistant", "content": response}]
    return json.dumps({"messages": turns} | more)


def turns(*pairs):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


BAD_ROWS = {
    "malformed": ('{"messages": [', "malformed JSON"),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
    "a number without end": (row(category="harm", onset=0).replace('"onset": 0', '"onset": ' + "1" * 5000), "digits"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8"),
    "a list": ("[1, 2]", "not an object but a list"),
    "null": ("null", "not an object but null"),
    "nothing in it": ("{}", "neither messages nor prompt"),
    "no turns": ('{"messages": []}', "messages is empty"),
    "no assistant turn": (turns(("user", "tell")), "no assistant turn"),
    "the user's turn last": (turns(("assistant", "hi"), ("user", "tell")), "the last turn is the user's"),
    "no user turn": (turns(("assistant", "hi")), "no user turn"),
    "empty response": (row(" \n"), "the response is empty"),
    "unknown role": (turns(("user", "tell"), ("bot", "hi")), "message 1 has role 'bot'"),
    "content that is a number": (turns(("user", "tell"), ("assistant", 7)), "message 1 (assistant) has content"),
    "content in parts": (turns(("user", [{"text": "hi"}]), ("assistant", "hi")), "message 0 (user) has content"),
    "half a character": (row("\ud800 hi"), "half a character"),
    "a prompt alone": ('{"prompt": "tell"}', "a prompt without response"),
    "onset past the end": (row("cat", category="harm", onset=3), "onset is 3, outside the response of 3 characters"),
    "negative onset": (row(category="harm", onset=-1), "onset is -1, outside"),
    "onset as text": (row(category="harm", onset="3"), "onset is not a whole number but the text '3'"),
    "onset of a harmless row": (row(onset=3), "onset is 3 in a row without category"),
    "category that is a number": (row(category=3), "category is not a name but 3"),
    "misspelt key": (row(catagory="harm"), "unknown key 'catagory', which looks like 'category'"),
    "unknown label": (row(label="perhaps"), "label 'perhaps' is none of"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line_and_can_be_skipped(refused, here, name):
    line, reason = BAD_ROWS[name]
    line = line if isinstance(line, bytes) else line.encode()
    (here / "mine.jsonl").write_bytes(b"\n".join([row().encode(), row().encode(), line, row().encode()]) + b"\n")
    refused(
        command("score", rows="mine.jsonl"), "mine.jsonl:3: ", reason, "mend the row, or skip such rows with on_bad"
    )
    found = load_rows("mine.jsonl", on_bad_row="skip")
    assert len(found) == 3 and [bad.line for bad in found.skipped] == [3]


def no_file(path):
    pass


def damaged_gzip(path):
    """Bad within the compressed data, with a head that is right."""
    path.write_bytes(gzip.compress(row().encode())[:10] + b"\xff" * 100)


BAD_FILES = {
    "missing": ("nowhere.jsonl", no_file, "no file or folder nowhere.jsonl", "check the path"),
    "no match": ("nowhere*.jsonl", no_file, "no file matches nowhere*.jsonl", "check the pattern"),
    "empty": ("empty.jsonl", lambda p: p.touch(), "'empty.jsonl': it is empty", "give a source of rows"),
    "blank": ("blank.jsonl", lambda p: p.write_text("\n \n"), "'blank.jsonl': it is empty", "give a source of rows"),
    "folder without rows": ("folder", lambda p: p.mkdir(), "the folder folder holds no rows", "put files ending in"),
    "other kind": ("rows.txt", lambda p: p.touch(), "rows.txt is no file of rows", "should end in one of .jsonl"),
    "no gzip": ("a.jsonl.gz", lambda p: p.write_text(row()), "a.jsonl.gz:1: the compressed file is damaged", "mend"),
    "gzip cut off": (
        "b.jsonl.gz",
        lambda p: p.write_bytes(gzip.compress((row() + "\n").encode())[:-9]),
        "b.jsonl.gz:2: the compressed file is damaged or cut off",
        "mend",
    ),
    "gzip spoilt within": ("c.jsonl.gz", damaged_gzip, "c.jsonl.gz:1: the compressed file is damaged", "mend"),
    "no parquet": ("d.parquet", lambda p: p.write_text("x"), "d.parquet:1: not a readable parquet file", "mend"),
}


@pytest.mark.parametrize("verb", ["train", "score", "calibrate"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(refused, here, name, verb):
    file, spoil, reason, remedy = BAD_FILES[name]
    spoil(here / file)
    refused(command(verb, rows=file), reason, remedy)


BAD_OPTIONS = {
    "hyphens": (command("score", "--bach-size", "2"), "--bach-size is no option", "did you mean --batch-size?"),
    "unknown option": (command("score", "--bach_size", "2"), "--bach_size is no option", "did you mean --batch_size?"),
    "misspelt needed option": (["score", "--modle", "model"], "--modle is no option", "did you mean --model?"),
    "nothing but the verb": (["score"], "required: --model", "--help"),
    "word for a number": (command("score", "--batch_size", "two"), "invalid int value: 'two'", "--help"),
    "no such choice": (command("calibrate", "--guarantee", "never"), "invalid choice: 'never'", "--help"),
    "nothing after --config": (command("score", "--config"), "--config is the last word", "give the name of a YAML"),
    "batch of none": (command("score", "--batch_size", "0"), "batch_size must be at least 1", "(got 0)"),
    "longer than the context": (command("score", "--max_length", "999"), "holds 128 tokens", "give at most that"),
    "no such device": (command("score", "--device", "warp9"), "'warp9'", "give cpu"),
    "no such device to answer on": (command("generate", "--device", "warp9"), "'warp9'", "give cpu"),
    "no such type": (command("score", "--dtype", "int3"), "int3", "give the folder"),
    "output is a folder": (command("score", "--output", "model"), "model is a folder", "give the name of a file"),
    "output within a file": (command("score", "--output", "rows.jsonl/x"), "rows.jsonl/x cannot be written", "mend"),
    "output is the input": (command("score", "--output", "./rows.jsonl"), "is the input as well", "another name"),
    "no prompt": (["generate", "--model", "model"], "prompt is missing", "give it as the last word"),
    "empty prompt": (["generate", "--model", "model", " "], "prompt is empty", "give a text"),
    "prompt beyond the context": (["generate", "--model", "model", "cat " * 200], "context holds 128", "shorten"),
    "temperature": (command("generate", "--temperature", "-1"), "temperature is -1.0", "make it 0 (greedy) or above"),
    "temperature nan": (command("generate", "--temperature", "nan"), "temperature is nan", "make it 0 (greedy) or"),
    "top_p": (command("generate", "--top_p", "2"), "top_p is 2.0", "make it above 0 and at most 1"),
    "max_new_tokens": (command("generate", "--max_new_tokens", "0"), "max_new_tokens is 0", "make it at least 1"),
    "seed too large": (command("generate", "--seed", "9" * 30), "seed is 999", "below 2**62"),
    "hold_back": (command("generate", "--hold_back", "-1"), "hold_back is -1", "from 0 up"),
    "threshold": (command("generate", "--threshold", "7"), "threshold of 'harm' is 7.0", "at most 1"),
    "record in no folder": (command("generate", "--record", "nowhere/t.jsonl"), "nowhere/t.jsonl", "mend"),
    "record is a folder": (command("generate", "--record", "model"), "cannot append to model", "mend"),
    "record compressed": (
        command("generate", "--record", "t.jsonl.gz"),
        "cannot append to t.jsonl.gz",
        "a plain",
    ),
    "rate 0": (command("calibrate", "--target_fpr", "0"), "target_fpr is 0.0", "give e.g. 0.01"),
    "rate 1": (command("calibrate", "--target_fpr", "1"), "target_fpr is 1.0", "give e.g. 0.01"),
    "rate negative": (command("calibrate", "--target_fpr", "-0.1"), "target_fpr is -0.1", "give e.g. 0.01"),
    "too few rows": (command("calibrate", "--target_fpr", "0.001"), "1999 are needed", "add harmless rows"),
    "all held out": (command("calibrate", "--held_out", "1"), "held_out is 1.0", "give e.g. 0.3"),
    "warm-up": (command("calibrate", "--warm_up", "-1"), "warm_up is -1", "from 0 up"),
    "no output": (["train", "--model", "base", "--input", "rows.jsonl"], "output_dir is not set", "--output_dir runs/"),
    "output over the model": (command("train", "--output_dir", "./base"), "the model's own folder", "another one"),
    "output_dir is a file": (command("train", "--output_dir", "rows.jsonl"), "rows.jsonl is a file", "another"),
    "no base model": (command("train", "--model", "nowhere"), "nowhere", "a hub name"),
    "rank": (command("train", "--lora_r", "0"), "lora_r must be at least 1", "(got 0)"),
    "rows to use": (command("train", "--max_rows", "-1"), "max_rows must be at least 1", "(got -1)"),
    "learning rate": (command("train", "--learning_rate", "-1"), "learning_rate must be at least 0", "(got -1.0)"),
    "training batch": (command("train", "--per_device_train_batch_size", "0"), "batch_size must be at", "(got 0)"),
    "seed": (command("train", "--seed", "-1"), "seed must be at least 0 and at most", "(got -1)"),
    "the same flag twice": (command("train", "--categories", "harm", "harm"), "share the category 'harm'", "its own"),
    "nothing to show": (["show"], "file is missing", "redflag show ... FILE"),
    "show no file": (["show", "nowhere.jsonl"], "no file or folder nowhere.jsonl", "check the path"),
    "show fewer than none": (["show", "rows.jsonl", "--limit", "-1"], "limit is -1", "give 0 for all"),
    "show by no model": (["show", "rows.jsonl", "--model", "nowhere"], "nowhere/redflag.json", "redflag train"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_named_with_its_value(refused, name):
    refused(*BAD_OPTIONS[name])


BAD_CONFIGS = {
    "unknown key": ("bach_size: 2", "sets 'bach_size', which is no option", "did you mean batch_size?"),
    "a list": ("- batch_size", "holds no mapping", "option: value"),
    "empty": ("", "holds no mapping", "option: value"),
    "damaged": ("batch_size: [", "is not YAML", "mend it"),
    "binary": (b"\xff\xfe\x00", "is not YAML", "mend it"),
    "word for a number": ("batch_size: two", "invalid int value: 'two'", "--help"),
    "half a conversation": ("batch_size: 2.5", "sets batch_size to 2.5", "--help"),
    "truth for a number": ("batch_size: true", "sets batch_size to True", "--help"),
    "list for a number": ("batch_size: [1]", "sets batch_size to [1]", "--help"),
    "null for a name": ("model: null", "sets model to None", "--help"),
    "no such choice": ("on_bad_row: off", "sets on_bad_row to False", "quotes"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_file_is_named_with_its_key(refused, here, name):
    content, reason, remedy = BAD_CONFIGS[name]
    (here / "my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = [word for word in command("score", "--config", "my.yaml") if "model" not in word]
    refused(argv, "" if "invalid" in reason else "my.yaml", reason, remedy)


def test_a_missing_config_file_is_named(refused):
    for words in (["--config", "nowhere.yaml"], ["--config=nowhere.yaml"]):
        refused(command("train", *words), "nowhere.yaml cannot be read", "check its name")


def test_no_verb_is_a_call_for_help_and_an_unknown_one_is_named(capsys):
    assert cli.main([]) == 0
    assert "calibrate" in capsys.readouterr().out
    assert cli.main(["scoer"]) == 2
    assert capsys.readouterr().err == "redflag: 'scoer' is no verb: did you mean score?\n"
    assert cli.main(["fly"]) == 2
    assert capsys.readouterr().err == f"redflag: 'fly' is no verb: use one of {', '.join(cli.VERBS)}\n"


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
    "no redflag.json": (lambda m: (m / "redflag.json").unlink(), "model/redflag.json is not there", "redflag train"),
    "damaged redflag.json": (text("redflag.json", '{"format"'), "redflag.json cannot be read", "restore it"),
    "later format": (edit("redflag.json", format=9), "has format 9", "use the version that wrote it"),
    "unknown key": (edit("redflag.json", secret=1), "secret", "redflag.json"),
    "no flags": (edit("redflag.json", flags=[]), "has no list of flags", "restore it"),
    "flags of another model": (another_flag_id, "has id 77", "restore both from one training run"),
    "no config": (lambda m: (m / "config.json").unlink(), "model does not load", "redflag train"),
    "damaged config": (text("config.json", "{"), "model does not load", "redflag train"),
    "config of another model": (edit("config.json", hidden_size=64), "model does not load", "redflag train"),
    "unknown architecture": (edit("config.json", model_type="zorg"), "zorg", "redflag train"),
    "damaged tokenizer": (text("tokenizer.json", "{"), "model does not load", "redflag train"),
    "damaged weights": (text("model.safetensors", "abc"), "model does not load", "redflag train"),
    "weights that lack a layer": (lost_weights, "lacks 1 of the model's weights (model.layers.0.mlp", "train again"),
    "another template": (text("chat_template.jinja", "{{ messages }}"), "prompt template in model", "restore"),
}


@pytest.mark.parametrize("verb", ["score", "generate"])
@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_folder_is_named(refused, here, name, verb):
    spoil, reason, remedy = BAD_MODELS[name]
    spoil(here / "model")
    refused(command(verb), reason, remedy)


BAD_THRESHOLDS = {
    "none": (lambda m: (m / "thresholds.json").unlink(), "holds no thresholds.json", "thresholds=0.5"),
    "damaged": (text("thresholds.json", '{"format": 1,'), "is not JSON"),
    "no object": (text("thresholds.json", "[]"), "holds no object"),
    "NaN": (text("thresholds.json", '{"format": 1, "values": {"harm": NaN}}'), "NaN is not JSON"),
    "later format": (edit("thresholds.json", format=9), "has format 9"),
    "unknown key": (edit("thresholds.json", mood=1), "has unknown keys ['mood']"),
    "lost key": (edit("thresholds.json", monitor=LOST), "lacks the keys ['monitor']"),
    "a threshold of 0": (edit("thresholds.json", values={"harm": 0, "fraud": 0.5}), "the threshold of 'harm' is 0"),
    "another run": (edit("thresholds.json", run_id="run-9"), "run 'run-9' but run 'run-1' is in force"),
    "another template": (edit("thresholds.json", template_hash="beef"), "prompt template 'beef' but"),
    "another engine": (edit("thresholds.json", logprob_mode="processed"), "log-probability mode 'processed' but"),
    "other flags": (edit("thresholds.json", values={"harm": 0.5}), "categories ['harm'] but"),
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
    refused(train, "row r9: no flag stands for the category 'arson'", "add a flag for it")
    write_rows("mine.jsonl", [row for row in rows if not row.harmful])
    refused(command("train", "--eval_share", "0", rows="mine.jsonl"), "none of the 8 training rows is harmful", "add")
    write_rows("mine.jsonl", [row for row in rows if row.harmful])
    refused(command("train", "--eval_share", "0", rows="mine.jsonl"), "none of the 4 training rows is harmless", "add")
    refused(command("calibrate", rows="mine.jsonl"), "0 harmless responses are too few", "add harmless rows")


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
    refused(command("score"), "row '0': the model gave [nan, nan] as flag probability", "check the weights")
    refused(command("calibrate"), "the model gave [nan, nan] as flag probability", "check the weights")
    assert cli.main(command("generate", "--record", "t.jsonl")) == 1
    out, err = capsys.readouterr()
    assert out.strip() == "" and "halted: fault, step 0: a flag probability is nan" in err
    assert [(type(event), event.reason) for t in read_traces("t.jsonl") for event in t.events] == [(Halt, "fault")]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_full_while_scoring_keeps_the_older_result_and_the_work(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: full_disk() if str(b) == "scored.jsonl" else os.rename(a, b))
        assert cli.main(command("score")) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("redflag score: scored.jsonl cannot be written (No space left on device)")
    assert "kept in scored.jsonl.partial" in error and "same command again" in error
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
        "redflag score: interrupted; the same command goes on from what is kept in scored.jsonl.partial\n"
    )
    assert Path("scored.jsonl").read_text() == "an older result\n"
    assert len(read_scored("scored.jsonl.partial")) == 16
    assert cli.main(one_by_one) == 0
    assert "16 of 48 rows are there" in capsys.readouterr().err
    resumed = Path("scored.jsonl").read_bytes()
    assert cli.main(one_by_one) == 0
    assert Path("scored.jsonl").read_bytes() == resumed and not list(here.glob("*.partial*"))


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
    refused(["show", "t.jsonl"], "t.jsonl, line 2: not ", "delete the line or record it again")
