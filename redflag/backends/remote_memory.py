"""A completion server that measures the earlier answers of a conversation too, before it continues it.

They are measured as given responses are (`redflag.backends.remote_score`), with a request of their own: one for all of
them where the server measures prompts, else one generated token for each position.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import cached_property

from redflag.backends import Sampling
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_link import Link
from redflag.backends.remote_score import ServedScores
from redflag.trace import Step

Measured = tuple[tuple[tuple[float, ...], ...], ...]


class RememberingBackend(RemoteBackend):
    """As `RemoteBackend`; the first step carries what `Sampling.earlier` asks for."""

    measures_earlier = True

    @cached_property
    def _scores(self) -> ServedScores:
        return ServedScores(self)

    def prepare(self) -> None:
        """Finds out how the server measures, without an event loop.

        Raises:
            RedflagError: It cannot; names the server option, version or address to fix.
        """

        async def alone() -> None:
            try:
                await self._scores.way()
            finally:
                await self.aclose()

        asyncio.run(alone())

    def _steps(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int], link: Link | None
    ) -> AsyncGenerator[Step, None]:
        steps = super()._steps(token_ids, replace(sampling, earlier=()), watch, link)
        return self._with_earlier(steps, list(token_ids), sampling.earlier, link) if sampling.earlier else steps

    async def _with_earlier(
        self,
        steps: AsyncGenerator[Step, None],
        prompt: list[int],
        spans: Sequence[tuple[int, int]],
        link: Link | None,
    ) -> AsyncGenerator[Step, None]:
        try:
            earlier: Measured | None = await self.measure(prompt, spans)
            async for step in steps:
                yield step if earlier is None else step._replace(earlier=earlier)
                earlier = None
        finally:
            await steps.aclose()
            if link is not None:  # A loop of this stream's own: `ask` has opened further connections on it.
                await self.aclose()

    async def measure(self, prompt: Sequence[int], spans: Sequence[tuple[int, int]]) -> Measured:
        """T x K probabilities of each span.

        Raises:
            RedflagError: As `redflag.backends.remote_score.score_response`, as are all others.
        """
        if await self._scores.way() == "steps":  # No position between the spans is paid for.
            parts = [await self._scores.score(prompt[:start], prompt[start:end]) for start, end in spans]
        else:
            first, last = spans[0][0], spans[-1][1]
            probs = await self._scores.score(prompt[:first], prompt[first:last])
            parts = [probs[start - first : end - first] for start, end in spans]
        return tuple(tuple(map(tuple, part.tolist())) for part in parts)
