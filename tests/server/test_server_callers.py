"""Who may ask, and how much: keys, the operator, bodies that are too long or never come."""

# ruff: noqa: F811
from __future__ import annotations

import json
import socket

import httpx
import openai
import pytest
from request_server import (
    BODY_LIMIT,
    KEY,
    OPEN,
    OPERATOR,
    OTHER_KEY,
    TEXT,
    post,
    refusal,
    server,  # noqa: F401# noqa: F401
)
from running import MODEL, ROUTES, body_of, engine, running

from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.server.audit_log import AuditLog


def test_routes_methods_and_models_that_are_not_there(server):
    with httpx.Client(base_url=server.url, headers=OPEN) as client:
        for path in ("/", "/v1", "/v1/embeddings", "/docs", "/openapi.json", "/v1/chat"):
            refusal(client.get(path), 404, "not_found")
            refusal(client.post(path, json={}), 404, "not_found")
        for path in ROUTES:
            answer = client.get(path)
            refusal(answer, 405, "method_not_allowed")
            assert answer.headers["allow"] == "POST"
        refusal(client.post("/v1/models"), 405, "method_not_allowed")
        for route in ROUTES:
            refusal(client.post(route, json={**body_of(route), "model": "gpt-4"}), 404, "model_not_found", "model")
        refusal(client.get("/v1/models/gpt-4"), 404, "model_not_found", "model")
        assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert client.get(f"/v1/models/{MODEL}").json()["object"] == "model"
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("a/b")
        with pytest.raises(openai.BadRequestError, match="n must ask for 4 answers at most"):
            client.completions.create(model=MODEL, prompt="a", n=5)


def test_who_has_no_key_gets_nothing(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        for route in ROUTES:
            error = refusal(post(server, route, body_of(route), headers), 401, "invalid_api_key")
            assert error["type"] == "authentication_error"
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 401
    assert post(server, TEXT, body_of(TEXT), {"Authorization": f"Bearer {OTHER_KEY}"}).status_code == 200
    for path in ("/health", "/ready"):
        assert httpx.get(server.url + path).status_code == 200


def test_metrics_are_the_operators(server):
    refusal(httpx.get(server.url + "/metrics"), 403, "operator_key_required")
    refusal(httpx.get(server.url + "/metrics", headers=OPEN), 403, "operator_key_required")
    for headers in ({"Authorization": f"Bearer {OPERATOR}"}, {"X-Redflag-Operator": OPERATOR}):
        answer = httpx.get(server.url + "/metrics", headers=headers)
        assert answer.status_code == 200 and b"redflag_requests_total" in answer.content


def test_the_watch_is_overridden_by_the_operator_alone_with_a_reason_and_that_is_written_down(server):
    keys = {**OPEN, "X-Redflag-Operator": OPERATOR}
    why = {"X-Redflag-Override": "incident 17: reviewing a false alarm"}
    body = body_of(TEXT, user="u-17")
    refusal(post(server, TEXT, body, {**OPEN, **why}), 403, "operator_key_required")
    refusal(post(server, TEXT, body, {**keys, **why, "X-Redflag-Operator": "x"}), 403, "invalid_operator_key")
    refusal(post(server, TEXT, body, {**keys, "X-Redflag-Override": ""}), 400, "override_reason_missing")
    count = len(server.traces)
    watched, overridden = post(server, TEXT, body, keys), post(server, TEXT, body, {**keys, **why})
    server.told(count + 2)
    assert watched.json()["choices"][0]["finish_reason"] == "content_filter"
    assert overridden.json()["choices"][0] == {"index": 0, "text": "the cat", "logprobs": None, "finish_reason": "stop"}
    entries = [json.loads(line) for line in server.audit_path.read_text().splitlines()]
    mine = [entry for entry in entries if entry["request"] == overridden.json()["id"]]
    assert [entry["kind"] for entry in mine] == ["override", "response"]
    assert all(entry["reason"] == why["X-Redflag-Override"] and entry["user"] == "u-17" for entry in mine)
    assert not [entry for entry in entries if entry["request"] == watched.json()["id"]]


def test_without_an_audit_log_nobody_overrides(tokenizer, spec, thresholds, script):
    _, turns = engine(script("a"), tokenizer.eos_token_id)
    with running(Guard(turns, tokenizer, spec, thresholds), Limits(MODEL, operator_key=OPERATOR)) as server:
        headers = {"X-Redflag-Operator": OPERATOR, "X-Redflag-Override": "why not"}
        refusal(post(server, TEXT, body_of(TEXT), headers), 403, "audit_log_required")


def test_an_override_that_cannot_be_written_down_is_refused(tokenizer, spec, thresholds, script, tmp_path):
    _, turns = engine(script("a"), tokenizer.eos_token_id)
    folder = tmp_path / "logs"
    folder.mkdir()
    audit = AuditLog(folder / "audit.jsonl", thresholds.values)
    (folder / "audit.jsonl").unlink()
    folder.rmdir()
    limits = Limits(MODEL, operator_key=OPERATOR)
    with running(Guard(turns, tokenizer, spec, thresholds), limits, audit=audit) as server:
        headers = {"X-Redflag-Operator": OPERATOR, "X-Redflag-Override": "why not"}
        refusal(post(server, TEXT, body_of(TEXT), headers), 503, "audit_log_failed")
        assert not server.traces and post(server, TEXT, body_of(TEXT), {}).status_code == 200


def test_without_keys_everybody_may_ask_and_nobody_operates(tokenizer, spec, thresholds, script):
    _, turns = engine(script("a"), tokenizer.eos_token_id)
    with running(Guard(turns, tokenizer, spec, thresholds)) as server:
        assert post(server, TEXT, body_of(TEXT), {}).status_code == 200
        assert httpx.get(server.url + "/metrics").status_code == 200
        refusal(post(server, TEXT, body_of(TEXT), {"X-Redflag-Operator": ""}), 403, "invalid_operator_key")


def test_a_body_that_is_too_long_is_refused_however_it_is_sent(server):
    long = json.dumps(body_of(TEXT, user="u") | {"prompt": "x" * BODY_LIMIT}).encode()
    refusal(post(server, TEXT, long), 413, "request_too_large")
    refusal(post(server, TEXT, b" " * (8 << 20)), 413, "request_too_large")

    def pieces():  # chunked: no length is announced
        yield from (long[i : i + 9999] for i in range(0, len(long), 9999))

    refusal(httpx.post(server.url + TEXT, content=pieces(), headers=OPEN), 413, "request_too_large")
    fits = body_of(TEXT, user="u") | {"prompt": "the cat " * 100_000}
    assert post(server, TEXT, fits).status_code == 200


def test_a_body_that_never_comes_or_lies_about_its_length_holds_nothing_up(server):
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall((head % 500).encode() + b'{"model"')
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection((host, int(port)), timeout=10) as connection:  # says 5 and sends more
        connection.sendall((head % 5).encode() + json.dumps(body_of(TEXT)).encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
