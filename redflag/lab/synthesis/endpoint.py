"""Asks a server that speaks `POST /chat/completions`: many questions at once, at a pace, with patience."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from redflag.backends.outbound import proxy_for
from redflag.errors import RedflagError
from redflag.judges.chat_fields import refused_field, request_fields, without
from redflag.lab.synthesis.pace import Pace
from redflag.lab.synthesis.questions import Question, Reply

if TYPE_CHECKING:
    import aiohttp

_LARGEST = 8 << 20  # bytes of a reply
_LONGEST = 60.0  # seconds between two tries
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


class Endpoint:
    """A model behind an OpenAI-compatible server.

    A server that cannot be reached, is late, is busy (429, with `Retry-After`) or fails (5xx) is asked again after
    pauses that double. One that will not take a question (400, 413, 422) has refused it, which is an answer. One that
    does not know us or the model (401, 403, 404), or stays lost, ends everything: what was answered is kept. A model
    that refuses `max_tokens` or a temperature is asked without, once (`redflag.judges.chat_fields`).

    Answers that begin in the question (a last assistant message) are continued by `continue_final_message`, which vLLM
    and SGLang understand; others ignore it and begin anew.

    Attributes:
        url: The chat route.
        model: The model's name there.
        identity: The same, and the further fields of requests, where there are any: they may change the answers.
        requests: Requests that were sent, repeated ones too.
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
        backoff: float = 0.5,
        options: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Checks the settings; asks nothing yet.

        Args:
            url: Base address, such as `http://host:8000/v1`, or that of the chat route itself.
            model: The model's name there.
            api_key: Sent as bearer token. Redirects are not followed, so that it goes nowhere else.
            concurrency: Most requests at a time.
            pace: Most requests per minute; None: no limit.
            timeout: Seconds for one request.
            retries: Further tries of a question.
            backoff: Seconds before the first of them.
            options: Further fields of every request, or others in place of those here; None leaves one out.
            headers: Sent with every request.

        Raises:
            RedflagError: A setting cannot be used, or aiohttp is not installed.
        """
        try:
            import aiohttp  # noqa: F401
        except ImportError:
            raise RedflagError(
                "aiohttp is not installed, without which no server can be asked: `pip install redflag-llm[serve]`"
            ) from None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RedflagError(f"the server's address is {url!r}, which is none: give http://host:port/v1")
        if not model:
            raise RedflagError("the model has no name, so the server cannot tell which one to ask: name it")
        if concurrency < 1 or retries < 0 or not (math.isfinite(timeout) and timeout > 0 and backoff >= 0):
            raise RedflagError(
                f"concurrency is {concurrency}, retries {retries} and timeout {timeout}, so nothing could be asked: "
                "give at least 1 request at a time, retries from 0 and seconds above 0"
            )
        route = parts.path.rstrip("/")
        route += "" if route.endswith("/chat/completions") else "/chat/completions"
        self.url = parts._replace(path=route).geturl()
        self.model = model
        self.identity = f"{model} {json.dumps(dict(options), sort_keys=True)}" if options else model
        self.requests = 0
        self._headers = ({"Authorization": f"Bearer {api_key}"} if api_key else {}) | dict(headers or {})
        self._proxy = proxy_for(self.url)
        self._refused: frozenset[str] = frozenset()
        self._concurrency = concurrency
        self._pace = pace or Pace()
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff
        self._options = dict(options or {})

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        """Asks; see `redflag.lab.synthesis.questions.Model.ask`."""
        asyncio.run(self._all(questions, keep))

    async def _all(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        import aiohttp

        waiting = iter(enumerate(questions))
        limits = aiohttp.ClientTimeout(total=self._timeout)
        async with aiohttp.ClientSession(headers=self._headers, timeout=limits, proxy=self._proxy) as session:

            async def work() -> None:
                for index, question in waiting:
                    keep(index, await self._one(session, question))

            workers = [asyncio.create_task(work()) for _ in range(min(self._concurrency, len(questions)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _one(self, session: aiohttp.ClientSession, question: Question) -> Reply:
        tries = 0
        refused = self._refused
        while True:
            await self._pace.wait()
            self.requests += 1
            body = without(refused, self._body(question))
            status, content, pause = await self._post(session, body)
            if status == 200:
                self._refused |= refused
                return self._read(content)
            if (field := refused_field(status, content, body)) is not None:
                refused |= {field}
                continue
            why = f"answered {status}: {content[:200]}" if status else f"is lost: {content[:200]}"
            if status in (400, 413, 422):
                return Reply("", "refused")
            if not (status in (0, 408, 429) or status >= 500):
                raise RedflagError(f"{self.url} {why}, so nothing can be asked there: mend the address, name or key")
            if tries == self._retries:
                raise RedflagError(
                    f"{self.url} {why}, {tries + 1} times for one question; every answer so far is kept: give the "
                    "command again when the server is well"
                )
            wait = min(self._backoff * 2**tries * (1 + random.random()), _LONGEST)
            if pause is not None:
                self._pace.hold(min(pause, _LONGEST))
            tries += 1
            await self._pace.sleep(wait)

    def _body(self, question: Question) -> dict[str, Any]:
        own = {
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
            "seed": question.seed,
            "stream": False,
        }
        if question.messages[-1]["role"] == "assistant":
            own |= {"continue_final_message": True, "add_generation_prompt": False}
        messages = [dict(message) for message in question.messages]
        return {"model": self.model, "messages": messages, **request_fields(own, self._options)}

    async def _post(self, session: aiohttp.ClientSession, body: Mapping[str, Any]) -> tuple[int, str, float | None]:
        """Status (0: no answer came), content, and the seconds that the server wants to be left alone."""
        import aiohttp

        try:
            async with session.post(self.url, json=body, allow_redirects=False) as response:
                content = b""
                while len(content) <= _LARGEST and (more := await response.content.read(1 << 16)):
                    content += more
                return response.status, content.decode(errors="replace"), _seconds(response.headers.get("Retry-After"))
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return 0, f"{type(error).__name__} {error}".strip(), None

    def _read(self, content: str) -> Reply:
        try:
            reply = json.loads(content)
            choice = reply["choices"][0]
            said = choice["message"]["content"] or ""
            usage = reply.get("usage") or {}
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
            text = _THOUGHT.sub("", said, count=1) if said.lstrip().startswith("<think>") else said
            text = text.encode("utf-8", "replace").decode()
            return Reply(text, finish, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
            raise RedflagError(
                f"{self.url} replied with no chat completion ({content[:80]!r}), so it is no such server: mend the "
                "address"
            ) from None


def _seconds(header: str | None) -> float | None:
    try:
        seconds = float(header or "")
    except ValueError:
        return None  # a date, or nothing
    return seconds if math.isfinite(seconds) and seconds > 0 else None
