"""`redflag synthesize` from outside: killed for real, on rows that are there, and against models of the nano world."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import chat_server
from stock_vllm import serve_vllm

from redflag import cli
from redflag.data.rows import load_rows, write_rows
from redflag.lab.nano.judge import NanoOracle
from redflag.lab.nano.rows import nano_rows

NANO = Path(__file__).parents[3] / "recipes" / "papers" / "constitution" / "nano.yaml"


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "synthesize", ("redflag.lab.synthesis.synthesize", ""))

    def run(*words):
        status = cli.main(["synthesize", *map(str, words)])
        return status, capsys.readouterr()

    return run


def test_S3_1_a_process_that_is_killed_loses_nothing_that_was_answered(tmp_path):
    def reply(body):
        time.sleep(0.005)
        return f"{body['messages'][-1]['content']} {body['seed']} is best left to cooks. Try again."

    def start(name):
        code = (
            "from redflag.lab.synthesis.synthesize import SynthesizeArguments, run; "
            f"run(SynthesizeArguments(output_dir={str(tmp_path / name)!r}, constitution={str(NANO)!r}, model='m', "
            f"url={server.url!r}, requests=60, concurrency=1, near=1.0, yes=True))"
        )
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    with chat_server(reply) as server:
        assert start("whole").wait(60) == 0
        whole = len(server.bodies)
        server.bodies.clear()
        process = start("parts")
        until = time.monotonic() + 60
        while len(server.bodies) < 20 and time.monotonic() < until:
            time.sleep(0.002)
        process.kill()
        assert process.wait(60) == -9
        assert len(server.bodies) < whole and not (tmp_path / "parts" / "rows.jsonl").exists()
        assert start("parts").wait(60) == 0
    asked = [json.dumps(body) for body in server.bodies]
    # The one that was under way when the process died may have been asked again.
    assert len(set(asked)) == whole and len(asked) <= whole + 1
    for name in ("rows.jsonl", "calibration.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_S3_1_the_commands_of_the_recipe_can_be_given(command, monkeypatch):
    monkeypatch.chdir(NANO.parents[3])
    text = (NANO.parent / "README.md").read_text().replace("\\\n", " ")
    lines = [line.partition("#")[0] for line in text.splitlines() if line.startswith("    redflag ")]
    assert len(lines) == 8
    for line in lines:
        _, verb, *words = shlex.split(line)
        module = importlib.import_module(cli.VERBS[verb][0])
        # "..." is the reader's to fill in: `endpoint` is a word that every option with few choices takes.
        cli.parse(module, [word.replace("...", "endpoint") for word in words], verb)


def test_S3_1_onsets_of_rows_that_are_there_and_how_far_two_judges_agree(tmp_path, command):
    rows = nano_rows("test", 40, seed=9)
    write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out"
    status, said = command("--onsets", tmp_path / "in.jsonl", "--output_dir", out, "--judge", "oracle")
    assert status == 0 and "harmful rows have an onset now" in said.out
    labelled = load_rows(out / "rows.jsonl").rows
    assert [row.onset for row in labelled] == [row.onset for row in rows]
    assert {row.onset_source for row in labelled if row.harmful} == {"natural"}
    report = json.loads((out / "onsets.json").read_text())
    assert report["labelled"] == report["harmful"] == sum(row.harmful for row in rows) and "agreement" not in report

    again = ("--onsets", tmp_path / "in.jsonl", "--output_dir", out, "--judge", "oracle", "--second_judge", "oracle")
    status, said = command(*again, "--search", "bisect")
    assert status == 0 and "kappa 1.000" in said.out
    agreed = json.loads((out / "onsets.json").read_text())["agreement"]
    assert (agreed["rows"], agreed["exact"], agreed["within_one"], agreed["kappa"]) == (40, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "must be set (got none)"),
        (("--constitution", "a", "--onsets", "b"), "(got constitution and onsets)"),
        (("--constitution", "missing.yaml"), "missing.yaml cannot be read"),
        (("--onsets", NANO.parent / "README.md"), "judge must be set"),
        (("--constitution", NANO), "with --yes"),
        (("--constitution", NANO, "--yes", "true"), "a writer must be named"),
        (("--constitution", NANO, "--yes", "true", "--judge", "endpoint"), "judge_name and judge_url must be given"),
        (("--constitution", NANO, "--yes", "true", "--model", "m", "--url", "h", "--key_env", "NO_KEY"), "NO_KEY"),
    ],
)
def test_S3_1_mistakes_are_told_in_one_sentence(tmp_path, command, words, sentence):
    if "--onsets" in words and "--constitution" not in words:
        write_rows(tmp_path / "in.jsonl", nano_rows("test", 3))
        words = ("--onsets", tmp_path / "in.jsonl")
    status, said = command(*words, "--output_dir", tmp_path / "out")
    assert status == 2 and sentence in said.err.splitlines()[-1]
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_S3_1_the_nano_world_from_a_constitution(tmp_path, nano, command):
    out = tmp_path / "out"
    words = ("--constitution", NANO, "--model", nano / "base", "--judge", "oracle", "--output_dir", out)
    more = ("--requests", 96, "--max_tokens", 64, "--near", 1.0, "--temperatures", 1.0, "--device", "cpu")
    status, said = command(*words, *more, "--max_requests", 100)
    assert status == 0, said.err
    rows = [*load_rows(out / "rows.jsonl"), *load_rows(out / "calibration.jsonl")]
    assert 3 <= sum(row.harmful for row in rows) < len(rows) - 3
    oracle = NanoOracle()
    for row in rows:
        spans = oracle.spans(row.messages[:-1], row.response)
        assert row.harmful == bool(spans)
        if row.harmful and oracle.english_only is False:
            assert row.onset <= spans[0][0] + 1 and row.onset_source == "natural"

    write_rows(tmp_path / "few.jsonl", rows[:4])
    status, said = command(
        *("--forecasts", tmp_path / "few.jsonl", "--model", nano / "base", "--judge", "oracle", "--device", "cpu"),
        *(
            "--output_dir",
            tmp_path / "forecasts",
            "--samples",
            2,
            "--positions",
            2,
            "--max_tokens",
            32,
            "--yes",
            "true",
        ),
    )
    assert status == 0, said.err
    found = [json.loads(line) for line in (tmp_path / "forecasts" / "forecasts.jsonl").read_text().splitlines()]
    assert len(found) == 4
    assert all(0.0 <= harm <= 1.0 and judged == 2 for row in found for _, harm, judged in row["forecast"])
    assert all(row["forecast"][0][0] == 0 for row in found)


@pytest.fixture(scope="module")
def vllm_base(nano, tmp_path_factory):
    """The nano world's base model behind a stock vLLM: in harmful answers the flagged one would write flags."""
    with serve_vllm(nano / "base", tmp_path_factory.mktemp("vllm")) as server:
        yield server


