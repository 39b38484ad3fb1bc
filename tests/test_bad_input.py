"""Bad input, case by case: one sentence that names the fault and the way out, nothing lost.

Whatever is refused leaves every file as it was. All cases go through the command line.
"""

from __future__ import annotations

import gzip

import pytest
from bad_input import command, here, refused, row, turns

from redflag import cli
from redflag.data.rows import load_rows

__all__ = ["here", "refused"]


BAD_ROWS = {
    "malformed": ('{"messages": [', "malformed JSON"),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
    "a number without end": (row(category="harm", onset=0).replace('"onset": 0', '"onset": ' + "1" * 5000), "digits"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8"),
    "a list": ("[1, 2]", "a record must be an object (got a list)"),
    "null": ("null", "a record must be an object (got null)"),
    "nothing in it": ("{}", "a row must have messages or a prompt"),
    "no turns": ('{"messages": []}', "messages must not be empty"),
    "no assistant turn": (turns(("user", "tell")), "no assistant turn"),
    "the user's turn last": (turns(("assistant", "hi"), ("user", "tell")), "the last turn is the user's"),
    "no user turn": (turns(("assistant", "hi")), "no user turn"),
    "empty response": (row(" \n"), "the response is empty"),
    "unknown role": (turns(("user", "tell"), ("bot", "hi")), "(got 'bot')"),
    "content that is a number": (turns(("user", "tell"), ("assistant", 7)), "the content of message 1 (assistant)"),
    "content in parts": (turns(("user", [{"text": "hi"}]), ("assistant", "hi")), "the content of message 0 (user)"),
    "half a character": (row("\ud800 hi"), "half a character"),
    "a prompt alone": ('{"prompt": "tell"}', "a prompt without response"),
    "onset past the end": (
        row("cat", category="harm", onset=3),
        "onset must be within the response of 3 characters (got 3)",
    ),
    "negative onset": (row(category="harm", onset=-1), "onset must be within"),
    "onset as text": (row(category="harm", onset="3"), "onset must be a whole number (got the text '3')"),
    "onset of a harmless row": (row(onset=3), "onset must be left out in a row without category"),
    "category that is a number": (row(category=3), "category must be a name (got 3)"),
    "misspelt key": (row(catagory="harm"), "unknown key 'catagory', which looks like 'category'"),
    "unknown label": (row(label="perhaps"), "label must be one of"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line_and_can_be_skipped(refused, here, name):
    line, reason = BAD_ROWS[name]
    line = line if isinstance(line, bytes) else line.encode()
    (here / "mine.jsonl").write_bytes(b"\n".join([row().encode(), row().encode(), line, row().encode()]) + b"\n")
    refused(command("score", rows="mine.jsonl"), "mine.jsonl:3: ", reason, "Fix the row, or skip such rows with on_bad")
    found = load_rows("mine.jsonl", on_bad_row="skip")
    assert len(found) == 3 and [bad.line for bad in found.skipped] == [3]


def no_file(path):
    pass


def damaged_gzip(path):
    """Bad within the compressed data, with a head that is right."""
    path.write_bytes(gzip.compress(row().encode())[:10] + b"\xff" * 100)


BAD_FILES = {
    "missing": ("nowhere.jsonl", no_file, "nowhere.jsonl must be a file or folder", "Check the path"),
    "no match": ("nowhere*.jsonl", no_file, "no file matches nowhere*.jsonl", "Check the pattern"),
    "empty": ("empty.jsonl", lambda p: p.touch(), "'empty.jsonl': it is empty", "Give a source of rows"),
    "blank": ("blank.jsonl", lambda p: p.write_text("\n \n"), "'blank.jsonl': it is empty", "Give a source of rows"),
    "folder without rows": ("folder", lambda p: p.mkdir(), "the folder folder must hold files", "files ending in"),
    "other kind": ("rows.txt", lambda p: p.touch(), "(got rows.txt)", "must end in one of .jsonl"),
    "no gzip": (
        "a.jsonl.gz",
        lambda p: p.write_text(row()),
        "a.jsonl.gz:1: the compressed file is damaged",
        "Fix the row",
    ),
    "gzip cut off": (
        "b.jsonl.gz",
        lambda p: p.write_bytes(gzip.compress((row() + "\n").encode())[:-9]),
        "b.jsonl.gz:2: the compressed file is damaged or cut off",
        "Fix the row",
    ),
    "gzip spoilt within": ("c.jsonl.gz", damaged_gzip, "c.jsonl.gz:1: the compressed file is damaged", "Fix the row"),
    "no parquet": ("d.parquet", lambda p: p.write_text("x"), "d.parquet:1: not a readable parquet file", "Fix the row"),
}


@pytest.mark.parametrize("verb", ["train", "score", "calibrate"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(refused, here, name, verb):
    file, spoil, reason, remedy = BAD_FILES[name]
    spoil(here / file)
    refused(command(verb, rows=file), reason, remedy)


BAD_OPTIONS = {
    "hyphens": (command("score", "--bach-size", "2"), "unknown option --bach-size", "did you mean --batch-size?"),
    "unknown option": (
        command("score", "--bach_size", "2"),
        "unknown option --bach_size",
        "did you mean --batch_size?",
    ),
    "misspelt needed option": (["score", "--modle", "model"], "unknown option --modle", "did you mean --model?"),
    "nothing but the verb": (["score"], "required: --model", "--help"),
    "word for a number": (command("score", "--batch_size", "two"), "invalid int value: 'two'", "--help"),
    "no such choice": (command("calibrate", "--guarantee", "never"), "invalid choice: 'never'", "--help"),
    "nothing after --config": (command("score", "--config"), "--config is the last word", "give the name of a YAML"),
    "batch of none": (command("score", "--batch_size", "0"), "batch_size must be at least 1", "(got 0)"),
    "longer than the context": (command("score", "--max_length", "999"), "max_length must be at most 128", "(got 999)"),
    "no such device": (command("score", "--device", "warp9"), "'warp9'", "For example cpu"),
    "no such device to answer on": (command("generate", "--device", "warp9"), "'warp9'", "For example cpu"),
    "no such type": (command("score", "--dtype", "int3"), "int3", "Give the folder"),
    "output is a folder": (command("score", "--output", "model"), "model is a folder", "output must be a file"),
    "output within a file": (
        command("score", "--output", "rows.jsonl/x"),
        "rows.jsonl/x cannot be written",
        "fix that",
    ),
    "output is the input": (
        command("score", "--output", "./rows.jsonl"),
        "output must not be the input",
        "rows.jsonl",
    ),
    "no prompt": (["generate", "--model", "model"], "prompt is missing", "give it as the last word"),
    "empty prompt": (["generate", "--model", "model", " "], "prompt must not be empty", "Give a text"),
    "prompt beyond the context": (["generate", "--model", "model", "cat " * 200], "context holds 128", "shorten"),
    "temperature": (
        command("generate", "--temperature", "-1"),
        "temperature must be 0 (greedy) or above (got -1.0)",
        "must be 0 (greedy) or above",
    ),
    "temperature nan": (
        command("generate", "--temperature", "nan"),
        "temperature must be 0 (greedy) or above (got nan)",
        "must be 0 (greedy) or",
    ),
    "top_p": (
        command("generate", "--top_p", "2"),
        "top_p must be above 0 and at most 1",
        "above 0 and at most 1 (1 = off)",
    ),
    "max_new_tokens": (
        command("generate", "--max_new_tokens", "0"),
        "max_new_tokens must be at least 1 (got 0)",
        "must be at least 1",
    ),
    "seed too large": (
        command("generate", "--seed", "9" * 30),
        "seed must be None or a whole number below",
        "below 2**62",
    ),
    "hold_back": (
        command("generate", "--hold_back", "-1"),
        "hold_back must be a whole number of at least 0",
        "(got -1)",
    ),
    "threshold": (command("generate", "--threshold", "7"), "threshold of 'harm' must be above 0", "at most 1"),
    "record in no folder": (
        command("generate", "--record", "nowhere/t.jsonl"),
        "nowhere/t.jsonl",
        "fix the permissions",
    ),
    "record is a folder": (command("generate", "--record", "model"), "cannot append to model", "fix the permissions"),
    "record compressed": (
        command("generate", "--record", "t.jsonl.gz"),
        "cannot append to the compressed file t.jsonl.gz",
        "a plain",
    ),
    "rate 0": (
        command("calibrate", "--target_fpr", "0"),
        "target_fpr must be above 0 and below 1 (got 0.0)",
        "For example 0.01",
    ),
    "rate 1": (
        command("calibrate", "--target_fpr", "1"),
        "target_fpr must be above 0 and below 1 (got 1.0)",
        "For example 0.01",
    ),
    "rate negative": (
        command("calibrate", "--target_fpr", "-0.1"),
        "target_fpr must be above 0 and below 1 (got -0.1)",
        "For example 0.01",
    ),
    "too few rows": (command("calibrate", "--target_fpr", "0.001"), "1999 are needed", "Add harmless rows"),
    "all held out": (
        command("calibrate", "--held_out", "1"),
        "held_out must be at least 0 and below 1",
        "For example 0.3",
    ),
    "warm-up": (command("calibrate", "--warm_up", "-1"), "warm_up must be a whole number of at least 0", "(got -1)"),
    "no output": (
        ["train", "--model", "base", "--input", "rows.jsonl"],
        "output_dir must be a folder",
        "--output-dir runs/",
    ),
    "output over the model": (
        command("train", "--output_dir", "./base"),
        "output_dir must not be the base model's folder",
        "Choose another",
    ),
    "output_dir is a file": (command("train", "--output_dir", "rows.jsonl"), "rows.jsonl is a file", "another"),
    "no base model": (command("train", "--model", "nowhere"), "nowhere", "a hub name"),
    "rank": (command("train", "--lora_r", "0"), "lora_r must be at least 1", "(got 0)"),
    "rows to use": (command("train", "--max_rows", "-1"), "max_rows must be at least 1", "(got -1)"),
    "learning rate": (command("train", "--learning_rate", "-1"), "learning_rate must be at least 0", "(got -1.0)"),
    "training batch": (command("train", "--per_device_train_batch_size", "0"), "batch_size must be at", "(got 0)"),
    "seed": (command("train", "--seed", "-1"), "seed must be at least 0 and at most", "(got -1)"),
    "the same flag twice": (
        command("train", "--categories", "harm", "harm"),
        "each flag must have its own category (got 'harm' twice)",
        "its own",
    ),
    "nothing to show": (["show"], "file is missing", "redflag show ... FILE"),
    "show no file": (["show", "nowhere.jsonl"], "nowhere.jsonl must be a file or folder", "Check the path"),
    "show fewer than none": (["show", "rows.jsonl", "--limit", "-1"], "limit must be at least 0", "(got -1)"),
    "show by no model": (["show", "rows.jsonl", "--model", "nowhere"], "nowhere/redflag.json", "redflag train"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_named_with_its_value(refused, name):
    refused(*BAD_OPTIONS[name])


BAD_CONFIGS = {
    "unknown key": ("bach_size: 2", "sets the unknown option 'bach_size'", "did you mean batch_size?"),
    "a list": ("- batch_size", "must be a mapping", "option: value"),
    "empty": ("", "must be a mapping", "option: value"),
    "damaged": ("batch_size: [", "must be YAML", "Fix it"),
    "binary": (b"\xff\xfe\x00", "must be YAML", "Fix it"),
    "word for a number": ("batch_size: two", "invalid int value: 'two'", "--help"),
    "half a conversation": ("batch_size: 2.5", "sets batch_size to the invalid value 2.5", "--help"),
    "truth for a number": ("batch_size: true", "sets batch_size to the invalid value True", "--help"),
    "list for a number": ("batch_size: [1]", "sets batch_size to the invalid value [1]", "--help"),
    "null for a name": ("model: null", "sets model to the invalid value None", "--help"),
    "no such choice": ("on_bad_row: off", "sets on_bad_row to the invalid value False", "quotes"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_file_is_named_with_its_key(refused, here, name):
    content, reason, remedy = BAD_CONFIGS[name]
    (here / "my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = [word for word in command("score", "--config", "my.yaml") if "model" not in word]
    refused(argv, "" if "invalid" in reason else "my.yaml", reason, remedy)


def test_a_missing_config_file_is_named(refused):
    for words in (["--config", "nowhere.yaml"], ["--config=nowhere.yaml"]):
        refused(command("train", *words), "nowhere.yaml cannot be read", "Check its name")


def test_no_verb_is_a_call_for_help_and_an_unknown_one_is_named(capsys):
    assert cli.main([]) == 0
    assert "calibrate" in capsys.readouterr().out
    assert cli.main(["scoer"]) == 2
    assert capsys.readouterr().err == "redflag: unknown command 'scoer': did you mean score?\n"
    assert cli.main(["fly"]) == 2
    assert capsys.readouterr().err == f"redflag: unknown command 'fly': use one of {', '.join(cli.VERBS)}\n"
