"""Servers that answer whole, for scoring, and what can go wrong with them."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from upstream import EOS, FLAG, VOCABULARY, Upstream, log_softmax, logits_of

from redflag.backends import remote as remote_module
from redflag.backends.upstreams import Upstreams
from redflag.flags import Flag, FlagSpec

SPEC = FlagSpec(flags=(Flag("harm", "<|a|>", id=FLAG), Flag("fraud", "<|b|>", id=17)), run_id="run-1")


PAIRS = [([20, 30 + i, 40], [10 + (i * 7 + t) % 40 for t in range(i % 9)]) for i in range(24)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE", 0.01)


class Scoring(Upstream):
    """An honest server that also answers whole, and what can go wrong with it.

    Attributes:
        prefill: Whether it knows `prompt_logprob_token_ids`; "wrong" gives other numbers there.
        faults: Statuses that it answers before it does as asked; one per request for a response.
        refuses: A prompt that begins so gets the status that is said.
        dies_after: Requests until it answers nothing at all any more.
        slow: Seconds for each request.
    """

    def __init__(self, **settings: Any) -> None:
        own = {"prefill": False, "faults": [], "refuses": {}, "dies_after": math.inf, "slow": 0.0}
        for name, default in own.items():
            setattr(self, name, settings.pop(name, default))
        super().__init__(**settings)
        self.whole, self.most_open, self.dead = 0, 0, False

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["stream"]:
            return await super().completions(request)
        return await self.measured(request, body, self.complete)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        if not self.prefill:
            raise web.HTTPNotFound
        return await self.measured(request, await request.json(), self.prefilled)

    async def list_models(self, request: web.Request) -> web.Response:
        if self.dead:
            assert request.transport is not None
            request.transport.abort()
        return await super().list_models(request)

    async def measured(self, request: web.Request, body: dict[str, Any], answer: Any) -> web.StreamResponse:
        prompt = body.get("token_ids") or body["prompt"]
        ids = prompt[0] if isinstance(prompt[0], list) else prompt
        asked = ids[0] == 20  # not by the handshake
        self.whole += asked
        self.dead |= self.whole > self.dies_after
        if self.dead:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if asked and self.faults:
            return web.json_response({"error": {"message": "a fault"}}, status=self.faults.pop(0))
        if status := self.refuses.get(ids[1]):
            return web.json_response({"error": {"message": "not this one"}}, status=status)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(self.slow)
        self.open -= 1
        return web.json_response(answer(body))

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        several = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = []
        for index, prompt in enumerate(several):
            values = log_softmax(logits_of(prompt))
            best = sorted(range(VOCABULARY), key=values.__getitem__, reverse=True)
            shown = body.get("logprob_token_ids") or best[: body["logprobs"]]
            top = {f"token_id:{i}": values[i] for i in {best[0], *shown}}
            name = f"token_id:{best[0]}"
            logprobs = {"tokens": [name], "token_logprobs": [top[name]], "top_logprobs": [top]}
            choices.append({"index": index, "text": "x", "logprobs": logprobs, "finish_reason": "length"})
            if "prompt_logprobs" in body:
                choices[-1]["prompt_logprobs"] = [None, *(self.ranked(prompt, t) for t in range(1, len(prompt)))]
        return {"choices": choices[::-1]}  # in whatever order

    def ranked(self, prompt: list[int], t: int) -> dict[str, dict[str, Any]]:
        values = log_softmax(logits_of(prompt[:t]))
        best = sorted(range(VOCABULARY), key=values.__getitem__, reverse=True)
        own = prompt[t]  # beyond the vocabulary where the rows are another tokenizer's
        shown = {i: i for i in best[:20]} | {own: own % VOCABULARY}
        return {str(i): {"logprob": values[k], "rank": best.index(k) + 1} for i, k in shown.items()}

    def prefilled(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, sampling = body["token_ids"], body["sampling_params"]
        first, rows = sampling["prompt_logprob_start"], sampling["prompt_logprob_token_ids"]
        assert len(rows) == len(ids) - 1 - first
        wrong = self.prefill == "wrong"
        scores = [[log_softmax(logits_of(ids[: first + i + 1 + wrong]))[k] for k in row] for i, row in enumerate(rows)]
        data = io.BytesIO()
        np.save(data, np.array(scores, dtype=np.float32))
        return {"prompt_token_id_logprobs": base64.b64encode(data.getvalue()).decode()}


def exact(prompt: list[int], response: list[int]) -> np.ndarray:
    steps = [log_softmax(logits_of(prompt + response[:t])) for t in range(len(response))]
    return np.exp([[step[i] for i in SPEC.ids] for step in steps]).reshape(-1, 2)


def connect(*servers: Upstream, **options: Any) -> Upstreams:
    return Upstreams([server.url for server in servers], SPEC, frozenset({EOS}), **{"retries": 1} | options)


def scored(scorer: Upstreams, pairs: Any = PAIRS, batch_size: int = 3) -> list[np.ndarray]:
    return list(scorer.score(pairs, batch_size=batch_size))


def assert_exact(found: list[np.ndarray], pairs: Any = PAIRS) -> None:
    assert len(found) == len(pairs)
    for probs, pair in zip(found, pairs, strict=True):
        assert probs.dtype == np.float32 and np.allclose(probs, exact(*pair), rtol=1e-5, atol=1e-9)