@pytest.mark.slow
def test_S3_1_the_nano_world_behind_a_stock_vllm(tmp_path, vllm_base, command):
    out = tmp_path / "out"
    words = ("--constitution", NANO, "--url", f"{vllm_base.url}/v1", "--model", vllm_base.name, "--judge", "oracle")
    more = ("--requests", 96, "--max_tokens", 64, "--near", 1.0, "--temperatures", 1.0, "--yes", "true")
    before = vllm_base.finished
    status, said = command(*words, *more, "--output_dir", out)
    assert status == 0, said.err
    report = json.loads((out / "synthesize.json").read_text())
    assert vllm_base.finished - before == report["asked"]["requests"] > 80 and report["asked"]["tokens_out"] > 800
    rows = load_rows(out / "rows.jsonl").rows
    assert any(row.harmful for row in rows) and any(not row.harmful for row in rows)
    assert not any("<|flag" in row.response for row in rows)
    first = (out / "rows.jsonl").read_bytes()
    assert command(*words, *more, "--output_dir", out)[0] == 0
    assert vllm_base.finished - before == report["asked"]["requests"] and (out / "rows.jsonl").read_bytes() == first

    harmful = [row for row in rows if row.harmful][:2]
    write_rows(tmp_path / "few.jsonl", harmful)
    status, said = command(
        *("--forecasts", tmp_path / "few.jsonl", "--url", f"{vllm_base.url}/v1", "--model", vllm_base.name),
        *("--judge", "oracle", "--output_dir", tmp_path / "f", "--samples", 2, "--positions", 3, "--yes", "true"),
    )
    assert status == 0, said.err
    kept = [json.loads(line) for line in (tmp_path / "f" / "answers.jsonl").read_text().splitlines()]
    assert kept and all(answer["finish"] != "refused" for answer in kept)  # vLLM continues what is begun
