"""The one client of chat models: what is sent, what is not, and what becomes of a server that misbehaves."""

from __future__ import annotations

import asyncio
import builtins
import gzip
import json
import os
import shutil
import ssl
import subprocess
import sys

import pytest
from chat_server import chat_server

from redflag.chat import LARGEST, ChatClient, ChatError
from redflag.errors import RedflagError

ASK = [{"role": "user", "content": "q"}]
KEY = "sk-0123456789"


def test_nothing_of_the_environment_is_sent(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "leak")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://leak.invalid/v1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Leak: leak")
    with chat_server(lambda body: "a") as server:
        ChatClient(server.url, "m").ask(ASK, {"stream": False})
        ChatClient(server.url, "m", api_key=KEY, headers={"X-Team": "röt"}).ask(ASK, {})
        ChatClient(server.url, "m", api_key=KEY, headers={"authorization": "Basic b"}).ask(ASK, {})
    assert server.bodies[0] == {"model": "m", "messages": ASK, "stream": False}
    plain, ours, own = (headers for _, headers in server.asked)
    assert "leak" not in str(server.asked) and "tainless" not in str(server.asked)
    assert "Authorization" not in plain
    assert ours["Authorization"] == f"Bearer {KEY}" and ours["X-Team"].encode("latin-1").decode() == "röt"
    assert {name.lower(): value for name, value in own.items()}["authorization"] == "Basic b"


def test_a_netrc_is_not_read(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with chat_server(lambda body: "a") as server:
        ChatClient(server.url, "m").ask(ASK, {})
    assert "Authorization" not in server.asked[0][1]


def test_an_address_keeps_its_query():
    with chat_server(lambda body: "a") as server:
        ChatClient(f"{server.url}/chat/completions?api-version=2&x=", "m").ask(ASK, {})
    assert server.asked[0][0] == "/v1/chat/completions?api-version=2&x="


def test_fields_that_openai_does_not_know_are_sent_and_options_win():
    with chat_server(lambda body: "a") as server:
        client = ChatClient(server.url, "m", options={"top_k": 5, "temperature": None, "seed": 2})
        client.ask(ASK, {"temperature": 1, "seed": 1, "continue_final_message": True})
    assert server.bodies == [{"model": "m", "messages": ASK, "top_k": 5, "seed": 2, "continue_final_message": True}]


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("zipped", [False, True])
def test_no_more_than_the_limit_is_read(monkeypatch, status, zipped):
    huge = b'"' + b"x" * (40 * LARGEST) + b'"'
    with chat_server(lambda body: "a") as server:
        if zipped:
            huge, server.headers = gzip.compress(huge), {"Content-Encoding": "gzip"}
        monkeypatch.setattr(server, "answer", lambda body: (status, huge))
        with pytest.raises(ChatError, match="more than 1048576 bytes" if status == 200 else str(status)) as raised:
            ChatClient(server.url, "m", retries=0).ask(ASK, {})
    assert raised.value.status == status and len(str(raised.value)) < 400


def test_a_zipped_reply_is_read(monkeypatch):
    with chat_server(lambda body: "a") as server:
        server.headers = {"Content-Encoding": "gzip"}
        monkeypatch.setattr(server, "answer", lambda body: (200, gzip.compress(b'{"a": 1}')))
        assert ChatClient(server.url, "m").ask(ASK, {}) == {"a": 1}


def test_a_redirect_is_not_followed():
    with chat_server(lambda body: 307) as server:
        server.headers = {"Location": server.url + "/chat/completions?elsewhere"}
        with pytest.raises(ChatError, match="answered 307"):
            ChatClient(server.url, "m", api_key=KEY).ask(ASK, {})
    assert len(server.asked) == 1


def test_keys_that_a_server_repeats_are_not_shown(monkeypatch):
    secret = "Bearer gateway-token"
    with chat_server(lambda body: "a") as server:
        content = f"no such key: {KEY}, gateway-token".encode()
        monkeypatch.setattr(server, "answer", lambda body: (401, content))
        with pytest.raises(ChatError) as raised:
            ChatClient(server.url, "m", api_key=KEY, headers={"X-Gateway": secret}).ask(ASK, {})
    assert str(raised.value) == f"{server.url}/chat/completions answered 401: no such key: ***, ***"


@pytest.mark.parametrize("settings", [{"api_key": KEY + "\n"}, {"headers": {"X-Key": KEY + "\r\nX: y"}}])
def test_a_key_of_two_lines_is_refused_and_not_shown(settings):
    with pytest.raises(RedflagError, match="printable") as raised:
        ChatClient("http://h", "m", **settings)
    assert KEY not in str(raised.value)


def test_a_server_that_wants_to_be_left_alone_is():
    told = []
    with chat_server(lambda body: "a" if len(server.bodies) > 1 else 429) as server:
        server.headers = {"Retry-After": "0.01"}
        ChatClient(server.url, "m", busy=told.append).ask(ASK, {})
    assert told == [0.01] and len(server.bodies) == 2


def test_many_questions_share_connections():
    async def all_of_them(client):
        async with client.open() as connections:
            return await asyncio.gather(*(client.reply(connections, ASK, {"seed": i}) for i in range(8)))

    with chat_server(lambda body: str(body["seed"])) as server:
        replies = asyncio.run(all_of_them(ChatClient(server.url, "m")))
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == [str(i) for i in range(8)]


def test_half_a_surrogate_pair_is_no_reason_to_fail():
    with chat_server(lambda body: "a") as server:
        ChatClient(server.url, "m").ask([{"role": "user", "content": "half \ud800"}], {})
    assert server.bodies[0]["messages"][0]["content"] == "half ?"


def test_a_proxy_of_another_kind_is_named(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://user:word@p:1")
    with pytest.raises(RedflagError, match="got socks5") as raised:
        ChatClient("http://gpu.example", "m")
    assert "word" not in str(raised.value)


TLS = """
import sys
from redflag.chat import ChatClient, ChatError
try:
    print(ChatClient(sys.argv[1], "m", retries=0).ask([], {})["choices"][0]["message"]["content"])
except ChatError as error:
    print(error)
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_private_certificate_authority_is_the_file_in_ssl_cert_file(tmp_path):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "ca.pem")
    made = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout {key} -out {certificate}"
    words = ["openssl", *made.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(words, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def said(**environment):
        words = [sys.executable, "-c", TLS, server.url]
        return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True).stdout

    with chat_server(lambda body: "measured", tls=context) as server:
        assert said(SSL_CERT_FILE=certificate) == "measured\n"
        without = said()
    assert "is lost" in without and "certificate" in without


def test_a_missing_package_is_one_sentence_that_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_openai(name, *rest, **more):
        if name == "openai":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_openai)
    with pytest.raises(RedflagError, match=r"openai must be installed.*redflag-llm\[serve\]"):
        ChatClient("http://h", "m")


def test_openai_is_imported_when_somebody_is_asked_and_not_before():
    program = """
import json, sys
import redflag, redflag.cli, redflag.judges.endpoint, redflag.lab.synthesis.remote_writer, redflag.lab.attacks.pair
print(json.dumps([name for name in ("openai",) if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
