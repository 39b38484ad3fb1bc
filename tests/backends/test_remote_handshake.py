"""What a server is asked before anything is served: one that would leave the watch blind is refused."""

from __future__ import annotations

import asyncio
import socket

import pytest
from upstream import EOS, FLAG, Status, Upstream, event

from redflag.backends import Sampling
from redflag.backends import remote as remote_module
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_handshake import handshake, shake_hands
from redflag.errors import RedflagError

PROMPT = [20, 30, 40]
BUSY = Status((429, {"error": {"message": "queue full"}}, {}))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE", 0.01)


def connect(upstream, **options):
    return RemoteBackend(upstream.url, [FLAG], [EOS], **{"step_timeout": 10.0, **options})


def closed_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize("options", [{}, {"upper_bound": True}, {"api_key": "secret"}, {"model": "tiny"}])
def test_a_sound_server_is_accepted(options):
    with Upstream(api_key=options.get("api_key"), per_chunk=2).serve() as upstream:
        backend = connect(upstream, **options)
        handshake(backend)
        assert (backend.model, backend.context_length) == ("tiny", 64)
        assert list(backend.stream(PROMPT, Sampling(max_new_tokens=3)))


@pytest.mark.parametrize(
    ("wrong", "options", "named"),
    [
        ({"mode": "processed"}, {}, "--logprobs-mode raw_logprobs"),
        ({"mode": "processed"}, {"upper_bound": True}, "--logprobs-mode raw_logprobs"),
        ({"mode": "temperature"}, {}, "temperature changes .*--logprobs-mode raw_logprobs"),
        ({"mode": "logits"}, {}, "--logprobs-mode raw_logprobs"),
        ({"mode": "negative logits"}, {}, "--logprobs-mode raw_logprobs"),
        ({"knows_ids": False}, {}, "logprob_token_ids.*upper_bound=True"),
        ({"heeds_bias": False}, {}, "logit_bias"),
        ({"names_ids": False}, {}, "return_tokens_as_token_ids"),
        ({"most": 5}, {"upper_bound": True}, "--max-logprobs 20"),
        ({"api_key": "secret"}, {}, "API key"),
        ({"api_key": "secret"}, {"model": "tiny"}, "API key"),
        ({"models": [{"id": "other"}]}, {"model": "tiny"}, r"\['other'\] and not 'tiny'"),
        ({"models": []}, {}, "model must be given"),
        ({"script": lambda body, number: [BUSY]}, {}, "queue full"),
        ({"script": lambda body, number: [0.5]}, {"step_timeout": 0.1}, "too slow"),
        ({"script": lambda body, number: [Status((400, {"message": "id out-of-vocab"}, {}))]}, {}, "serve the model"),
        ({"script": lambda body, number: [Status((404, {"detail": "Not Found"}, {}))]}, {}, "/v1/completions"),
        ({"script": lambda body, number: [event([9], [{9: -1.0, FLAG: None}], "length")]}, {}, "measures NaN"),
        (
            {"script": lambda body, number: [event([9], [{9: -1.0, FLAG: -1.0}], "length", logprobs=None)]},
            {},
            "streams log-prob",
        ),
        ({"script": lambda body, number: [event([9], [{9: -1.0, FLAG: -1.0}], "stop")]}, {}, "generation_config.json"),
        ({"script": lambda body, number: [event([], [], "length", text="")]}, {}, "without a token"),
    ],
)
def test_a_server_that_would_leave_the_watch_blind_is_refused_with_what_mends_it(wrong, options, named):
    with Upstream(**wrong).serve() as upstream:
        with pytest.raises(RedflagError, match=named) as raised:
            handshake(connect(upstream, **options))
        assert upstream.url in str(raised.value)


def test_a_server_that_is_not_there_is_refused():
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(RedflagError, match="does not answer"):
        handshake(RemoteBackend(url, [FLAG], [EOS]))


def test_hands_are_shaken_on_a_running_loop_too():
    with Upstream().serve() as upstream:

        async def run():
            backend = connect(upstream)
            await shake_hands(backend)
            await backend.aclose()

        asyncio.run(run())
        (prompt,) = {tuple(body["prompt"]) for body in upstream.bodies}
        assert prompt and not {FLAG, EOS} & set(prompt)
