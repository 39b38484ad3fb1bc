"""The server's process: its limits, and systems that lack what Linux has."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import httpx
import pytest
from foreign import WITHOUT_POSIX
from running import body_of, wait_for
from upstream import Upstream

from redflag.server.process import raise_file_limit

resource = pytest.importorskip("resource")
INFINITY = resource.RLIM_INFINITY


@pytest.fixture
def system(monkeypatch):
    """A system with such limits, which takes no more than `most` files; what was set is in the list."""

    def pretend(soft, hard, most):
        limits = [(soft, hard)]

        def setrlimit(kind, wanted):
            if wanted[0] == INFINITY or wanted[0] > most:
                raise ValueError("current limit exceeds maximum limit")
            limits.append(wanted)

        monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
        monkeypatch.setattr(resource, "setrlimit", setrlimit)
        return limits

    return pretend


@pytest.mark.parametrize(
    ("soft", "hard", "most", "limit"),
    [
        (1024, 1_048_576, 1 << 30, 1_048_576),  # Linux
        (256, INFINITY, 1 << 30, 65536),  # macOS
        (256, INFINITY, 12_000, 10240),
        (256, INFINITY, 256, 256),
        (20_000, INFINITY, 12_000, 20_000),  # never lowered
        (INFINITY, INFINITY, 1 << 30, INFINITY),
        (4096, 4096, 4096, 4096),
    ],
)
def test_the_file_limit_is_raised_as_far_as_the_system_goes(soft, hard, most, limit, system):
    limits = system(soft, hard, most)
    raise_file_limit(2)
    assert limits[-1] == (limit, hard)


@pytest.mark.parametrize(
    ("most", "needed", "warned"), [(12_000, 2048, False), (256, 2048, True), (256, 256, False), (256, 257, True)]
)
def test_too_few_files_are_said_with_both_numbers(most, needed, warned, system, caplog):
    system(256, INFINITY, most)
    with caplog.at_level(logging.WARNING):
        raise_file_limit(needed)
    assert [f"256 open files, and max_open may need {needed}" in line for line in caplog.messages] == [True] * warned


def test_a_system_without_such_limits_is_no_error(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "resource", None)
    raise_file_limit(1 << 40)
    assert not caplog.messages


SERVE = "import sys; from redflag.cli import main; sys.exit(main(sys.argv[1:]))"


def windows(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_POSIX + SERVE, "serve", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_without_file_locks_an_audit_log_is_refused_in_one_sentence(model_dir, tmp_path):
    process = windows("--model", str(model_dir), "--audit", str(tmp_path / "audit.jsonl"), "--port", "0")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.startswith(
        "redflag serve: audit must be left out on this system, which does not have the file locks (fcntl)"
    )
    assert said.count("\n") == 1 and "pip install" not in said


def test_without_file_locks_it_serves_all_the_same(model_dir):
    with Upstream(models=[{"id": "m", "max_model_len": 512}]).serve() as upstream:
        words = ("--model", str(model_dir), "--upstream", upstream.url, "--port", "0", "--threshold", "1.0")
        process = windows(*words)
        try:
            line = next(line for line in process.stderr if " at http://" in line)
            url = line.split(" at ")[1].split("/v1")[0]
            wait_for(lambda: httpx.get(url + "/ready").status_code == 200)
            body = body_of("/v1/chat/completions", max_tokens=5) | {"model": "m"}
            assert httpx.post(url + "/v1/chat/completions", json=body, timeout=60).status_code == 200
        finally:
            process.terminate()
            process.communicate(timeout=30)
