"""What stands around a request: packed bodies, and clients and proxies that speak HTTP/1.0."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from running import MODEL, ROUTES, Running, body_of, chunks_of, engine, running, text_of_chunks, wait_for

from redflag.guard.guard import Guard
from redflag.server.access import Limits

CHAT, TEXT = ROUTES


@pytest.fixture
def server(tokenizer, spec, thresholds, script) -> Iterator[Running]:
    _, turns = engine(script("abcdefghij"), tokenizer.eos_token_id)
    with running(Guard(turns, tokenizer, spec, thresholds), Limits(MODEL, max_body_bytes=10_000)) as made:
        yield made


def send(server, data, encoding):
    return httpx.post(server.url + CHAT, content=data, headers={"content-encoding": encoding})


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "identity"])
def test_a_body_may_be_gzipped(server, encoding):
    plain = json.dumps(body_of(CHAT)).encode()
    answer = send(server, plain if encoding == "identity" else gzip.compress(plain), encoding)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "abcdefghij"


def test_a_small_body_that_unpacks_to_a_large_one_is_not_unpacked(server):
    body = body_of(CHAT) | {"metadata": {"a": "x" * 50_000_000}}
    packed = gzip.compress(json.dumps(body).encode())
    nested = gzip.compress(b"\0" * 9_000_000)
    assert len(nested) < 10_000 < len(packed)
    for data in (packed, nested):
        answer = send(server, data, "gzip")
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_other_packings_are_refused_by_name(server):
    plain = json.dumps(body_of(CHAT)).encode()
    for encoding in ("br", "zstd", "deflate", "gzip, gzip"):
        answer = send(server, zlib.compress(plain), encoding)
        assert answer.status_code == 415 and encoding in answer.json()["error"]["message"]
    for broken in (plain, gzip.compress(plain)[:-9], gzip.compress(plain) + b"more", b""):
        answer = send(server, broken, "gzip")
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_gzip"


def test_an_answer_is_never_packed(server):
    """A stream would wait for the packer; a proxy in front may do it."""
    for stream in (False, True):
        asked = body_of(CHAT, stream=stream)
        answer = httpx.post(server.url + CHAT, json=asked, headers={"Accept-Encoding": "gzip, br"})
        assert "content-encoding" not in answer.headers


def spoken(server, head: str, body: bytes = b"") -> Iterator[bytes]:
    """What comes over a plain connection, as it comes."""
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname, host.port), 20) as link:
        link.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        while data := link.recv(65536):
            yield data


def request(version: str, **fields) -> tuple[str, bytes]:
    body = json.dumps(body_of(CHAT, **fields)).encode()
    return f"POST {CHAT} HTTP/{version}\nHost: x\nContent-Length: {len(body)}\nConnection: close\n", body


def test_a_stream_over_http_1_0_has_no_chunks_and_ends_with_the_connection(server):
    sent = b"".join(spoken(server, *request("1.0", stream=True)))
    head, _, content = sent.partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0] and b"transfer-encoding" not in head.lower()
    assert text_of_chunks(chunks_of(content)) == "abcdefghij"
    chunked = b"".join(spoken(server, *request("1.1", stream=True)))
    assert b"transfer-encoding: chunked" in chunked.lower()


def test_http_1_0_is_answered_as_any_other(server):
    whole = b"".join(spoken(server, *request("1.0")))
    assert json.loads(whole.partition(b"\r\n\r\n")[2])["choices"][0]["finish_reason"] == "stop"
    for method, path, status in (("GET", "/health", b"200"), ("HEAD", "/health", b"200"), ("GET", "/nothing", b"404")):
        head, _, body = b"".join(spoken(server, f"{method} {path} HTTP/1.0\n")).partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == status and bool(body) == (method == "GET")


def test_a_client_of_http_1_0_that_leaves_stops_the_engine(tokenizer, spec, thresholds, script):
    import itertools
    import time

    def endless(prompt, sampling):
        for step in itertools.cycle(script("the cat sat ", end=False)):
            time.sleep(0.002)
            yield step

    backend, turns = engine(endless, tokenizer.eos_token_id)
    with running(Guard(turns, tokenizer, spec, thresholds), Limits(MODEL, max_tokens=10**6)) as server:
        coming = spoken(server, *request("1.0", stream=True, max_tokens=10**6))
        next(coming)
        coming.close()
        assert server.told().end is None
        wait_for(lambda: backend.open_streams == 0 and not server.server.open)
