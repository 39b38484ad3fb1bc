"""Streams of a scripted upstream, and their steps."""

from __future__ import annotations

import asyncio
import time

import pytest
from upstream import DONE, EOS, FLAG, event

from redflag.backends import Sampling
from redflag.backends import remote as remote_module
from redflag.backends.remote import RemoteBackend

PROMPT = [20, 30, 40]
FIRST = event([9], [{9: -1.0, FLAG: -2.0}], prompt_token_ids=PROMPT)
SECOND = event([8], [{8: -1.0, FLAG: -3.0}])
LAST = event([EOS], [{EOS: -0.1, FLAG: -4.0}], "stop") + DONE
TOKENS = [9, 8, EOS]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE", 0.01)


def connect(upstream, **options):
    return RemoteBackend(upstream.url, [FLAG], [EOS], **{"step_timeout": 10.0, **options})


def tokens(steps):
    return [step.token_id for step in steps]


def both_ways(backend, prompt=PROMPT, sampling=None):
    """The steps of a stream, read with and without an event loop."""
    sampling = sampling or Sampling(max_new_tokens=20, seed=0)

    async def collect():
        try:
            return [step async for step in backend.astream(prompt, sampling)]
        finally:
            await backend.aclose()

    alone = list(backend.stream(prompt, sampling))
    assert asyncio.run(collect()) == alone
    return alone


def wait_until(fact, seconds=5.0):
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until
        time.sleep(0.01)
