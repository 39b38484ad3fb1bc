"""Requests to other machines: proxies, headers, certificate authorities."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from upstream import EOS, FLAG, Upstream

from redflag.backends.open import UpstreamOptions
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_handshake import handshake
from redflag.calibrating import calibrate
from redflag.cli import parse
from redflag.errors import RedflagError
from redflag.judges.endpoint import EndpointJudge
from redflag.lab.evaluating import evaluate
from redflag.lab.synthesis.questions import Question
from redflag.lab.synthesis.remote_writer import RemoteWriter
from redflag.outbound import extra_headers, proxy_for
from redflag.scoring import score
from redflag.server import serve
from redflag.terminal import generate

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("url", "variables", "proxy"),
    [
        ("https://gpu.example", {}, None),
        ("https://gpu.example", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("https://gpu.example:8443/v1", {"https_proxy": "http://user:word@p:1"}, "http://user:word@p:1"),
        ("https://gpu.example", {"HTTPS_PROXY": "p:1"}, "http://p:1"),
        ("https://gpu.example", {"HTTP_PROXY": "http://p:1"}, None),
        ("http://gpu.example", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("http://gpu.example", {"ALL_PROXY": "http://p:1"}, "http://p:1"),
        ("https://gpu.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "example"}, None),
        ("https://gpu.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "a.example,gpu.example"}, None),
        ("https://gpu.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
        ("https://gpu.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.example"}, "http://p:1"),
        ("http://127.0.0.1:8000", {"HTTP_PROXY": "http://p:1", "ALL_PROXY": "http://p:1"}, None),
        ("http://127.8.9.1", {"HTTP_PROXY": "http://p:1"}, None),
        ("http://[::1]:8000", {"HTTP_PROXY": "http://p:1"}, None),
        ("http://localhost:8000", {"HTTP_PROXY": "http://p:1"}, None),
        ("http://vllm.localhost", {"HTTP_PROXY": "http://p:1"}, None),
        ("http://10.0.0.7:8000", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
    ],
)
def test_the_proxy_is_the_environments_and_none_for_this_machine(
    url: str, variables: dict[str, str], proxy: str | None, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert proxy_for(url) == proxy


@contextmanager
def proxy() -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """A proxy that answers everything itself: `(url, requests)`."""
    seen: list[tuple[str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            seen.append((f"{self.command} {self.path}", dict(self.headers)))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = json.dumps({"choices": [{"message": {"content": "no"}}], "data": [{"id": "m"}]}).encode()
            self.send_response(407 if self.command == "CONNECT" else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_CONNECT = answer

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_upstream_judge_and_writer_go_through_the_proxy(environment: pytest.MonkeyPatch) -> None:
    with proxy() as (address, seen):
        environment.setenv("HTTP_PROXY", address)
        backend = RemoteBackend("http://gpu.invalid:8000", [FLAG], [EOS], headers={"X-Team": "red"})

        async def names() -> list[str]:
            try:
                return await backend.identify(backend.link())
            finally:
                await backend.aclose()

        assert asyncio.run(names()) == ["m"]
        judge = EndpointJudge("http://judge.invalid/v1", "m", headers={"X-Team": "blue"})
        assert judge([{"role": "user", "content": "q"}], "a").harm == 0.0
        RemoteWriter("http://writer.invalid/v1", "m", headers={"X-Team": "green"}).ask(
            [Question(({"role": "user", "content": "q"},))], lambda index, reply: None
        )
    assert [(request, headers["X-Team"]) for request, headers in seen] == [
        ("GET http://gpu.invalid:8000/v1/models", "red"),
        ("POST http://judge.invalid/v1/chat/completions", "blue"),
        ("POST http://writer.invalid/v1/chat/completions", "green"),
    ]


def test_this_machine_is_asked_directly_whatever_the_environment_says(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Upstream().serve() as upstream:
        handshake(RemoteBackend(upstream.url, [FLAG], [EOS]))


@pytest.mark.parametrize("refused", [True, False])
def test_a_proxy_that_does_not_help_is_named_as_the_reason(refused: bool, environment: pytest.MonkeyPatch) -> None:
    with proxy() as (address, seen):
        environment.setenv("HTTPS_PROXY", address if refused else "http://127.0.0.1:9")
        with pytest.raises(RedflagError, match=r"https://gpu\.invalid does not answer .*fix HTTP_PROXY or HTTPS_PROXY"):
            handshake(RemoteBackend("https://gpu.invalid", [FLAG], [EOS]))
    assert [request for request, _ in seen] == ["CONNECT gpu.invalid:443"] * refused


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"X-Secret": "${NO_SUCH_VARIABLE}"}, "NO_SUCH_VARIABLE must be set, which upstream_headers names in X-Secret"),
        ({"X Team": "red"}, "X Team"),
        ({"": "red"}, "names of headers"),
        ({"X-Team": 7}, "X-Team"),
        ({"X-Team": "red\r\nX-Other: blue"}, "printable"),
        ({"X-Team": "${TWO_LINES}"}, "printable"),
        ({"Content-Length": "7"}, "Content-Length"),
        ({"transfer-encoding": "chunked"}, "transfer-encoding"),
    ],
)
def test_headers_that_cannot_be_sent_are_named(
    headers: dict[str, str], named: str, environment: pytest.MonkeyPatch
) -> None:
    environment.delenv("NO_SUCH_VARIABLE", raising=False)
    environment.setenv("TWO_LINES", "one\ntwo")
    with pytest.raises(RedflagError, match=named) as refused:
        extra_headers(headers, "upstream_headers")
    assert "upstream_headers" in str(refused.value)


def test_a_secret_comes_from_the_environment_and_stands_in_no_message(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SECRET", "s3cret ${X}")
    assert extra_headers({"Authorization": "Basic ${SECRET}"}, "o") == {"Authorization": "Basic s3cret ${X}"}
    environment.setenv("SECRET", "s3cret\n")
    with pytest.raises(RedflagError) as raised:
        extra_headers({"Authorization": "${SECRET}"}, "o")
    assert "s3cret" not in str(raised.value)
    assert extra_headers(None, "o") == {}


TLS = """
import asyncio, sys
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_handshake import handshake
backend = RemoteBackend(sys.argv[1], [5], [1])
try:
    handshake(backend)
    print("measured")
