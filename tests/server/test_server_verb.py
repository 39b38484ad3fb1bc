"""`redflag serve`: it starts only where the watch is attached, and says in one sentence why it does not."""

from __future__ import annotations

import shutil
import signal
import socket

import httpx
import pytest
from running import body_of, start, wait_for
from upstream import Upstream

from redflag.cli import parse
from redflag.errors import RedflagError
from redflag.server import serve
from redflag.server.process import bind
from redflag.trace import read_traces

CHAT = "/v1/chat/completions"


def arguments(*words):
    return parse(serve, list(words), prog="redflag serve")


@pytest.fixture
def refused(monkeypatch):
    """Runs the verb in this process; it must not get as far as serving."""
    from redflag.server import log
    from redflag.server.process import Process

    monkeypatch.setattr(Process, "run", lambda *args, **options: pytest.fail("it served"))

    def run(*words):
        try:
            with pytest.raises(RedflagError) as error:
                serve.run(*arguments(*words, "--port", "0", "--device", "cpu"))
        finally:
            log.teardown()
        return str(error.value)

    return run


def test_it_refuses_to_start_where_the_watch_is_not_attached(refused, model_dir, tmp_path, monkeypatch):
    assert "must be a folder" in refused("--model", str(tmp_path / "nothing"))
    without = shutil.copytree(model_dir, tmp_path / "uncalibrated")
    (without / "thresholds.json").unlink()
    assert "redflag calibrate" in refused("--model", str(without))
    unflagged = shutil.copytree(model_dir, tmp_path / "unflagged")
    (unflagged / "redflag.json").unlink()
    assert "redflag.json" in refused("--model", str(unflagged))
    lost = refused("--model", str(model_dir), "--upstream", "http://127.0.0.1:9")
    assert "127.0.0.1:9" in lost and "does not answer" in lost
    assert "second judge" in refused("--model", str(model_dir), "--action", "escalate")
    assert "replacement" in refused("--model", str(model_dir), "--action", "replace")
    assert "MISSING_KEY" in refused(
        "--model", str(model_dir), "--upstream", "http://x", "--upstream_key_env", "MISSING_KEY"
    )
    for option in ("max_open", "max_tokens", "max_body_bytes"):
        assert option in refused("--model", str(model_dir), f"--{option}", "0")
    assert "request_timeout" in refused("--model", str(model_dir), "--request_timeout", "0")
    assert "audit log" in refused("--model", str(model_dir), "--audit", str(tmp_path / "no" / "audit.jsonl"))
    for variable in (serve.API_KEYS, serve.OPERATOR_KEY):
        monkeypatch.setenv(variable, "short")
        assert variable in refused("--model", str(model_dir))
        monkeypatch.delenv(variable)


def test_a_port_that_is_taken_is_found_out_before_the_model_is_loaded(refused, model_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RedflagError, match="cannot listen on"):
            bind("127.0.0.1", taken.getsockname()[1], 60)
    for host, port in (("127.0.0.1", 70_000), ("203.0.113.1", 0), ("no such host", 0)):
        with pytest.raises(RedflagError, match="cannot listen on"):
            bind(host, port, 60)


def test_keys_come_from_the_environment_alone(model_dir):
    found, _ = arguments("--model", str(model_dir))
    keys = {serve.API_KEYS: " first-client-key-1 ,second-client-key,", serve.OPERATOR_KEY: "operator-key-0123456789"}
    limits = serve.limits_of(found, keys)
    assert limits.api_keys == ("first-client-key-1", "second-client-key") and limits.name == "model"
    assert limits.operator_key == "operator-key-0123456789" and serve.limits_of(found, {}).operator_key is None
    assert not [name for name in vars(found) if name in ("api_keys", "operator_key")]


def test_a_model_in_the_process_is_served_until_a_signal_and_open_responses_end_well(nano, tmp_path):
    record, audit = tmp_path / "traces.jsonl", tmp_path / "audit.jsonl"
    process, url = start(
        *("--model", str(nano / "model"), "--port", "0", "--name", "nano", "--hold_back", "2", "--device", "cpu"),
        *("--record", str(record), "--audit", str(audit), "--grace", "0.3", "--json_logs", "true"),
    )
    try:
        wait_for(lambda: httpx.get(url + "/ready").status_code == 200)
        body = body_of(CHAT, max_tokens=12) | {"model": "nano"}
        asked = {"messages": [{"role": "user", "content": "How do I make plum cake with ginger?"}], "temperature": 0}
        answer = httpx.post(url + CHAT, json={**body, **asked}, timeout=60)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
        endless = {**body, "stream": True, "max_tokens": 400, "logit_bias": {}, "temperature": 2, "seed": 1}
        with httpx.stream("POST", url + CHAT, json=endless, timeout=60) as stream:
            pieces = stream.iter_bytes()
            received = next(pieces)
            process.send_signal(signal.SIGTERM)
            received += b"".join(pieces)
        assert received.endswith(b"data: [DONE]\n\n")
        process.stderr.read()
        assert process.wait(30) in (-signal.SIGTERM, 0)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    traces = list(read_traces(record))
    assert len(traces) == 2 and all(trace.end is not None for trace in traces)


def test_before_an_upstream_clients_keep_the_name_that_they_know(model_dir):
    models = [{"id": "their/model", "max_model_len": 512}]
    with Upstream(models=models).serve() as upstream:
        words = ("--model", str(model_dir), "--upstream", upstream.url, "--port", "0", "--threshold", "1.0")
        process, url = start(*words)
        try:
            wait_for(lambda: httpx.get(url + "/ready").status_code == 200)
            body = body_of(CHAT, max_tokens=5) | {"model": "their/model"}
            assert httpx.post(url + CHAT, json=body, timeout=60).status_code == 200
            assert httpx.get(url + "/v1/models/their/model").json()["id"] == "their/model"
        finally:
            process.terminate()
            process.communicate(timeout=30)
