"""The demo of the real model: what it shows, what it leaves, what it does not do twice."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from tiny import make_rows
from tiny_smollm2 import SMOLLM2, make_index, needs_smollm2, train_flag

from redflag import Guard, cli
from redflag.data.rows import load_rows, write_rows
from redflag.lab import demo, demo_watch
from redflag.models import fetch, named
from redflag.models.named import DEFAULT
from redflag.models.pack import pack_flag


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REDFLAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path, monkeypatch, cache):
    """A demo of seconds: tiny model and flag, few rows, two steps."""
    make_index(tmp_path, monkeypatch)
    trained = train_flag(
        tmp_path / "trained", fetch.fetch_smollm2(tmp_path / "base", log=lambda _: None), threshold=1e-9
    )
    monkeypatch.setitem(named.SHIPPED, DEFAULT, pack_flag(trained, tmp_path / "shipped"))
    figures = {"about": "seed 0", "figures": {"AUROC": "0.9", "caught at 1% false alarms": "40%"}}
    (tmp_path / "shipped" / "figures.json").write_text(json.dumps(figures))
    parts = ("train", "test", "calibration", "calibration")
    rows = [replace(row, id=f"{parts[i // 2 % 4]}-{i}") for i, row in enumerate(make_rows(120))]
    write_rows(tmp_path / "starter.jsonl", [row for row in rows if not (row.harmful and row.id.startswith("cal"))])
    monkeypatch.setattr(demo, "STARTER", tmp_path / "starter.jsonl")
    monkeypatch.setattr(demo, "TRAINING", {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 64})
    monkeypatch.setattr(demo_watch, "TOKENS", 8)
    # The tiny model reads a token a letter, and not many of them.
    short = [tuple((request[:20], prefill[:20]) for request, prefill in case.begun) for case in demo_watch.CASES]
    cases = tuple(replace(case, begun=begun) for case, begun in zip(demo_watch.CASES, short, strict=True))
    monkeypatch.setattr(demo_watch, "CASES", cases)
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore")
def test_it_watches_teaches_and_does_nothing_twice(tiny, capsys):
    command = ["demo", "--output_dir", str(tiny), "--color", "never"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert first.count("assistant: ") == len(demo_watch.CASES)
    assert "halted: alarm harm" in first and "action escalate" in first
    covered = re.findall(r"gone on: (.*)", first)
    assert covered and not re.search(r"[^\s█]", "".join(covered))
    for wanted in ("AUROC of the answer's peak", "keep KL", "recorded when it was made (seed 0", "40%", "Try next:"):
        assert wanted in first, wanted
    for name in ("before/redflag.json", "after/thresholds.json", "after.jsonl", "results.json", "watch.txt"):
        assert (tiny / name).exists(), name
    results = json.loads((tiny / "results.json").read_text())
    assert results["after"]["counts"] == results["before"]["counts"]
    before = {path: path.stat().st_mtime_ns for path in (tiny / "after").iterdir()}
    assert cli.main(command) == 0
    again = capsys.readouterr().out
    assert again.count("done before") == 8 and again.count("assistant: ") == len(demo_watch.CASES)
    assert {path: path.stat().st_mtime_ns for path in (tiny / "after").iterdir()} == before


@pytest.mark.filterwarnings("ignore")
def test_stages_are_skipped(tiny, capsys):
    assert cli.main(["demo", "--output_dir", str(tiny), "--color", "always", "--skip", "teach"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out and "AUROC of" not in out and not (tiny / "rows").exists()
    assert cli.main(["demo", "--output_dir", str(tiny), "--skip", "watch", "teach"]) == 0
    assert "assistant: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world", "nano", "--skip", "watch"], "skip must come with the world smollm2"),
        (["--size", "0.5"], "size must come with --world nano"),
        (["--reflect", "true"], "reflect must come with --world nano"),
        (["--world", "nano", "--size", "0"], "size must be above 0 and at most 10 (got 0.0)"),
        (["--color", "green"], "color"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(tmp_path, options, message, capsys):
    assert cli.main(["demo", "--output_dir", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_covered_text_shows_the_length_of_its_words():
    assert demo_watch.cover("To do\x1b[2J it!") == "██ ██████ ███"


def test_without_recorded_figures_nothing_is_said(tmp_path):
    assert demo.recorded(tmp_path) == ""


@pytest.mark.skipif(not demo.STARTER.is_file(), reason="no starter rows: recipes/smollm2/starter.py")
def test_the_starter_rows_fall_into_three_parts_that_share_no_answer():
    rows = load_rows(demo.STARTER).rows
    parts = {name: [row for row in rows if row.id.startswith(f"{name}-")] for name in demo.PARTS}
    assert {name: (len(part), sum(row.harmful for row in part)) for name, part in parts.items()} == {
        "train": (160, 70),
        "calibration": (60, 0),
        "test": (80, 40),
    }
    sentences = {
        name: {s for row in part for s in re.split(r"(?<=[.!?]) ", row.response)} for name, part in parts.items()
    }
    shared = {s for s in sentences["train"] & (sentences["calibration"] | sentences["test"]) if len(s) > 60}
    # An opening, which is harmless, belongs to all parts.
    assert not {s for s in shared if not s.startswith("Caller: ")}


@needs_smollm2
def test_the_real_model_completes_halts_and_resumes(cache, monkeypatch):
    (cache / DEFAULT).mkdir(parents=True)
    (cache / DEFAULT / "base").symlink_to(SMOLLM2)
    monkeypatch.setattr(demo_watch, "TOKENS", 24)
    ends = []
    stream = Guard.stream

    def noted(guard, messages, *given):
        made = stream(guard, messages, *given)
        ends.append(made.trace)
        return made

    monkeypatch.setattr(Guard, "stream", noted)
    demo_watch.streams(named.Path(named.model_folder(DEFAULT)), False, lambda _: None)
    facts = [trace.facts() for trace in ends if trace.events]
    assert "halted" in {fact.end for fact in facts} and "done" in {fact.end for fact in facts}
    assert any(fact.resumes for fact in facts)
