"""An OpenAI-compatible server that returns log-probabilities, such as a stock vLLM, as a backend.

Written for an event loop, where thousands of streams need no threads. `RemoteBackend.stream` runs the same code on a
loop of its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import weakref
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from redflag.backends import BusyError, Sampling, refuse_earlier, room_for
from redflag.backends.remote_chat import ChatReader, chat_body
from redflag.backends.remote_guided import guided
from redflag.backends.remote_link import Link, SyncSteps, aiohttp
from redflag.backends.remote_wire import MOST_IDS, RefusalError, StreamReader, reason_of, request_body
from redflag.errors import RedflagError
from redflag.outbound import proxy_for
from redflag.trace import Step

_RETRIED = {429: BusyError, 502: ConnectionError, 503: BusyError, 504: ConnectionError}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries; tripled after each


class RemoteBackend:
    """A completion server as a backend: `astream` for event loops, `stream` for everything else.

    One stream is one request; the server measures the flags and bans them. Whether it was started with the right
    options is unknown until `redflag.backends.remote_handshake` has checked; run that before the first user's request.

    Attributes:
        url: Without `/v1`.
        flag_ids: The K flag ids; `eos_ids`: ids that end a response.
        model: The served model's name; None before the first request, if none was given.
        context_length: Maximum number of tokens of prompt and response together; None before the first request, and if
            the server does not report it.
        upper_bound: Whether the probability of a flag that is not among the server's 20 most likely tokens is replaced
            by the twentieth's, which it cannot exceed.

    Example:
        ```python
        backend = RemoteBackend("http://127.0.0.1:8000", spec.ids, eos_ids)
        handshake(backend)
        for step in backend.stream(prompt_ids, Sampling(temperature=0.0)):
            print(step.token_id, step.flag_probs)
        ```
    """

    logprob_mode = "raw"

    def __init__(
        self,
        url: str,
        spec_ids: Sequence[int],
        eos_ids: Iterable[int],
        *,
        model: str | None = None,
        api_key: str | None = None,
        upper_bound: bool = False,
        connect_timeout: float = 5.0,
        step_timeout: float = 60.0,
        retries: int = 2,
        vocab_size: int | None = None,
        context_length: int | None = None,
        headers: Mapping[str, str] | None = None,
        route: Literal["completions", "chat"] = "completions",
    ) -> None:
        """Makes no request yet.

        Args:
            url: With or without `/v1`.
            spec_ids: The K flag ids, in the order of `FlagSpec`.
            model: None takes the server's first one.
            api_key: Sent as a bearer token.
            upper_bound: For servers without `logprob_token_ids`: use the 20 most likely tokens instead.
            connect_timeout: Seconds for a connection to be made.
            step_timeout: Seconds without a step, including the first, after which a stream fails.
            retries: Further tries if the server cannot be reached or is busy; only before the first step.
            vocab_size: Number of ids of the model; a token beyond them is a fault. None = no check.
            context_length: None asks the server.
            headers: Sent with every request, for example for a gateway in front of the server.
            route: `chat` lets the server render conversations if `Sampling.chat` is given, to the same ids.

        Raises:
            RedflagError: The address is invalid, or there are no flags or more than a request can measure.
        """
        if not url.startswith(("http://", "https://")):
            raise RedflagError(
                f"the server's address must begin with http:// or https:// (got {url!r}). Write http://HOST:PORT."
            )
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.model = model
        self.upper_bound = upper_bound
        self.route = route
        if route == "chat" and upper_bound:
            raise RedflagError("upper_bound must not be given with the route chat, which needs logprob_token_ids.")
        self.context_length = context_length
        self.flag_ids = tuple(spec_ids)
        self.eos_ids = frozenset(eos_ids) - frozenset(spec_ids)
        self._vocab_size = vocab_size
        self._check_ids(self.flag_ids, "flag")
        self._connect_timeout, self._step_timeout, self._retries = connect_timeout, step_timeout, retries
        self._headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._headers |= headers or {}
        self._proxy = proxy_for(self.url)
        self._asked = model is not None and context_length is not None
        self._links: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Link] = weakref.WeakKeyDictionary()

    @property
    def most_logprobs(self) -> int | None:
        """0: besides the chosen token the server names either the flags or the likeliest tokens. None with bounds."""
        return None if self.upper_bound else 0

    def stream(self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()) -> SyncSteps:
        """Continues a prompt; see `redflag.backends.Backend.stream`. Not for a thread in which an event loop runs.

        Raises:
            RedflagError: As every backend; at the first step also if the server refuses the request, with its message.
            BusyError: The server was busy at every try.
            ConnectionError: The server cannot be reached, is lost, or sends a response that cannot be judged.
            TimeoutError: No step came for `step_timeout` seconds.
        """
        self._check(token_ids, sampling, watch)
        return SyncSteps(self._new_link, lambda link: self._steps(token_ids, sampling, watch, link))

    def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncGenerator[Step, None]:
        """Continues a prompt on the running event loop. Close it with `aclose`, which does not wait."""
        self._check(token_ids, sampling, watch)
        return self._steps(token_ids, sampling, watch, None)

    async def aclose(self) -> None:
        """Closes the connections of the running event loop; streams still open on it fail."""
        link = self._links.pop(asyncio.get_running_loop(), None)
        if link is not None:
            await link.close()

    def _check(self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int]) -> None:
        if watch:
            self._check_ids(watch, "watched")
        self._room(token_ids, sampling)

    def _check_ids(self, ids: Sequence[int], kind: str) -> None:
        if not 1 <= len(ids) <= MOST_IDS:
            raise RedflagError(f"the number of {kind} ids must be at least 1 and at most {MOST_IDS} (got {len(ids)}).")
        outside = [i for i in ids if i < 0 or (self._vocab_size is not None and i >= self._vocab_size)]
        if outside:
            raise RedflagError(f"{kind} ids must be at least 0 and below {self._vocab_size or 'V'} (got {outside[0]}).")

    def _steps(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int], link: Link | None
    ) -> AsyncGenerator[Step, None]:
        refuse_earlier(sampling)
        measured = watch or self.flag_ids
        if sampling.grammar is not None:
            return guided(self, token_ids, sampling, measured=measured, banned=self.flag_ids, link=link)
        return self.answer(token_ids, sampling, measured=measured, banned=self.flag_ids, link=link)

    async def answer(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        measured: Sequence[int],
        banned: Collection[int],
        allowed: Sequence[int] = (),
        link: Link | None = None,
    ) -> AsyncGenerator[Step, None]:
        """One request, for any measured and banned ids; `stream` and `astream` use it.

        Args:
            measured: Ids that are measured; `banned`: ids that are never chosen.
            allowed: The only ids that may be chosen; empty allows all.
            link: The connections to use; None = those of the running event loop.
        """
        loop = asyncio.get_running_loop()
        link = link or self.link()
        prompt = [int(token_id) for token_id in token_ids]
        chat = sampling.chat if self.route == "chat" else None
        pause = _FIRST_PAUSE
        # Each try has a reader of its own. A try after the first step would repeat steps that were yielded already, so
        # it fails instead.
        for tries_left in range(self._retries, -1, -1):
            response, begun = None, False
            reader = (StreamReader if chat is None else ChatReader)(
                prompt,
                measured=measured,
                banned=banned,
                eos_ids=self.eos_ids,
                upper_bound=self.upper_bound,
                vocab_size=self._vocab_size,
                logprobs=sampling.logprobs is not None,
            )
            try:
                if not self._asked:
                    await self.identify(link)
                body = request_body(
                    prompt,
                    sampling,
                    self._room(prompt, sampling),
                    model=self.model or "",
                    measured=measured,
                    banned=banned,
                    allowed=allowed,
                    eos_ids=self.eos_ids,
                    upper_bound=self.upper_bound,
                )
                if chat is None:
                    response = await self._open(link, "/v1/completions", body)
                else:
                    response = await self._open(link, "/v1/chat/completions", chat_body(body, chat))
                waiting_since = loop.time()
                while reader.finish is None:
                    data = await response.content.readany()
                    if not data:
                        raise _Failure("it ended the stream without a finish_reason")
                    steps = reader.feed(data)
                    for step in steps:
                        begun = True
                        yield step
                    # Empty events keep the connection alive without any step, so the socket's time-out is not enough.
                    if steps:
                        waiting_since = loop.time()
                    elif loop.time() - waiting_since > self._step_timeout:
                        raise asyncio.TimeoutError
                return
            except (_Failure, aiohttp.ClientError, asyncio.TimeoutError) as error:
                pause = self._next_pause(error, pause, "step", last=begun or not tries_left)
            finally:
                # Also when the consumer closes the generator: leaving an unfinished response stops the engine.
                if response is not None:
                    link.leave(response, over=reader.finish in ("stop", "length"))
            await _sleep(pause)
            pause *= 3

    async def ask(self, path: str, body: dict[str, Any]) -> Any:
        """One request that is not streamed; retried like a stream.

        Args:
            body: The request without `model`, which is added.

        Returns:
            The answer's JSON; None if it is not JSON.

        Raises:
            RedflagError: The server refuses the request; with its message.
            BusyError: The server was busy at every try.
            ConnectionError: The server cannot be reached or is lost.
            TimeoutError: No answer came for `step_timeout` seconds.
        """
        link = self.link()
        pause, tries_left = _FIRST_PAUSE, self._retries
        while True:
            try:
                if not self._asked:
                    await self.identify(link)
                request = {"model": self.model, **body}
                async with link.session.post(f"{self.url}{path}", json=request, allow_redirects=False) as response:
                    await self._expect_ok(response)
                    return _json(await response.read())
            except (_Failure, aiohttp.ClientError, asyncio.TimeoutError) as error:
                pause = self._next_pause(error, pause, "answer", last=not tries_left)
            await _sleep(pause)
            pause, tries_left = pause * 3, tries_left - 1

    def _next_pause(self, error: Exception, pause: float, awaited: str, *, last: bool) -> float:
        """Seconds until the next try: `pause`, or what the server asks for; raises if this was the last try."""
        # A server that accepted the request and is silent is not asked again: it may still be working on it.
        if isinstance(error, asyncio.TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
            raise TimeoutError(f"the server {self.url} gave no {awaited} for {self._step_timeout:g} s") from error
        failure = error if isinstance(error, _Failure) else _Failure(str(error) or type(error).__name__)
        if last:
            raise failure.kind(f"the server {self.url} failed: {failure}") from error
        return pause if failure.pause is None else failure.pause

    def link(self) -> Link:
        """The connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._links:
            self._links[loop] = self._new_link()
        return self._links[loop]

    async def identify(self, link: Link) -> list[str]:
        """Asks the server for its models; sets `model` and `context_length` if they are unknown.

        Returns:
            The names of the models; empty if the server does not list them.

        Raises:
            RedflagError: The server refuses, or names no model and none was given.
        """
        async with link.session.get(f"{self.url}/v1/models", allow_redirects=False) as response:
            if response.status not in (404, 405):
                await self._expect_ok(response)
            listed = _json(await response.content.read(1 << 20)) if response.status == 200 else None
        cards = listed.get("data") if isinstance(listed, dict) else None
        models = {
            card["id"]: card for card in cards or [] if isinstance(card, dict) and isinstance(card.get("id"), str)
        }
        if self.model is None:
            if not models:
                raise RedflagError(
                    f"model must be given: the server {self.url} lists no models at /v1/models, and a request must "
                    "name one."
                )
            self.model = next(iter(models))
        length = models.get(self.model, {}).get("max_model_len")
        if self.context_length is None and type(length) is int and length > 0:
            self.context_length = length
        self._asked = True
        return list(models)

    def _room(self, prompt: Sequence[int], sampling: Sampling) -> int:
        return room_for(len(prompt), sampling, self.context_length, "server")

    async def _open(self, link: Link, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        response = await link.session.post(self.url + path, json=body, allow_redirects=False)
        try:
            await self._expect_ok(response)
        except BaseException:
            response.close()
            raise
        return response

    async def _expect_ok(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 200:
            return
        body = await response.content.read(1 << 16)
        reason = reason_of(_json(body) or body.decode(errors="replace"))
        message = f"it responded with {response.status}: {reason}"
        if response.status in _RETRIED:
            raise _Failure(message, _RETRIED[response.status], _seconds(response.headers.get("Retry-After")))
        if 400 <= response.status < 500 and response.status != 408:
            raise RefusalError(response.status, reason)
        raise ConnectionError(f"the server {self.url} failed: {message}")

    def _new_link(self) -> Link:
        return Link(
            headers=self._headers,
            connect_timeout=self._connect_timeout,
            step_timeout=self._step_timeout,
            proxy=self._proxy,
        )


class _Failure(ConnectionError):
    """A failure that is worth another try; `kind` is raised after the last one. `pause` is the server's, in seconds."""

    def __init__(self, what: str, kind: type[Exception] = ConnectionError, pause: float | None = None) -> None:
        super().__init__(what)
        self.kind, self.pause = kind, pause


async def _sleep(pause: float) -> None:
    # Not quite the same for all clients of a server that was busy, which would come back together.
    await asyncio.sleep(min(pause, _LONGEST_PAUSE) * random.uniform(0.75, 1.25))


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() else None
