"""A completion server in the test's process: an honest one in vLLM's dialect, its faulty relatives, a scripted one."""

from __future__ import annotations

import asyncio
import json
import math
import random
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

VOCABULARY = 60
FLAG, EOS = 5, 1


class Abort:
    """Cuts the connection."""


class Status(tuple):
    """`(code, body, headers)` in place of a stream."""


Item = bytes | float | type[Abort] | Status
"""What a script consists of: bytes to send, seconds to wait, a cut, a status."""


def logits_of(context: list[int]) -> list[float]:
    """Next-token logits of the model that is served: any numbers that depend on the whole context."""
    key = sum((index + 1) * token_id for index, token_id in enumerate(context))
    values = [3.0 * math.sin(1.7 * key + 2.3 * token_id * token_id) for token_id in range(VOCABULARY)]
    values[EOS] -= 1.0
    return values


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - total for z in logits]


def event(
    chosen: list[int],
    tops: list[dict[int, float | None]],
    finish: str | None = None,
    *,
    text: str = "x",
    **choice: Any,
) -> bytes:
    """One server-sent event in vLLM's shape."""
    names = [f"token_id:{token_id}" for token_id in chosen]
    logprobs = {
        "tokens": names,
        "top_logprobs": [{f"token_id:{token_id}": value for token_id, value in top.items()} for top in tops],
        "token_logprobs": [top.get(token_id) for token_id, top in zip(chosen, tops, strict=False)],
    }
    whole = {"index": 0, "text": text, "finish_reason": finish, "token_ids": chosen, "logprobs": logprobs, **choice}
    whole = {key: value for key, value in whole.items() if value is not ...}
    return b"data: " + json.dumps({"choices": [whole]}).encode() + b"\n\n"


PARTS = ("tokens", "token_logprobs", "top_logprobs")
DONE = b"data: [DONE]\n\n"


