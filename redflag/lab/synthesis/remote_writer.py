"""A writer behind `POST /chat/completions`: concurrent requests, rate limit and retries."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from redflag.chat import ChatClient, ChatError
from redflag.errors import RedflagError
from redflag.lab.synthesis.questions import Question, Reply

if TYPE_CHECKING:
    import openai

_LONGEST = 60.0  # seconds of the longest pause, whatever the server's Retry-After
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


class Pace:
    """Spaces requests evenly, so that no minute holds more than its share. For one event loop."""

    def __init__(
        self,
        per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if per_minute is not None and not (math.isfinite(per_minute) and per_minute > 0):
            raise RedflagError(f"requests per minute must be above 0 (got {per_minute}).")
        self.interval = 60.0 / per_minute if per_minute else 0.0  # seconds from one request to the next
        self._clock, self._sleep = clock, sleep
        self._next = -math.inf

    async def wait(self) -> None:
        """Returns when the next request may be sent."""
        while (now := self._clock()) < self._next:
            await self._sleep(self._next - now)
        self._next = now + self.interval

    def hold(self, seconds: float) -> None:
        """Delays all requests, because the server reported that it is busy."""
        self._next = max(self._next, self._clock() + seconds)


class RemoteWriter:
    """A model behind an OpenAI-compatible server.

    A request is retried with growing pauses if the server cannot be reached, is late, is busy (429, with `Retry-After`)
    or fails (5xx). A refused question (400, 413, 422) counts as answered. If the server rejects the key or the model
    (401, 403, 404), or stays unreachable, the run ends with its answers cached. A model that refuses `max_tokens` or a
    temperature is asked once more without it (`redflag.chat`).

    A last assistant message is continued by `continue_final_message`, which vLLM and SGLang support; other servers
    ignore it and start a new answer.

    Attributes:
        identity: The model's name, with the further fields of requests, which may change the answers.
        requests: Number of requests sent, including retries.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        pace: Pace | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        options: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Checks the settings, most of which are those of `redflag.chat.ChatClient`; makes no request yet.

        Raises:
            RedflagError: A setting is invalid, or openai is not installed.
        """
        if concurrency < 1:
            raise RedflagError(f"concurrency must be at least 1 (got {concurrency}).")
        self._client = ChatClient(
            url,
            model,
            api_key=api_key,
            headers=headers,
            options=options,
            timeout=timeout,
            retries=retries,
            before=self._turn,
            busy=lambda seconds: self._pace.hold(min(seconds, _LONGEST)),
        )
        self.url = self._client.url
        self.model = model
        self.identity = f"{model} {json.dumps(dict(options), sort_keys=True)}" if options else model
        self.requests = 0
        self._concurrency = concurrency
        self._pace = pace or Pace()
        self._retries = retries

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        """Asks; see `redflag.lab.synthesis.questions.Writer.ask`."""
        asyncio.run(self._all(questions, keep))

    async def _all(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        waiting = iter(enumerate(questions))
        async with self._client.open() as connections:

            async def work() -> None:
                for index, question in waiting:
                    keep(index, await self._one(connections, question))

            workers = [asyncio.create_task(work()) for _ in range(min(self._concurrency, len(questions)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _turn(self) -> None:
        await self._pace.wait()
        self.requests += 1

    async def _one(self, connections: openai.AsyncOpenAI, question: Question) -> Reply:
        try:
            reply = await self._client.reply(connections, question.messages, _fields(question))
        except ChatError as error:
            if error.status in (400, 413, 422):
                return Reply("", "refused")
            if error.status in (0, 408, 409, 429) or error.status >= 500:
                raise RedflagError(
                    f"{error} (after {self._retries} retries for one question). All answers so far are cached. Repeat "
                    "the command when the server works again."
                ) from None
            raise RedflagError(f"{error}. Fix the address, name or key.") from None
        return self._read(reply)

    def _read(self, reply: Any) -> Reply:
        try:
            choice = reply["choices"][0]
            content = choice["message"]["content"] or ""
            usage = reply.get("usage") or {}
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
            text = _THOUGHT.sub("", content, count=1) if content.lstrip().startswith("<think>") else content
            text = text.encode("utf-8", "replace").decode()
            return Reply(text, finish, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise RedflagError(
                f"{self.url} must reply with a chat completion (got {str(reply)[:80]}). Fix the address."
            ) from None


def _fields(question: Question) -> dict[str, Any]:
    fields = {
        "temperature": question.temperature,
        "max_tokens": question.max_tokens,
        "seed": question.seed,
        "stream": False,
    }
    if question.messages[-1]["role"] == "assistant":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return fields
