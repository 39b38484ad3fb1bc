"""Memory over turns at the doors: the earlier answers in a request count, and nothing else is kept."""

from __future__ import annotations

import dataclasses

import httpx
import numpy as np
import pytest
from running import MODEL, running

from redflag.backends.scripted import ScriptedBackend
from redflag.backends.turns import Turns
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.server.keys import read_keys
from redflag.watching.memory import Memory

OPERATOR = "operator-key-0123456789"
ASK, LATER = ["hello"], ["hello", "the cat", "go on"]
BODIES = {
    "/v1/chat/completions": lambda turns: {"messages": turns, "max_tokens": 20},
    "/v1/responses": lambda turns: {"input": turns, "max_output_tokens": 20},
    "/v1/messages": lambda turns: {"messages": turns, "max_tokens": 20},
}


@pytest.fixture
def guard(tokenizer, spec, thresholds, script):
    """Every position of an earlier answer has 0.3, and the new one 0.4 at its third token; the threshold is 0.5."""

    def earlier(prompt, spans):
        return [[(0.3, 0.0)] * (end - start) for start, end in spans]

    class Engine(ScriptedBackend):
        def score(self, pairs, *, batch_size):
            ((_, response),) = pairs
            probs = np.full((len(response), 2), 0.01, dtype=np.float32)
            probs[:, 0] = [0.3 if "cat" in tokenizer.decode(response[: i + 1]) else 0.01 for i in range(len(response))]
            return [probs]

    backend = Engine(script("the cat sat", {2: (0.4, 0.0)}), {tokenizer.eos_token_id}, earlier=earlier)
    return Guard(Turns(backend), tokenizer, spec, thresholds, memory=Memory(1.0))


def turns(texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("route", BODIES)
def test_at_every_door_with_a_conversation(guard, route):
    with running(guard) as server:
        for count, (texts, end) in enumerate(((ASK, "done"), (LATER, "halted"), (ASK, "done")), 1):
            answer = httpx.post(server.url + route, json={"model": MODEL, **BODIES[route](turns(texts))})
            assert answer.status_code == 200, answer.text
            assert server.told(count).facts().end == end


def test_a_text_that_is_judged_counts_the_answers_before_it(guard):
    with running(guard, Limits(MODEL, operator_key=OPERATOR)) as server:

        def score(*texts):
            body = {"messages": turns(texts)}
            headers = {"X-Redflag-Operator": OPERATOR}
            [result] = httpx.post(server.url + "/v1/moderations", json=body, headers=headers).json()["results"]
            return result["category_scores"]["harm"]

        alone, behind = score("hello", "the cat"), score("hello", "the cat", "go on", "the cat")
    assert alone == pytest.approx(0.3) and behind > 0.9


def test_a_key_of_its_own_keeps_the_memory(guard, tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n  - {name: strict, key: a-key-of-16-or-more, factor: 0.5}\n")
    (key,) = read_keys(file, guard)
    assert key.thresholds.memory == Memory(1.0) and key.thresholds.values["harm"] == 0.25
    assert dataclasses.replace(key.thresholds, memory=None) != key.thresholds
