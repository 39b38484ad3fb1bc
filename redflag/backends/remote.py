"""Any OpenAI-compatible server that returns log-probabilities as a backend; first of all a stock vLLM.

Written for an event loop, where thousands of streams cost no thread each. `RemoteBackend.stream` runs the very same
code on a loop of its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import weakref
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from redflag.backends import BusyError, ContextLengthError, Sampling
from redflag.backends.remote_chat import ChatReader, chat_body
from redflag.backends.remote_guided import guided
from redflag.backends.remote_link import Link, SyncSteps, aiohttp
from redflag.backends.remote_wire import MOST_IDS, RefusalError, StreamReader, reason_of, request_body
from redflag.errors import RedflagError
from redflag.outbound import proxy_for
from redflag.trace import Step

_RETRIED = {429: BusyError, 502: ConnectionError, 503: BusyError, 504: ConnectionError}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries; tripled from try to try


class RemoteBackend:
    """A completion server behind the seam: `astream` for event loops, `stream` for everything else.

    One stream is one request; the server measures the flags and bans them. What it was started with is not known until
    `redflag.backends.remote_handshake` has asked: let it, before the first user does.

    Attributes:
        url: Address of the server, without `/v1`.
        model: Name of the served model; the server's first one unless it was given.
        context_length: Most tokens of prompt and response together; None until the server was asked, and where it does
            not say.
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
        """Sets up; the server is not asked anything yet.

        Args:
            url: Address, with or without `/v1`.
            spec_ids: The K flag ids, in the order of `FlagSpec`.
            eos_ids: Ids that end a response.
            model: Name of the served model; None takes the server's first one.
            api_key: Sent as a bearer token.
            upper_bound: For servers that know no `logprob_token_ids`: take the 20 most likely tokens instead.
            connect_timeout: Seconds for a connection to be made.
            step_timeout: Seconds without a step, the first one included, after which a stream fails.
            retries: Further tries where the server cannot be reached or is busy; before the first step only.
            vocab_size: Number of ids of the model; a token beyond them is a fault. None does not look.
            context_length: Most tokens of prompt and response together; None asks the server.
            headers: Sent with every request, before all of a gateway in front of the server.
            route: Who renders conversations; `chat`: the server, wherever `Sampling.chat` is given, to the same ids.

        Raises:
            RedflagError: The address is none, or there are no flags or more than a request can measure.
        """
        if not url.startswith(("http://", "https://")):
            raise RedflagError(
                f"The server's address {url!r} names no protocol, so it is not known how to ask; write "
                "http://HOST:PORT."
            )
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.model = model
        self.upper_bound = upper_bound
        self.route = route
        if route == "chat" and upper_bound:
            raise RedflagError("upper_bound must not be given with the route chat, which needs logprob_token_ids.")
        self.context_length = context_length
        self._flag_ids = tuple(spec_ids)
        self._eos_ids = frozenset(eos_ids) - frozenset(spec_ids)
        self._vocab_size = vocab_size
        self._check_ids(self._flag_ids, "flag")
        self._connect_timeout, self._step_timeout, self._retries = connect_timeout, step_timeout, retries
        self._headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._headers |= headers or {}
        self._proxy = proxy_for(self.url)
        self._asked = model is not None and context_length is not None
        self._links: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Link] = weakref.WeakKeyDictionary()

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a response."""
        return self._eos_ids

    @property
    def most_logprobs(self) -> int | None:
        """0: beside the chosen token the server names the flags or the likeliest tokens, not both. None with bounds."""
        return None if self.upper_bound else 0

    @property
    def flag_ids(self) -> tuple[int, ...]:
        """The K flag ids."""
        return self._flag_ids

    def stream(self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()) -> SyncSteps:
        """Continues a prompt; see `redflag.backends.Backend.stream`. Not for a thread in which an event loop runs.

        Raises:
            RedflagError: As every backend; at the first step also where the server refuses the request, in its words.
            BusyError: The server was busy at every try.
            ConnectionError: The server cannot be reached, is lost, or sends what cannot be judged.
            TimeoutError: No step came for `step_timeout` seconds.
        """
        self._check(token_ids, watch)
        return SyncSteps(self._new_link, lambda link: self._steps(token_ids, sampling, watch, link))

    def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncGenerator[Step, None]:
        """Continues a prompt on the running event loop; as `stream`. Close with `aclose`, which waits for nothing."""
        self._check(token_ids, watch)
        return self._steps(token_ids, sampling, watch, None)

    async def aclose(self) -> None:
        """Closes the connections of the running event loop; streams that are still open there fail."""
        link = self._links.pop(asyncio.get_running_loop(), None)
        if link is not None:
            await link.close()

    def _check(self, token_ids: Sequence[int], watch: Sequence[int]) -> None:
        if not token_ids:
            raise RedflagError("The prompt holds no tokens, so there is nothing to continue; give at least one.")
        if watch:
            self._check_ids(watch, "watched")
        if self.context_length is not None and len(token_ids) >= self.context_length:
            raise ContextLengthError(len(token_ids), self.context_length, "server")

    def _check_ids(self, ids: Sequence[int], kind: str) -> None:
        if not 1 <= len(ids) <= MOST_IDS:
            raise RedflagError(
                f"There are {len(ids)} {kind} ids and a request can measure 1 to {MOST_IDS}; give as many as that."
            )
        outside = [i for i in ids if i < 0 or (self._vocab_size is not None and i >= self._vocab_size)]
        if outside:
            raise RedflagError(
                f"The {kind} id {outside[0]} is not among the model's {self._vocab_size} ids, so its probability "
                "cannot be measured; name ids of the model that is served."
            )

    def _steps(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int], link: Link | None
    ) -> AsyncGenerator[Step, None]:
        measured = watch or self._flag_ids
        if sampling.grammar is not None:
            return guided(self, token_ids, sampling, measured=measured, banned=self._flag_ids, link=link)
        return self.answer(token_ids, sampling, measured=measured, banned=self._flag_ids, link=link)

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
        """One request: what `stream` and `astream` are made of, for any measured and banned ids.

        Args:
            token_ids: The prompt.
            sampling: How tokens are chosen.
            measured: Ids that are measured.
            banned: Ids that are not chosen.
            allowed: The only ids that are chosen; empty for all.
            link: The connections to use; those of the running event loop if None.
        """
        loop = asyncio.get_running_loop()
        link = link or self.link()
        prompt = [int(token_id) for token_id in token_ids]
        chat = sampling.chat if self.route == "chat" else None
        pause = _FIRST_PAUSE
        for tries_left in range(self._retries, -1, -1):
            response, begun = None, False
            reader = (StreamReader if chat is None else ChatReader)(
                prompt,
                measured=measured,
                banned=banned,
                eos_ids=self._eos_ids,
                upper_bound=self.upper_bound,
                vocab_size=self._vocab_size,
                logprobs=sampling.logprobs is not None,
            )
            try:
                if not self._asked:
                    await self.identify(link)
                    self._check(prompt, ())
                body = request_body(
                    prompt,
                    sampling,
                    self._room(prompt, sampling),
                    model=self.model or "",
                    measured=measured,
                    banned=banned,
                    allowed=allowed,
                    eos_ids=self._eos_ids,
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
                        raise _Failure("it ended the stream without saying that the response is over")
                    steps = reader.feed(data)
                    for step in steps:
                        begun = True
                        yield step
                    # Empty events keep a connection alive and are no answer, so the socket's time-out is not enough.
                    if steps:
                        waiting_since = loop.time()
                    elif loop.time() - waiting_since > self._step_timeout:
                        raise asyncio.TimeoutError
                return
            except (_Failure, aiohttp.ClientError, asyncio.TimeoutError) as error:
                if isinstance(error, asyncio.TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                    raise TimeoutError(f"the server {self.url} gave no step for {self._step_timeout:g} s") from error
                failure = error if isinstance(error, _Failure) else _Failure(str(error) or type(error).__name__)
                if begun or not tries_left:
                    raise failure.kind(f"the server {self.url} failed: {failure}") from error
                pause = pause if failure.pause is None else failure.pause
            finally:
                if response is not None:
                    link.leave(response, over=reader.finish in ("stop", "length"))
            await asyncio.sleep(min(pause, _LONGEST_PAUSE) * random.uniform(0.75, 1.25))
            pause *= 3

    async def ask(self, path: str, body: dict[str, Any]) -> Any:
        """One request whose answer comes whole; tried again like a stream.

        Args:
            path: Where, such as `/v1/completions`.
            body: What, without `model`, which is added.

        Returns:
            The answer's JSON; None where it is none.

        Raises:
            RedflagError: The server refuses the request, in its words.
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
                if isinstance(error, asyncio.TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                    raise TimeoutError(f"the server {self.url} gave no answer for {self._step_timeout:g} s") from error
                failure = error if isinstance(error, _Failure) else _Failure(str(error) or type(error).__name__)
                if not tries_left:
                    raise failure.kind(f"the server {self.url} failed: {failure}") from error
                pause = pause if failure.pause is None else failure.pause
            await asyncio.sleep(min(pause, _LONGEST_PAUSE) * random.uniform(0.75, 1.25))
            pause, tries_left = pause * 3, tries_left - 1

    def link(self) -> Link:
        """The connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._links:
            self._links[loop] = self._new_link()
        return self._links[loop]

    async def identify(self, link: Link) -> list[str]:
        """Asks the server for its models; sets `model` and `context_length` where they are not known.

        Returns:
            The names of the models; empty where the server does not say.

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
                    f"The server {self.url} does not say at /v1/models what it serves, and a request must name the "
                    "model; name it."
                )
            self.model = next(iter(models))
        length = models.get(self.model, {}).get("max_model_len")
        if self.context_length is None and type(length) is int and length > 0:
            self.context_length = length
        self._asked = True
        return list(models)

    def _room(self, prompt: Sequence[int], sampling: Sampling) -> int:
        room = sampling.max_new_tokens
        return room if self.context_length is None else min(room, self.context_length - len(prompt))

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
        said = f"it answered {response.status}: {reason}"
        if response.status in _RETRIED:
            raise _Failure(said, _RETRIED[response.status], _seconds(response.headers.get("Retry-After")))
        if 400 <= response.status < 500 and response.status != 408:
            raise RefusalError(response.status, reason)
        raise ConnectionError(f"the server {self.url} failed: {said}")

    def _new_link(self) -> Link:
        return Link(
            headers=self._headers,
            connect_timeout=self._connect_timeout,
            step_timeout=self._step_timeout,
            proxy=self._proxy,
        )


class _Failure(ConnectionError):
    """What another try may mend. `kind` is raised if none is left; `pause` is in seconds, None if not asked for."""

    def __init__(self, what: str, kind: type[Exception] = ConnectionError, pause: float | None = None) -> None:
        super().__init__(what)
        self.kind, self.pause = kind, pause


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() else None
