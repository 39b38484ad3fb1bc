"""A folder with everything that the verbs take, and the check that a command is refused and changes nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from redflag import cli

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
            assert words in last, (words, last)
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