@dataclass
class Upstream:
    """The server's settings; each of them makes it wrong in one way.

    Attributes:
        script: What to send for the n-th request, in place of an answer: `(body, n) -> items`.
        mode: `raw`, `processed` (after ban and temperature), `temperature` (after temperature alone) or `logits`.
        knows_ids: Whether `logprob_token_ids` is heeded.
        heeds_bias: Whether `logit_bias` is heeded.
        names_ids: Whether `return_tokens_as_token_ids` and `return_token_ids` are heeded.
        per_chunk: Tokens per event.
        render: A request's body -> the prompt's ids, for `/v1/chat/completions`.
        hides_prompt: Whether `return_token_ids` is heeded for answers alone.
        most: `--max-logprobs`.
        models: Bodies of `/v1/models`; None answers 404.
        bodies: Every request, in order.
        open: Responses that are being written.
    """

    script: Callable[[dict[str, Any], int], Iterable[Item]] | None = None
    mode: str = "raw"
    knows_ids: bool = True
    heeds_bias: bool = True
    names_ids: bool = True
    per_chunk: int = 1
    render: Callable[[dict[str, Any]], list[int]] = lambda body: [
        int(i) for i in body["messages"][-1]["content"].split()
    ]
    hides_prompt: bool = False
    most: int = 20
    api_key: str | None = None
    models: list[dict[str, Any]] | None = field(default_factory=lambda: [{"id": "tiny", "max_model_len": 64}])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    open: int = 0
    url: str = ""

    def answer(self, body: dict[str, Any]) -> Iterator[Item]:
        if body["logprobs"] > self.most and not (self.knows_ids and "logprob_token_ids" in body):
            yield Status((400, {"error": {"message": "logprobs of 20, which is greater than max allowed: 5"}}, {}))
            return
        context = list(body["prompt"])
        draw = random.Random(body.get("seed"))
        pending: list[tuple[int, dict[int, float | None]]] = []
        for index in range(body["max_tokens"]):
            raw = logits_of(context)
            logits = list(raw)
            if self.heeds_bias:
                for token_id, bias in body.get("logit_bias", {}).items():
                    logits[int(token_id)] += bias
            if "allowed_token_ids" in body:
                allowed = set(body["allowed_token_ids"])
                logits = [z if i in allowed else -1e9 for i, z in enumerate(logits)]
            greedy = body["temperature"] == 0
            warmed = [z / (body["temperature"] or 1.0) for z in logits]
            token_id = max(range(VOCABULARY), key=logits.__getitem__)
            if not greedy:
                weights = [math.exp(value) for value in log_softmax(warmed)]
                token_id = draw.choices(range(VOCABULARY), weights)[0]
            seen = {
                "raw": log_softmax(raw),
                "processed": log_softmax(warmed),
                "temperature": log_softmax([z / (body["temperature"] or 1.0) for z in raw]),
                "logits": raw,
                "negative logits": [z - 40.0 for z in raw],
            }[self.mode]
            if self.knows_ids and "logprob_token_ids" in body:
                shown = [token_id, *body["logprob_token_ids"]]
            else:
                ranked = sorted(range(VOCABULARY), key=seen.__getitem__, reverse=True)
                shown = [token_id, *ranked[: min(body["logprobs"], self.most)]]
            pending.append((token_id, {i: seen[i] for i in shown}))
            context.append(token_id)
            finish = None
            if token_id in body["stop_token_ids"]:
                finish = "stop"
            elif index + 1 == body["max_tokens"]:
                finish = "length"
            if finish or len(pending) == self.per_chunk or index == 0:
                ids, tops = [i for i, _ in pending], [top for _, top in pending]
                extra: dict[str, Any] = {} if index else {"prompt_token_ids": body["prompt"]}
                sent = event(ids, tops, finish, **extra)
                if not self.names_ids:
                    sent = sent.replace(b"token_id:", b"word ").replace(b'"token_ids"', b'"other"')
                yield sent
                pending = []
            if finish:
                break
        yield DONE

    def answer_chat(self, body: dict[str, Any]) -> Iterator[Item]:
        """The same in the shape of a chat; the prompt's ids come first."""
        prompt = self.render(body)
        names = [] if self.hides_prompt else ["prompt_token_ids"]
        first = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        yield b"data: " + json.dumps(first | dict.fromkeys(names, prompt)).encode() + b"\n\n"
        for item in self.answer(body | {"prompt": prompt, "logprobs": len(body["logprob_token_ids"])}):
            if item is DONE or not isinstance(item, bytes):
                yield item
                continue
            (choice,) = json.loads(item[6:])["choices"]
            logprobs = choice["logprobs"]
            choice["logprobs"] = {
                "content": [
                    {
                        "token": name,
                        "logprob": logprob,
                        "top_logprobs": [dict(token=k, logprob=v) for k, v in top.items()],
                    }
                    for name, logprob, top in zip(*(logprobs[part] for part in PARTS), strict=True)
                ]
            }
            del choice["text"]
            choice.pop("prompt_token_ids", None)
            yield b"data: " + json.dumps({"choices": [choice | {"delta": {"content": "x"}}]}).encode() + b"\n\n"

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.connections.add(request.transport)
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = await request.json()
        self.bodies.append(body)
        answer = self.answer_chat if "messages" in body else self.answer
        items = answer(body) if self.script is None else self.script(body, len(self.bodies))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self.open += 1
        try:
            for item in items:
                if isinstance(item, Status):
                    code, answer, headers = item
                    return web.json_response(answer, status=code, headers=headers)
                if item is Abort:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if not response.prepared:
                    await response.prepare(request)
                if isinstance(item, bytes):
                    await response.write(item)
                else:
                    await asyncio.sleep(item)
            return response
        finally:
            self.open -= 1

    async def generate(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPNotFound

    async def list_models(self, request: web.Request) -> web.Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.models is None:
            raise web.HTTPNotFound
        return web.json_response({"object": "list", "data": self.models})

    @contextmanager
    def serve(self, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Upstream]:
        """Serves on a port (a free one, if 0), in a thread of its own."""
        loop = asyncio.new_event_loop()
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.completions)
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_post("/inference/v1/generate", self.generate)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0, access_log=None)

        async def start() -> None:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls)
            await site.start()
            self.url = f"http{'s' * (tls is not None)}://127.0.0.1:{runner.addresses[0][1]}"

        async def stop() -> None:
            await asyncio.sleep(0.02)  # a connection that is being accepted would be left over
            await runner.cleanup()
            await asyncio.sleep(0.02)  # transports close in the loop's next rounds

        loop.run_until_complete(start())
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
