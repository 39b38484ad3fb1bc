"""Many completion servers as one scorer: rows go to whoever is free, and away from who fails."""

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

_TRIES = 3  # for a row that living servers fail at


class Upstreams:
    """Any number of OpenAI-compatible servers of one model; a `redflag.scoring.scorer.Scorer`.

    Close it, or use it in a `with` block. Not for a thread in which an event loop runs.

    Attributes:
        context_length: Most tokens of prompt and response together; the least of the servers', None if none says.
        ways: Per server that is in use, how it measures (`redflag.backends.remote_score`).
        upper_bound: Whether probabilities are upper bounds.

    Example:
        ```python
        with Upstreams(["http://gpu1:8000", "http://gpu2:8000"], spec, eos_ids) as scorer:
            scored = list(score_rows(scorer, tokenizer, spec, rows))
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
            upper_bound: For servers that know no `logprob_token_ids`: take the 20 most likely tokens instead.
            step_timeout: Seconds for one answer.
            retries: Further tries of a request where a server cannot be reached or is busy.

        Raises:
            RedflagError: No server can be used. One that cannot, beside others that can, is named on stderr.
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
            raise RedflagError(f"upstream is {list(urls)}, where each server's address must stand once: mend the list")
        self._backends = backends
        self._last_words = ""
        self._loop = asyncio.new_event_loop()
        try:
            found = self._loop.run_until_complete(_all(find_way(backend) for backend in backends))
            self._living: dict[RemoteBackend, Way] = {
                b: way for b, way in zip(backends, found, strict=True) if not isinstance(way, BaseException)
            }
            faults = [error for error in found if isinstance(error, BaseException)]
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
        """Address of each server that is in use -> how it measures."""
        return {backend.url: way for backend, way in self._living.items()}

    def __enter__(self) -> Upstreams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections; any number of times."""
        if self._loop.is_closed():
            return
        self._loop.run_until_complete(_all(backend.aclose() for backend in self._backends))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def score(self, pairs: Sequence[Pair], *, batch_size: int) -> Iterator[Probs]:
        """Flag probabilities of given responses, in the order given, each as soon as all before it are there.

        Args:
            pairs: `(prompt_ids, response_ids)` of each.
            batch_size: Responses that each server works on at a time.

        Yields:
            T x K float32 per pair.

        Raises:
            RedflagError: A server refuses a row, living servers fail at it again and again, or no server is left.
                Everything before that row has been yielded.
        """
        loop = self._loop
        results: list[asyncio.Future[Probs]] = [loop.create_future() for _ in pairs]
        queue: asyncio.PriorityQueue[tuple[int, int]] = asyncio.PriorityQueue()
        for index in range(len(pairs)):
            queue.put_nowait((index, 0))
        workers = [
            loop.create_task(self._work(backend, queue, pairs, results))
            for backend in self._living
            for _ in range(max(1, batch_size))
        ]
        ended = loop.create_task(_end_of(workers))
        try:
            for index, result in enumerate(results):
                either: list[asyncio.Future[Any]] = [result, ended]
                loop.run_until_complete(asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED))
                if not result.done():
                    raise RedflagError(
                        f"no upstream server is left ({self._last_words}), so the {len(pairs) - index} rows from here "
                        "on are not scored: start one and give the same command again"
                    )
                yield result.result()
        finally:
            for task in (*workers, ended):
                task.cancel()
            loop.run_until_complete(_all((*workers, ended)))
            for result in results:
                if not result.cancel() and not result.cancelled():
                    result.exception()  # looked at, so that asyncio does not complain

    async def _work(
        self,
        backend: RemoteBackend,
        queue: asyncio.PriorityQueue[tuple[int, int]],
        pairs: Sequence[Pair],
        results: list[asyncio.Future[Probs]],
    ) -> None:
        """Takes rows, the earliest first, for as long as its server lives."""
        while True:
            index, failures = await queue.get()
            way = self._living.get(backend)
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
                    several = RedflagError(f"{error}, {failures} times: see what the server logs")
                    results[index].set_exception(several)
            except Exception as error:  # Also what nobody foresaw: a row without an end would be waited for for ever.
                results[index].set_exception(error)

    async def _lives(self, backend: RemoteBackend, error: Exception) -> bool:
        """Whether it still answers at all: then the row is at fault, or the moment was. If not, it is left out."""
        try:
            await backend.identify(backend.link())
            return True
        except (RedflagError, OSError, asyncio.TimeoutError, aiohttp.ClientError):
            pass
        if self._living.pop(backend, None) is not None:
            self._last_words = str(error)
            if self._living:
                print(f"{error}; its rows go to the {len(self._living)} that are left", file=sys.stderr)
        return False


async def _all(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """What all of them return or raise."""
    return await asyncio.gather(*work, return_exceptions=True)


async def _end_of(workers: Sequence[asyncio.Task[Any]]) -> None:
    await asyncio.wait(workers)