except Exception as error:
    print(error)
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_private_certificate_authority_is_the_file_in_ssl_cert_file(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "ca.pem")
    made = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout {key} -out {certificate}"
    words = ["openssl", *made.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(words, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def said(**environment: str) -> str:
        words = [sys.executable, "-c", TLS, upstream.url]
        return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True).stdout

    with Upstream().serve(tls=context) as upstream:
        assert said(SSL_CERT_FILE=certificate) == "measured\n"
        without = said()
    assert "does not answer" in without and "name the file of its certificate authority in SSL_CERT_FILE" in without


def test_every_verb_takes_name_key_and_headers_of_its_upstream(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GATEWAY", "s3cret")
    environment.setenv("KEY", "k")
    words = ["--model", "m", "--upstream_model", "n", "--upstream_key_env", "KEY"]
    headers = '{"X-Gateway": "Bearer ${GATEWAY}"}'
    verbs = {
        serve: [],
        generate: ["Hi"],
        score: ["--input", "r", "--output", "o"],
        calibrate: ["--input", "r"],
        evaluate: ["--test", "t", "--calibration", "c"],
    }
    for verb, more in verbs.items():
        arguments = parse(verb, [*words, "--upstream_headers", headers, *more], prog="redflag")[0]
        assert arguments.upstream_options() == {
            "model": "n",
            "api_key": "k",
            "headers": {"X-Gateway": "Bearer s3cret"},
        }


def test_a_key_that_is_not_set_is_named(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(
        RedflagError, match="the environment variable NO_SUCH_KEY must be set, which upstream_key_env names"
    ):
        UpstreamOptions(upstream_key_env="NO_SUCH_KEY").upstream_options()
