"""Several completion servers as one scorer: rows go to idle servers, and away from failing ones."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from redflag.backends import BusyError
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_link import aiohttp
from redflag.backends.remote_score import Way, find_way, score_response
from redflag.errors import RedflagError
from redflag.flags import FlagSpec

Probs = npt.NDArray[np.float32]
Pair = tuple[Sequence[int], Sequence[int]]

_TRIES = 3  # for a row at which servers fail that are otherwise alive


class Upstreams:
    """Any number of OpenAI-compatible servers of one model; a `redflag.scoring.scorer.Scorer`.

    Close it, or use it in a `with` block. Not for a thread in which an event loop runs.

    Attributes:
        context_length: Maximum number of tokens of prompt and response together: the smallest of the servers', None if
            unknown.
        ways: How each server in use measures (`redflag.backends.remote_score`).
        upper_bound: Whether probabilities are upper bounds.

    Example:
        ```python
        with Upstreams(["http://gpu1:8000", "http://gpu2:8000"], spec, eos_ids) as scorer:
            scored = list(score(scorer, tokenizer, spec, rows))
        ```
    """

    def __init__(
        self,
        urls: Sequence[str],
        spec: FlagSpec,
        eos_ids: frozenset[int],
        *,
        model: str | None = None,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        upper_bound: bool = False,
        step_timeout: float = 600.0,
        retries: int = 3,
    ) -> None:
        """Connects, and finds out how each server measures.

        Args:
            urls: Addresses, with or without `/v1`.
            spec: The flags.
            eos_ids: Ids that end a response.
            model: Name of the served model; None takes each server's first one.
            api_key: Sent as a bearer token.
            headers: Sent with every request.
            upper_bound: For servers without `logprob_token_ids`: use the 20 most likely tokens instead.
            step_timeout: Seconds for one answer.
            retries: Further tries of a request if a server cannot be reached or is busy.

        Raises:
            RedflagError: No server can be used. If some can, the others are left out and named on stderr.
        """
        self.upper_bound = upper_bound
        backends = [
            RemoteBackend(
                url,
                spec.ids,
                eos_ids,
                model=model,
                api_key=api_key,
                headers=headers,
                upper_bound=upper_bound,
                step_timeout=step_timeout,
                retries=retries,
            )
            for url in urls
        ]
        if len({backend.url for backend in backends}) != len(urls) or not urls:
            raise RedflagError(f"upstream must name at least one server, and each only once (got {list(urls)}).")
        self._backends = backends
        self._last_words = ""
        self._loop = asyncio.new_event_loop()
        try:
            ways = self._loop.run_until_complete(_all(find_way(backend) for backend in backends))
            self._living: dict[RemoteBackend, Way] = {
                b: way for b, way in zip(backends, ways, strict=True) if not isinstance(way, BaseException)
            }
            faults = [error for error in ways if isinstance(error, BaseException)]
            for error in faults:
                if not isinstance(error, RedflagError | OSError | BusyError):
                    raise error
                if self._living:
                    print(f"left out: {error}", file=sys.stderr)
            if not self._living:
                raise faults[0] if isinstance(faults[0], RedflagError) else RedflagError(f"{faults[0]}; start it")
        except BaseException:
            self.close()
            raise
        lengths = [b.context_length for b in self._living if b.context_length is not None]
        self.context_length: int | None = min(lengths, default=None)

    @property
    def ways(self) -> dict[str, Way]:
        """Address of each server in use -> how it measures."""
        return {backend.url: way for backend, way in self._living.items()}

    def __enter__(self) -> Upstreams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections; may be called repeatedly."""
        if self._loop.is_closed():
            return
        self._loop.run_until_complete(_all(backend.aclose() for backend in self._backends))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def score(self, pairs: Sequence[Pair], *, batch_size: int) -> Iterator[Probs]:
        """Flag probabilities of given responses, in order, each as soon as all before it are done.

        Args:
            pairs: `(prompt_ids, response_ids)` of each.
            batch_size: Number of concurrent responses per server.

        Yields:
            T x K float32 per pair.

        Raises:
            RedflagError: A server refuses a row, servers that are alive fail at it repeatedly, or no server is left.
                Everything before that row has been yielded.
        """
        loop = self._loop
        results: list[asyncio.Future[Probs]] = [loop.create_future() for _ in pairs]
        # All servers take rows from one queue, (row, failures so far), the earliest first. Each has several workers,
        # which are its concurrent requests.
        queue: asyncio.PriorityQueue[tuple[int, int]] = asyncio.PriorityQueue()
        for index in range(len(pairs)):
            queue.put_nowait((index, 0))
        workers = [
            loop.create_task(self._work(backend, queue, pairs, results))
            for backend in self._living
            for _ in range(max(1, batch_size))
        ]
        # Workers end when their server is dropped. If all have ended, the next row will never be done.
        ended = loop.create_task(_end_of(workers))
        try:
            for index, result in enumerate(results):
                either: list[asyncio.Future[Any]] = [result, ended]
                loop.run_until_complete(asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED))
                if not result.done():
                    raise RedflagError(
                        f"No upstream server is left ({self._last_words}); {len(pairs) - index} rows are not scored. "
                        "Start a server and run the same command again."
                    )
                yield result.result()
        finally:
            for task in (*workers, ended):
                task.cancel()
            loop.run_until_complete(_all((*workers, ended)))
            for result in results:
                if not result.cancel() and not result.cancelled():
                    result.exception()  # retrieved, so that asyncio does not warn

    async def _work(
        self,
        backend: RemoteBackend,
        queue: asyncio.PriorityQueue[tuple[int, int]],
        pairs: Sequence[Pair],
        results: list[asyncio.Future[Probs]],
    ) -> None:
        """Takes rows, the earliest first, as long as its server is alive."""
        while True:
            index, failures = await queue.get()
            way = self._living.get(backend)
            # The server was dropped while this worker waited: the row goes back to the others.
            if way is None:
                queue.put_nowait((index, failures))
                return
            try:
                results[index].set_result(await score_response(backend, way, *pairs[index]))
            except (ConnectionError, TimeoutError, BusyError) as error:
                failures += await self._lives(backend, error)
                if failures < _TRIES:
                    queue.put_nowait((index, failures))
                else:
                    several = RedflagError(f"{error}, {failures} times. See the server's log.")
                    results[index].set_exception(several)
            except Exception as error:  # Unexpected ones too: a row without a result would be awaited for ever.
                results[index].set_exception(error)

    async def _lives(self, backend: RemoteBackend, error: Exception) -> bool:
        """Whether the server still answers. If so, the row or a passing failure is the cause; if not, it is dropped."""
        try:
            await backend.identify(backend.link())
            return True
        except (RedflagError, OSError, asyncio.TimeoutError, aiohttp.ClientError):
            pass
        if self._living.pop(backend, None) is not None:
            self._last_words = str(error)
            if self._living:
                print(f"{error}; its rows go to the {len(self._living)} remaining servers", file=sys.stderr)
        return False


async def _all(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Results or exceptions of all of them."""
    return await asyncio.gather(*work, return_exceptions=True)


async def _end_of(workers: Sequence[asyncio.Task[Any]]) -> None:
    await asyncio.wait(workers)
