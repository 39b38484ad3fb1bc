"""A server that says ten letters, with a key, an operator and an origin, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running import MODEL, ROUTES, Running, body_of, engine, running

from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.watching.thresholds import Thresholds

ROOT = Path(__file__).resolve().parents[2]
CHAT, TEXT = ROUTES
KEY, OPERATOR = "sk-first-client-key-0", "operator-key-0123456789"
ORIGIN = "app://obsidian.md"
ASK = {"role": "user", "content": "hello"}
ANSWER = "abcdefghij"


def serving(tokenizer, spec, script, limits, *, answer=ANSWER, policy=None, high=None):
    _, turns = engine(script(answer, high), tokenizer.eos_token_id)
    thresholds = Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    return running(Guard(turns, tokenizer, spec, thresholds, policy), limits)


@pytest.fixture(scope="module")
def server(tokenizer, spec) -> Iterator[Running]:
    """One server that says ten letters, allows at most four tokens, and has a key, an operator and an origin."""
    from redflag.trace import Step

    def script(text, high=None):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [Step(i, (0.01, 0.0)) for i in [*ids, tokenizer.eos_token_id]]

    limits = Limits(
        MODEL, api_keys=(KEY,), operator_key=OPERATOR, max_tokens=4, default_tokens=3, allow_origins=(ORIGIN,)
    )
    with serving(tokenizer, spec, script, limits) as made:
        yield made


def post(server, fields, route=CHAT, headers=None):
    headers = {"Authorization": f"Bearer {KEY}"} if headers is None else headers
    return httpx.post(server.url + route, json=fields, headers=headers, timeout=20)


def prompt_of(server, messages):
    """The ids that the engine gets for a conversation."""
    prompts = server.server.guard.backend._worker._backend.prompts
    begun = len(prompts)
    answer = post(server, body_of(CHAT) | {"messages": messages})
    assert answer.status_code == 200, answer.content
    assert len(prompts) == begun + 1
    return prompts[-1], answer
