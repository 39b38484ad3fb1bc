"""Earlier answers measured by a server, whichever way it offers; refused in words where it offers none."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scoring_upstream import SPEC, Scoring, exact, short_pauses
from upstream import EOS

from redflag.backends import Sampling
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_score import RememberingBackend
from redflag.errors import RedflagError

__all__ = ["short_pauses"]

PROMPT = [20, 30, *range(31, 45)]
SPANS = ((3, 6), (8, 12))
GREEDY = Sampling(max_new_tokens=4, temperature=0.0)


def opened(server: Any, **options: Any) -> RememberingBackend:
    backend = RememberingBackend(server.url, SPEC.ids, frozenset({EOS}), retries=1, **options)
    backend.prepare()
    return backend


@pytest.mark.parametrize(("prefill", "requests"), [(True, 1), (False, 2)])
def test_the_first_step_carries_them_and_the_stream_is_the_same(prefill: bool, requests: int) -> None:
    with Scoring(prefill=prefill).serve() as server:
        backend = opened(server)
        before = server.whole
        steps = list(backend.stream(PROMPT, replace(GREEDY, earlier=SPANS)))
        assert server.whole - before == requests
        assert [step._replace(earlier=None) for step in steps] == list(backend.stream(PROMPT, GREEDY))
    assert steps[0].earlier is not None and all(step.earlier is None for step in steps[1:])
    for (start, end), measured in zip(SPANS, steps[0].earlier, strict=True):
        assert np.allclose(measured, exact(PROMPT[:start], PROMPT[start:end]), rtol=1e-5)


def test_on_an_event_loop_too() -> None:
    async def run(backend: RememberingBackend) -> Any:
        steps = backend.astream(PROMPT, replace(GREEDY, earlier=SPANS))
        first = await anext(steps)
        await steps.aclose()
        await backend.aclose()
        return first

    with Scoring(prefill=True).serve() as server:
        first = asyncio.run(run(opened(server)))
    assert [len(measured) for measured in first.earlier] == [3, 4]


def test_bounds_where_they_are_asked_for() -> None:
    with Scoring(knows_ids=False).serve() as server:
        with pytest.raises(RedflagError, match="upper_bound"):
            opened(server)
        (first, *_) = opened(server, upper_bound=True).stream(PROMPT, replace(GREEDY, earlier=SPANS))
    for (start, end), measured in zip(SPANS, first.earlier, strict=True):
        assert (np.array(measured) >= exact(PROMPT[:start], PROMPT[start:end]) - 1e-7).all()


def test_a_server_that_is_lost_meanwhile_is_an_error_before_the_first_step() -> None:
    with Scoring(prefill=True).serve() as server:
        backend = opened(server)
        server.faults = [502, 502]
        with pytest.raises(ConnectionError):
            next(backend.stream(PROMPT, replace(GREEDY, earlier=SPANS)))


def test_a_backend_that_was_not_asked_to_refuses() -> None:
    backend = RemoteBackend("http://127.0.0.1:1", SPEC.ids, frozenset({EOS}))
    with pytest.raises(RedflagError, match="memory"):
        next(backend.stream(PROMPT, replace(GREEDY, earlier=SPANS)))
